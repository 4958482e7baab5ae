"""What `run_train.sh` starts where there is more than one process: a check of the job, and torchrun.

    WORLD_SIZE=4 python -m titan_fp8.launch OPTIONS_OF_TORCHRUN -- OPTIONS_OF_THE_TRAINER

A mistake is answered once, before there is a process group, and no launcher's trace buries it. The check takes seconds,
most of them for the import of what builds a model. torchrun, and the processes that it starts, import the same, so they
begin at once, and wait at a gate (`worker.py`) which opens when the check has found nothing:

    launcher    check .............................. | gate opens, or all end
    torchrun    import ........ | starts workers
    workers                       import ........... | wait | train
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from titan_fp8.worker import GATE, OPEN

TORCHRUN, WORKER = "torch.distributed.run", "titan_fp8.worker"


class Gate:
    """A folder, which workers find in their environment: it holds a file when they may go on, and they end when it is
    gone. It is opened or closed once, by whoever is first."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="titan_fp8-gate-"))
        self._first = threading.Lock()

    def open(self) -> None:
        """Let the workers go on, unless it has been closed."""
        if self._first.acquire(blocking=False):
            (self.folder / OPEN).touch()

    def close(self) -> bool:
        """Let workers end without a word. False: it is too late, or somebody else has."""
        is_first = self._first.acquire(blocking=False)
        if is_first:
            self.remove()
        return is_first

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Check and launch. WORLD_SIZE is that of the job, all nodes together. The exit code of a check that finds
    something is that of the command, and torchrun's otherwise."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--")
    of_torchrun, options = arguments[:end], arguments[end + 1 :]
    # In a group of its own: an interrupt from the keyboard is the launcher's, which ends the check.
    check = subprocess.Popen([sys.executable, "-m", "titan_fp8.cli.main", "check", *options], process_group=0)
    gate = Gate()
    os.environ[GATE] = str(gate.folder)
    del os.environ["WORLD_SIZE"]  # torchrun tells its processes theirs
    threading.Thread(target=_open_after, args=[check, gate], daemon=True).start()
    try:
        importlib.import_module(TORCHRUN).main([*of_torchrun, "-m", WORKER, *options])
    except BaseException as error:
        if gate.close():
            check.kill()
            if (number := _signal_of(error)) is not None:
                os._exit(128 + number)  # torchrun has things to say about it
        raise
    finally:
        gate.remove()
    return 0


def _open_after(check: subprocess.Popen, gate: Gate) -> None:
    code = check.wait()
    if code == 0:
        gate.open()
    elif gate.close():
        os._exit(code if code > 0 else 128 - code)  # whatever torchrun or its import is doing


def _signal_of(error: BaseException) -> int | None:
    """The number of the signal that ended torchrun, or its import."""
    return signal.SIGINT if isinstance(error, KeyboardInterrupt) else getattr(error, "sigval", None)


if __name__ == "__main__":
    sys.exit(main())
