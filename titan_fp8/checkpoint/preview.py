"""Will a run find what it is to load? Asked before anything of the run exists, of the folders and the meta model.

The same rules as `Checkpointer.load` has, as far as manifests, names and shapes tell; tensor files are not opened.
Nothing is written and no other rank is asked. There is no optimizer yet, so its tensors are left to `load`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from titan_fp8.checkpoint import choice, folder, tensor_files, tensors
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
        model: any model with the parameters of the run's, all of them, on any device; None when there is none to ask.
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
    if folder.recoverable(checkpoints):
        return  # which of them counts is known when the run has put them back
    exclusions = tensors.Exclusions(tuple(config.exclude_from_loading))
    checks: list[Callable[[], None]] = []
    try:
        chosen, saved = _find(checkpoints, config)
    except CheckpointError as error:
        faults = [str(error)]
        # Names that the model lacks may be those of the checkpoint that was meant, if there is any.
        known = config.initial_load_path is None and not folder.complete_checkpoints(checkpoints)
        if model is not None and known:
            checks.append(lambda: exclusions.check(model.state_dict()))
    else:
        faults = []
        if model is not None:
            checks.append(lambda: exclusions.check(model.state_dict(), chosen, saved))
        if chosen is not None and saved is not None and fingerprint is not None:
            checks.append(lambda: _check_fit(chosen, saved, config, exclusions, model, fingerprint))
    faults += [fault for check in checks if (fault := _fault(check)) is not None]
    if faults:
        raise CheckpointError("\n".join(faults))


def _find(checkpoints: Path, config: CheckpointSection) -> tuple[choice.Choice | None, Metadata | None]:
    """The checkpoint that will be loaded and its metadata; None and None when there will be none."""
    chosen = choice.find(checkpoints, config)
    return chosen, None if chosen is None else tensor_files.read_metadata(chosen.path)


def _check_fit(
    chosen: choice.Choice,
    saved: Metadata,
    config: CheckpointSection,
    exclusions: tensors.Exclusions,
    model: nn.Module | None,
    fingerprint: dict[str, Any],
) -> None:
    choice.check_fingerprint(chosen, fingerprint, config)
    if model is None or exclusions.component("model"):
        return
    wanted = tensors.without(tensors.model_tensors([model]), exclusions)
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    tensors.check_fit(chosen.path, saved, shapes, exclusions, model=True, optimizer=False)


def _fault(check: Callable[[], None]) -> str | None:
    try:
        check()
    except CheckpointError as error:
        return str(error)
    return None
