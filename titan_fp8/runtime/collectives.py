"""Collectives over one axis of the mesh, as operators that autograd functions and compiled code may contain.

They work on plain tensors along their first dimension and, but for `exchange_rows`, wait for the result. Nothing here
is differentiable; whoever needs the gradient writes the pair (`all_gather` and `reduce_scatter` are each other's).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_ops = torch.ops._c10d_functional


@dataclass(frozen=True)
class Axis:
    """The ranks of one axis of a mesh.

    Attributes:
        group_name: of their process group, as PyTorch registers it: a string, which compiled code can hold.
        ranks: their numbers among all ranks of the job.
        rank: this one's number among them.
    """

    group_name: str
    ranks: tuple[int, ...]
    rank: int

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.ranks)

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Axis":
        """The axis whose ranks are those of `group`."""
        return cls(group.group_name, tuple(dist.get_process_group_ranks(group)), dist.get_rank(group))


def all_reduce(x: Tensor, axis: Axis, operation: str = "sum") -> Tensor:
    """x, combined over the axis: `operation` is "sum" or "max"."""
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), operation, axis.group_name))


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """The ranks' `[n, ...]` one after the other, `[size * n, ...]`. Float8 travels as bytes."""
    is_float8 = x.is_floating_point() and x.element_size() == 1
    data = x.contiguous().view(torch.uint8) if is_float8 else x.contiguous()
    gathered = _ops.wait_tensor(_ops.all_gather_into_tensor(data, axis.size, axis.group_name))
    return gathered.view(x.dtype) if is_float8 else gathered


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part `[n / size, ...]` of the sum of the ranks' x `[n, ...]`; the size divides n."""
    if x.shape[0] % axis.size:
        raise ValueError(f"{list(x.shape)} cannot be scattered over {axis.size} ranks: they do not divide its rows")
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), "sum", axis.size, axis.group_name))


def exchange_equally(x: Tensor, axis: Axis) -> Tensor:
    """x `[size, ...]`, of which row r goes to rank r: the rows that came, in the order of the ranks."""
    return wait_for(exchange_rows(x, [1] * axis.size, [1] * axis.size, axis))


def exchange_rows(x: Tensor, sent: list[int], came: list[int], axis: Axis) -> Tensor:
    """Rows x `[sum(sent), ...]`, in the order of the ranks that they go to: those that will have come once `wait_for`
    returns, `[sum(came), ...]`, in the order of the ranks that they are from."""
    return _ops.all_to_all_single(x.contiguous(), came, sent, axis.group_name)


def wait_for(x: Tensor) -> Tensor:
    """x, which an exchange that was begun gives: it has come, for whatever this stream does next."""
    return _ops.wait_tensor(x)
