"""A weight in MXFP8 that FSDP gathers as codes: what its parameter consists of, what travels, and what arrives.

A weight `[N, K]` is the right operand of two products, whose blocks of 32 lie along K (output) and along N
(grad_input), and codes of neither follow from those of the other. Both travel in every gather, so that a forward pass,
its recomputation and a backward pass find the same, whether or not FSDP frees the weight in between:

    codes     [n, K]      e4m3, blocks along K         n rows of a shard, whole blocks of 32
    scale     [n, K/32]   e8m0
    codes_n   [n, K]      e4m3, blocks along N, as the weight lies
    scale_n   [n/32, K]   e8m0

which is 2 (1 + 1/32) bytes a value. All four are rows of the whole weight's, so that what FSDP puts together is what
one process would compute, bit for bit; nothing has to be agreed upon before. Scales are plain: swizzled ones, and codes
with N contiguous, are made of what was gathered where they are multiplied (`mx_weight.py`).

Weights of experts `[E, N, K]` are cut by experts, which travel likewise, or each expert by rows. Then FSDP wants pieces
of the shard's shape and nothing else: codes travel, and scales, 2/32 of a byte a value, are gathered when they are made
and kept whole on each rank.

E experts, N out features, K in features, n rows of a shard.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_fp8.kernels import mx
from titan_fp8.quantization.gathered_weight import GatheredWeight
from titan_fp8.quantization.shard_cast import ShardAxis, cut_dim, is_cut_by_rows
from titan_fp8.quantization.shardable import ShardableWeight
from titan_fp8.quantization.weight_state import WeightState
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.told_signature import told_signature

OPTION = "enable_fsdp_mxfp8_all_gather"


class MXCodes(NamedTuple):
    """A weight, or a shard of it, in both orientations; see the module. Of experts with E before all."""

    codes: Tensor
    scale: Tensor
    codes_n: Tensor
    scale_n: Tensor


def cast_weight(weight: Tensor, mode: str, kernel: str = "triton") -> MXCodes:
    """The codes of a weight `[N, K]`, or of experts `[E, N, K]`; N and K are multiples of 32."""
    if weight.dim() == 3:
        codes, scale, codes_t, scale_t = mx.cast_experts(weight, mode)
    elif kernel == "triton":
        codes, scale, codes_t, scale_t = mx.cast_both(weight, mode)
    else:
        codes, scale = mx.cast_rows(weight, mode)
        codes_t, scale_t = mx.cast_columns(weight, mode, kernel=kernel)
    return MXCodes(codes, scale, codes_t.transpose(-2, -1).contiguous(), scale_t.transpose(-2, -1).contiguous())


def shard_problem(shape: Sequence[int], dim: int, ranks: int) -> str | None:
    """Why a weight `[N, K]` or `[E, N, K]` that is cut along `dim` into so many shards cannot be gathered as codes, in
    words, or None."""
    size = shape[dim]
    if len(shape) == 3 and dim == 0:
        if size % ranks == 0:
            return None
        return f"{size} experts do not come out even in {ranks} shards"
    if size % (mx.BLOCK * ranks) == 0:
        return None
    return (
        f"{size} rows in {ranks} shards are not whole blocks of {mx.BLOCK} rows in each, as blocks along the rows must "
        f"be: {size} is not a multiple of {mx.BLOCK * ranks}"
    )


class MXWeightState(WeightState):
    """The MXFP8 codes of one weight on this rank.

    Args:
        mode: how scales are rounded, one of `titan_fp8.kernels.mx.MODES`.
        kernel: what casts along N.
        name: of the parameter, for messages.
        caches: see `WeightState`.

    Attributes:
        codes: of this rank's shard.
        whole_scales: of an expert's weight that is cut by rows: the `scale` and `scale_n` of the whole weight, the same
            two tensors for good, refreshed in place.
    """

    def __init__(self, mode: str, kernel: str, *, name: str, caches: bool) -> None:
        super().__init__(caches=caches)
        self.mode, self.kernel, self.name = mode, kernel, name
        self.codes: MXCodes | None = None
        self.whole_scales: tuple[Tensor, Tensor] | None = None

    @property
    def format(self) -> Hashable:
        """Mode and kernel."""
        return self.mode, self.kernel

    def __deepcopy__(self, memo: dict[int, Any]) -> "MXWeightState":
        return memo.setdefault(id(self), _restored(self.mode, self.kernel, self.name, self.caches, self.parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.mode, self.kernel, self.name, self.caches, self.parts)  # a copy begins without codes


def _restored(mode: str, kernel: str, name: str, caches: bool, parts: tuple[Any, ...]) -> MXWeightState:
    state = MXWeightState(mode, kernel, name=name, caches=caches)
    state.parts = parts
    return state


class ShardableMXWeight(ShardableWeight):
    """See `ShardableWeight`."""

    state: MXWeightState

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "ShardableMXWeight":
        return ShardableMXWeight(inner["tensor"], meta)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def cast_all(cls, weights: Sequence[Any], shapes: Sequence[Sequence[int]], axis: ShardAxis, *, ahead: bool) -> None:
        """See `ShardableWeight`."""
        unchanged = [weight.state.is_fresh(weight) for weight in weights]
        divided = []
        for weight, shape, is_same in zip(weights, shapes, unchanged, strict=True):
            weight.state.codes = cast_weight(weight.tensor, weight.state.mode, weight.state.kernel)
            if cut_dim(weight.shape, shape) == 1:
                divided.append((weight.state, is_same))
        if divided:
            _gather_scales(divided, axis)
        for weight in weights:
            weight.state.recorded(weight, ahead=ahead)

    @told_signature
    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """What FSDP sends: the four tensors of the shard, as bytes in the dtype in which the unit's other parameters
        are gathered, since FSDP copies wider elements faster; of experts that are cut by rows the codes alone, in the
        shape of the shard.

        Args:
            mesh: the ranks that hold the weight's shards, one axis.
            outer_size: `[N, K]`, or `[E, N, K]`.

        Raises:
            UserError: shards are not whole blocks.
        """
        by_rows = is_cut_by_rows(self.shape, outer_size)
        dim = cut_dim(self.shape, outer_size) if by_rows else 0
        problem = shard_problem(outer_size, dim, mesh.size()) if by_rows else f"it was cut to {list(self.shape)}"
        if problem:
            raise UserError(
                f"{self.state.name}: a weight {list(outer_size)} is to be gathered as MXFP8 codes, and {problem}; "
                f"leave it in high precision (filter_fqns; of experts: fqns), take fewer shards, or turn {OPTION} off"
            )
        if not self.state.serves(self):
            axis = ShardAxis(mesh.get_group(), mesh.get_local_rank(), mesh.size())
            self.cast_all([self], [outer_size], axis, ahead=False)
        made = self.state.codes
        assert made is not None
        dtype = mp_policy.param_dtype or self.dtype
        if dim == 1:
            assert self.state.whole_scales is not None
            scale, scale_n = self.state.whole_scales
            sent = {"codes": made.codes.view(torch.uint8), "codes_n": made.codes_n.view(torch.uint8)}
            held = {"scale": scale, "scale_n": scale_n}
        else:
            # Of a group of one rank FSDP takes the first tensor and no other.
            count = 1 if mesh.size() == 1 else len(made)
            pieces = made._asdict()
            sent = {name: pieces[name].view(torch.uint8).view(-1).view(dtype) for name in MXCodes._fields[:count]}
            held = {name: pieces[name] for name in MXCodes._fields[count:]}
        return tuple(sent.values()), (tuple(sent), held, outer_size)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """What FSDP makes of what was gathered: a `GatheredMXWeight`, whose gradient has `param_dtype`. FSDP frees and
        refills its memory, so `out`, if there is one, holds the codes already."""
        sent, held, shape = metadata
        if out is not None:
            out = out._local_tensor if isinstance(out, DTensor) else out  # under tensor parallelism
            assert isinstance(out, GatheredMXWeight)
            assert out.codes.untyped_storage().data_ptr() == outputs[0].untyped_storage().data_ptr()
            for name, tensor in held.items():
                setattr(out, name, tensor)
            return None
        looks = {
            "codes": (torch.float8_e4m3fn, shape),
            "scale": (mx.E8M0, _scale_shape(shape, -1)),
            "codes_n": (torch.float8_e4m3fn, shape),
            "scale_n": (mx.E8M0, _scale_shape(shape, -2)),
        }
        found = {
            name: tensor.view(-1).view(torch.uint8).view(looks[name][0]).view(looks[name][1])
            for name, tensor in zip(sent, outputs, strict=True)
        }
        return GatheredMXWeight(**found, **held, dtype=param_dtype), ()


def _scale_shape(shape: Sequence[int], dim: int) -> list[int]:
    """Of scales of blocks along `dim` of a weight of this shape."""
    divided = list(shape)
    divided[dim] //= mx.BLOCK
    return divided


def _gather_scales(divided: Sequence[tuple[MXWeightState, bool]], axis: ShardAxis) -> None:
    """Fill `whole_scales` of weights of experts that are cut by rows, with one gather for all. Each with whether the
    weight is the one that its last scales were made from: then autograd does not notice."""
    mine = [part for state, _ in divided if state.codes for part in (state.codes.scale, state.codes.scale_n)]
    sent = torch.cat([part.view(torch.uint8).view(-1) for part in mine])
    found = sent.unsqueeze(0)
    if axis.ranks > 1:
        found = sent.new_empty(axis.ranks, sent.numel())
        dist.all_gather_into_tensor(found.view(-1), sent, group=axis.group)
    pieces = found.split([part.numel() for part in mine], dim=1)
    whole = [
        piece.reshape(axis.ranks, *part.shape).movedim(0, 1).flatten(1, 2).contiguous().view(mx.E8M0)
        for piece, part in zip(pieces, mine, strict=True)
    ]
    for number, (state, is_same) in enumerate(divided):
        new = whole[2 * number], whole[2 * number + 1]
        old = state.whole_scales
        if old is None or old[0].device != new[0].device:
            state.whole_scales = new
            continue
        with torch.autograd._unsafe_preserve_version_counter(old if is_same else ()):  # pyright: ignore
            for place, value in zip(old, new, strict=True):
                place.copy_(value)


class GatheredMXWeight(GatheredWeight):
    """A weight `[N, K]`, or the weights of experts `[E, N, K]`, as MXFP8 codes in both orientations.

    Args:
        codes, scale, codes_n, scale_n: see `MXCodes`.
        dtype: the dtype that autograd sees.
    """

    scale: Tensor
    codes_n: Tensor
    scale_n: Tensor

    user = (
        "MXFP8 codes, which only an MXFP8Linear can use, or experts in MXFP8; leave the layer out of the conversion "
        f"(filter_fqns; of experts: fqns), turn {OPTION} off"
    )

    @staticmethod
    def __new__(
        cls, codes: Tensor, scale: Tensor, codes_n: Tensor, scale_n: Tensor, dtype: torch.dtype
    ) -> "GatheredMXWeight":
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device
        )

    def __init__(self, codes: Tensor, scale: Tensor, codes_n: Tensor, scale_n: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scale, self.codes_n, self.scale_n = codes, scale, codes_n, scale_n

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale", "codes_n", "scale_n"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "GatheredMXWeight":
        return GatheredMXWeight(inner["codes"], inner["scale"], inner["codes_n"], inner["scale_n"], meta)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GatheredMXWeight({list(self.shape)}, dtype={self.dtype})"

    @property
    def made(self) -> MXCodes:
        """Its tensors."""
        return MXCodes(self.codes, self.scale, self.codes_n, self.scale_n)

    def same(self) -> "GatheredMXWeight":
        """See `GatheredWeight`."""
        return GatheredMXWeight(*self.made, self.dtype)

    def dequantize(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The numbers that the codes by blocks along K stand for, fp32, of its shape."""
        return mx.from_mx(self.scale, self.codes, torch.float32)
