"""Processes that share work by rounds: in each round every process contributes one result, in a fixed order.

They are started by `forkserver`: a fork of the training process would copy the state of CUDA, of NCCL and of running
threads, which does not survive it. Results travel through one pipe a process. A full pipe holds its process back, and
a pipe that ends says that its process, or the parent, is gone, so neither outlives the other.

When a machine is taken back, torchrun and SLURM send SIGTERM to every process there is. The parent goes on to the end
of its step and saves (`runtime/preemption.py`), for which it needs data, so these processes do not heed the signal.
"""

import atexit
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

import torch

from titan_fp8.runtime.errors import UserError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Shareable(Protocol[T_co]):
    """Work that several processes share. Can be pickled."""

    def parts(self, part: int = 0, parts: int = 1) -> Iterator[T_co]:
        """What process number `part` of `parts` contributes, one item a round; the same number of rounds for each."""
        ...


class WorkerPool(Generic[T]):
    """Processes at some work. Each is at most one result ahead of the one that was taken last."""

    def __init__(self, work: Shareable[T], workers: int, repeat: bool = False) -> None:
        """`repeat`: when the rounds end, begin again instead of ending the processes."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._closed = False
        self._results: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for part in range(workers):
            results, sender = context.Pipe(duplex=False)
            arguments = (work, part, workers, sender, repeat)
            process = context.Process(target=_work, args=arguments, name=f"titan_fp8 data {part}", daemon=True)
            process.start()
            sender.close()  # so that the pipe ends when the process does
            self._results.append(results)
            self._processes.append(process)
        # Else multiprocessing, at the end of a parent that did not call `close`, would send SIGTERM and wait for ever.
        atexit.register(self.close)

    def rounds(self) -> Iterator[list[T]]:
        """The results of each round, in the order of the processes, until the work ends.

        Raises:
            UserError: a process died, for example for lack of memory.
            Exception: whatever a process raised.
        """
        while True:
            entries = [self._receive(part) for part in range(len(self._results))]
            for kind, value in entries:
                if kind == "error":
                    raise value
            if any(kind == "end" for kind, _ in entries):
                return
            yield [value for _, value in entries]

    def close(self) -> None:
        """End the processes. A `rounds` that waits in another thread ends too."""
        self._closed = True
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()  # and not terminate(), whose signal they ignore
        for process in self._processes:
            process.join()

    def _receive(self, part: int) -> tuple[str, Any]:
        try:
            return self._results[part].recv()
        except (EOFError, OSError):
            if self._closed:
                return ("end", None)
            self._processes[part].join(timeout=5)
            code = self._processes[part].exitcode
            raise UserError(
                f"data worker {part} died with exit code {code}; if memory ran out (-9), lower the number of workers"
            ) from None


def _work(work: Shareable[Any], part: int, parts: int, results: Connection, repeat: bool) -> None:
    """A process: send its results, each when there is room for it."""
    # Ctrl-C ends the parent, which then ends this process; so does SIGTERM, but not at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        while True:
            for item in work.parts(part, parts):
                results.send(("item", item))
            results.send(("end", None))
            if not repeat:
                return
    except BrokenPipeError:  # the parent is gone
        return
    except Exception as error:  # raised again in the parent
        results.send(("error", _portable(error)))


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else one that says the same."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # many exceptions cannot be rebuilt from their arguments
        pass
    return RuntimeError("".join(traceback.format_exception(error)))
