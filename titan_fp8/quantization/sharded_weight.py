"""A weight that FSDP gathers as float8 codes: `ShardableWeight` in this format.

What travels is the shard's codes, one byte a value; what arrives becomes a `GatheredFloat8Weight`. Codes are cast on
the way if they must be, or ahead (`refresh`), together with all ranks that hold shards (`shard_cast.py`). They are kept
for later gathers; or the weight's statistics are, a few bytes, from which each gather makes them by itself.

E experts, N out features, K in features, n rows of a shard.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_fp8.quantization.gathered_weight import GatheredFloat8Weight
from titan_fp8.quantization.shard_cast import (
    CastShard,
    Shard,
    ShardAxis,
    cast_shard,
    cast_shards,
    chunk_length,
    cut_dim,
    is_cut_by_rows,
)
from titan_fp8.quantization.shardable import ShardableWeight
from titan_fp8.quantization.weight_state import Float8WeightState
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.told_signature import told_signature


class ShardableFloat8Weight(ShardableWeight):
    """See `ShardableWeight`."""

    state: Float8WeightState

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "ShardableFloat8Weight":
        return ShardableFloat8Weight(inner["tensor"], meta)

    @classmethod
    def cast_all(cls, weights: Sequence[Any], shapes: Sequence[Sequence[int]], axis: ShardAxis, *, ahead: bool) -> None:
        """See `ShardableWeight`."""
        refresh(weights, shapes, axis, ahead=ahead)

    @told_signature
    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """What FSDP sends: the codes `[chunk, K]`, as bytes. Casts if it must, together with all ranks of `mesh`.

        Where all shards are equally long, the bytes are given out in the dtype in which the unit's other parameters are
        gathered, `[chunk, K / 2]` for a 16-bit one: FSDP copies wider elements faster. Where it pads, or puts parts of
        experts together, it wants K. Codes that do not travel through FSDP's memory (`state.exchange`)
        have something sent that stands for them.

        Args:
            mesh: the ranks that hold the weight's shards, one axis.
            outer_size: `[N, K]`, or `[E, N, K]`.
        """
        if not is_cut_by_rows(self.shape, outer_size):
            raise UserError(
                f"a weight of shape {list(outer_size)} was sharded to {list(self.shape)}; only a weight that is "
                "sharded by rows can be gathered as float8 codes: let fully_shard place it by Shard(0), or turn "
                "enable_fsdp_float8_all_gather off (of experts: leave them out of fqns)"
            )
        if self.state.codes is None or not self.state.serves(self):
            axis = ShardAxis(mesh.get_group(), mesh.get_local_rank(), mesh.size())
            _make_codes(self, outer_size, axis)
        codes = self.state.give_out()
        dtype = mp_policy.param_dtype or self.dtype
        if self.state.exchange is not None:
            return (self.state.exchange.send(codes, dtype),), (self.state.scale, outer_size)
        is_even = outer_size[0] % mesh.size() == 0 and cut_dim(self.shape, outer_size) == 0
        if is_even and outer_size[-1] % dtype.itemsize == 0:
            codes = codes.view(dtype)
        return (codes,), (self.state.scale, outer_size)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """What FSDP makes of the gathered codes `[ranks * chunk, ...]`: a `GatheredFloat8Weight`, whose gradient has
        `param_dtype`. FSDP frees and refills their memory, or they lie elsewhere and stay there, so `out`, if there
        is one, holds them already."""
        (data,), (scale, shape) = outputs, metadata
        if self.state.exchange is not None:
            data = self.state.exchange.received(data)
        if out is not None:
            out = out._local_tensor if isinstance(out, DTensor) else out  # under tensor parallelism
            assert isinstance(out, GatheredFloat8Weight)
            assert out.codes.data_ptr() == data.data_ptr()
            out.scale = scale
            return None
        codes = data.view(-1).view(self.state.recipe.weight_dtype)[: prod(shape)].view(shape)
        return GatheredFloat8Weight(codes, scale, self.state.recipe, param_dtype), ()


@torch.inference_mode(False)
def refresh(
    weights: Sequence[ShardableFloat8Weight], shapes: Sequence[Sequence[int]], axis: ShardAxis, *, ahead: bool
) -> None:
    """Cast shards, all on one device and sharded over one axis, with one all-reduce.

    Args:
        weights: the shards.
        shapes: of each one's weight, `[N, K]` or `[E, N, K]`.
        axis: over which they are sharded; every rank of it must call this with its shards of the same weights.
        ahead: what is found serves every gather until a write is seen, also where nothing is cached. That is codes, or
            statistics and scales alone where codes are not kept.
    """
    shards = [_shard_of(weight, shape, axis, ahead=ahead) for weight, shape in zip(weights, shapes, strict=True)]
    cast = cast_shards(shards, axis.group if axis.ranks > 1 else None)
    unchanged = [weight.state.is_fresh(weight) for weight in weights]
    for shard, weight, made in zip(shards, weights, cast, strict=True):
        if made.codes is not None:
            weight.state.hold(made.codes, _padded_length(shard, axis))
        weight.state.statistics = None if weight.state.keeps_codes else made.statistics
        weight.state.recorded(weight, ahead=ahead)
    _refresh_scales([weight.state for weight in weights], cast, unchanged)


@torch.inference_mode(False)
def _make_codes(weight: ShardableFloat8Weight, shape: Sequence[int], axis: ShardAxis) -> None:
    """Give the state of a weight of this shape the codes for a gather. All ranks decide alike whether that needs them
    all: what the state knows of the weight came from all of them, and each sees the same writes."""
    state = weight.state
    if not state.serves(weight):
        refresh([weight], [shape], axis, ahead=False)
        return
    assert state.statistics is not None
    shard = _shard_of(weight, shape, axis)
    state.hold(cast_shard(shard, state.statistics), _padded_length(shard, axis))


def _shard_of(weight: ShardableFloat8Weight, shape: Sequence[int], axis: ShardAxis, *, ahead: bool = False) -> Shard:
    state = weight.state
    # A gather comes at any time after the optimizer's step, and somebody may have written to the weights by then.
    amax = state.amax_of(weight) if ahead else None
    casts = state.keeps_codes or not ahead
    return Shard.of(weight.tensor, state.recipe, shape, axis, state.axis, amax, casts=casts)


def _padded_length(shard: Shard, axis: ShardAxis) -> int:
    """How many rows, or experts, FSDP sends of a shard."""
    return shard.tensor.shape[0] if shard.dim else chunk_length(shard.shape[0], axis.ranks)


@torch.no_grad()
def _refresh_scales(states: Sequence[Float8WeightState], cast: Sequence[CastShard], unchanged: Sequence[bool]) -> None:
    """Write new scales into the tensors that hold the old ones; where the weight is the same, unnoticed by autograd."""
    old, new, kept = [], [], []
    for state, made, same in zip(states, cast, unchanged, strict=True):
        if state.scale is None or state.scale.device != made.scale.device:
            state.scale = made.scale.clone()
            continue
        old.append(state.scale)
        new.append(made.scale)
        if same:
            kept.append(state.scale)
    if old:
        with torch.autograd._unsafe_preserve_version_counter(tuple(kept)):  # pyright: ignore
            torch._foreach_copy_(old, new)  # pyright: ignore[reportPrivateImportUsage]
