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
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from titan_fp8.data.batch import Batch, WindowBlock
from titan_fp8.data.config import DataloaderSection
from titan_fp8.data.sources import Position, Progress, Source, StepPlan, lanes_of_slots
from titan_fp8.data.workers import WorkerPool

T = TypeVar("T")

_DEFAULT_AHEAD = 2
_CLOSE_TIMEOUT_S = 10.0


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
        """End the thread. What was prepared and not asked for is lost. Closing twice is the same as once.

        A thread that waits for a stalled network is left behind after some seconds; it ends with the process.
        """
        self._stop.set()
        if self._on_close is not None:
            self._on_close()
            self._on_close = None
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while self._thread.is_alive() and time.monotonic() < deadline:  # it may wait for room in the queue
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
            self._thread.join(timeout=0.005)
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
        if not self._stop.is_set():
            self._queue.put(entry)
        return not self._stop.is_set()


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
    pool: WorkerPool[Part] | None,
    section: DataloaderSection,
    *,
    pin_memory: bool,
    on_close: Callable[[], None] | None = None,
) -> Prefetcher[Step]:
    """Read a job once, by the processes of a pool or else by the thread itself."""
    parts = pool.rounds() if pool else ([part] for part in job.parts())
    device = torch.cuda.current_device() if pin_memory and torch.cuda.is_available() else None
    ahead = section.prefetch_factor or _DEFAULT_AHEAD
    return Prefetcher(_join(parts, job.plan.local_batch, device), ahead, on_close)


def worker_count(job: Job, section: DataloaderSection) -> int:
    """Processes for a job: what the section asks for, but at most one a slot."""
    return min(section.num_workers, len(job.plan.slots()))


def _join(steps: Iterator[list[Part]], local_batch: int, device: int | None) -> Iterator[Step]:
    if device is not None:
        torch.cuda.set_device(device)  # of this thread; without it pinning would open a context on GPU 0
    for parts in steps:
        batches = WindowBlock.concatenate([part.windows for part in parts]).batches(local_batch)
        if device is not None:
            batches = [batch.pin_memory() for batch in batches]
        yield Step(batches, tuple(part.progress for part in parts))
