"""Will a run find what it is to load? Asked before anything of the run exists, of the folders and the meta model.

The same rules as `Checkpointer.load` has, as far as names and manifests tell; tensor files are not opened. Nothing is
written and no other rank is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from titan_fp8.checkpoint import choice, folder, tensors
from titan_fp8.checkpoint.config import CheckpointSection
from titan_fp8.checkpoint.folder import CheckpointError


def check_loading(
    config: CheckpointSection,
    run_folder: Path,
    *,
    model: nn.Module | None,
    fingerprint: dict[str, Any] | None,
    total_steps: int,
) -> None:
    """Refuse what `Checkpointer.load` would refuse, all of it at once.

    Args:
        config: `[checkpoint]`.
        run_folder: `job.dump_folder`, which need not exist.
        model: any model with the parameters of the run's; None when there is none to ask.
        fingerprint: as the `Checkpointer` gets it; None when it is not known.
        total_steps: `training.steps`.

    Raises:
        CheckpointError: with one line a fault, and more where fields are compared.
    """
    if not config.enable:
        return
    checkpoints = run_folder / config.folder
    try:
        _check(config, checkpoints, model, fingerprint, total_steps)
    except OSError as error:
        raise CheckpointError(f"reading {checkpoints} failed: {type(error).__name__}: {error}") from error


def _check(
    config: CheckpointSection,
    checkpoints: Path,
    model: nn.Module | None,
    fingerprint: dict[str, Any] | None,
    total_steps: int,
) -> None:
    if checkpoints.exists() and not checkpoints.is_dir() and not config.load_only:
        raise CheckpointError(f"checkpoint.folder: {checkpoints} is a file; name a folder")
    if config.create_seed_checkpoint or choice.finished_step(checkpoints, config, total_steps) is not None:
        return  # nothing will be loaded
    checks: list[Callable[[], None]] = []
    if model is not None and config.exclude_from_loading:
        exclusions = tensors.Exclusions(tuple(config.exclude_from_loading))
        checks.append(lambda: exclusions.check(model.state_dict()))
    if not folder.recoverable(checkpoints):  # which of them counts is known when the run has put them back
        checks.append(lambda: _check_choice(checkpoints, config, fingerprint))
    faults = [fault for check in checks if (fault := _fault(check)) is not None]
    if faults:
        raise CheckpointError("\n".join(faults))


def _check_choice(checkpoints: Path, config: CheckpointSection, fingerprint: dict[str, Any] | None) -> None:
    chosen = choice.find(checkpoints, config)
    if chosen is not None and fingerprint is not None:
        choice.check_fingerprint(chosen, fingerprint, config)


def _fault(check: Callable[[], None]) -> str | None:
    try:
        check()
    except CheckpointError as error:
        return str(error)
    return None
