"""Producers that write float8, in plain PyTorch: what the fused kernels compute.

A *producer* is what makes the input of a linear layer (or the gradient of its output): RMSNorm, residual add and
RMSNorm, SwiGLU, the backward of SwiGLU. Its result is needed in float8 only, so a fused kernel never writes it in high
precision, which saves a write and a read of the whole tensor.

Two steps that can be checked one by one:

    output = round_to_activation_dtype(formula in fp32)       rounded once
    codes  = plain cast of output                             kernels/float8 or kernels/blockwise

The rounding between them is deliberate. The codes are the ones that the plain cast gives for a tensor that exists (it
comes out when asked for, with `emit`), so a fused model and one that is not compute the same to within one rounding of
the producer's output, and a saved tensor and a recomputed one have the same codes.

Rounding points of the output, for activations in bf16:

    sum       x + branch, rounded: it is the residual stream, and the norm reads it rounded
    RMSNorm   (x * rstd) * weight in fp32 with the weight rounded to bf16 first, rounded once: as `F.rms_norm` does
    SwiGLU    silu(gate) * up in fp32, rounded once. The eager expression `F.silu(gate) * up` rounds silu as well, so
              the two differ by up to that rounding.
    backward  grad_gate and grad_up in fp32, each rounded once; of a norm, the gradients that its readers give are
              summed in fp32, and the gradient of x in fp32 with that of the residual stream added is rounded once (an
              addition by itself would round each sum)

The kernels equal the second step bit for bit; the first to within one unit in the last place of the output, because
sums run in another order and exponentials are approximated.

T tokens, K features of a norm, H hidden features of a SwiGLU. Sources: arXiv 1910.07467 (RMSNorm), 2002.05202 (SwiGLU).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_fp8.kernels import blockwise, float8

TENSOR, ROW, BLOCK = "tensor", "row", "block"
GRANULARITIES = (TENSOR, ROW, BLOCK)
"""What shares a scale: the tensor; a row (of the transposed layout: a column), a power of two; 128 values of one."""


MAX_GRADS = 3
"""So many readers of a norm's output may each give a gradient of it: wq, wk and wv."""


class Cast(NamedTuple):
    """What becomes of an output.

    Attributes:
        granularity: one of `GRANULARITIES`.
        dtype: float8 format.
        power_of_two: scales of blocks are powers of two (those of rows always are, one for the tensor never).
        rows: write the codes in the output's own layout, `[T, K]`.
        columns: write the transposed layout, `[K, padded(T)]`, T padded to 16, or for blocks to 128.
        emit: write the output itself.
    """

    granularity: str
    dtype: torch.dtype
    power_of_two: bool = False
    rows: bool = True
    columns: bool = False
    emit: bool = False


class Produced(NamedTuple):
    """An output in the forms asked for; None for the others.

    Attributes:
        output: `[T, K]` in the activations' dtype.
        codes, scale: by rows; scale [], `[T, 1]`, or `[T, K/128]` with strides (1, T).
        codes_t, scale_t: by columns; scale `[K, 1]`, or `[K, padded(T)/128]` with strides (1, K). With one scale for
            the tensor, that is `scale`, and `scale_t` is None.
    """

    output: Tensor | None
    codes: Tensor | None
    scale: Tensor | None
    codes_t: Tensor | None
    scale_t: Tensor | None


def quantize(output: Tensor, cast: Cast) -> Produced:
    """`output [T, K]` in the forms that `cast` asks for, by the plain casts."""
    codes = scale = codes_t = scale_t = None
    rows, columns, dtype = cast.rows, cast.columns, cast.dtype
    if cast.granularity == TENSOR and (rows or columns):
        codes, codes_t, scale = float8.cast_tensor(output, float8.amax(output), dtype, rows=rows, columns=columns)
    elif cast.granularity == ROW:
        codes, scale = float8.cast_rows(output, dtype) if rows else (None, None)
        codes_t, scale_t = float8.cast_columns(output, dtype) if columns else (None, None)
    elif cast.granularity == BLOCK:
        power_of_two = cast.power_of_two
        codes, scale = blockwise.cast_block_rows(output, dtype, power_of_two) if rows else (None, None)
        codes_t, scale_t = blockwise.cast_block_columns(output, dtype, power_of_two) if columns else (None, None)
    return Produced(output if cast.emit else None, codes, scale, codes_t, scale_t)


def norm_output(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """RMSNorm of x `[T, K]`, or of x + branch: `(sum or None, rstd fp32 [T], output [T, K])`."""
    total = None if branch is None else (x + branch).contiguous()
    value = (x if total is None else total).float()
    rstd = torch.rsqrt(value.square().mean(1) + eps)
    output = value * rstd.unsqueeze(1) * weight.to(x.dtype).float()
    return total, rstd, output.to(x.dtype).contiguous()


def norm_backward(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x `[T, K]` and of weight `[K]`, in x's dtype, for those of the output `[T, K]`, one from each of its
    readers, and for `residual_grad [T, K]` of x itself where it is read beside the norm."""
    grad = grads[0].float()
    for other in grads[1:]:
        grad = grad + other.float()
    normed = x.float() * rstd.unsqueeze(1)
    scaled = grad * weight.to(x.dtype).float()
    grad_x = rstd.unsqueeze(1) * (scaled - normed * (scaled * normed).mean(1, keepdim=True))
    if residual_grad is not None:
        grad_x = grad_x + residual_grad.float()
    return grad_x.to(x.dtype).contiguous(), (grad * normed).sum(0).to(x.dtype)


def swiglu_output(gate: Tensor, up: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`silu(gate) * up`, `[T, H]`, in `dtype` or in gate's."""
    value = gate.float()
    return (value / (1 + torch.exp(-value)) * up.float()).to(dtype or gate.dtype).contiguous()


def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up `[T, H]` for the gradient of `silu(gate) * up`, in its dtype."""
    value, g = gate.float(), grad.float()
    sigmoid = 1 / (1 + torch.exp(-value))
    grad_gate = g * (up.float() * (sigmoid * (1 + value * (1 - sigmoid))))
    grad_up = g * (value * sigmoid)
    return grad_gate.to(grad.dtype).contiguous(), grad_up.to(grad.dtype).contiguous()


def rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, cast: Cast, *, keeps_amax: bool = False
) -> tuple[Tensor | None, Tensor, Tensor | None, Produced]:
    """See `titan_fp8.kernels.producers.rms_norm`."""
    total, rstd, output = norm_output(x, branch, weight, eps)
    return total, rstd, amax_for_columns(output, cast) if keeps_amax else None, quantize(output, cast)


def amax_for_columns(output: Tensor, cast: Cast) -> Tensor | None:
    """What the scales of the columns of an output `[T, K]` are computed from, if that is more than a tile of it: the
    bits of the largest |output|, int32 `[]`, or of each column `[K]`."""
    if cast.granularity == TENSOR:
        return float8.amax(output)
    if cast.granularity == BLOCK:
        return None
    magnitudes = output.float().view(torch.int32) & 0x7FFFFFFF
    return magnitudes.amax(0) if output.shape[0] else magnitudes.new_zeros(output.shape[1])


def norm_columns(x: Tensor, weight: Tensor, rstd: Tensor, cast: Cast) -> Produced:
    """See `titan_fp8.kernels.producers.norm_columns`."""
    output = x.float() * rstd.unsqueeze(1) * weight.to(x.dtype).float()
    return quantize(output.to(x.dtype).contiguous(), columns_alone(cast))


def columns_alone(cast: Cast) -> Cast:
    """`cast`, but for the columns and nothing else."""
    return cast._replace(rows=False, columns=True, emit=False)


def swiglu(gate: Tensor, up: Tensor, cast: Cast) -> Produced:
    """See `titan_fp8.kernels.producers.swiglu`."""
    return quantize(swiglu_output(gate, up), cast)


def output_cast(cast: Cast, dtype: torch.dtype) -> Cast:
    """How the backward of SwiGLU, whose gradients are cast by `cast`, makes the columns of its output in `dtype`."""
    return columns_alone(cast)._replace(dtype=dtype)


def swiglu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    cast: Cast,
    output_columns: torch.dtype | None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Produced, Produced, Produced | None]:
    """See `titan_fp8.kernels.producers.swiglu_backward`."""
    if scales is not None:
        gate, up = (codes.float() * scale for codes, scale in zip((gate, up), scales, strict=True))
    grad_gate, grad_up = swiglu_gradients(grad, gate, up)
    output = None
    if output_columns is not None:
        output = quantize(swiglu_output(gate, up, grad.dtype), output_cast(cast, output_columns))
    return quantize(grad_gate, cast), quantize(grad_up, cast), output
