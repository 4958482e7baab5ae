"""Which checkpoint a run starts from, decided from the folders on disk and the configuration alone.

In this order:

1. `load_step` names a step: that checkpoint of the run's own folder, or an error.
2. The *full* checkpoint saved last in the run's own folder. A later model-only one is no resume point, and is said.
   Saved last, not of the highest step: a run that went back with `load_step` leaves its old ones behind.
3. A seed checkpoint (`step-0`, weights only) in the run's own folder.
4. `initial_load_path`: a checkpoint anywhere, weights only unless `initial_load_model_only = false`.
5. Nothing: a fresh start.

A run folder with checkpoints of which none can be resumed from (model-only, damaged) is an error, and not a fresh start
that would one day overwrite them. Folders that were being written when a run died are not checkpoints at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_fp8.checkpoint import fingerprint
from titan_fp8.checkpoint.config import CheckpointSection
from titan_fp8.checkpoint.folder import (
    MANIFEST_NAME,
    METADATA_NAME,
    CheckpointError,
    Manifest,
    by_age,
    complete_checkpoints,
    describe,
    fault_of,
    faulty_checkpoints,
    read_manifest,
    recover,
    step_folder,
)
from titan_fp8.runtime.logging import logger


@dataclass(frozen=True)
class Choice:
    """A checkpoint to load.

    Attributes:
        path: its folder.
        full: everything is loaded, not only the weights.
        manifest: None for one that torchtitan wrote.
    """

    path: Path
    full: bool
    manifest: Manifest | None


def finished_step(folder: Path, config: CheckpointSection, total_steps: int) -> int | None:
    """The step at which the run in `folder` is finished: that of the last one saved, if it is `total_steps` or more."""
    if config.load_step >= 0 or config.create_seed_checkpoint:
        return None
    saved = [entry for entry in by_age(complete_checkpoints(folder)) if entry.manifest.kind != "seed"]
    return saved[-1].manifest.step if saved and saved[-1].manifest.step >= total_steps else None


def choose(folder: Path, config: CheckpointSection) -> Choice | None:
    """The checkpoint to load, None for a fresh start. It changes nothing on disk but what `folder.recover` mends.

    Raises:
        CheckpointError: what was asked for is not there or cannot be used.
    """
    recover(folder)
    if config.load_step >= 0:
        return find(folder, config)
    for path, fault in faulty_checkpoints(folder).items():
        logger.warning("%s does not count as a checkpoint: %s", path, fault)
    chosen = find(folder, config)
    if chosen is not None and chosen.path.parent == folder:
        _say_what_is_passed_over(folder, chosen)
    return chosen


def find(folder: Path, config: CheckpointSection) -> Choice | None:
    """What `choose` chooses in a folder in which there is nothing to mend. Reads only, and says nothing.

    Raises:
        CheckpointError: as `choose`.
    """
    if config.load_step >= 0:
        return _of_step(folder, config.load_step)
    saved, faults = by_age(complete_checkpoints(folder)), faulty_checkpoints(folder)
    newest = {entry.manifest.kind: entry for entry in saved}
    best = newest.get("full") or newest.get("seed")
    if best is not None:
        return Choice(best.path, best.manifest.kind == "full", best.manifest)
    if saved:
        raise CheckpointError(
            f"{folder} holds no full checkpoint to resume from, only {describe(saved)}. To train on from those weights "
            f"with a fresh optimizer, start in another job.dump_folder with checkpoint.initial_load_path = "
            f'"{saved[-1].path}"; set checkpoint.last_save_model_only = false to be able to raise training.steps later'
        )
    if faults:
        path, fault = next(reversed(faults.items()))
        raise CheckpointError(
            f"{folder} holds no complete checkpoint to resume from; {path.name}: {fault}. Remove it to start anew"
        )
    return _initial(config) if config.initial_load_path else None


def check_fingerprint(chosen: Choice, ours: dict[str, Any], config: CheckpointSection) -> None:
    """Raise a CheckpointError if the checkpoint is of another model or recipe and `config` does not allow that."""
    if chosen.manifest is None:
        return
    fingerprint.check(
        str(chosen.path),
        chosen.manifest.fingerprint,
        ours,
        allow_model_change=config.allow_model_change,
        # Weights alone say nothing of how they will be quantized.
        allow_recipe_change=config.allow_recipe_change or not chosen.full,
    )


def _say_what_is_passed_over(folder: Path, chosen: Choice) -> None:
    saved = by_age(complete_checkpoints(folder))
    at = next(number for number, entry in enumerate(saved) if entry.path == chosen.path)
    later = [entry for entry in saved[at + 1 :] if entry.manifest.kind == "model"]
    if later:
        logger.info("resuming from %s; later ones have only weights: %s", chosen.path.name, describe(later))
    left = [entry for entry in saved[:at] if entry.manifest.step > saved[at].manifest.step]
    if left:
        logger.info("resuming from %s, which was saved after %s", chosen.path.name, describe(left))


def _of_step(folder: Path, step: int) -> Choice:
    path = step_folder(folder, step)
    fault = fault_of(path) if path.is_dir() else "there is no such folder"
    if fault is not None:
        there = describe(complete_checkpoints(folder))
        raise CheckpointError(f"checkpoint.load_step = {step}: {path}: {fault}; complete checkpoints: {there}")
    manifest = read_manifest(path)
    if manifest.kind == "model":
        raise CheckpointError(
            f"checkpoint.load_step = {step}: {path} holds the model's weights only and cannot be resumed from; to "
            f'start from them, use another job.dump_folder and checkpoint.initial_load_path = "{path}"'
        )
    return Choice(path, manifest.kind == "full", manifest)


def _initial(config: CheckpointSection) -> Choice:
    path = Path(config.initial_load_path or "").expanduser()
    asked = f'checkpoint.initial_load_path = "{path}"'
    if not path.is_dir():
        raise CheckpointError(f"{asked}: there is no such folder")
    inside = complete_checkpoints(path) or complete_checkpoints(path / "checkpoint")
    if inside:
        raise CheckpointError(f'{asked} is a folder of checkpoints; name one of them, such as "{inside[-1].path}"')
    if (path / METADATA_NAME).is_file() and not (path / MANIFEST_NAME).exists():
        if not config.initial_load_model_only:
            raise CheckpointError(
                f"{asked} was not written by titan_fp8: only its weights can be loaded; set "
                "checkpoint.initial_load_model_only = true"
            )
        return Choice(path, False, None)
    fault = fault_of(path)
    if fault is not None:
        raise CheckpointError(f"{asked} is no complete checkpoint: {fault}")
    manifest = read_manifest(path)
    if not config.initial_load_model_only and manifest.kind != "full":
        raise CheckpointError(
            f"{asked} holds the model's weights only; set checkpoint.initial_load_model_only = true to start from them"
        )
    return Choice(path, not config.initial_load_model_only, manifest)
