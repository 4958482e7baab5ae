"""The norm of all gradients together, and clipping by it.

Under FSDP each rank holds a slice of every gradient, so the norm of what a rank holds is not the norm. What to add up
depends on how a gradient is laid out, tensor by tensor:

- a plain tensor (one GPU, DDP, a parameter left out of FSDP) is whole on every rank: its square counts once;
- a DTensor that is sharded along some axes of its mesh is summed over exactly those axes. Along an axis on which it is
  replicated (the outer axis of HSDP) every rank has the same slice, and summing would count it twice.

    sharded over axis "shard" of ("replicate" 2, "shard" 2):   rank 0: a | rank 1: b | rank 2: a | rank 3: b
    norm^2 = |a|^2 + |b|^2                                     one all-reduce over "shard"

So gradients are grouped by (mesh, sharded axes): one scalar all-reduce a group and axis, whatever the number of
parameters. Norms are taken in fp32 also of bf16 gradients. The result stays on the device: nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_fp8.kernels import adam
from titan_fp8.runtime.known_squares import take_known_squares

_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds the same, so that both clip by the same factor

_Layout = tuple[DeviceMesh, tuple[int, ...]] | None  # None: whole on every rank


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    *,
    foreach: bool | None = None,
    one_read: bool = False,
    is_untouched: bool = False,
    stages: dist.ProcessGroup | None = None,
) -> Tensor:
    """Scale the gradients of `parameters` in place so that their common 2-norm is at most `max_norm`.

    The same as `torch.nn.utils.clip_grad_norm_` of the whole gradients in one process: the factor is
    `min(max_norm / (norm + 1e-6), 1)`. All ranks must call it with the same parameters (it all-reduces).

    Args:
        parameters: plain tensors and DTensors, mixed; those without a gradient are left out.
        max_norm: at least 0. 0 measures the norm and leaves the gradients alone.
        foreach: torch's batched kernels; None lets torch choose (they are used for what they support).
        one_read: measure by `kernels.adam.square_sum` instead.
        is_untouched: nothing has been written to the gradients since the backward pass, by nobody, so that with
            `one_read` those whose squares are known (`runtime/known_squares.py`) need not be read.
        stages: ranks that have other parameters of the same model, those of other pipeline stages.

    Returns:
        The norm before clipping: a plain fp32 tensor `[]`, the same on every rank, inf or NaN where a gradient is.

    Raises:
        ValueError: `max_norm` is negative or NaN.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm = {max_norm}: must be at least 0 (0 measures without clipping)")
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in listed if p.grad is not None]
    groups: dict[_Layout, list[Tensor]] = {}
    for grad in grads:
        groups.setdefault(_layout(grad), []).append(grad)
    squares = [
        _square_sum(layout, of_layout, foreach, one_read=one_read, is_untouched=is_untouched)
        for layout, of_layout in groups.items()
    ]
    if stages is not None and listed:
        squares.append(torch.zeros((), device=_local(listed[0]).device))  # a stage may have no gradients
    norm = _root_of_sum(squares, stages)
    if max_norm > 0 and groups:
        factor = clip_factor(norm, max_norm)
        for of_layout in groups.values():
            _scale([_local(grad) for grad in of_layout], factor, foreach)
    return norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of the 2-norm `norm`, a tensor `[]`, are multiplied by so that it is at most `max_norm`."""
    return (max_norm / (norm + _EPS)).clamp(max=1.0)


class GradNorm:
    """The norm of gradients that do not live at the same time: each is added before it is dropped.

    On a GPU they may come on several streams (FSDP's are those of its reductions), so nothing is added up before
    `take`, which is called when all of them are done.
    """

    def __init__(self) -> None:
        self._squares: dict[_Layout, list[Tensor]] = {}

    @torch.no_grad()
    def add(self, grad: Tensor) -> None:
        """Take one gradient, a plain tensor or a DTensor."""
        layout, local = _layout(grad), _local(grad)
        square = torch.linalg.vector_norm(local, dtype=torch.float32).square()
        self._squares.setdefault(layout, []).append(square)

    @torch.no_grad()
    def take(self) -> Tensor:
        """The norm of what was added since the last call, as `clip_grad_norm_` returns it, by all ranks together. Not
        for a pipeline, whose stages have other parameters."""
        squares = []
        for layout, parts in self._squares.items():
            for part in parts:
                if part.is_cuda:  # its memory belongs to the stream that it came on
                    part.record_stream(torch.cuda.current_stream(part.device))
            squares.append(_over_ranks(layout, torch.stack(parts).sum()))
        self._squares = {}
        return _root_of_sum(squares)


def _layout(grad: Tensor) -> _Layout:
    """Where the pieces of `grad` are: its mesh and the mesh axes that it is split along."""
    if not isinstance(grad, DTensor):
        return None
    if any(placement.is_partial() for placement in grad.placements):
        raise AssertionError(f"a gradient that is still to be reduced has no norm: {grad.placements}")
    return grad.device_mesh, tuple(i for i, p in enumerate(grad.placements) if not p.is_replicate())


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _square_sum(
    layout: _Layout, grads: list[Tensor], foreach: bool | None, *, one_read: bool, is_untouched: bool
) -> Tensor:
    """Sum of all squares of one group's gradients, over all ranks: fp32 `[]`."""
    known, unread = take_known_squares(grads) if one_read and is_untouched else ([], grads)
    locals_ = [_local(grad) for grad in unread]
    present = [t for t in locals_ if t.numel() > 0]  # a rank past the end of a short dim holds an empty slice
    if one_read and (known or present):
        squares = [torch.cat(known).sum()] if known else []
        square = sum(squares, adam.square_sum(present)) if present else squares[0]
    elif present:
        norms = _norms(present, foreach)
        square = torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()
    else:
        square = torch.zeros((), device=locals_[0].device)
    return _over_ranks(layout, square)


def _over_ranks(layout: _Layout, square: Tensor) -> Tensor:
    """Add up what the ranks hold of one group's gradients."""
    if layout is not None:
        mesh, sharded_axes = layout
        square = square.to(mesh.device_type)  # offloaded gradients live on the CPU, their group on the GPU
        for axis in sharded_axes:
            dist.all_reduce(square, group=mesh.get_group(axis))
    return square


def _root_of_sum(squares: list[Tensor], stages: dist.ProcessGroup | None = None) -> Tensor:
    if not squares and stages is None:
        return torch.zeros(())
    total = torch.stack([square.to(squares[0].device) for square in squares]).sum() if squares else torch.zeros(())
    if stages is not None:
        dist.all_reduce(total, group=stages)
    return total.sqrt()


def _norms(tensors: list[Tensor], foreach: bool | None) -> list[Tensor]:
    if foreach is False:
        return [torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors]
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float32))  # pyright: ignore[reportPrivateImportUsage]


def _scale(tensors: list[Tensor], factor: Tensor, foreach: bool | None) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    for device, batch in by_device.items():
        local_factor = factor.to(device)
        if foreach is False:
            for tensor in batch:
                tensor.mul_(local_factor)
        else:
            torch._foreach_mul_(batch, local_factor)  # pyright: ignore[reportPrivateImportUsage]
