"""Batches prepared beside the training step: one thread always, worker processes on request.

    worker 0 (slots 0..3)  --\\
                              >-- thread: join the parts, cut microbatches, pin -- queue --> next_step()
    worker 1 (slots 4..7)  --/

Without workers the thread reads the source itself, which is enough while tokenizing takes less time than a training
step: the `tokenizers` library and NumPy release Python's lock. With workers each process owns a fixed part of the
rank's slots, as if it were a rank of its own, so the samples do not depend on their number.

Preparing runs ahead of the training, so each step carries the `Progress` of its source; whoever consumes the step
applies it, and a state is always that of the steps consumed. An exception travels the same way and is raised where
the step would have been.

Worker processes are started by `forkserver`: a fork of the training process would copy the state of CUDA, NCCL and of
running threads, which does not survive it.
"""

import multiprocessing
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch

from titan_fp8.data.batch import Batch, WindowBlock
from titan_fp8.data.config import DataloaderSection
from titan_fp8.data.sources import Position, Progress, Source, StepPlan, lanes_of_slots
from titan_fp8.runtime.errors import UserError

T = TypeVar("T")

_DEFAULT_AHEAD = 2


@dataclass(frozen=True)
class Part:
    """The samples of one step that one process prepared, and what that changed."""

    windows: WindowBlock
    progress: Progress


@dataclass(frozen=True)
class Step:
    """One rank's microbatches of a step, and what preparing them changed, by process."""

    batches: list[Batch]
    progress: tuple[Progress, ...]


@dataclass(frozen=True)
class Job:
    """What to read: a source from a position on, for `steps` steps (None: without end)."""

    source: Source
    position: Position
    plan: StepPlan
    steps: int | None = None

    def parts(self, part: int = 0, parts: int = 1) -> Iterator[Part]:
        """The steps of one of `parts` processes, in order."""
        slots = self.plan.slots(part, parts)
        first, stride = self.position.samples, self.plan.global_batch
        lanes = lanes_of_slots(slots, first, stride, self.position.lanes)
        reader = self.source.reader(self.position, lanes)
        step = 0
        while self.steps is None or step < self.steps:
            windows = [reader.window(first + step * stride + slot) for slot in slots]
            yield Part(WindowBlock.stack(windows), reader.progress())
            step += 1


class Prefetcher(Generic[T]):
    """An iterator that a background thread advances, up to `ahead` items before they are asked for."""

    def __init__(self, items: Iterator[T], ahead: int, on_close: Callable[[], None] | None = None) -> None:
        """`on_close` is called by `close` and makes an iterator that waits for its next item end."""
        self._items = items
        self._on_close = on_close
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._end: tuple[str, Any] | None = None
        self._thread = threading.Thread(target=self._run, name="titan_fp8 data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next item. Raises what the iterator raised, now and at every later call."""
        kind, value = self._end or self._queue.get()
        if kind == "item":
            return value
        self._end = (kind, value)
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """End the thread. What was prepared and not asked for is lost. Closing twice is the same as once."""
        self._stop.set()
        if self._on_close is not None:
            self._on_close()
            self._on_close = None
        self._thread.join()
        self._end = self._end or ("end", None)

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as error:  # raised again by the consumer
            self._put(("error", error))

    def _put(self, entry: tuple[str, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


class WorkerPool:
    """Processes that prepare the parts of each step. Each waits with its next part until the last one was taken."""

    def __init__(self, job: Job, workers: int, repeat: bool = False) -> None:
        """`repeat`: when the steps of a finite job end, begin again instead of ending the processes."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._closed = False
        self._results: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for part in range(workers):
            results, sender = context.Pipe(duplex=False)
            arguments = (job, part, workers, sender, repeat)
            process = context.Process(target=_work, args=arguments, name=f"titan_fp8 data {part}", daemon=True)
            process.start()
            sender.close()  # so that the pipe ends when the process does
            self._results.append(results)
            self._processes.append(process)

    def steps(self) -> Iterator[list[Part]]:
        """The parts of each step, in the order of the slots, until the job's steps end.

        Raises:
            RuntimeError: a worker died, for example for lack of memory.
            Exception: whatever a worker raised.
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
        """End the processes."""
        self._closed = True
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def _receive(self, part: int) -> tuple[str, Any]:
        try:
            return self._results[part].recv()
        except (EOFError, OSError):
            if self._closed:
                return ("end", None)
            self._processes[part].join(timeout=5)
            raise RuntimeError(
                f"data worker {part} died with exit code {self._processes[part].exitcode}; if memory ran out (-9), "
                "lower dataloader.num_workers or dataloader.prefetch_factor"
            ) from None


def _work(job: Job, part: int, parts: int, results: Connection, repeat: bool) -> None:
    """A worker process: send the job's parts, each when the one before was taken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the training process, which then ends this one
    torch.set_num_threads(1)
    try:
        while True:
            for item in job.parts(part, parts):
                results.send(("item", item))
            results.send(("end", None))
            if not repeat:
                return
    except BrokenPipeError:  # the training process is gone
        return
    except Exception as error:  # raised again in the training process
        results.send(("error", _portable(error)))


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else one that says the same."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # many exceptions cannot be rebuilt from their arguments
        pass
    return RuntimeError("".join(traceback.format_exception(error)))


def prefetch_steps(job: Job, section: DataloaderSection, *, pin_memory: bool) -> Prefetcher[Step]:
    """Start preparing the steps of a job.

    Args:
        job: what to read.
        section: `num_workers` processes (at most one a slot is used), and `prefetch_factor` steps ahead (None for 2).
        pin_memory: put batches into page-locked memory, if there is a GPU.
    """
    workers = worker_count(job, section)
    pool = WorkerPool(job, workers) if workers else None
    return prefetch_pass(job, pool, section, pin_memory=pin_memory, on_close=pool.close if pool else None)


def prefetch_pass(
    job: Job,
    pool: WorkerPool | None,
    section: DataloaderSection,
    *,
    pin_memory: bool,
    on_close: Callable[[], None] | None = None,
) -> Prefetcher[Step]:
    """Read a job once, by the processes of a pool or else by the thread itself."""
    parts = pool.steps() if pool else ([part] for part in job.parts())
    device = torch.cuda.current_device() if pin_memory and torch.cuda.is_available() else None
    ahead = section.prefetch_factor or _DEFAULT_AHEAD
    return Prefetcher(_join(parts, job.plan.local_batch, device), ahead, on_close)


def worker_count(job: Job, section: DataloaderSection) -> int:
    """Processes for a job: what the section asks for, but at most one a slot."""
    return min(section.num_workers, len(job.plan.slots()))


def check_dataloader(section: DataloaderSection, name: str) -> None:
    """Refuse keys that mean nothing without worker processes.

    Raises:
        UserError: `persistent_workers` or `prefetch_factor` with `num_workers = 0`.
    """
    if section.num_workers:
        return
    if section.persistent_workers:
        raise UserError(f"{name}.dataloader.persistent_workers needs {name}.dataloader.num_workers > 0")
    if section.prefetch_factor is not None:
        raise UserError(
            f"{name}.dataloader.prefetch_factor = {section.prefetch_factor} needs {name}.dataloader.num_workers > 0"
        )


def _join(steps: Iterator[list[Part]], local_batch: int, device: int | None) -> Iterator[Step]:
    if device is not None:
        torch.cuda.set_device(device)  # of this thread; without it pinning would open a context on GPU 0
    for parts in steps:
        batches = WindowBlock.concatenate([part.windows for part in parts]).batches(local_batch)
        if device is not None:
            batches = [batch.pin_memory() for batch in batches]
        yield Step(batches, tuple(part.progress for part in parts))
