"""Names that are not keys: older spellings that still work, and the answer to all others.

An older spelling is read as what it became, and a line says so. A name that is close to a key, or that a key has in
another project, is answered with that key.
"""

from collections.abc import Iterable, Mapping

from titan_fp8.config.keys import Key
from titan_fp8.runtime.suggest import nearest

_OLDER_SECTIONS = {"float8": "quantize.linear.float8", "mx": "quantize.linear.mx"}
_OLDER_KEYS = {"training.compile": "compile.enable"}
_OLDER_CONVERTERS = {"float8": "quantize.linear.float8", "mx": "quantize.linear.mx"}
CONVERTERS_KEY = "model.converters"

_FLOAT8 = "quantize.linear.float8"
_NAMES_ELSEWHERE = {
    f"{_FLOAT8}.enable_fsdp_fp8_all_gather": f"{_FLOAT8}.enable_fsdp_float8_all_gather",
    f"{_FLOAT8}.precompute_fp8_dynamic_scale_for_fsdp": f"{_FLOAT8}.precompute_float8_dynamic_scale_for_fsdp",
    f"{_FLOAT8}.enabled": CONVERTERS_KEY,
    f"{_FLOAT8}.enable": CONVERTERS_KEY,
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.interval_type": "checkpoint.interval",
    "training.batch_size": "training.local_batch_size",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
}
"""Names of NeMo AutoModel and of earlier torchtitan releases -> ours. They are suggested, not accepted."""

_SECTIONS_ELSEWHERE = {"fp8": _FLOAT8}


def current_path(path: str, sections: Iterable[str]) -> str:
    """The path that an older spelling became, or `path` itself. `sections` are the job's own, which come first."""
    head, _, rest = path.partition(".")
    if head in _OLDER_SECTIONS and head not in sections:
        path = f"{_OLDER_SECTIONS[head]}.{rest}" if rest else _OLDER_SECTIONS[head]
    return _OLDER_KEYS.get(path, path)


def current_converters(names: list[str]) -> tuple[list[str], list[str]]:
    """Converter names with older spellings replaced, and a line for each that was."""
    current = [_OLDER_CONVERTERS.get(name, name) if isinstance(name, str) else name for name in names]
    changed = [(name, now) for name, now in zip(names, current, strict=True) if name != now]
    return current, [f'{CONVERTERS_KEY}: "{name}" is read as "{now}"' for name, now in changed]


def unknown_key(path: str, keys: Mapping[str, Key], sections: Iterable[str]) -> str:
    """The message for a path that is no key: `no such key (did you mean steps?)`."""
    sections = list(sections)
    if path in sections:
        inner = [key.name for key in keys.values() if key.section == path]
        inner += [section.rpartition(".")[2] for section in sections if section.rpartition(".")[0] == path]
        return f"is a section, not a key; it holds {', '.join(inner)}"
    section, _, name = path.rpartition(".")
    if section and section not in sections:
        return unknown_section(section, sections)
    siblings = [key.name for key in keys.values() if key.section == section]
    if path in _NAMES_ELSEWHERE:
        target = _NAMES_ELSEWHERE[path]
        return _no_such("key", target.rpartition(".")[2] if target.rpartition(".")[0] == section else target)
    inner = [other for other in sections if section and other.rpartition(".")[0] == section]
    if inner and not siblings:
        return unknown_section(path, inner)
    hits = nearest(name, siblings) or [key.path for key in keys.values() if key.name == name]
    if not hits:
        # A key of another section, misspelt.
        by_name = {key.name: key.path for key in keys.values()}
        hits = [by_name[hit] for hit in nearest(name, by_name) if len(name) > 4]
    return _no_such("key", *hits[:2])


def unknown_section(section: str, sections: Iterable[str]) -> str:
    """The message for a section that does not exist: `no such section (did you mean training?)`."""
    sections = list(sections)
    if section in _SECTIONS_ELSEWHERE:
        return _no_such("section", _SECTIONS_ELSEWHERE[section])
    return _no_such("section", *nearest(section, sections))


def _no_such(kind: str, *hits: str) -> str:
    return f"no such {kind} (did you mean {' or '.join(hits)}?)" if hits else f"no such {kind}"
