"""The command line as a source: `--section.key value` in all its forms into a list of `Given`.

    --training.steps 20   --training.steps=20        a value; it may begin with one dash (-1)
    --compile.enable      --compile.enable=true      a flag that is on
    --compile.no_enable   --compile.enable=false     a flag that is off
    --model.converters a,b   "a, b"   '["a", "b"]'   a list; given again, its elements are added
    --model.converters=                              the empty list, whatever was given before

What follows a key and begins with two dashes is the next key, so the key before it stands alone and means true. A
single value that is given twice counts as given last.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from titan_fp8.config.errors import Violation
from titan_fp8.config.given import Given, Sources, clean_list
from titan_fp8.config.keys import Key
from titan_fp8.config.names import CONVERTERS_KEY, current_converters, current_path, unknown_key
from titan_fp8.config.text import show

_INTEGER = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|nan)", re.ASCII)
_TRUTH = {"true": True, "false": False}
_NO = "no_"
HELP = ("--help", "-h")


@dataclass(frozen=True)
class Option:
    """One option as it was typed.

    Attributes:
        typed: the option itself, `--training.steps`.
        value: what followed it, or None.
    """

    typed: str
    value: str | None

    @property
    def name(self) -> str:
        """The dotted path, with underscores where dashes were typed."""
        return self.typed[2:].replace("-", "_")


def split_options(argv: Sequence[str], sources: Sources) -> list[Option]:
    """The options of a command line with what follows each; anything else becomes a violation."""
    options: list[Option] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word in HELP:
            word = HELP[0]
        elif not word.startswith("--") or len(word) == 2:
            sources.violations.append(Violation("command line", _stray(word, options)))
            continue
        typed, equals, value = word.partition("=")
        if equals:
            options.append(Option(typed, value))
        elif position < len(argv) and not argv[position].startswith("--") and argv[position] not in HELP:
            options.append(Option(typed, argv[position]))
            position += 1
        else:
            options.append(Option(typed, None))
    return options


def help_topic(options: Sequence[Option]) -> str | None:
    """What help is asked for: a section or key, "" for everything, None for no help."""
    for option in options:
        if option.typed == HELP[0]:
            return (option.value or "").removeprefix("--")
    return None


def last_value(options: Sequence[Option], path: str) -> str | None:
    """The last value given for a key, without checks."""
    values = [option.value for option in options if option.name == path]
    return values[-1] if values else None


def enter_options(
    options: Sequence[Option], keys: Mapping[str, Key], sections: Mapping[str, Any], sources: Sources
) -> None:
    """Enter the options into `sources.cli`. Unknown names and values that cannot be read become violations."""
    for option in options:
        path = current_path(option.name, sections)
        off = None if path in keys else _flag_that_is_off(option.name, keys, sections)
        if off is not None:
            path = f"{off.section}.{_NO}{off.name}"
        if path != option.name:
            sources.notices.append(f"{option.typed} is read as --{path}")
        key = keys.get(path, off)
        if key is None:
            sources.violations.append(Violation(option.typed, unknown_key(path, keys, sections)))
        else:
            _enter(option, key, off is not None, sources)


def _flag_that_is_off(path: str, keys: Mapping[str, Key], sections: Mapping[str, Any]) -> Key | None:
    """The flag `compile.enable` for `compile.no_enable`, and for the older `training.no_compile`."""
    section, _, name = path.rpartition(".")
    key = keys.get(current_path(f"{section}.{name.removeprefix(_NO)}", sections))
    return key if name.startswith(_NO) and key is not None and key.is_flag else None


def _enter(option: Option, key: Key, is_off: bool, sources: Sources) -> None:
    value, problem = _read(option, key, is_off)
    if problem is not None:
        sources.violations.append(Violation(option.typed, problem))
        sources.rejected.add(key.path)
        return
    if key.path == CONVERTERS_KEY and isinstance(value, list):
        value, notices = current_converters(value)
        sources.notices += [f"{option.typed}: {notice.partition(': ')[2]}" for notice in notices]
    earlier = sources.cli.get(key.path)
    if isinstance(value, list) and value and earlier is not None and isinstance(earlier.value, list):
        value = earlier.value + value
    # A word that the key takes for a string is shown in quotes; one that failed to be a number is shown as typed.
    text = value if isinstance(value, str) and not key.takes_strings else show(value)
    sources.cli[key.path] = Given(key.path, value, option.typed, "cli", text)


def _read(option: Option, key: Key, is_off: bool) -> tuple[Any, str | None]:
    """The value of an option, and what is wrong with it, if anything. A word that is not of the key's type stays a
    string: the key's own check answers it."""
    if is_off and option.value is not None:
        return False, f"takes no value, not {show(option.value)}; write --{key.path}={option.value}"
    if is_off:
        return False, None
    if option.value is None:
        return True, None if key.is_flag else f"needs a value: {key.type_in_words}"
    if any(0xD800 <= ord(character) <= 0xDFFF for character in option.value):
        return option.value, "the value is not valid UTF-8"
    if key.list_item is not None:
        return _read_list(key, option.value)
    return _read_word(key, option.value), None


def _read_word(key: Key, word: str) -> Any:
    if word in key.choices:
        return word
    if key.is_optional and word == "None":
        return None
    if key.is_flag and word.lower() in _TRUTH:
        return _TRUTH[word.lower()]
    if int in key.members and _INTEGER.fullmatch(word) and len(word) < 1000:
        return int(word)
    if float in key.members and _NUMBER.fullmatch(word):
        return float(word)
    return word


def _read_list(key: Key, word: str) -> tuple[Any, str | None]:
    if key.is_optional and word == "None":
        return None, None
    stripped = word.strip()
    if stripped.startswith("["):
        try:
            items = tomllib.loads(f"list = {stripped}")["list"]
        except ValueError:
            return [], f"{show(word)} is no list; write a,b"
    elif stripped == "":
        items = []
    else:
        items = [part.strip() for part in stripped.split(",")]
        if "" in items:
            return [], f"{show(word)}: an element is empty; leave it out"
        items = [items] if get_origin(key.list_item) is list else items
    cleaned, problem = clean_list(key, items)
    return cleaned, None if problem is None else f"{show(word)}: {problem}"


def _stray(word: str, options: Sequence[Option]) -> str:
    if word.startswith("-") and not word.startswith("--"):
        return f"{show(word)}: an option begins with two dashes"
    if options and options[-1].value is not None:
        return (
            f"{show(word)}: not an option, and {options[-1].typed} before it has its value, {show(options[-1].value)}; "
            "separate the elements of a list with commas"
        )
    return f"{show(word)}: not an option; options are written as --section.key"
