"""The run's folder: `job.dump_folder`, where everything that a run leaves behind lies.

    outputs/
        config.toml               the resolved configuration; it starts the same run again
        conversion_report.json    what the converters did to which module
        versions.json             packages, device, git revision
        metrics.jsonl             one JSON object a logged step        (observability.metrics)
        validation.jsonl          one JSON object a validation
        tb/                       TensorBoard event files
        checkpoint/step-N/        checkpoints                          (titan_fp8.checkpoint)
        profile_traces/           profiler traces                      (observability.profiling)
        memory_snapshot/          snapshots of the CUDA allocator
        .lock                     held by the process that writes metrics

How files are written and what becomes of an earlier run's: `files.py`.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from titan_fp8.observability.files import atomic_write, disk_errors, move_aside
from titan_fp8.observability.versions import collect_versions
from titan_fp8.runtime.errors import UserError

_NO_LOCKS_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def create_run_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder (and its parents) if it is not there and return its absolute path.

    Raises:
        UserError: `path` is a file, or the folder cannot be made.
    """
    folder = _checked_folder(path)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_run_folder(path: str | os.PathLike[str]) -> None:
    """Whether this process could write into the folder, or make it. Makes nothing.

    Raises:
        UserError: `path` is, or lies below, a file, or this user may not write there.
    """
    folder = _checked_folder(path)
    existing = next(place for place in (folder, *folder.parents) if os.path.isdir(place))
    with disk_errors(folder):
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)} in {existing}")


def _checked_folder(path: str | os.PathLike[str]) -> Path:
    """The absolute path, of which no existing part is a file."""
    folder = Path(path).expanduser().absolute()
    for place in (folder, *folder.parents):
        if os.path.lexists(place):
            if not os.path.isdir(place):
                if place == folder:
                    raise UserError(f"job.dump_folder = {str(path)!r}: this is a file; name a folder")
                raise UserError(f"cannot write {folder}: {place} is a file; set job.dump_folder to another folder")
            break
    return folder


class RunFolderLock:
    """Held by the process that writes a run's metrics, so that a second run in the same folder is refused.

    A POSIX record lock: the kernel drops it when the process ends, however it ends, and forked children (data loader
    workers) do not inherit it. File systems without locks are used unlocked.

    Raises:
        UserError: another process, named in the message, holds the folder.
    """

    def __init__(self, run_folder: Path) -> None:
        path = run_folder / ".lock"
        with disk_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                holder = os.read(self._descriptor, 200).decode(errors="replace").strip() or "unknown process"
                os.close(self._descriptor)
                raise UserError(
                    f"{run_folder}: another run is writing here ({holder}); wait for it to end or set job.dump_folder"
                ) from error
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Let another run use the folder; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def write_run_record(
    run_folder: Path,
    *,
    config_toml: str,
    conversion_report: Mapping[str, Any] | None,
    versions: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.toml`, `conversion_report.json` and `versions.json` into the run's folder (call on one rank).

    A file there with another content belongs to an earlier start and is kept as `NAME.n`.

    Args:
        run_folder: from `create_run_folder`.
        config_toml: the resolved configuration as TOML.
        conversion_report: JSON-able; None when no converter ran, which writes an empty object.
        versions: defaults to `collect_versions()`.
    """
    contents = {
        "config.toml": config_toml,
        "conversion_report.json": _as_json(conversion_report or {}),
        "versions.json": _as_json(collect_versions() if versions is None else versions),
    }
    for name, content in contents.items():
        path = run_folder / name
        if path.exists() and path.read_text() != content:
            move_aside(path)
        atomic_write(path, content)


def _as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
