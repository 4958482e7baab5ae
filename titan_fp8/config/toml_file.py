"""The TOML source: a file into a list of `Given`, each with its line."""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_fp8.config.errors import Violation
from titan_fp8.config.given import CONFIG_FILE_KEY, Given, Sources, clean_list
from titan_fp8.config.keys import Key
from titan_fp8.config.names import CONVERTERS_KEY, current_converters, current_path, unknown_key, unknown_section
from titan_fp8.config.text import show
from titan_fp8.config.toml_lines import key_lines
from titan_fp8.runtime.suggest import nearest

RECIPES_FOLDER = "train_configs"
_ERROR_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


@dataclass(frozen=True)
class TomlFile:
    """A TOML document.

    Attributes:
        name: path of the file, as messages have it.
        data: the tables.
        lines: path of each key -> line.
    """

    name: str
    data: dict[str, Any]
    lines: Mapping[tuple[str, ...], int]

    def place(self, path: tuple[str, ...]) -> str:
        """`file.toml:14`."""
        line = self.lines.get(path)
        return self.name if line is None else f"{self.name}:{line}"

    def get(self, dotted: str) -> Any:
        """The value of a key as it stands in the file, or None."""
        value: Any = self.data
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def find_config_file(asked: str, place: str, sources: Sources) -> Path | None:
    """The file to read, or None with a violation noted.

    A path that does not exist is looked up by its base name in `train_configs/`, of the current folder and of the
    repository: the documents of other projects name paths of their own.
    """
    if os.path.isdir(asked):
        sources.violations.append(Violation(place, f"{CONFIG_FILE_KEY} = {show(asked)}: is a folder, not a TOML file"))
        return None
    if os.path.exists(asked):
        return Path(asked)
    name = os.path.basename(asked)
    folders = [Path(RECIPES_FOLDER), Path(__file__).parents[2] / RECIPES_FOLDER]
    for folder in folders:
        found = folder / name
        if name and os.path.isfile(found):
            sources.notices.append(f"{asked} does not exist; reading {found} instead")
            return found
    recipes = [recipe.name for folder in folders if folder.is_dir() for recipe in sorted(folder.glob("*.toml"))]
    hits = nearest(name, recipes)
    hint = f" (did you mean {RECIPES_FOLDER}/{hits[0]}?)" if hits else ""
    sources.violations.append(Violation(place, f"{CONFIG_FILE_KEY} = {show(asked)}: no such file{hint}"))
    return None


def read_toml(path: Path, sources: Sources) -> TomlFile | None:
    """The parsed file, or None with a violation noted: it cannot be read, is not UTF-8, or is not TOML."""
    try:
        # In bytes, so that line ends stay as they are: a carriage return alone is no line end in TOML.
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        sources.violations.append(Violation(str(path), f"cannot be read: {error.strerror or error}"))
        return None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = f"not UTF-8: byte 0x{error.object[error.start]:02x}"
        sources.violations.append(Violation(f"{path}:{line}", problem))
        return None
    try:
        return TomlFile(str(path), tomllib.loads(text), key_lines(text))
    except RecursionError:
        sources.violations.append(Violation(str(path), "values are nested too deeply"))
    except ValueError as error:
        sources.violations.append(_syntax_error(path, str(error), last_line=text.count("\n") + 1))
    return None


def _syntax_error(path: Path, message: str, *, last_line: int) -> Violation:
    found = _ERROR_PLACE.search(message)
    if found is None:
        return Violation(str(path), f"not TOML: {message}")
    return Violation(f"{path}:{found.group(1) or last_line}", f"not TOML: {_ERROR_PLACE.sub('', message)}")


def enter_toml(file: TomlFile, keys: Mapping[str, Key], sections: Mapping[str, Any], sources: Sources) -> None:
    """Enter the file's keys into `sources.toml`. Unknown names and wrong shapes become violations."""
    for raw_path, value in _leaves(file.data, (), keys, sections):
        written = ".".join(raw_path)
        place = file.place(raw_path)
        path = current_path(written, sections)
        if path != written:
            sources.notices.append(f"{place}: {written} is read as {path}")
        problem = _name_problem(path, value, keys, sections, sources)
        if problem is None:
            _enter(keys[path], value, place, sources)
        else:
            sources.violations.append(Violation(place, f"{written}: {problem}"))


def _name_problem(
    path: str, value: Any, keys: Mapping[str, Key], sections: Mapping[str, Any], sources: Sources
) -> str | None:
    if path not in keys:
        is_table = isinstance(value, dict) and path not in sections
        return unknown_section(path, sections) if is_table else unknown_key(path, keys, sections)
    if path == CONFIG_FILE_KEY:
        return "stands on the command line only; a TOML file does not name another one"
    if path in sources.toml:
        return f"is the same key as {path} at {sources.toml[path].place}; keep one of them"
    return None


def _enter(key: Key, value: Any, place: str, sources: Sources) -> None:
    given = Given(key.path, value, place, "toml", show(value))
    value, problem = clean_list(key, value)
    if key.list_item is not None and isinstance(value, str) and str not in key.members:
        problem = f"{key.expected}; write {key.name} = [{show(value)}]"
    if problem is not None:
        sources.reject(given, problem)
        return
    if key.path == CONVERTERS_KEY and isinstance(value, list):
        value, notices = current_converters(value)
        sources.notices += [f"{place}: {notice}" for notice in notices]
    sources.toml[key.path] = Given(key.path, value, place, "toml", given.text)


def _leaves(
    table: dict[str, Any], prefix: tuple[str, ...], keys: Mapping[str, Key], sections: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Keys with their values. A table that is no section is one leaf, so that it is reported once."""
    for name, value in table.items():
        path = (*prefix, name)
        dotted = ".".join(path)
        if isinstance(value, dict) and current_path(dotted, sections) in sections:
            yield from _leaves(value, path, keys, sections)
        else:
            yield path, value
