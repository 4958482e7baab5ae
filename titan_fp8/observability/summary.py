"""The closing summary: what a run did, in a block that stands at the end of its log.

    trained 300 of 300 steps in 0:04:12
      loss           5.5413 (step 1) -> 1.9210 (step 300)
      throughput     12,345 tok/s per device, mean without the first line's steps
      peak memory    3.21 GiB
      files          /home/me/outputs
        metrics.jsonl            loss, throughput and memory of each logged step
        checkpoint/step-300      newest checkpoint

Only files that are there are named.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_fp8.observability.console import format_duration

# Default name in the run's folder -> what it is.
_FILES = {
    "config.toml": "resolved configuration: CONFIG_FILE for the same run again",
    "conversion_report.json": "what the converters did to which module",
    "versions.json": "packages, device, git revision",
    "metrics.jsonl": "loss, throughput and memory of each logged step",
    "validation.jsonl": "validation losses",
    "tb": "for tensorboard --logdir",
    "checkpoint": "checkpoints",
    "profile_traces": "for ui.perfetto.dev",
    "memory_snapshot": "for pytorch.org/memory_viz",
}


@dataclass(frozen=True)
class RunSummary:
    """What one process saw of a run.

    Attributes:
        resume_step: step of the checkpoint this process went on from, 0 for a fresh start.
        last_step: last step logged.
        total_steps: steps of the whole run.
        first_step, first_loss: of the run's first line, also when an earlier process wrote it; None without any.
        final_loss: at `last_step`; may be NaN. None when this process logged nothing.
        validation: (step, loss) of the last validation, or None.
        wall_time_s: of this process, everything included.
        mean_tps: tokens a second and device, over the lines after the first (over the first when it is the only one).
        peak_memory_gib: of this rank.
    """

    resume_step: int
    last_step: int
    total_steps: int
    first_step: int | None
    first_loss: float | None
    final_loss: float | None
    validation: tuple[int, float] | None
    wall_time_s: float
    mean_tps: float | None
    peak_memory_gib: float


class RunTotals:
    """Adds up the lines of a run.

    Args:
        first_record: the run's first line when an earlier process wrote it.
    """

    def __init__(self, first_record: Mapping[str, Any] | None = None) -> None:
        self.validation: tuple[int, float] | None = None
        self._first = (first_record["step"], first_record.get("loss")) if first_record else None
        self._final_loss: float | None = None
        self._peak_memory_gib = 0.0
        self._first_tps: float | None = None
        self._device_tokens = 0.0
        self._seconds = 0.0

    def add(self, record: Mapping[str, Any], *, loss: float, elapsed_s: float) -> None:
        """Take a line (`loss` as measured, since `record` has null for NaN) that stands for `elapsed_s` of training."""
        if self._first is None:
            self._first = (record["step"], loss)
        self._final_loss = loss
        self._peak_memory_gib = max(self._peak_memory_gib, record["memory_gib"])
        if self._first_tps is None:
            self._first_tps = record["tps"]
        else:
            self._device_tokens += record["tps"] * elapsed_s
            self._seconds += elapsed_s

    def summary(self, *, resume_step: int, last_step: int, total_steps: int, wall_time_s: float) -> RunSummary:
        """The sum so far."""
        first_step, first_loss = self._first or (None, None)
        return RunSummary(
            resume_step=resume_step,
            last_step=last_step,
            total_steps=total_steps,
            first_step=first_step,
            first_loss=first_loss,
            final_loss=self._final_loss,
            validation=self.validation,
            wall_time_s=wall_time_s,
            mean_tps=self._device_tokens / self._seconds if self._seconds else self._first_tps,
            peak_memory_gib=self._peak_memory_gib,
        )


def format_summary(summary: RunSummary, run_folder: Path, *, renamed: Mapping[str, str] | None = None) -> str:
    """The block of the module's docstring.

    Args:
        summary: from `MetricsLogger.summary`.
        run_folder: the run's folder.
        renamed: names that the configuration may change, by their default: `{"tb": "events", "checkpoint": ...}`.
    """
    steps = f"trained {summary.last_step - summary.resume_step} steps"
    if summary.resume_step:
        steps += f" ({summary.resume_step + 1} to {summary.last_step} of {summary.total_steps})"
    elif summary.last_step != summary.total_steps:
        steps += f" of {summary.total_steps}"
    rows = []
    if summary.final_loss is not None:
        first = "n/a" if summary.first_loss is None else f"{summary.first_loss:.4f}"
        rows.append(
            ("loss", f"{first} (step {summary.first_step}) -> {summary.final_loss:.4f} (step {summary.last_step})")
        )
    if summary.validation is not None:
        rows.append(("validation", f"{summary.validation[1]:.4f} (step {summary.validation[0]})"))
    if summary.mean_tps is not None:
        rows.append(("throughput", f"{summary.mean_tps:,.0f} tok/s per device, mean without the first line's steps"))
        rows.append(("peak memory", f"{summary.peak_memory_gib:.2f} GiB"))
    rows.append(("files", str(run_folder)))
    lines = [f"{steps} in {format_duration(summary.wall_time_s)}"]
    lines += [f"  {name:<12} {text}" for name, text in rows]
    lines += [f"    {name:<24} {meaning}" for name, meaning in _files_of(run_folder, renamed or {})]
    return "\n".join(lines)


def _files_of(run_folder: Path, renamed: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    for default_name, meaning in _FILES.items():
        path = run_folder / renamed.get(default_name, default_name)
        if path.exists():
            newest = _newest_checkpoint(path) if default_name == "checkpoint" else None
            row = (newest, "newest checkpoint") if newest else (path, meaning)
            found.append((os.path.relpath(row[0], run_folder), row[1]))
    return found


def _newest_checkpoint(folder: Path) -> Path | None:
    steps = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return max(steps, key=lambda path: int(path.name.removeprefix("step-")), default=None)
