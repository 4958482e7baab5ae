"""Writing files so that a crash or a full disk costs nothing.

Two rules. A file that is replaced is written under another name, fsynced and renamed, so that a reader (or a crash)
finds the old text or the new one, never half of it. And nothing of an earlier run is overwritten: what stands in the
way is renamed to `NAME.1`, `NAME.2`, ..., the highest number being the latest.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from titan_fp8.runtime.errors import UserError

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` raised while `path` is written into a `UserError` that says what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            remedy = "the disk or quota is full; free some space or set job.dump_folder to another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "this user may not write there; set job.dump_folder to a folder of your own"
        else:
            remedy = "check the file system or set job.dump_folder to another one"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8) so that it is never seen half written.

    Raises:
        UserError: the disk is full or not writable; the old file is then untouched and no temporary file is left.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb", buffering=0) as file:
                write_all(file.fileno(), data)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """`os.write` until all of `data` is taken: a nearly full disk takes a part and refuses only the rest."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def move_aside(*paths: Path) -> list[Path]:
    """Rename those of `paths` that exist to `NAME.n`, with the same n (the first above all numbers taken) for all.

    Returns:
        The new names; empty when none of the paths exists.
    """
    existing = [path for path in paths if path.exists()]
    if not existing:
        return []
    number = 1 + max(_highest_suffix(path) for path in paths)
    moved = []
    for path in existing:
        target = path.with_name(f"{path.name}.{number}")
        with disk_errors(target):
            path.rename(target)
        moved.append(target)
    return moved


def _highest_suffix(path: Path) -> int:
    suffixes = (other.name[len(path.name) + 1 :] for other in path.parent.glob(f"{path.name}.*"))
    return max((int(suffix) for suffix in suffixes if suffix.isdecimal()), default=0)
