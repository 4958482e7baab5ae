"""The weight of a linear or of experts in MXFP8 as the right operand of its two products, and where it comes from:

    the parameter       quantized in each forward pass and, along N, in each backward pass
    a cache             once an optimizer step (`MXWeightCache`), kept as it is multiplied
    a gathered weight   FSDP has gathered codes in place of numbers (`mx_sharded.py`)

An operand is codes and their swizzled scale, or, emulated, what they stand for and None:

    rows      sums over K: codes [N, K]; values [N, K]
    columns   sums over N: codes [K, N]; values [N, K], as the weight lies

All three ways give the same bits. Of experts all shapes have E before the rest.

N out features, K in features, E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titan_fp8.kernels import mx
from titan_fp8.kernels.mx import reference
from titan_fp8.kernels.mx.layout import padded_shape
from titan_fp8.quantization import mx_grouped_ops, mx_ops
from titan_fp8.quantization.fsdp_weight import check_gathered
from titan_fp8.quantization.mx_sharded import GatheredMXWeight
from titan_fp8.quantization.weights import CodesCache, StepWatch
from titan_fp8.runtime.operators import register_operator

Operand = tuple[Tensor, Tensor | None]


class Cast(NamedTuple):
    """How a weight is cast.

    Attributes:
        mode: how scales are rounded.
        kernel: what casts a linear's along N.
        emulate: operands are what the codes stand for.
    """

    mode: str
    kernel: str
    emulate: bool


class Made(NamedTuple):
    """What there is of a weight's operands before a product; four tensors as an autograd function takes them.

    Attributes:
        rows, row_scale, columns, column_scale: both operands; or, if `plain`, the four tensors of `MXCodes`; or None:
            the parameter is to be cast.
        plain: scales are not swizzled, and codes lie as the weight does.
    """

    rows: Tensor | None = None
    row_scale: Tensor | None = None
    columns: Tensor | None = None
    column_scale: Tensor | None = None
    plain: bool = False


def row_operand(weight: Tensor, made: Made, cast: Cast) -> Operand:
    """The operand of the product that sums over K; weight: the parameter, as it is now."""
    if made.rows is None:
        return _rows_of(weight, cast)
    if not made.plain:
        return made.rows, made.row_scale
    assert made.row_scale is not None
    if cast.emulate:
        return values_of_weight(made.rows, made.row_scale), None
    return made.rows, swizzled(made.row_scale)


def column_operand(weight: Tensor | None, made: Made, cast: Cast, after: Tensor) -> Operand:
    """The operand of the product that sums over N, in backward. weight: may be None where `made` has it; after: a
    gradient, before which the compiler makes nothing of the weight."""
    if made.columns is None:
        assert weight is not None
        return _columns_of(weight, cast, after)
    if not made.plain:
        return made.columns, made.column_scale
    assert made.column_scale is not None
    if cast.emulate:
        return values_of_weight(made.columns, made.column_scale, after), None
    return transposed(made.columns, made.column_scale, after)


def made_of(module: nn.Module, name: str, weight: Tensor, cache: "MXWeightCache | None") -> Made:
    """What there is of the operands of a module's weight, for this forward pass.

    Args:
        module: a linear, or experts.
        name: of the parameter.
        weight: what this rank multiplies of it.
        cache: that of the parameter, if it has one.

    Raises:
        RuntimeError: it was made for an all-gather of codes and is now something else.
    """
    if isinstance(weight, GatheredMXWeight):
        return Made(*weight.made, plain=True)
    several = getattr(module, "fsdp_weight_states", None) or {}
    if getattr(module, "fsdp_weight_state", None) is not None or name in several:
        check_gathered(weight, of="a layer of experts" if several else "a linear", codes="MXFP8")
    if cache is None:
        return Made()
    cache.use(getattr(module, name))
    assert cache.rows is not None
    assert cache.columns is not None
    return Made(*cache.rows, *cache.columns)


class MXWeightCache(CodesCache):
    """Both operands of one weight, `[N, K]` or of experts `[E, N, K]`, valid from one change of the weight to the next.

    Native they are 2 (1 + 1/32) bytes a value; emulated 4 on a GPU and 8 on a CPU.

    Args:
        cast: how the weight is cast.
        watch: see `CodesCache`.
    """

    rows: Operand | None
    columns: Operand | None

    def __init__(self, cast: Cast, *, watch: StepWatch | None = None) -> None:
        super().__init__(watch)
        self._cast = cast

    def cast(self, weight: Tensor) -> None:
        """Make both operands of `weight`."""
        how = self._cast
        if weight.dim() == 3 or how.kernel != mx_ops.TRITON:
            self.rows, self.columns = _rows_of(weight, how), _columns_of(weight, how, None)
        elif how.emulate:
            by_rows, by_columns = mx_ops.values(weight, how.mode, how.kernel)
            self.rows, self.columns = (by_rows, None), (by_columns, None)
        else:
            codes, scale, codes_t, scale_t = mx_ops.both(weight, how.mode, how.kernel)
            self.rows, self.columns = (codes, scale), (codes_t, scale_t)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MXWeightCache":
        return MXWeightCache(self._cast, watch=self._watch)

    def __reduce__(self) -> tuple[Any, ...]:
        return MXWeightCache, (self._cast,)


def _rows_of(weight: Tensor, cast: Cast) -> Operand:
    if weight.dim() == 2:
        return (mx_ops.row_values(weight, cast.mode), None) if cast.emulate else mx_ops.rows(weight, cast.mode)
    if cast.emulate:
        return mx_grouped_ops.weight_values(weight, cast.mode, True), None
    return mx_grouped_ops.experts(weight, cast.mode, True)


def _columns_of(weight: Tensor, cast: Cast, after: Tensor | None) -> Operand:
    mode, kernel = cast.mode, cast.kernel
    if weight.dim() == 2:
        if cast.emulate:
            return mx_ops.column_values(weight, mode, kernel, after), None
        return mx_ops.columns(weight, mode, kernel, after)
    if cast.emulate:
        return mx_grouped_ops.weight_values(weight, mode, False, after), None
    return mx_grouped_ops.experts(weight, mode, False, after)


def _swizzled_like(scale: Tensor, rows: int, columns: int) -> Tensor:
    padded_rows, padded_columns = padded_shape(rows, columns)
    of_experts = scale.dim() == 3
    shape = (scale.shape[0], padded_rows * padded_columns) if of_experts else (padded_rows, padded_columns)
    return scale.new_empty(shape)


def dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes `[..., N, K]` and plain scales of either orientation stand for, `[..., N, K]` in bf16 or fp32.

    The numbers of `mx.from_mx`, with no fp32 copy of them on the way: a product of two bf16 numbers is exact before it
    is rounded, and both factors are exact in bf16.
    """
    dim = -1 if scale.shape[-1] != codes.shape[-1] else -2
    factors = reference.scale_values(scale).to(dtype).unsqueeze(dim)
    blocks = codes.to(dtype).unflatten(dim, (scale.shape[dim], mx.BLOCK))
    return (blocks * factors).view(codes.shape)


def _transposed(codes: Tensor, scale: Tensor, after: Tensor | None = None) -> tuple[Tensor, Tensor]:
    codes_t = codes.view(torch.uint8).transpose(-2, -1).contiguous().view(codes.dtype)
    return codes_t, mx.swizzle(scale.transpose(-2, -1))


values_of_weight = register_operator(
    "mx_values_of_weight(Tensor codes, Tensor scale, Tensor? after=None) -> Tensor",
    lambda codes, scale, after=None: dequantized(codes, scale, mx_ops.values_dtype(codes.device)),
    lambda codes, scale, after=None: codes.new_empty(codes.shape, dtype=mx_ops.values_dtype(codes.device)),
)
"""`mx_values_of_weight(codes [..., N, K], plain scale of either orientation, after)` -> [..., N, K], what they stand
for; `after`, here and below: as in `ops.py`."""

swizzled = register_operator(
    "mx_swizzled(Tensor scale) -> Tensor",
    mx.swizzle,
    lambda scale: _swizzled_like(scale, *scale.shape[-2:]),
)
"""`mx_swizzled(scale [..., N, K/32])` -> swizzled."""

transposed = register_operator(
    "mx_transposed(Tensor codes, Tensor scale, Tensor? after=None) -> (Tensor, Tensor)",
    _transposed,
    lambda codes, scale, after=None: (
        codes.new_empty((*codes.shape[:-2], codes.shape[-1], codes.shape[-2])),
        _swizzled_like(scale, scale.shape[-1], scale.shape[-2]),
    ),
)
"""`mx_transposed(codes [..., N, K], scale [..., N/32, K], after)` -> codes_t [..., K, N], swizzled scale."""
