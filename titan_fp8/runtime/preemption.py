"""Stopping on a signal: how a scheduler takes its machines back without losing the work.

    scheduler --SIGUSR1 or SIGTERM--> this rank: remembered       (another rank may hear of it a step earlier or later)
    end of the step: did any rank hear of it?                     one decision, the same on all ranks
    yes --> a full checkpoint --> `leave`: an exit code that says "start me again"

The handlers only remember. Saving from within one would write the state of half a step, and its ranks would not be at
the same one.

torchrun turns every exit code but 0 into 1, and the first worker that ends with another one gets all others killed.
Under torchrun a saved run therefore ends with 0; that it is not finished stands in the file that the environment
variable TITAN_FP8_PREEMPTED_FILE names, which `scripts/slurm_train.sh` sets on each node and looks for afterwards.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
PREEMPTED = os.EX_TEMPFAIL
"""75, in sysexits.h "temporary failure, try again": the exit code of a run that saved all it needs to go on."""
UNSAVED = 1
"""The exit code of a run that was asked to stop and has nothing to go on from: starting it again would not help it."""
PREEMPTED_FILE = "TITAN_FP8_PREEMPTED_FILE"


class Preempted(SystemExit):
    """The run stops here because it was asked to; an exit code and no defect, so it passes `except Exception`."""


class StopSignals:
    """Remembers that a signal to stop came to this process, from construction until `close`.

    Python runs handlers in the main thread only and lets no other thread install them; elsewhere nothing is installed
    and `received` stays False.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def close(self) -> None:
        """Put the handlers back that were there before; a second call does nothing."""
        for number, handler in self._before.items():
            # None: a handler that C code installed, which Python can neither name nor put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # No log line: the signal may have interrupted the writing of one.
        self.received = True


def leave(*, saved: bool) -> NoReturn:
    """End this rank's part of a run that was asked to stop. Call on all ranks, after everything is on the disk.

    Args:
        saved: there is a checkpoint of this step to go on from.

    Raises:
        Preempted: always, with `PREEMPTED` (0 under torchrun) or `UNSAVED` as the exit code.
    """
    if not saved:
        raise Preempted(UNSAVED)
    note = os.environ.get(PREEMPTED_FILE)
    if note:
        Path(note).touch()
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    raise Preempted(0 if under_torchrun else PREEMPTED)
