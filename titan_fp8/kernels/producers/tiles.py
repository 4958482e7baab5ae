"""What the fused producers share: rounding to the activations' dtype, and codes of a tile.

The casts themselves are the plain kernels' own helpers (`kernels/float8/kernel.py`), so that a producer cannot differ
from them: scales from amax, fp32 -> code, NaN.

A producer may compute the same value in two passes, once for amax and once for codes. Both must get the same bits, so
no kernel here is compiled with the contraction of `a * b + c` into one operation (`LAUNCH`), which a compiler may do in
one kernel and not in another.

T tokens, K features; `padded_tokens` is T rounded up to a multiple of 16, or of 128 for blocks.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_fp8.kernels import blockwise, float8
from titan_fp8.kernels.blockwise.reference import empty_scale
from titan_fp8.kernels.float8 import E5M2
from titan_fp8.kernels.float8 import kernel as casts
from titan_fp8.kernels.float8.kernel import _abs_bits, _exact_bits, _scales, _to_codes
from titan_fp8.kernels.producers.reference import BLOCK, ROW, TENSOR, Cast, Produced

LAUNCH: dict[str, Any] = {"enable_fp_fusion": False}
"""Options of every launch."""

_NAN_BITS = tl.constexpr(0x7FC00000)
_INF_BITS = tl.constexpr(0x7F800000)


@triton.jit
def _rounded(value, dtype: tl.constexpr, EXACT_BITS: tl.constexpr):
    """fp32 rounded to `dtype`, nearest even, as fp32. EXACT_BITS: with integers; the interpreter truncates to bf16."""
    if dtype == tl.float16:
        value = value.to(tl.float16).to(tl.float32)
    elif dtype == tl.bfloat16:
        if EXACT_BITS:
            bits = value.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            rounded = tl.where((bits & 0x7FFFFFFF) > _INF_BITS, _NAN_BITS, rounded)
            value = rounded.to(tl.float32, bitcast=True)
        else:
            value = value.to(tl.bfloat16).to(tl.float32)
    return value


@triton.jit
def _store_codes(
    value, pid_t, pid_k, tokens, features, padded_tokens,
    row_amax_ptr, column_amax_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    GRANULARITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr, SELECT_NAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes of one tile `value [BLOCK_T, BLOCK_K]` (fp32, rounded, zero outside) in the layouts asked for.

    GRANULARITY "tensor": one amax and one scale, at row_amax_ptr and row_scale_ptr. "row": the amax of rows and of
    columns is known. "block": it is the tile's own, which has 128 features for ROWS and 128 tokens for COLUMNS.
    """
    t = pid_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_t, mask_k = t < tokens, k < features
    codes = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.uint8)
    if GRANULARITY == "tensor":
        inv_scale, scale = _scales(tl.load(row_amax_ptr), E5M2, False)
        if (pid_t == 0) & (pid_k == 0):
            tl.store(row_scale_ptr, scale)
        # The padding is zero even where the scale is NaN.
        codes = _to_codes(value * tl.where(mask_t, inv_scale, 0.0)[:, None], E5M2, EXACT_BITS, SELECT_NAN)
    if ROWS:
        if GRANULARITY == "row":
            inv_scale, scale = _scales(tl.load(row_amax_ptr + t, mask=mask_t, other=0), E5M2, True)
            if pid_k == 0:
                tl.store(row_scale_ptr + t, scale, mask=mask_t)
            codes = _to_codes(value * inv_scale[:, None], E5M2, EXACT_BITS, SELECT_NAN)
        if GRANULARITY == "block":
            inv_scale, scale = _scales(tl.max(_abs_bits(value), axis=1), E5M2, POWER_OF_TWO)
            tl.store(row_scale_ptr + pid_k.to(tl.int64) * tokens + t, scale, mask=mask_t)
            codes = _to_codes(value * inv_scale[:, None], E5M2, EXACT_BITS, SELECT_NAN)
        tl.store(rows_ptr + t[:, None] * features + k[None, :], codes, mask=mask_t[:, None] & mask_k[None, :])
    if COLUMNS:
        if GRANULARITY != "tensor":
            if GRANULARITY == "row":
                inv_scale, scale = _scales(tl.load(column_amax_ptr + k, mask=mask_k, other=0), E5M2, True)
                if pid_t == 0:
                    tl.store(column_scale_ptr + k, scale, mask=mask_k)
            else:
                inv_scale, scale = _scales(tl.max(_abs_bits(value), axis=0), E5M2, POWER_OF_TWO)
                tl.store(column_scale_ptr + pid_t.to(tl.int64) * features + k, scale, mask=mask_k)
            scaled = tl.where(mask_t[:, None], value * inv_scale[None, :], 0.0)
            codes = _to_codes(scaled, E5M2, EXACT_BITS, SELECT_NAN)
        mask = mask_k[:, None] & (t < padded_tokens)[None, :]
        tl.store(columns_ptr + k[:, None] * padded_tokens + t[None, :], tl.trans(codes), mask=mask)


class Forms(NamedTuple):
    """Where the forms of one output `[T, K]` are written, and the cast that asks for them."""

    produced: Produced
    padded_tokens: int
    cast: Cast

    def pointers(self, unused: Tensor) -> tuple[Tensor, ...]:
        """`output, rows, row_scale, columns, column_scale`; `unused` for what is not written."""
        output, codes, scale, codes_t, scale_t = self.produced
        return tuple(unused if each is None else each for each in (output, codes, scale, codes_t, scale_t))

    def result(self) -> Produced:
        """What was asked for, codes as float8."""
        codes, codes_t = (None if c is None else c.view(self.cast.dtype) for c in self.produced[1:4:2])
        return self.produced._replace(codes=codes, codes_t=codes_t)


def new_forms(x: Tensor, cast: Cast) -> Forms:
    """Uninitialized forms of an output that has the shape and dtype of `x [T, K]`."""
    tokens, features = x.shape
    device = x.device
    is_block = cast.granularity == BLOCK
    padded_tokens = blockwise.padded(tokens) if is_block else float8.padded(tokens)
    codes = codes_t = scale = scale_t = None
    if cast.rows:
        codes = casts.new_codes(tokens, features, device=device)
        scale = empty_scale(tokens, blockwise.blocks(features), device) if is_block else new_fp32(tokens, 1, like=x)
    if cast.columns:
        codes_t = casts.new_codes(features, padded_tokens, device=device)
        blocks = blockwise.blocks(padded_tokens)
        scale_t = empty_scale(features, blocks, device) if is_block else new_fp32(features, 1, like=x)
    if cast.granularity == TENSOR and (cast.rows or cast.columns):
        scale, scale_t = new_fp32(like=x), None
    output = torch.empty(tokens, features, dtype=x.dtype, device=device) if cast.emit else None
    return Forms(Produced(output, codes, scale, codes_t, scale_t), padded_tokens, cast)


def new_fp32(*shape: int, like: Tensor) -> Tensor:
    """Uninitialized fp32 numbers."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def new_amaxes(*sizes: int, device: torch.device) -> list[Tensor]:
    """Zeroed int32 vectors of at least these sizes, from one allocation, each aligned as a tensor of its own is."""
    # Whether a pointer is aligned decides which variant of a kernel runs; the number of tokens must not.
    aligned = [float8.padded(size) for size in sizes]
    return list(torch.zeros(sum(aligned), dtype=torch.int32, device=device).split(aligned))


def flags(cast: Cast, device: torch.device) -> dict[str, Any]:
    """The constants of a kernel that calls `_store_codes`."""
    return {
        "GRANULARITY": cast.granularity if cast.rows or cast.columns else "none",
        "ROWS": cast.rows,
        "COLUMNS": cast.columns,
        "EMIT": cast.emit,
        **format_flags(cast, device),
    }


def format_flags(cast: Cast, device: torch.device) -> dict[str, Any]:
    """The constants of a kernel that writes codes."""
    return {
        "E5M2": cast.dtype == E5M2,
        "POWER_OF_TWO": cast.granularity == ROW or cast.power_of_two,
        "EXACT_BITS": _exact_bits(device),
        "SELECT_NAN": casts.SELECT_NAN,
    }
