"""Types and ranges: pydantic checks the values, and its findings are put into our words.

pydantic reports an error with the path into the data and one error for each alternative of a union. Here they are
gathered into one line a key: what was expected, or for a misspelt word the nearest allowed one.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from titan_fp8.config.errors import ConfigErrors, Violation
from titan_fp8.config.given import Given, Sources
from titan_fp8.config.keys import Key, all_sections
from titan_fp8.config.section import Section
from titan_fp8.config.text import show
from titan_fp8.runtime.suggest import did_you_mean

_RANGE_MESSAGES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "string_too_short": "must not be empty",
    "finite_number": "must be a finite number",
}


def nested(root: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat paths into nested dictionaries, with a dictionary for every section."""
    tree: dict[str, Any] = {}
    for section in all_sections(root):
        _descend(tree, section)
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        (_descend(tree, section) if section else tree)[name] = value
    return tree


def _descend(tree: dict[str, Any], section: str) -> dict[str, Any]:
    for part in section.split("."):
        tree = tree.setdefault(part, {})
    return tree


def check_values(root: type[Section], keys: Mapping[str, Key], givens: dict[str, Given], sources: Sources) -> None:
    """Take out of `givens` (one source's) every value of a wrong type or out of range, and note why."""
    try:
        root.model_validate(nested(root, {path: given.value for path, given in givens.items()}))
    except ValidationError as error:
        for path, found in _by_key(error, keys).items():
            if path in givens:
                sources.reject(givens.pop(path), _problem(keys[path], found))


def build(
    root: type[Section], keys: Mapping[str, Key], values: Mapping[str, Any], sources: Sources
) -> tuple[Section, set[str]]:
    """The job, and the keys that are missing in it because their values were refused.

    Values have passed `check_values`; what can still fail is a validator over a whole section, which is reported at the
    section. Its keys are then missing, and so are the rejected ones: reading one raises `AttributeError`.
    """
    missing = set(sources.rejected)
    try:
        job = root.model_validate(nested(root, values))
    except ValidationError as error:
        for path, found in _by_key(error, keys).items():
            sources.violations += [_section_violation(path, one, sources) for one in found]
            if not path:  # a validator over the whole job: nothing of it can be used
                raise ConfigErrors(sources.violations) from None
            missing |= {path} if path in keys else {inner for inner in keys if inner.startswith(f"{path}.")}
        kept = {path: value for path, value in values.items() if path not in missing}
        job = root.model_validate(nested(root, kept))
    for path in missing:
        *sections, name = path.split(".")
        section: Any = job
        for part in sections:
            section = getattr(section, part)
        section.__dict__.pop(name, None)
    return job, missing


def _by_key(error: ValidationError, keys: Mapping[str, Key]) -> dict[str, list[Any]]:
    """Path of a key, or of the section whose validator failed -> its errors."""
    found: dict[str, list[Any]] = {}
    for one in error.errors(include_url=False):
        parts: list[str] = []
        for part in one["loc"]:
            parts.append(str(part))
            if ".".join(parts) in keys:
                break
        found.setdefault(".".join(parts), []).append(one)
    return found


def _problem(key: Key, found: Iterable[Any]) -> str:
    """One key's errors in words."""
    found = list(found)
    for one in found:
        if one["type"] in _RANGE_MESSAGES:
            return _RANGE_MESSAGES[one["type"]].format(**one.get("ctx", {}))
        if one["type"] == "value_error":
            return str(one["ctx"]["error"])
    words = [one["input"] for one in found if one["type"] == "literal_error" and isinstance(one["input"], str)]
    if words:
        others = ["true", "false"] if key.is_flag else []
        if words[0] in others:  # TOML's true, in quotes
            return key.expected
        element = f"{show(words[0])} is " if key.list_item is not None else ""
        choices = [*others, *key.choices]
        return f"{element}not one of {', '.join(choices)}{did_you_mean(words[0], choices)}"
    return key.expected


def _section_violation(path: str, one: Any, sources: Sources) -> Violation:
    message = str(one["ctx"]["error"]) if one["type"] == "value_error" else one["msg"]
    given = sources.winner(path)
    return Violation(path, message) if given is None else given.violation(message)
