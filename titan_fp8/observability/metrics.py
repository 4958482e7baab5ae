"""What a training run reports: the console, `metrics.jsonl`, TensorBoard, Weights & Biases.

**Throughput.** `tps` is tokens a second *and device*: the tokens of all ranks' batches since the last line, divided by
the time since then and by the number of ranks. Input positions are counted, whether or not they bear a label. Time
spent under `untimed()` (validation, waiting for a checkpoint) does not count.

**Model FLOP/s.** `tflops = flops_per_token * tps / 1e12`: the FLOPs that the model's mathematics asks for, forward and
backward, not those spent on recomputing activations (Chowdhery et al. 2022, "PaLM", appendix B). `mfu` is their share
of the device's peak in per cent, null where the peak is unknown, as on a CPU.

**One step, one line.** `metrics.jsonl` is written by rank 0 alone. A line is written when its step is logged; after
`flush()` all lines are durable, which is what the trainer calls before a checkpoint counts as complete. A run resumed
after step N drops the lines beyond N and writes them again. A fresh start renames an older run's file to
`metrics.jsonl.1`, `metrics.jsonl.2`, ... Validations have a file of their own, `validation.jsonl`, treated in the same
way, so that each step stands once in each.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from titan_fp8.observability.config import MetricsSection
from titan_fp8.observability.console import format_step, use_colors
from titan_fp8.observability.files import move_aside
from titan_fp8.observability.json_lines import METRICS_FILE, VALIDATION_FILE, JsonLinesFile, json_number
from titan_fp8.observability.memory import PeakMemory
from titan_fp8.observability.run_folder import RunFolderLock
from titan_fp8.observability.summary import RunSummary, RunTotals
from titan_fp8.observability.trackers import build_trackers
from titan_fp8.runtime.logging import logger


class MetricsLogger:
    """Measures and reports. Every rank makes one and calls it in the same steps; rank 0 writes the files.

    Build it right before the first step: the clock runs from then on.

    Args:
        config: `[metrics]`.
        run_folder: from `run_folder.create_run_folder`.
        device: where the model is; decides which memory is measured.
        rank, world_size: of this process.
        flops_per_token: model FLOPs (forward and backward) a token costs, None if unknown.
        peak_flops: the device's peak in FLOP/s that MFU is relative to, None if unknown.
        total_steps: the step at which training ends.
        resume_step: the step of the checkpoint that training goes on from; 0 for a fresh start.
        lock: of the run's folder, held since before anything was written there; None takes it here. Closed with this.
        clock: seconds, monotonic.

    Raises:
        UserError: the folder cannot be written, another run writes there, a tracker's package is missing, or the part
            of `metrics.jsonl` up to `resume_step` is damaged.
    """

    def __init__(
        self,
        config: MetricsSection,
        run_folder: Path,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        total_steps: int,
        resume_step: int = 0,
        lock: RunFolderLock | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._folder = run_folder
        self._world_size = world_size
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._total_steps = total_steps
        self._resume_step = resume_step
        self._colors = use_colors(disabled=config.disable_color_printing)

        self._lock = lock
        self._metrics: JsonLinesFile | None = None
        self._validation: JsonLinesFile | None = None
        self._writes_files = rank == 0
        if self._writes_files:
            self._open_files()
        self._trackers = build_trackers(config, run_folder, rank=rank, resume_step=resume_step)

        self._memory = PeakMemory(device)
        self._clock = clock
        self._started = self._interval_start = clock()
        self._untimed_s = 0.0
        self._last_step = resume_step
        self._first_logged: tuple[int, float] | None = None
        self._totals = RunTotals(first_record=self._metrics.first if self._metrics else None)

    def _open_files(self) -> None:
        self._lock = self._lock or RunFolderLock(self._folder)
        paths = (self._folder / METRICS_FILE, self._folder / VALIDATION_FILE)
        if self._resume_step == 0:
            for moved in move_aside(*(path for path in paths if path.exists() and path.stat().st_size > 0)):
                logger.info("an earlier run's metrics are kept as %s", moved)
        self._metrics = JsonLinesFile(paths[0], resume_step=self._resume_step)
        if self._resume_step > 0 and paths[1].exists():
            self._validation = JsonLinesFile(paths[1], resume_step=self._resume_step)

    def should_log(self, step: int) -> bool:
        """Whether `step` (counted from 1) gets a line: the first, the last and every `metrics.log_freq`-th."""
        return step in (1, self._total_steps) or step % self._config.log_freq == 0

    def log_step(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        extra: Mapping[str, float] | None = None,
    ) -> None:
        """Report `step`. On a GPU call it when the step's results have been read, always at the same place of a step:
        from call to call the work of as many steps is done as are counted.

        Args:
            step: counted from 1; larger than the last one logged.
            loss: mean over the label tokens of the step's global batch.
            grad_norm: of the whole model, before clipping.
            lr: learning rate that the step used.
            tokens: input tokens of all ranks in the steps since the last call (in all the steps of this process at the
                first call).
            extra: further numbers for the trackers and `metrics.jsonl`.
        """
        assert step > self._last_step, f"step {step} was logged already (last: {self._last_step})"
        now = self._clock()
        elapsed_s = max(now - self._interval_start - self._untimed_s, 1e-9)
        tps = tokens / elapsed_s / self._world_size
        flops = None if self._flops_per_token is None else self._flops_per_token * tps
        peak = self._memory.take()
        record: dict[str, Any] = {
            "step": step,
            "loss": json_number(loss),
            "grad_norm": json_number(grad_norm),
            "lr": lr,
            "tps": tps,
            "tflops": None if flops is None else flops / 1e12,
            "mfu": None if flops is None or not self._peak_flops else 100 * flops / self._peak_flops,
            "memory_gib": peak.reserved_gib,
            "memory_allocated_gib": peak.allocated_gib,
            "step_time_s": elapsed_s / (step - self._last_step),
        }
        clashing = record.keys() & (extra or {}).keys()
        assert not clashing, f"extra metrics must not be called {sorted(clashing)}"
        record |= extra or {}

        if self._metrics is not None:
            self._metrics.append(record)
        for tracker in self._trackers:
            tracker.log(step, record)
        eta_s = self._eta_s(step, now)
        logger.info(
            format_step(
                record, loss=loss, grad_norm=grad_norm, total_steps=self._total_steps, eta_s=eta_s, colors=self._colors
            )
        )
        self._totals.add(record, loss=loss, elapsed_s=elapsed_s)
        self._last_step = step
        self._interval_start, self._untimed_s = now, 0.0

    def _eta_s(self, step: int, now: float) -> float | None:
        """From the mean pace since the first line, which compilation slowed down; validation and the like included."""
        if self._first_logged is None:
            self._first_logged = (step, now)
            return 0.0 if step >= self._total_steps else None
        first_step, first_time = self._first_logged
        return (self._total_steps - step) * (now - first_time) / (step - first_step)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Time spent inside is not training: it does not count in `tps` and `step_time_s`. On a GPU it begins when the
        work is done that was asked for before."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = self._clock()
        try:
            yield
        finally:
            self._untimed_s += self._clock() - start

    def log_validation(self, step: int, loss: float, tokens: int) -> None:
        """Report a validation after `step`: its mean loss over `tokens` label tokens of all ranks."""
        record = {"step": step, "validation_loss": json_number(loss), "validation_tokens": tokens}
        if self._writes_files:
            if self._validation is None:
                self._validation = JsonLinesFile(self._folder / VALIDATION_FILE)
            self._validation.append(record)
        for tracker in self._trackers:
            tracker.log(step, {"validation_loss": record["validation_loss"]})
        logger.info("step %d   validation loss %.4f over %s tokens", step, loss, f"{tokens:,}")
        self._totals.validation = (step, loss)

    def flush(self) -> None:
        """Return when all that was logged is on the disk. Call it before a checkpoint counts as complete."""
        for file in (self._metrics, self._validation):
            if file is not None:
                file.flush()
        for tracker in self._trackers:
            tracker.flush()

    def summary(self) -> RunSummary:
        """What this process has done so far."""
        return self._totals.summary(
            resume_step=self._resume_step,
            last_step=self._last_step,
            total_steps=self._total_steps,
            wall_time_s=self._clock() - self._started,
        )

    def close(self) -> None:
        """Flush and close everything, and let other runs use the folder; a second call does nothing."""
        trackers, self._trackers = self._trackers, []
        try:
            for closable in (self._metrics, self._validation, *trackers):
                if closable is not None:
                    closable.close()
        finally:
            if self._lock is not None:
                self._lock.release()
