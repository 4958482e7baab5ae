"""What the fused producers share: rounding to the activations' dtype, and codes of a tile.

The casts themselves are the plain kernels' own (`kernels/float8/bits.py`, `kernels/blockwise/kernel.py`), so that a
producer cannot differ from them. They take a tile as four: the rows 4 quad, 4 quad + 1, 4 quad + 2 and 4 quad + 3.

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
from titan_fp8.kernels.blockwise.kernel import _store_block_tile
from titan_fp8.kernels.blockwise.reference import empty_scale
from titan_fp8.kernels.float8 import E5M2, bits
from titan_fp8.kernels.float8.bits import _INF_BITS, _NAN_BITS, _quads_of_tile, _store_tile
from titan_fp8.kernels.producers.reference import BLOCK, ROW, TENSOR, Cast, Produced

LAUNCH: dict[str, Any] = {"enable_fp_fusion": False}
"""Options of every launch."""


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
            # Two at a time; one by one, the conversion has an eighth of the rate of other instructions.
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 pair; cvt.rn.bf16x2.f32 pair, $3, $2;"
                " shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000; }",
                "=f,=f,f,f", [value], dtype=tl.float32, is_pure=True, pack=2,
            )  # fmt: skip
    return value


@triton.jit
def _store_codes(
    a, b, c, d, pid_t, pid_k, tokens, features, padded_tokens,
    row_amax_ptr, column_amax_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
    GRANULARITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, EXACT_BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes of one tile `[BLOCK_T, BLOCK_K]` (fp32, rounded, zero outside), in the layouts asked for.

    GRANULARITY "tensor": one amax and one scale, at row_amax_ptr and row_scale_ptr. "row": the amax of rows and of
    columns is known. "block": it is the tile's own, which has 128 features for ROWS and 128 tokens for COLUMNS.
    """
    quad, k = _quads_of_tile(pid_t, pid_k, BLOCK_T, BLOCK_K)
    if GRANULARITY == "tensor" or GRANULARITY == "row":
        _store_tile(
            a, b, c, d, row_amax_ptr, column_amax_ptr, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
            quad, k, pid_t, pid_k, tokens, features, padded_tokens,
            ROWS, COLUMNS, GRANULARITY == "tensor", E5M2, EXACT_BITS,
        )  # fmt: skip
    if GRANULARITY == "block":
        _store_block_tile(
            a, b, c, d, quad, k, pid_t, pid_k, tokens, features, rows_ptr, row_scale_ptr, columns_ptr, column_scale_ptr,
            ROWS, COLUMNS, E5M2, POWER_OF_TWO, EXACT_BITS, BLOCK_T,
        )  # fmt: skip


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
        codes = bits.new_codes(tokens, features, device=device)
        scale = empty_scale(tokens, blockwise.blocks(features), device) if is_block else new_fp32(tokens, 1, like=x)
    if cast.columns:
        codes_t = bits.new_codes(features, padded_tokens, device=device)
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
        **format_flags(cast, device),
    }


def format_flags(cast: Cast, device: torch.device) -> dict[str, Any]:
    """The constants of a kernel that writes codes."""
    return {
        "E5M2": cast.dtype == E5M2,
        "POWER_OF_TWO": cast.granularity == ROW or cast.power_of_two,
        "EXACT_BITS": bits.exact_bits(device),
    }
