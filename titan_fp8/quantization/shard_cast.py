"""Casting the shards of weights to the codes that the whole weights have.

FSDP cuts a weight `[N, K]` by rows, in chunks of ceil(N / ranks); the last shards may be short or empty. The weights of
experts `[E, N, K]`, which are cast by rows alone, it cuts by experts or each expert by rows. A rank casts its own rows,
but a scale may belong to rows that other ranks hold. What a scale needs to know of the whole weight is
its *statistics*, a vector of int32 that every rank fills with what its rows tell and of which an integer MAX over the
ranks makes the truth:

    recipe       statistics                                     size
    tensorwise   bits of the largest |w|                        1
    rowwise      bits of the row scales; 0 for others' rows     N, or E * N
    blockwise    bits of the largest |w| of each 128x128 tile   ceil(N/128) * K/128

Bits of fp32 numbers that are not negative order as the numbers do, NaN above all, so nothing that is not finite gets
lost on the way. A row lies on one rank, so rowwise codes need no statistics; the scales travel because every rank
needs all of them beside the gathered codes.

The statistics of many weights travel together: one buffer, one all-reduce. The kernels are those of a whole weight, so
the codes have the same bits on every mesh. Whoever keeps a weight's statistics can make the codes of its shard again
without asking anybody (`cast_shard`).

E experts, N out features, K in features, n rows of a shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_fp8.kernels import blockwise, float8
from titan_fp8.quantization.recipes import Float8Recipe, Granularity
from titan_fp8.runtime.collectives import Axis, all_reduce

_SLOT_MULTIPLE = 4  # 16 bytes: Triton compiles a kernel anew for a pointer of another alignment


class ShardAxis(NamedTuple):
    """The ranks that hold the shards of a weight, and which of them this one is."""

    group: dist.ProcessGroup | None
    rank: int
    ranks: int


@dataclass(frozen=True)
class Shard:
    """The part of a weight that this rank casts.

    Attributes:
        tensor: `[n, K]`, or of experts `[e, N, K]` or `[E, n, K]`; bf16, fp16 or fp32.
        recipe: how the weight is cast.
        shape: of the weight, `[N, K]` or `[E, N, K]`.
        dim: the dimension along which it is cut.
        first: where in this dimension the shard begins.
        axis: ranks that hold other parts of the weight that the shard is of, whose one scale, if it has one for all,
            is that of the parts together.
        amax: int32 `[]`, the bits of the largest |w| of the shard, where that is known and the recipe needs it.
        casts: whether codes are wanted, or the weight's scale and statistics alone.
    """

    tensor: Tensor
    recipe: Float8Recipe
    shape: Sequence[int]
    dim: int
    first: int
    axis: Axis | None = None
    amax: Tensor | None = None
    casts: bool = True

    @classmethod
    def of(
        cls,
        tensor: Tensor,
        recipe: Float8Recipe,
        shape: Sequence[int],
        shards: ShardAxis,
        axis: Axis | None = None,
        amax: Tensor | None = None,
        *,
        casts: bool = True,
    ) -> "Shard":
        """The shard `tensor` of a weight of this shape that is sharded over `shards`."""
        dim = cut_dim(tensor.shape, shape)
        first = min(shards.rank * chunk_length(shape[dim], shards.ranks), shape[dim])
        return cls(tensor, recipe, shape, dim, first, axis, amax, casts)

    @property
    def statistics_size(self) -> int:
        """How many int32 the weight's statistics are."""
        match self.recipe.granularity:
            case Granularity.TENSOR:
                return 1
            case Granularity.ROW:
                return prod(self.shape[:-1])
            case Granularity.BLOCK:
                return blockwise.blocks(self.shape[0]) * (self.tensor.shape[1] // blockwise.BLOCK)

    def place_in(self, statistics: Tensor) -> Tensor:
        """Of the weight's statistics those that this shard tells, a view."""
        if self.recipe.granularity is not Granularity.ROW:
            return statistics
        return statistics.view(*self.shape[:-1]).narrow(self.dim, self.first, self.tensor.shape[self.dim])


class CastShard(NamedTuple):
    """What is made of a shard.

    Attributes:
        codes: of its rows, in its shape; None unless the shard `casts`.
        scale: of the whole weight, as `casts.cast_weight` of the whole weight gives it; of experts `[E, N]`.
        statistics: int32, of the whole weight, in memory that the weights of one call share.
    """

    codes: Tensor | None
    scale: Tensor
    statistics: Tensor


class _Measured(NamedTuple):
    """What a shard tells about the weight: int32 values in the shape of its place in the statistics; and its codes, if
    they need no more than that."""

    values: Tensor
    codes: Tensor | None


def cut_dim(shard: Sequence[int], whole: Sequence[int]) -> int:
    """The dimension along which a weight was cut."""
    return 1 if len(whole) == 3 and tuple(shard[1:]) != tuple(whole[1:]) else 0


def is_cut_by_rows(shard: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether FSDP may have made a shard of this shape of a weight `[N, K]` or `[E, N, K]` without cutting rows."""
    if len(whole) not in (2, 3) or len(shard) != len(whole) or shard[-1] != whole[-1]:
        return False
    return len(whole) == 2 or shard[1] == whole[1] or shard[0] == whole[0]


def chunk_length(length: int, ranks: int) -> int:
    """Length of a full shard, to which the codes of a shorter one are padded."""
    return -(-length // ranks)


@torch.no_grad()
def cast_shards(shards: Sequence[Shard], group: dist.ProcessGroup | None) -> list[CastShard]:
    """Cast shards of any recipes, on one device, with one all-reduce over `group` (none if that is None)."""
    measured = [_measure(shard) for shard in shards]
    sizes = [shard.statistics_size for shard in shards]
    slots = [-(-size // _SLOT_MULTIPLE) * _SLOT_MULTIPLE for size in sizes]
    buffer = torch.zeros(sum(slots), dtype=torch.int32, device=shards[0].tensor.device)
    statistics = [slot[:size] for slot, size in zip(buffer.split(slots), sizes, strict=True)]
    pairs = [
        (shard.place_in(whole), part.values)
        for shard, whole, part in zip(shards, statistics, measured, strict=True)
        if part.values.numel()
    ]
    if pairs:
        places, values = zip(*pairs, strict=True)
        torch._foreach_copy_(places, values)  # pyright: ignore[reportPrivateImportUsage]
    if group is not None:
        dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=group)
    _reduce_over_parts(shards, statistics)
    return [_finish(*each) for each in zip(shards, measured, statistics, strict=True)]


@torch.no_grad()
def cast_shard(shard: Shard, statistics: Tensor) -> Tensor:
    """The codes of a shard alone, the same bits as `cast_shards` makes, from the weight's statistics that it gave."""
    match shard.recipe.granularity:
        case Granularity.TENSOR:
            return _cast_tensor(shard, statistics)[0]
        case Granularity.ROW:
            return _cast_rows(shard)[0]
        case Granularity.BLOCK:
            return _cast_blocks(shard, statistics)


def _reduce_over_parts(shards: Sequence[Shard], statistics: Sequence[Tensor]) -> None:
    """Where tensor parallelism has divided a weight that has one scale: its largest value over all parts, one
    all-reduce an axis. Tiles lie in one part; rows may be cut, and each part then has its own powers of two."""
    of_tensors: dict[Axis, list[Tensor]] = {}
    for shard, values in zip(shards, statistics, strict=True):
        if shard.axis is not None and shard.recipe.granularity is Granularity.TENSOR:
            of_tensors.setdefault(shard.axis, []).append(values)
    for axis, values in of_tensors.items():
        reduced = all_reduce(torch.cat(values), axis, "max")
        torch._foreach_copy_(values, list(reduced.split(1)))  # pyright: ignore[reportPrivateImportUsage]


def _measure(shard: Shard) -> _Measured:
    tensor = shard.tensor
    match shard.recipe.granularity:
        case Granularity.TENSOR:
            amax = float8.amax(tensor) if shard.amax is None else shard.amax
            return _Measured(amax.view(1), None)
        case Granularity.ROW:
            codes, scale = _cast_rows(shard)
            return _Measured(scale.view(torch.int32).view(tensor.shape[:-1]), codes if shard.casts else None)
        case Granularity.BLOCK:
            return _Measured(blockwise.block_amax(tensor, shard.first, shard.shape[0]).view(-1), None)


def _finish(shard: Shard, measured: _Measured, statistics: Tensor) -> CastShard:
    dtype, power_of_two = shard.recipe.weight_dtype, shard.recipe.power_of_two_scales
    match shard.recipe.granularity:
        case Granularity.TENSOR if shard.casts:
            return CastShard(*_cast_tensor(shard, statistics), statistics)
        case Granularity.TENSOR:
            return CastShard(None, blockwise.block_scale(statistics.view(()), dtype, power_of_two), statistics)
        case Granularity.ROW:
            scale = statistics.view(torch.float32)
            scale = scale.view(-1, 1) if len(shard.shape) == 2 else scale.view(*shard.shape[:-1])
            return CastShard(measured.codes, scale, statistics)
        case Granularity.BLOCK:
            scale = blockwise.block_scale(_of_blocks(shard, statistics), dtype, power_of_two)
            return CastShard(_cast_blocks(shard, statistics) if shard.casts else None, scale, statistics)


def _cast_tensor(shard: Shard, statistics: Tensor) -> tuple[Tensor, Tensor]:
    dtype = shard.recipe.weight_dtype
    codes, _, scale = float8.cast_tensor(shard.tensor, statistics.view(()), dtype, rows=True, columns=False)
    assert codes is not None
    return codes, scale


def _cast_rows(shard: Shard) -> tuple[Tensor, Tensor]:
    tensor = shard.tensor
    codes, scale = float8.cast_rows(tensor.reshape(-1, tensor.shape[-1]), shard.recipe.weight_dtype)
    return codes.view(tensor.shape), scale


def _cast_blocks(shard: Shard, statistics: Tensor) -> Tensor:
    dtype, power_of_two = shard.recipe.weight_dtype, shard.recipe.power_of_two_scales
    amax = _of_blocks(shard, statistics)
    return blockwise.cast_blocks_from_amax(shard.tensor, amax, dtype, power_of_two, shard.first)


def _of_blocks(shard: Shard, statistics: Tensor) -> Tensor:
    """Statistics as the amax of tiles, `[ceil(N/128), K/128]`."""
    return statistics.view(blockwise.blocks(shard.shape[0]), -1)
