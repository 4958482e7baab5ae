"""On which line each key of a TOML document stands.

Python's `tomllib` gives values without places, and an error message without a line sends the reader searching. This
scanner reads a document that `tomllib` has accepted, so it need not check anything: it skips values and writes down
where keys and tables begin.
"""

import tomllib

_BARE_KEY_ENDS = "=.]} \t\n\r#,"


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Path of each key and table -> number of the line, from 1, on which it is first written.

    Args:
        text: a valid TOML document. Keys inside arrays of tables have the array's path, without an index.
    """
    return _Scanner(text).scan()


class _Scanner:
    """A position in the text. Each method leaves it behind what it read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[tuple[str, ...], int] = {}

    def scan(self) -> dict[tuple[str, ...], int]:
        table: tuple[str, ...] = ()
        while self._skip_blank():
            if self.text[self.at] == "[":
                start = self.at
                while self.text[self.at] == "[":
                    self.at += 1
                table = self._dotted_key()
                self._note(table, start)
                while self.at < len(self.text) and self.text[self.at] == "]":
                    self.at += 1
            else:
                self._pair(table)
        return self.lines

    def _pair(self, table: tuple[str, ...]) -> None:
        start = self.at
        path = table + self._dotted_key()
        self._note(path, start)
        self.at += 1  # the equals sign
        self._skip_blank()
        self._value(path)

    def _value(self, path: tuple[str, ...]) -> None:
        opening = self.text[self.at]
        if opening in "\"'":
            self._string()
        elif opening == "[":
            self._items("]", lambda: self._value(path))
        elif opening == "{":
            self._items("}", lambda: self._pair(path))
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}\n#":
                self.at += 1

    def _items(self, closing: str, read_item) -> None:
        self.at += 1
        while self._skip_blank(commas=True) and self.text[self.at] != closing:
            read_item()
        self.at += 1

    def _string(self) -> str:
        """The text between the quotes, escapes unresolved."""
        quote = self.text[self.at]
        fence = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(fence)
        start = self.at
        while not self.text.startswith(fence, self.at):
            self.at += 2 if quote == '"' and self.text[self.at] == "\\" else 1
        if len(fence) == 3:  # up to two quotes may stand before the closing fence
            while self.text.startswith(quote, self.at + 3):
                self.at += 1
        end = self.at
        self.at += len(fence)
        return self.text[start:end]

    def _dotted_key(self) -> tuple[str, ...]:
        parts = []
        while True:
            self._skip_spaces()
            start = self.at
            if self.text[self.at] in "\"'":
                self._string()
                # tomllib resolves the escapes of a quoted key.
                parts.append(next(iter(tomllib.loads(f"{self.text[start : self.at]} = 0"))))
            else:
                while self.text[self.at] not in _BARE_KEY_ENDS:
                    self.at += 1
                parts.append(self.text[start : self.at])
            self._skip_spaces()
            if self.text[self.at] != ".":
                return tuple(parts)
            self.at += 1

    def _note(self, path: tuple[str, ...], at: int) -> None:
        line = self.text.count("\n", 0, at) + 1
        for length in range(1, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    def _skip_spaces(self) -> None:
        while self.text[self.at] in " \t":
            self.at += 1

    def _skip_blank(self, *, commas: bool = False) -> bool:
        """Skip white space and comments; False at the end of the text."""
        blank = " \t\r\n," if commas else " \t\r\n"
        while self.at < len(self.text):
            if self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif self.text[self.at] in blank:
                self.at += 1
            else:
                return True
        return False
