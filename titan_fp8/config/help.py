"""`--help`: every key with its type, default, meaning and unit, read off the section classes."""

import textwrap
from collections.abc import Mapping

from titan_fp8.config.errors import ConfigErrors, Violation
from titan_fp8.config.keys import Key, all_keys, all_sections
from titan_fp8.config.names import unknown_key, unknown_section
from titan_fp8.config.section import Section
from titan_fp8.config.text import show

_WIDTH = 110
_INTRODUCTION = """\
Settings come from defaults < TOML file (--job.config_file) < command line.

  --section.key VALUE   --section.key=VALUE    a value
  --section.flag        --section.no_flag      true and false, also --section.flag=false
  --section.list a,b    --section.list=        a list (given again, elements are added), and the empty
                                               list, whatever is given before it

`--help SECTION` shows one section, for example `--help quantize.linear.float8`.
"""


def help_text(root: type[Section], topic: str) -> str:
    """Help on all keys (`topic` ""), on a section with all below it, or on one key.

    Raises:
        ConfigErrors: there is no such section or key.
    """
    keys, sections = all_keys(root), all_sections(root)
    chosen = {path: key for path, key in keys.items() if not topic or path == topic or path.startswith(f"{topic}.")}
    if not chosen:
        is_key_like = topic.rpartition(".")[0] in sections
        problem = unknown_key(topic, keys, sections) if is_key_like else unknown_section(topic, [*sections, *keys])
        raise ConfigErrors([Violation(f"--help {topic}", problem)])
    parts = [] if topic else [_INTRODUCTION]
    for path, section in sections.items():
        inner = {key: value for key, value in chosen.items() if value.section == path}
        if inner:
            parts.append(_section_help(path, section, inner))
    return "\n".join(parts).rstrip()


def type_and_range(key: Key) -> str:
    """Such as `integer >= 1`."""
    return f"{key.type_in_words} {key.bounds}".rstrip() if key.bounds else key.type_in_words


def remarks(key: Key) -> str:
    """What there is to say about a key besides its meaning, or ""."""
    if not key.is_supported:
        return "Not supported yet: leave it at its default."
    if key.unsupported_values:
        return f"Not supported yet: {', '.join(show(value) for value in key.unsupported_values)}."
    return ""


def _wrapped(text: str) -> str:
    indent = " " * 6
    return textwrap.fill(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _section_help(path: str, section: type[Section], keys: Mapping[str, Key]) -> str:
    summary = (section.__doc__ or "").strip().partition("\n")[0]
    lines = [f"[{path}]  {summary}"]
    for key in keys.values():
        unit = f", {key.unit}" if key.unit else ""
        lines.append(f"  --{key.path}  ({type_and_range(key)}{unit}; default {show(key.default)})")
        text = f"{key.meaning} {remarks(key)}".strip()
        lines.append(_wrapped(text))
    return "\n".join(lines) + "\n"
