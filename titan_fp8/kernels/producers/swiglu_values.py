"""SwiGLU and its gradients of tiles in registers, as every kernel of it computes them.

T tokens, H hidden features.
"""

# Triton's language is not Python's; pyright takes the kernels for ordinary functions.
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from titan_fp8.kernels.float8.bits import _from_codes
from titan_fp8.kernels.producers.tiles import _rounded


@triton.jit
def _sigmoid(x, EXACT_BITS: tl.constexpr):
    """`1 / (1 + exp(-x))` in fp32, to a relative 2^-17 for any |x| < 88."""
    if EXACT_BITS:
        value = 1.0 / (1.0 + tl.exp(-x))
    else:
        # An exponential that underflows adds nothing to 1, so it may be flushed to zero; the reciprocal may not be.
        value = tl.inline_asm_elementwise(
            "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
            " rcp.approx.f32 $0, e; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return value


@triton.jit
def _unrounded(gate, up, EXACT_BITS: tl.constexpr):
    """`silu(gate) * up` of fp32 tiles."""
    return gate * _sigmoid(gate, EXACT_BITS) * up


@triton.jit
def _output(gate, up, dtype: tl.constexpr, EXACT_BITS: tl.constexpr):
    """`silu(gate) * up` of fp32 tiles, rounded to dtype."""
    return _rounded(_unrounded(gate, up, EXACT_BITS), dtype, EXACT_BITS)


@triton.jit
def _unrounded_gradients(grad, gate, up, EXACT_BITS: tl.constexpr):
    """`(grad_gate, grad_up)` of fp32 tiles."""
    sigmoid = _sigmoid(gate, EXACT_BITS)
    return grad * (up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))), grad * (gate * sigmoid)


@triton.jit
def _gradients(grad, gate, up, dtype: tl.constexpr, EXACT_BITS: tl.constexpr):
    """`(grad_gate, grad_up)` of fp32 tiles, rounded to dtype."""
    grad_gate, grad_up = _unrounded_gradients(grad, gate, up, EXACT_BITS)
    return _rounded(grad_gate, dtype, EXACT_BITS), _rounded(grad_up, dtype, EXACT_BITS)


@triton.jit
def _load(x_ptr, t, k, stride, mask):
    return tl.load(x_ptr + t[:, None] * stride + k[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def _value(x, scale_ptr, t, tokens, CODES: tl.constexpr, EXACT_BITS: tl.constexpr):
    """A tile at rows t in fp32. CODES: x holds e4m3 codes as bytes, whose scales, one a row, are at scale_ptr."""
    if CODES:
        scale = tl.load(scale_ptr + t, mask=t < tokens, other=0)
        value = _from_codes(x, False, EXACT_BITS) * scale[:, None]
    else:
        value = x.to(tl.float32)
    return value


@triton.jit
def _load_value(
    x_ptr, scale_ptr, t, k, stride, tokens, features, CODES: tl.constexpr, EXACT_BITS: tl.constexpr
):  # fmt: skip
    """`_value` of a tile of x, zero outside."""
    mask = (t < tokens)[:, None] & (k < features)[None, :]
    x = tl.load(x_ptr + t[:, None] * stride + k[None, :], mask=mask, other=0)
    return _value(x, scale_ptr, t, tokens, CODES, EXACT_BITS)
