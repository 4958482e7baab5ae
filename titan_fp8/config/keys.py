"""The list of all keys of a configuration, read off its section classes.

A key's *path* is `training.dataloader.num_workers`: the same on the command line, in error messages and, split at the
last dot, in TOML. From the annotation follow how the key is typed on the command line and how its type is put into
words.
"""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from titan_fp8.config.section import NOT_SUPPORTED_YET, OFF, ONLY_WITH, PARKED_BY, UNIT, UNSUPPORTED_VALUES, Section

_WORDS = {int: "integer", float: "number", str: "string"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        path: dotted path from the root.
        annotation: its type.
        default: its default value.
        meaning: its documentation, in one paragraph.
        bounds: its range in words, such as `>= 1`, or "".
        extra: what `titan_fp8.config.section.key` noted beside it.
        switch: name of the section's key that turns it on, or None.
    """

    path: str
    annotation: Any
    default: Any
    meaning: str
    bounds: str
    extra: Mapping[str, Any]
    switch: str | None

    @property
    def section(self) -> str:
        """Path of the section it stands in."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Its name in the section."""
        return self.path.rpartition(".")[2]

    @property
    def unit(self) -> str | None:
        """Unit of the value."""
        return self.extra.get(UNIT)

    @property
    def is_supported(self) -> bool:
        """Whether other values than the default are."""
        return not self.extra.get(NOT_SUPPORTED_YET, False)

    @property
    def unsupported_values(self) -> list[Any]:
        """Legal values whose feature does not exist yet."""
        return self.extra.get(UNSUPPORTED_VALUES, [])

    @property
    def conditions(self) -> Iterator[tuple[dict[str, list[Any]], list[Any]]]:
        """Conditions under which the key has an effect: ({path: values}, values beside which it may be kept).

        One of the paths must have one of its values. All conditions must hold.
        """
        if self.switch is not None:
            yield {self.switch: [True]}, list(OFF)
        if ONLY_WITH in self.extra:
            paths = {f"{self.section}.{name}": values for name, values in self.extra[ONLY_WITH].items()}
            yield paths, self.extra[PARKED_BY]

    @cached_property
    def members(self) -> tuple[Any, ...]:
        """The alternatives of a union, or the type alone."""
        return _alternatives(self.annotation)

    @property
    def is_optional(self) -> bool:
        """Whether the key may be unset."""
        return type(None) in self.members

    @property
    def is_flag(self) -> bool:
        """Whether the key alone, without a value, means true."""
        return bool in self.members

    @cached_property
    def list_item(self) -> Any:
        """Type of a list's elements, or None for a key that is no list."""
        for member in self.members:
            if get_origin(member) is list:
                return get_args(member)[0]
        return None

    @property
    def takes_strings(self) -> bool:
        """Whether a string can be a value, or an element of one."""
        return str in self.members or bool(self.choices) or self.list_item is not None

    @property
    def choices(self) -> list[str]:
        """Words that are allowed, where only certain ones are."""
        return literals(self.annotation if self.list_item is None else self.list_item)

    @cached_property
    def type_in_words(self) -> str:
        """Such as `integer`, `true | false | "auto"`, `list of strings, or unset`."""
        words = " | ".join(_type_in_words(member) for member in self.members if member is not type(None))
        return f"{words}, or unset" if self.is_optional else words

    @property
    def expected(self) -> str:
        """`expected an integer`."""
        words = [_type_in_words(member) for member in self.members if member is not type(None)]
        article = "" if words[0].startswith(("true", '"')) else "an " if words == ["integer"] else "a "
        return f"expected {article}{' | '.join(words)}".replace(" | ", " or ")


def all_keys(root: type[Section]) -> dict[str, Key]:
    """Path -> key, in the order of the classes."""
    return {key.path: key for key in _walk(root, "", None)}


def all_sections(root: type[Section], prefix: str = "") -> dict[str, type[Section]]:
    """Path -> class of all sections below `root`, in the order of the classes, outer before inner ones."""
    found: dict[str, type[Section]] = {}
    for name, field in root.model_fields.items():
        if is_section(field.annotation):
            found[prefix + name] = field.annotation
            found |= all_sections(field.annotation, f"{prefix}{name}.")
    return found


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether a field's type is a section class."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def literals(annotation: Any) -> list[str]:
    """The words that an annotation allows through `Literal`."""
    return [word for member in _alternatives(annotation) if get_origin(member) is Literal for word in get_args(member)]


def _walk(section: type[Section], prefix: str, switch: str | None) -> Iterator[Key]:
    own_switch = switch if section.switch is None else prefix + section.switch
    for name, field in section.model_fields.items():
        path = prefix + name
        if is_section(field.annotation):
            yield from _walk(field.annotation, f"{path}.", own_switch)
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        yield Key(
            path=path,
            annotation=field.annotation,
            default=field.get_default(call_default_factory=True),
            meaning=" ".join((field.description or "").split()),
            bounds=", ".join(_bounds(field.metadata)),
            extra=extra,
            switch=None if path == own_switch else own_switch,
        )


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for constraint in metadata:
        for attribute, sign in _BOUNDS.items():
            bound = getattr(constraint, attribute, None)
            if bound is not None:
                yield f"{sign} {bound:g}" if abs(bound) < 1e6 else f"{sign} {bound}"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _type_in_words(member: Any) -> str:
    if member is bool:
        return "true | false"
    if get_origin(member) is Literal:
        return " | ".join(f'"{word}"' for word in get_args(member))
    if get_origin(member) is list:
        item = get_args(member)[0]
        if get_origin(item) is list:
            return "list of lists of strings"
        return f"list of {_type_in_words(item)}" if literals(item) else f"list of {_type_in_words(item)}s"
    return _WORDS.get(member, str(member))
