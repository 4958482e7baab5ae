"""Memory of a unit's own for the sums of its gradients over microbatches.

FSDP leaves the gradients of a microbatch, summed over ranks, in new memory, and adds later ones to them. Where several
microbatches make a step, two things can be saved:

- The sums of the first microbatch take the places of activations that its backward pass frees. They are of other sizes,
  and what is left between them does not fit the activations of the next microbatch. Made before the first forward pass,
  the sums of all units lie side by side, and activations find the memory that they had.
- What the ranks' gradients are added up with can go on and add the result to the sum: the pass over them that FSDP
  makes, two reads and a write, is a read and a write.

A unit's sums are a vector `[n]`, n the elements of its shard and of its padding; FSDP takes views of it as `.grad`, so
what is kept of a gradient beyond the step, without a copy, changes in the next one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


class GradientSums:
    """The sums of one unit.

    Args:
        modules: that hold the unit's parameters themselves.
        dtype: in which gradients are summed over ranks.
    """

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
        self._modules = list(modules)
        self._dtype = dtype
        self._parameters: list[nn.Parameter] = []
        self._sums: Tensor | None = None

    def create(self) -> None:
        """Take the memory, uninitialized, before the first forward pass, where the parameters are by now. Not for those
        that are cut along two dimensions of a mesh, or are of another dtype: FSDP casts their gradients after all."""
        own = [each for module in self._modules for each in module.parameters(recurse=False) if each.requires_grad]
        shards = [_padded_shard(each) for each in own]
        if own and None not in shards and all(each.dtype == self._dtype for each in own):
            self._parameters = own
            numel = sum(shard for shard in shards if shard is not None)
            self._sums = torch.empty(numel, dtype=self._dtype, device=own[0].device)

    def take(self, numel: int) -> tuple[Tensor, bool] | None:
        """The memory `[numel]`, and whether there are sums in it to add to. These are then no parameter's `.grad` until
        FSDP makes them so again.

        None where FSDP is to add by itself: no memory was taken, not all parameters have gradients this time, or they
        have somebody else's.

        Args:
            numel: of this rank's part of the gradients that are reduced now.
        """
        sums = self._sums
        if sums is None or numel != sums.numel():
            return None
        adds = any(parameter.grad is not None for parameter in self._parameters)
        if adds and not all(_lies_in(sums, parameter.grad) for parameter in self._parameters):
            return None
        for parameter in self._parameters:
            parameter.grad = None
        return sums, adds


def create_before_forward(model: nn.Module, kept: Iterable[GradientSums]) -> None:
    """Have these sums created when the model is called for the first time: all else that lasts has its memory then."""

    def create(*_: object) -> None:
        handle.remove()
        for sums in kept:
            sums.create()

    handle = model.register_forward_pre_hook(create, prepend=True)  # before FSDP gathers anything


def _padded_shard(parameter: nn.Parameter) -> int | None:
    """Elements of a shard as FSDP reduces it: along the dimension that is cut, all ranks have as many rows. None if it
    is cut otherwise."""
    if not isinstance(parameter, DTensor) or len(parameter.placements) != 1:
        return None
    (placement,) = parameter.placements
    if not isinstance(placement, Shard):
        return None
    ranks, length = parameter.device_mesh.size(), parameter.shape[placement.dim]
    return -(-length // ranks) * (parameter.numel() // length)


def _lies_in(sums: Tensor, grad: Tensor | None) -> bool:
    """Whether a gradient is a part of `sums`."""
    if not isinstance(grad, DTensor):
        return False
    return grad.to_local().untyped_storage().data_ptr() == sums.untyped_storage().data_ptr()
