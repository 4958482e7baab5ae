"""Processes that a launcher starts before it knows whether their job may run at all.

    launcher    Permission(): names itself and a file in the environment        .give(): the file is there
    process     follow_launcher(): a thread waits for the file                  .wait(): until it is there
                                   the launcher has gone without --> so does this process, without a word

What a process imports takes longer than the check of its job, and so the one need not wait for the other. A process
that no such launcher has started has the permission at once.
"""

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

VARIABLE = "TITAN_FP8_PERMISSION"
"""In the environment of what a launcher starts: its process number, a colon, and the file."""
POLL_S = 0.02


class Permission:
    """The launcher's side, made before it starts the processes."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="titan_fp8_launch_"))
        self._file = self._folder / "permission"
        self._given = threading.Event()
        os.environ[VARIABLE] = f"{os.getpid()}:{self._file}"

    def give(self) -> None:
        """Let all processes go on, those too that will be started."""
        self._file.touch()
        os.environ[VARIABLE] = ""  # those that will be started need not look for it
        self._given.set()

    def wait(self) -> None:
        """Until another thread has given it."""
        self._given.wait()

    def close(self) -> None:
        """Leave no file behind. Processes that still wait end."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Follower:
    """A process's side, see `follow_launcher`."""

    def __init__(self, launcher: int, file: Path) -> None:
        self._launcher, self._file, self._parent = launcher, file, os.getppid()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the launcher lets this process go on. If it ends before, this never returns."""
        self._thread.join()

    def _follow(self) -> None:
        while not self._file.exists():
            if self._launcher_has_gone():
                os._exit(1)  # and the command that was the launcher has said why
            time.sleep(POLL_S)

    def _launcher_has_gone(self) -> bool:
        if not self._file.parent.exists() or os.getppid() != self._parent:
            return True
        if self._parent != self._launcher:  # a wrapper is between, or the launcher went before this process looked
            try:
                os.kill(self._launcher, 0)
            except ProcessLookupError:
                return True
        return False


def follow_launcher() -> Follower | None:
    """Begin to follow the launcher that started this process; None: nobody's permission is needed."""
    told = os.environ.pop(VARIABLE, "")  # a process that this one starts is not the launcher's
    launcher, _, file = told.partition(":")
    return Follower(int(launcher), Path(file)) if told else None
