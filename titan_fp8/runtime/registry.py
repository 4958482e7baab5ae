"""A name -> object table that answers an unknown name with the nearest known one."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing (`kind` stands in error messages).

    Raises:
        UserError: on looking up a name that is not registered.
        KeyError: on registering a name twice.
    """

    def __init__(self, kind: str, entries: dict[str, T] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, T] = dict(entries or {})

    def register(self, name: str, entry: T) -> T:
        """Add `entry` under `name` and return it."""
        if name in self._entries:
            raise KeyError(f"{self.kind} {name!r} is registered already")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UserError(
                f"no such {self.kind}: {name!r}{did_you_mean(name, self)}; known: {', '.join(sorted(self))}"
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
