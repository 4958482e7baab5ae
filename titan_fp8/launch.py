"""What `run_train.sh` starts where there is more than one process: torchrun, and beside it a check of the job.

    WORLD_SIZE=4 python -m titan_fp8.launch OPTIONS_OF_TORCHRUN -- OPTIONS_OF_THE_TRAINER

A mistake is answered once, before there is a process group, and no launcher's trace buries it. The check takes seconds,
most of them for the import of what builds a model; torchrun and the trainers import meanwhile what they need, and
trainers go no further before the job is checked (`runtime/permission.py`). With several machines torchrun waits too:
one that has joined the others and leaves again would keep them waiting.
"""

import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from titan_fp8.runtime.permission import Permission
from titan_fp8.train import INTERRUPTED

TORCHRUN, TRAINER = "torch.distributed.run", "titan_fp8.train"


def main(argv: Sequence[str] | None = None) -> int:
    """Check and launch. WORLD_SIZE is that of the job, all nodes together. The exit code of a check that finds
    something is that of the command, after a signal 128 more than its number, and torchrun's otherwise."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--")
    of_torchrun, options = arguments[:end], arguments[end + 1 :]
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)  # torchrun has its own handler later
    permission, check = Permission(), None
    try:
        check = _Check(options, permission)
        os.environ.pop("WORLD_SIZE", None)  # torchrun tells its processes theirs
        torchrun = importlib.import_module(TORCHRUN)
        if _machines(of_torchrun) > 1:
            permission.wait()
        torchrun.main([*of_torchrun, "-m", TRAINER, *options])
    except BaseException as error:
        code = _code_of_interruption(error)
        if code is None:
            raise
        return code
    finally:
        if check is not None:
            check.end()
        permission.close()
    return 0


class _Check:
    """The check of a job in a process of its own. It gives the permission when it has found nothing; otherwise it ends
    this process, and with it all that wait for the permission."""

    def __init__(self, options: Sequence[str], permission: Permission) -> None:
        self._permission = permission
        self._process = subprocess.Popen([sys.executable, "-m", "titan_fp8.cli.main", "check", *options])
        self._is_wanted = True
        threading.Thread(target=self._follow, daemon=True).start()

    def end(self) -> None:
        """Nobody waits any more for what it finds."""
        self._is_wanted = False
        self._process.kill()  # a signal may have reached the launcher alone

    def _follow(self) -> None:
        code = self._process.wait()
        if code == 0:
            try:
                self._permission.give()
            except OSError as error:  # those that wait would do so for ever
                code = 1
                if self._is_wanted:
                    print(f"trainers cannot be told that their job is right: {error}", file=sys.stderr, flush=True)
        if code and self._is_wanted:
            self._permission.close()
            # Torchrun is under way in the main thread, and nothing is to be said about its end.
            os._exit(code if code > 0 else 128 - code)


def _machines(of_torchrun: Sequence[str]) -> int:
    """At most, as torchrun is told: `--nnodes N` or `--nnodes LEAST:MOST`."""
    told = of_torchrun[of_torchrun.index("--nnodes") + 1] if "--nnodes" in of_torchrun else "1"
    return int(told.rpartition(":")[2])


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _code_of_interruption(error: BaseException) -> int | None:
    """The exit code of an error that needs no words, as a signal does not; None: it was another one."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else None
    number = getattr(error, "sigval", None)  # torchrun's exception, whose module is imported with torchrun alone
    return None if number is None else 128 + int(number)


if __name__ == "__main__":
    sys.exit(main())
