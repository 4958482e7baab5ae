"""A series on disk: one JSON object a line, each with a `step`, in the order of the steps.

The file must survive what happens to training runs. A run killed in the middle of a write leaves half a line. A run
resumed from the checkpoint of step N trains the steps after N again, so the lines that the killed run wrote beyond N
have to go, or those steps would stand twice. A disk that fills up must not cost what is already written.

So: each line is one unbuffered write (nothing waits in memory for a failing disk to be retried), `flush` makes all
lines durable, and opening at step N keeps exactly the lines up to N, by writing them to a new file that replaces the
old one.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_fp8.observability.files import atomic_write, disk_errors, fsync_folder, write_all
from titan_fp8.runtime.errors import UserError

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"


def json_number(value: float | int | None) -> float | int | None:
    """`value`, or None (JSON's null) when it is NaN or infinite, which JSON cannot say."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLinesFile:
    """Appends records to `path`; the caller sees to it that steps grow.

    Args:
        path: the file; made if it is not there.
        resume_step: lines of steps after this one are dropped on opening. 0 drops every line: a caller that wants to
            keep an earlier run's file moves it aside first.

    Attributes:
        first: the first record kept from the file, None if there is none.

    Raises:
        UserError: a line that belongs to the kept part cannot be read, or the disk cannot be written.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        kept = read_json_lines(path, last_step=resume_step) if path.exists() else []
        self.first: dict[str, Any] | None = kept[0] if kept else None
        kept_text = b"".join(_encode(record) for record in kept)
        if path.exists() and path.read_bytes() != kept_text:
            atomic_write(path, kept_text)
        with disk_errors(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            fsync_folder(path.parent)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; NaN and infinities become null."""
        with disk_errors(self.path):
            write_all(self._descriptor, _encode({key: json_number(value) for key, value in record.items()}))

    def flush(self) -> None:
        """Return when every line is on the disk."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            with disk_errors(self.path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json_lines(path: Path, *, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records of `path` in order, up to and including `last_step`.

    What follows the last whole record is the torn end of a killed run and is ignored; an unreadable line that has a
    wanted record after it is damage, and an error.

    Raises:
        UserError: the file cannot be read, or is damaged in the part asked for.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    records: list[dict[str, Any]] = []
    unreadable: int | None = None
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            break
        record = _decode(line) if number < len(lines) else None  # the part after the last newline is torn
        if record is None:
            unreadable = unreadable or number
        elif last_step is None or record["step"] <= last_step:
            if unreadable is not None:
                raise UserError(f"{path}:{unreadable}: not a JSON object with a step; repair the line or move the file")
            records.append(record)
    return records


def _encode(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
