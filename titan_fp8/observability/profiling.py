"""Profiler traces and memory snapshots of chosen steps.

A trace answers where a step's time goes. It costs time itself, so the profiler works in cycles of `profile_freq` steps:

    | idle: profile_freq - warmup - active | profiler_warmup | profiler_active |   -> iteration_N/rankR_trace.json

N is the step after which the trace was written, a multiple of `profile_freq` also in a resumed run. Traces open in
ui.perfetto.dev. A memory snapshot lists what the CUDA allocator did and who asked for it; it is written every
`profile_freq` steps and when memory runs out, and opens in pytorch.org/memory_viz.

Both are context managers around the training loop and yield an object whose `step()` the loop calls after each step;
switched off, they cost nothing.
"""

import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from titan_fp8.observability.config import ProfilingSection
from titan_fp8.observability.files import atomic_write, disk_errors
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.logging import logger

# Allocator events that a snapshot goes back; a step of a large model makes tens of thousands.
_MEMORY_HISTORY_ENTRIES = 100_000


class StepHook(Protocol):
    """What the training loop calls after each step."""

    def step(self) -> None:
        """A training step is over."""
        ...


class _Off:
    def step(self) -> None:
        pass


@contextmanager
def maybe_enable_profiling(
    config: ProfilingSection, run_folder: Path, global_step: int, rank: int
) -> Iterator[StepHook]:
    """Trace steps as `[profiling]` says, if `enable_profiling` is set.

    Args:
        config: `[profiling]`.
        run_folder: traces go to `save_traces_folder` below it.
        global_step: steps trained before (the checkpoint's step, or 0).
        rank: of this process; each rank writes its own trace.

    Raises:
        UserError: a cycle does not hold its steps, there is nothing to trace, or a trace cannot be written.
    """
    if not config.enable_profiling:
        yield _Off()
        return
    for problem in config.problems():
        raise UserError(f"profiling.{problem.key} = {config.profile_freq}: {problem.text}")
    if not (config.trace_cpu or torch.cuda.is_available()):
        raise UserError("profiling.trace_cpu = false: there is no GPU, so nothing would be traced; leave it out")
    tracer = _Tracer(config, run_folder / config.save_traces_folder, global_step, rank)
    logger.info("profiling: a trace every %d steps in %s", config.profile_freq, tracer.folder)
    try:
        yield tracer
    finally:
        tracer.abandon()
    if not tracer.written:
        logger.warning(
            "profiling: the run ended before its first trace; one comes every profiling.profile_freq = %d steps",
            config.profile_freq,
        )


class _Tracer:
    """Runs one `torch.profiler.profile` a cycle.

    One profiler for the whole run would do as well until something fails inside it: PyTorch calls its handler between
    two states, and a handler that raises there (a full disk) leaves a profiler whose closing crashes the process. For
    the same reason a profiler that fails while it changes its state is let go and never stopped.
    """

    def __init__(self, config: ProfilingSection, folder: Path, global_step: int, rank: int) -> None:
        self.folder = folder
        self.written = 0
        self._config = config
        self._step = self._cycle_start = global_step
        self._rank = rank
        self._profiler: profile | None = None
        self._start_if_due()

    def step(self) -> None:
        self._step += 1
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.step()
            self._profiler = profiler
            if self._step % self._config.profile_freq == 0:
                self.abandon()
                self._write(profiler)
        self._start_if_due()

    def abandon(self) -> None:
        """Stop a cycle that is under way; nothing of it is written."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _start_if_due(self) -> None:
        config = self._config
        if self._step % config.profile_freq != config.profile_freq - config.profiler_warmup - config.profiler_active:
            return
        activities = [ProfilerActivity.CPU] if config.trace_cpu else []
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._cycle_start = self._step
        # Without acc_events, PyTorch 2.11 warns of events lost between cycles in the first cycle already.
        profiler = profile(
            activities=activities, schedule=self._action, record_shapes=config.trace_cpu, acc_events=True
        )
        # Steps are called ProfilerStep#N in the trace; this makes N the step's own number.
        profiler.step_num = self._step + 1
        profiler.start()
        self._profiler = profiler

    def _action(self, _: int) -> ProfilerAction:
        """What the profiler does in the step after `self._step`."""
        warmup, active = self._config.profiler_warmup, self._config.profiler_active
        steps_done = self._step - self._cycle_start
        if steps_done < warmup:
            return ProfilerAction.WARMUP
        if steps_done >= warmup + active:
            return ProfilerAction.NONE
        return ProfilerAction.RECORD if steps_done < warmup + active - 1 else ProfilerAction.RECORD_AND_SAVE

    def _write(self, profiler: profile) -> None:
        path = self.folder / f"iteration_{self._step}" / f"rank{self._rank}_trace.json"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        if not _is_whole(path):
            raise UserError(f"cannot write {path}: the profiler left half a trace; is the disk full?")
        self.written += 1
        logger.info("profiling: trace of step %d in %s", self._step, path)


def _is_whole(path: Path) -> bool:
    """Whether a trace ends as JSON ends. The exporter is C++ and, when the disk is full, says so at most in its log."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16))
        return file.read().rstrip().endswith(b"}")


def maybe_enable_memory_snapshot(
    config: ProfilingSection, run_folder: Path, global_step: int, rank: int, *, device: torch.device
) -> AbstractContextManager[StepHook]:
    """Record the CUDA allocator as `[profiling]` says, if `enable_memory_snapshot` is set.

    Snapshots go to `save_memory_snapshot_folder` below `run_folder`: `iteration_N/rankR_memory_snapshot.pickle`, and
    `iteration_N_out_of_memory/...` when memory runs out after step N, whose error then goes on its way.

    Args:
        config: `[profiling]`.
        run_folder, global_step, rank: as for `maybe_enable_profiling`.
        device: where the model is.

    Raises:
        UserError: asked for on a device other than CUDA (raised by the call itself), or a snapshot cannot be written.
    """
    if config.enable_memory_snapshot and device.type != "cuda":
        raise UserError(
            f"profiling.enable_memory_snapshot: it records the CUDA allocator, but the device is a {device.type}"
            "; leave it off or run on a GPU"
        )
    return _memory_snapshots(config, run_folder, global_step, rank)


@contextmanager
def _memory_snapshots(config: ProfilingSection, run_folder: Path, global_step: int, rank: int) -> Iterator[StepHook]:
    if not config.enable_memory_snapshot:
        yield _Off()
        return
    snapshots = _SnapshotWriter(run_folder / config.save_memory_snapshot_folder, global_step, rank, config.profile_freq)
    logger.info("memory snapshots every %d steps in %s", config.profile_freq, snapshots.folder)
    torch.cuda.memory._record_memory_history(max_entries=_MEMORY_HISTORY_ENTRIES)
    try:
        yield snapshots
    except torch.OutOfMemoryError:
        snapshots.write("_out_of_memory")
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


class _SnapshotWriter:
    def __init__(self, folder: Path, global_step: int, rank: int, freq: int) -> None:
        self.folder = folder
        self._step = global_step
        self._rank = rank
        self._freq = freq

    def step(self) -> None:
        self._step += 1
        if self._step % self._freq == 0:
            self.write("")

    def write(self, suffix: str) -> None:
        path = self.folder / f"iteration_{self._step}{suffix}" / f"rank{self._rank}_memory_snapshot.pickle"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, pickle.dumps(torch.cuda.memory._snapshot()))
        logger.info("memory snapshot of step %d in %s", self._step, path)
