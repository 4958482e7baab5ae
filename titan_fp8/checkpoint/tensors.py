"""The tensors of a checkpoint: which there are, whether they fit, and reading them into a live model.

Names follow torchtitan, so that its checkpoints load here: the model's parameters stand under their own names
(`layers.0.attention.wq.weight`), the optimizer's under `optimizer.state.<parameter>.<exp_avg | exp_avg_sq | step>`.
Values are DTensors where the model is sharded; torch.distributed.checkpoint writes and reads whatever slices it needs,
so the number of ranks may change in between.

Wrappers (DistributedDataParallel, activation checkpointing, torch.compile) add prefixes to parameter names; torch's
`get_model_state_dict` takes them off. A tied weight has several names in a module's `state_dict` and is written once,
under the first: two copies could differ, and then it would be chance which one a tied model gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from titan_fp8.checkpoint.choice import Choice
from titan_fp8.checkpoint.folder import CheckpointError
from titan_fp8.checkpoint.host_state import Stateful
from titan_fp8.runtime.patterns import matches
from titan_fp8.runtime.suggest import did_you_mean

OPTIMIZER = "optimizer"
COMPONENTS = ("model", OPTIMIZER, "lr_scheduler", "dataloader", "train_state", "rng")
_MAX_LISTED = 20
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}


class Optimizers(Stateful, Protocol):
    """What the checkpoint asks of an optimizer: tensors by name, the live ones, not copies."""

    def state_dict(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Exclusions:
    """`checkpoint.exclude_from_loading`: names of components, or patterns of parameter names.

    A pattern is a run of name components, `*` allowed, anywhere in a parameter's name (`runtime.patterns`): `output`,
    `layers.1`, `layers.*.attention.wq`. The parameter may be the model's, the checkpoint's or both's: what the model
    alone has keeps its initial value, what the checkpoint alone has is left there.
    """

    names: tuple[str, ...]

    def component(self, name: str) -> bool:
        """Whether the whole component is left alone."""
        return name in self.names

    def parameter(self, name: str) -> bool:
        """Whether the parameter (and its optimizer state) is left alone."""
        return any(matches(pattern, name) for pattern in self.names if pattern not in COMPONENTS)

    def beyond(self, parameters: Iterable[str]) -> list[str]:
        """The entries that are no component and part of none of these names."""
        known = list(parameters)
        return [n for n in self.names if n not in COMPONENTS and not any(matches(n, name) for name in known)]

    def check(self, parameters: Iterable[str], chosen: Choice | None = None, saved: Metadata | None = None) -> None:
        """Raise a CheckpointError that names every entry which matches nothing, or if nothing is left to load.

        Args:
            parameters: names of the model's.
            chosen: the checkpoint that will be loaded; None: nothing will be.
            saved: its metadata.
        """
        if chosen is not None and not chosen.full and self.component("model"):
            raise CheckpointError(
                f'checkpoint.exclude_from_loading: "model" leaves nothing of {chosen.path}, of which the weights '
                "of the model alone are loaded; take it out, or leave checkpoint.initial_load_path out"
            )
        known = {*parameters, *(_parameters_in(saved) if saved is not None else ())}
        # The same command has to go on from what it saved itself, which no longer holds what it was to leave out.
        settled = chosen.manifest.left_out if chosen is not None and chosen.manifest is not None else []
        lost = [name for name in self.beyond(known) if name not in settled]
        if lost:
            modules = {name[:at] for name in known for at, char in enumerate(name) if char == "."}
            likely = {*COMPONENTS, *modules, *known, *(piece for name in known for piece in name.split("."))}
            listed = "; ".join(f'"{name}"{did_you_mean(name, likely)}' for name in lost)
            raise CheckpointError(
                f"checkpoint.exclude_from_loading: {listed}: neither one of {', '.join(COMPONENTS)} nor part of the "
                f"name of a parameter of this model{f' or of {chosen.path}' if chosen is not None else ''}"
            )


def model_tensors(model_parts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """All parameters and persistent buffers of the model under their plain names, each once: the live tensors."""
    tensors: dict[str, Tensor] = {}
    for part in model_parts:
        aliases = _aliases(part)
        state = get_model_state_dict(part)
        tensors |= {name: value for name, value in state.items() if name not in aliases}  # pyright: ignore
    return tensors


def every_name(model_parts: Sequence[nn.Module]) -> list[str]:
    """All names of the model's tensors, the further names of tied weights too."""
    return [name for part in model_parts for name in get_model_state_dict(part)]


def announce_loaded(model_parts: Sequence[nn.Module]) -> None:
    """Load each part from itself, so that hooks on loading (a cache of quantized weights) learn of the new values."""
    for part in model_parts:
        set_model_state_dict(part, get_model_state_dict(part))


def optimizer_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    """The optimizer's tensors under the names they have in a checkpoint: the live tensors."""
    return {f"{OPTIMIZER}.{key}": value for key, value in optimizers.state_dict().items()}


def without(tensors: dict[str, Tensor], exclusions: Exclusions) -> dict[str, Tensor]:
    """The tensors that are loaded, in place, from a checkpoint."""
    return {name: value for name, value in tensors.items() if not exclusions.parameter(_parameter_of(name))}


def export(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors with floating-point values in `dtype` (copies where they had another)."""
    return {name: t.detach().to(dtype) if t.is_floating_point() else t.detach() for name, t in tensors.items()}


def check_fit(
    path: Path,
    saved: Metadata,
    wanted: dict[str, tuple[int, ...]],
    exclusions: Exclusions,
    *,
    model: bool,
    optimizer: bool,
) -> None:
    """Raise a CheckpointError with all `misfits` of the checkpoint in the folder `path`, if there are any."""
    faults = misfits(saved, wanted, exclusions, model=model, optimizer=optimizer)
    if faults:
        raise CheckpointError(
            f"{path} does not fit this model; tensors\n{faults}\nuse the model it was written with, or name what "
            "shall not be loaded in checkpoint.exclude_from_loading: parameters of this model keep their initial "
            "values, those that the checkpoint alone has are left out"
        )


def misfits(
    saved: Metadata, wanted: dict[str, tuple[int, ...]], exclusions: Exclusions, *, model: bool, optimizer: bool
) -> str:
    """What keeps the tensors of a checkpoint from being loaded into `wanted`, all at once; empty when nothing does.

    Args:
        saved: the checkpoint's metadata.
        wanted: shapes of the tensors to fill, by their names in the checkpoint.
        model: the model is loaded, so every tensor of a model in the checkpoint must have a place.
        optimizer: the same for the optimizer.
    """
    shapes = _shapes_in(saved)
    placed = {name for name in shapes if optimizer and _is_optimizer(name)}
    placed |= {name for name in shapes if model and not _is_other(name)}
    missing = sorted(wanted.keys() - shapes.keys())
    unexpected = sorted(n for n in placed - wanted.keys() if not exclusions.parameter(_parameter_of(n)))
    reshaped = sorted(name for name in wanted.keys() & shapes.keys() if wanted[name] != shapes[name])
    lines = _listed("not in the checkpoint", missing)
    lines += _listed("in the checkpoint, but not in this model", unexpected)
    pairs = [f"{n}: {list(shapes[n])} in the checkpoint, {list(wanted[n])} here" for n in reshaped]
    lines += _listed("of another shape", pairs)
    return "\n".join(lines)


def _aliases(part: nn.Module) -> set[str]:
    """The further names of tied tensors, without the prefixes of wrappers."""
    root = part.module if isinstance(part, DistributedDataParallel) else part
    named = chain(root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False))
    seen: set[int] = set()
    aliases = set()
    for name, tensor in named:
        if id(tensor) in seen:
            aliases.add(".".join(piece for piece in name.split(".") if piece not in _WRAPPERS))
        seen.add(id(tensor))
    return aliases


def _shapes_in(saved: Metadata) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors by name."""
    entries = saved.state_dict_metadata.items()
    return {name: tuple(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _parameters_in(saved: Metadata) -> set[str]:
    """The model's tensors in a checkpoint, and the parameters whose optimizer state is there."""
    names = _shapes_in(saved)
    return {_parameter_of(name) for name in names if not _is_other(name) or name.startswith(f"{OPTIMIZER}.state.")}


def _parameter_of(name: str) -> str:
    """The parameter that a tensor of a checkpoint belongs to."""
    if not _is_optimizer(name):
        return name
    return name.removeprefix(f"{OPTIMIZER}.state.").rpartition(".")[0]


def _is_optimizer(name: str) -> bool:
    return name.startswith(f"{OPTIMIZER}.")


def _is_other(name: str) -> bool:
    """Whether a tensor of a checkpoint (of torchtitan's, too) is not the model's."""
    return name.split(".")[0] in COMPONENTS


def _listed(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    rest = [f"    ... and {len(names) - _MAX_LISTED} more"] if len(names) > _MAX_LISTED else []
    return [f"  {title}:", *(f"    {name}" for name in names[:_MAX_LISTED]), *rest]
