"""Where metrics go besides `metrics.jsonl`: TensorBoard and Weights & Biases.

A tracker takes the record of a step and shows each of its numbers as a curve named by its key. Both have to cope with
a run that starts again in the same folder: resumed from the checkpoint of step N, what an earlier process reported of
later steps must not show; started anew, the earlier run's curves must not mix with the new ones.
"""

import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from titan_fp8.observability.config import MetricsSection
from titan_fp8.observability.files import atomic_write, disk_errors
from titan_fp8.runtime.errors import UserError


class Tracker(Protocol):
    """A receiver of metrics."""

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Take the numbers of `record`; None and what is not finite is left out."""
        ...

    def flush(self) -> None:
        """Hand over what is waiting."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


def build_trackers(config: MetricsSection, run_folder: Path, *, rank: int, resume_step: int) -> list[Tracker]:
    """The trackers of this rank: none on ranks other than 0 unless `metrics.save_for_all_ranks` is set.

    Raises:
        UserError: `metrics.enable_wandb` without the package, or a folder that cannot be written.
    """
    if rank != 0 and not config.save_for_all_ranks:
        return []
    name = f"rank_{rank}" if config.save_for_all_ranks else None
    trackers: list[Tracker] = []
    if config.enable_tensorboard:
        folder = run_folder / config.save_tb_folder
        trackers.append(TensorBoardTracker(folder / name if name else folder, resume_step=resume_step))
    if config.enable_wandb:
        trackers.append(WandbTracker(run_folder, rank_name=name, resume_step=resume_step))
    return trackers


def _curves(record: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


class TensorBoardTracker:
    """Event files in `folder`.

    Resuming after step N tells TensorBoard to hide what the earlier event files say of later steps (`purge_step`). A
    fresh start moves them into a sub-folder `previous_1`, `previous_2`, ..., which TensorBoard shows as runs of their
    own.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if resume_step == 0:
                _set_aside_event_files(folder)
            self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)
        self._folder = folder

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """One scalar a key."""
        with disk_errors(self._folder):
            for key, value in _curves(record).items():
                self._writer.add_scalar(key, value, step)

    def flush(self) -> None:
        """Write what is queued to the event file."""
        with disk_errors(self._folder):
            self._writer.flush()

    def close(self) -> None:
        """Write what is queued and close the event file."""
        with disk_errors(self._folder):
            self._writer.close()


def _set_aside_event_files(folder: Path) -> None:
    event_files = [path for path in folder.iterdir() if path.is_file() and "tfevents" in path.name]
    if not event_files:
        return
    number = 1
    while (folder / f"previous_{number}").exists():
        number += 1
    target = folder / f"previous_{number}"
    target.mkdir()
    for path in event_files:
        path.rename(target / path.name)


class WandbTracker:
    """A run on Weights & Biases.

    The run's id is kept in the run's folder, so that a resumed run goes on in the same curves. W&B cannot take a point
    back: it ignores the steps between the checkpoint and the point where the earlier process ended, which is harmless
    as they repeat. Project, team and name come from WANDB_PROJECT (default titan_fp8), WANDB_TEAM and WANDB_RUN_NAME;
    wandb reads its other variables itself. The resolved configuration is taken from the folder's `config.toml`.

    Raises:
        UserError: the package wandb is not installed.
    """

    def __init__(self, run_folder: Path, *, rank_name: str | None, resume_step: int) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "metrics.enable_wandb: the package wandb is not installed; pip install 'titan-fp8[wandb]'"
            ) from error
        id_file = run_folder / (f"wandb_run_id_{rank_name}" if rank_name else "wandb_run_id")
        known_id = id_file.read_text().strip() if resume_step and id_file.exists() else None
        config_file = run_folder / "config.toml"
        name = os.environ.get("WANDB_RUN_NAME")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "titan_fp8"),
            entity=os.environ.get("WANDB_TEAM"),
            name=f"{name}-{rank_name}" if name and rank_name else name or rank_name,
            group=name if rank_name else None,
            dir=str(run_folder),
            config=tomllib.loads(config_file.read_text()) if config_file.exists() else None,
            id=known_id,
            resume="allow" if known_id else None,
        )
        atomic_write(id_file, f"{self._run.id}\n")

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """One curve a key."""
        self._run.log(_curves(record), step=step)

    def flush(self) -> None:
        """Nothing to do: wandb uploads from a process of its own."""

    def close(self) -> None:
        """Wait for the upload and end the run."""
        self._run.finish()
