"""What a user wrote: one `Given` for each key that the TOML file or the command line names.

Both sources are brought into the same shape here, so that what follows (types, rules) need not know where a value came
from, and an error message still can say it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from titan_fp8.config.errors import Violation
from titan_fp8.config.keys import Key
from titan_fp8.config.text import show

Source = Literal["toml", "cli"]
CONFIG_FILE_KEY = "job.config_file"


@dataclass(frozen=True)
class Given:
    """A value for a key.

    Attributes:
        path: the key.
        value: the value, not yet checked against the key's type.
        place: `file.toml:14`, or `--section.key` as it was typed.
        source: TOML file or command line.
        text: the value as it was written.
    """

    path: str
    value: Any
    place: str
    source: Source
    text: str

    def violation(self, problem: str) -> Violation:
        """`place: key = value: problem`."""
        return Violation(self.place, f"{self.path} = {self.text}: {problem}")


@dataclass
class Sources:
    """All that was given, and what there is to say about it.

    Attributes:
        toml, cli: path -> what the source says about the key.
        violations: mistakes.
        notices: lines for the log, about readings that the user may not expect.
        rejected: keys whose value has no meaning. Rules that read one of them are not asked.
    """

    toml: dict[str, Given] = field(default_factory=dict)
    cli: dict[str, Given] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    rejected: set[str] = field(default_factory=set)

    def reject(self, given: Given, problem: str) -> None:
        """Note that a value cannot be used."""
        self.violations.append(given.violation(problem))
        self.rejected.add(given.path)

    def winner(self, path: str) -> Given | None:
        """What counts for the key: the command line's word, else the TOML file's."""
        return self.cli.get(path) or self.toml.get(path)

    def effective(self, keys: Mapping[str, Key], path: str) -> Any:
        """The value of a key, its default where nothing was given."""
        given = self.winner(path)
        return keys[path].default if given is None else given.value

    def drop(self, paths: list[str], reason: str) -> None:
        """Leave out TOML keys that the command line has made meaningless, and say so in one line."""
        for path in paths:
            del self.toml[path]
        if paths:
            self.notices.append(f"dropped from the TOML file: {', '.join(paths)}, because {reason}")


def clean_list(key: Key, value: Any) -> tuple[Any, str | None]:
    """A list without white space around its elements, and what is wrong with it, if anything.

    White space is how a filter such as `"attention.wk, output"` gets lost in silence; an empty element, or one with a
    comma in it, names nothing.
    """
    if key.list_item is None or not isinstance(value, list):
        return value, None
    cleaned = _stripped(value)
    for item in _strings(cleaned):
        if item == "":
            return cleaned, "an element is empty; leave it out"
        if "," in item:
            return cleaned, f"the element {show(item)} has a comma in it; write each name as a string of its own"
    return cleaned, None


def _stripped(item: Any) -> Any:
    if isinstance(item, list):
        return [_stripped(inner) for inner in item]
    return item.strip() if isinstance(item, str) else item


def _strings(items: list[Any]) -> Iterator[str]:
    for item in items:
        if isinstance(item, list):
            yield from _strings(item)
        elif isinstance(item, str):
            yield item
