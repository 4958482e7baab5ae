"""Sums of squares that whoever wrote a tensor found on the way, so that its norm needs no pass of its own.

They are those of a whole tensor, noted by who wrote it. Whoever has views of it that cover it, and knows that nothing
has been written to them since, may take them in place of reading, once.

Most writes show in the version counter that views share, or in that of a DTensor, which begins with zero; then nothing
is known any more. But not all: those of `torch._foreach_*` to DTensors do not, nor do collectives. So taking them is
for callers that see all that happens in between.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_ATTRIBUTE = "_titan_fp8_squares"


class _Known(NamedTuple):
    squares: Tensor
    version: int


_UNKNOWN = _Known(torch.empty(0), -1)


def note_squares(whole: Tensor, squares: Tensor) -> None:
    """Say that the squares of all that `whole` holds now add up to the sum of `squares`, fp32 `[n]`."""
    setattr(whole, _ATTRIBUTE, _Known(squares, whole._version))


def take_known_squares(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What is known of the squares of `tensors`, each fp32 `[n]` and of several of them together, and those of which
    nothing is, as of all from now on. Of DTensors it is about what this rank holds."""
    parts: dict[int, list[Tensor]] = {}
    wholes: dict[int, Tensor] = {}
    for tensor in tensors:
        local = _local(tensor)
        whole = local if local._base is None else local._base
        wholes[id(whole)] = whole
        parts.setdefault(id(whole), []).append(tensor)
    known, rest = [], []
    for key, whole in wholes.items():
        noted: Any = getattr(whole, _ATTRIBUTE, _UNKNOWN)
        is_written = any(isinstance(part, DTensor) and part._version for part in parts[key])
        if noted.version == whole._version and not is_written and _cover(list(map(_local, parts[key])), whole):
            known.append(noted.squares)
            delattr(whole, _ATTRIBUTE)
        else:
            rest += parts[key]
    return known, rest


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _cover(views: Sequence[Tensor], whole: Tensor) -> bool:
    """Whether dense views are all of `whole`, each element once."""
    end = whole.storage_offset()
    for view in sorted(views, key=Tensor.storage_offset):
        if view.storage_offset() != end or not view.is_contiguous():
            return False
        end += view.numel()
    return end == whole.storage_offset() + whole.numel()
