"""What torchrun starts for `run_train.sh`: the trainer, behind the gate of `launch.py`.

    TITAN_FP8_GATE=FOLDER torchrun ... -m titan_fp8.worker OPTIONS

While the launcher's check of the job goes on, a worker imports what building and training need. It trains as soon as
the folder holds the file `open`, and ends without a word when the folder or the launcher is gone.
"""

import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

GATE, OPEN = "TITAN_FP8_GATE", "open"
INTERRUPTED = 130
TRAINER = "titan_fp8.train"
LOOKS_S = 0.02


def main() -> int:
    """Wait for the gate, if there is one, and train; the exit code is that of the trainer."""
    folder = os.environ.pop(GATE, None)
    if folder is None:
        return importlib.import_module(TRAINER).main()
    # Whatever there is to say about an interrupt, the launcher says.
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    is_open = threading.Event()
    threading.Thread(target=_watch, args=[Path(folder), os.getppid(), is_open], daemon=True).start()
    train = importlib.import_module(TRAINER)
    train.prepare_process()
    importlib.import_module("titan_fp8.building")
    is_open.wait()
    signal.signal(signal.SIGINT, before)
    return train.main()


def _watch(gate: Path, launcher: int, is_open: threading.Event) -> None:
    """Beside an import, which may take seconds and is not to be waited for."""
    while not (gate / OPEN).exists():
        if not gate.exists() or os.getppid() != launcher:
            os._exit(0)
        time.sleep(LOOKS_S)
    is_open.set()


if __name__ == "__main__":
    sys.exit(main())
