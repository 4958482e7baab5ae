"""Producers that write float8: RMSNorm (with the residual add before it if asked), SwiGLU, and the backward of SwiGLU.

`reference.py` says what they compute and where they round; `norm_kernel.py` and `swiglu_kernel.py` compute it on a GPU
without writing the output in high precision. The backward of RMSNorm (`norm_backward_kernel.py`) writes no float8: what
it makes is the gradient of the residual stream.

Each function here checks its input and takes the Triton kernels for CUDA tensors where Triton is installed, otherwise
the reference. Codes and scales are, in both, bit for bit the plain cast of the producer's own output, which `Cast.emit`
returns.

Inputs are 2-D bf16, fp16 or fp32 tensors of any strides; outputs are contiguous. What is not asked for is neither
computed nor allocated.

T tokens, K features, H hidden features; see `kernels.float8` and `kernels.blockwise` for the layouts.
"""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from titan_fp8.kernels import float8
from titan_fp8.kernels.producers import reference
from titan_fp8.kernels.producers.reference import BLOCK, GRANULARITIES, MAX_GRADS, ROW, TENSOR, Cast, Produced

__all__ = [
    "BLOCK",
    "GRANULARITIES",
    "MAX_GRADS",
    "ROW",
    "TENSOR",
    "Cast",
    "Produced",
    "norm_columns",
    "rms_norm",
    "rms_norm_backward",
    "swiglu",
    "swiglu_backward",
]

_BLOCK_SIZE = 128


@functools.cache
def _norm_kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.producers.norm_kernel")


@functools.cache
def _norm_backward_kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.producers.norm_backward_kernel")


@functools.cache
def _swiglu_kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.producers.swiglu_kernel")


def _check_alike(x: Tensor, *others: Tensor) -> None:
    for other in others:
        if other.shape != x.shape or other.dtype != x.dtype:
            raise ValueError(
                f"expected tensors of one shape and dtype, got {x.dtype} {list(x.shape)} and {other.dtype} "
                f"{list(other.shape)}"
            )


def _check(cast: Cast, x: Tensor, *others: Tensor) -> None:
    float8.check_input(x, cast.dtype)
    _check_alike(x, *others)
    if cast.granularity not in GRANULARITIES:
        raise ValueError(f"granularity {cast.granularity!r}: expected one of {', '.join(GRANULARITIES)}")
    if cast.granularity == BLOCK and x.shape[1] % _BLOCK_SIZE:
        raise ValueError(
            f"expected features in multiples of {_BLOCK_SIZE} for blockwise scales, got shape {list(x.shape)}"
        )


def _contiguous_rows(x: Tensor) -> Tensor:
    """x with its features contiguous; rows may lie apart, as those of a part of a wider tensor do."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, cast: Cast, *, keeps_amax: bool = False
) -> tuple[Tensor | None, Tensor, Tensor | None, Produced]:
    """RMSNorm over K of x `[T, K]`, or of the sum x + branch, as float8.

    Args:
        x: `[T, K]`.
        branch: what is added to x before the norm, `[T, K]` of x's dtype, or None.
        weight: `[K]` of any float dtype; it is rounded to x's dtype.
        eps: added to the mean square.
        cast: the forms of the output; `cast.rows` is always wanted here.
        keeps_amax: return what `norm_columns` needs, so that the columns can be made later.

    Returns:
        The sum `[T, K]` in x's dtype (None without branch); rstd fp32 `[T]`; if asked, the bits of the largest |output|
        of what has a scale among the columns (int32, `[]` or `[K]`, None for blocks); the output in the forms asked
        for.

    Raises:
        ValueError: for shapes, dtypes or a cast that do not fit.
    """
    _check(cast, x, *([] if branch is None else [branch]))
    if weight.shape != x.shape[1:]:
        raise ValueError(f"expected a weight of shape {list(x.shape[1:])}, got {list(weight.shape)}")
    if not cast.rows:
        raise ValueError("a norm's output is always wanted by rows; cast.rows is False")
    if not float8.uses_kernel(x):
        return reference.rms_norm(x, branch, weight, eps, cast, keeps_amax=keeps_amax)
    x, branch = _contiguous_rows(x), None if branch is None else _contiguous_rows(branch)
    return _norm_kernel().rms_norm(x, branch, weight.contiguous(), eps, cast, keeps_amax=keeps_amax)


def norm_columns(x: Tensor, weight: Tensor, rstd: Tensor, amax: Tensor | None, cast: Cast) -> Produced:
    """The columns of RMSNorm of x `[T, K]` once more, of the bits that `rms_norm` gives.

    Args:
        x: what was normed; of `rms_norm` with a branch, the sum.
        weight: as `rms_norm` was given it.
        rstd, amax: as `rms_norm` returned them.
        cast: how; of the forms, columns alone are made.

    Raises:
        ValueError: for shapes, dtypes or a cast that do not fit.
    """
    _check(cast, x)
    if weight.shape != x.shape[1:] or rstd.shape != x.shape[:1]:
        raise ValueError(
            f"expected a weight and rstd for {list(x.shape)}, got {list(weight.shape)} and {list(rstd.shape)}"
        )
    if not float8.uses_kernel(x):
        return reference.norm_columns(x, weight, rstd, cast)
    return _norm_kernel().norm_columns(_contiguous_rows(x), weight.contiguous(), rstd, amax, cast)


def rms_norm_backward(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x `[T, K]` and weight `[K]`, both in x's dtype, for the sum of `grads` of the norm of x.

    Args:
        grads: gradients of the output `[T, K]`, in x's dtype; up to `MAX_GRADS`, one from each of its readers.
        x: what was normed, `[T, K]`; of `rms_norm` with a branch, the sum.
        weight: `[K]` of any float dtype.
        rstd: fp32 `[T]`, as `rms_norm` gave it.
        residual_grad: `[T, K]` in x's dtype, added to the gradient of x before that is rounded: what came for x from
            its other readers.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    residual = () if residual_grad is None else (_contiguous_rows(residual_grad),)
    float8.check_input(x)
    if not 1 <= len(grads) <= MAX_GRADS:
        raise ValueError(f"expected 1 to {MAX_GRADS} gradients of a norm's output, got {len(grads)}")
    _check_alike(x, *grads, *residual)
    if not float8.uses_kernel(x):
        return reference.norm_backward(grads, x, weight, rstd, *residual)
    backward = _norm_backward_kernel().rms_norm_backward
    rows = [_contiguous_rows(grad) for grad in grads]
    return backward(rows, _contiguous_rows(x), weight.contiguous(), rstd, *residual)


def swiglu(gate: Tensor, up: Tensor, cast: Cast) -> Produced:
    """`silu(gate) * up`, `[T, H]`, in the forms that `cast` asks for.

    Raises:
        ValueError: for shapes, dtypes or a cast that do not fit.
    """
    _check(cast, gate, up)
    if not float8.uses_kernel(gate):
        return reference.swiglu(gate, up, cast)
    return _swiglu_kernel().swiglu(_contiguous_rows(gate), _contiguous_rows(up), cast)


def swiglu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    cast: Cast,
    output_columns: torch.dtype | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Produced, Produced, Produced | None]:
    """Gradients of gate and of up `[T, H]`, for `grad [T, H]` of `silu(gate) * up`, in the forms that `cast` asks for.

    Args:
        output_columns: float8 format of the columns of the output itself, which the next weight's gradient reads; they
            are made here again, so that nobody need keep them: of the same bits as in `swiglu` where gate and up are
            the same. None: not wanted.
        scales: fp32 `[T, 1]` of gate and of up, which are then e4m3 codes by rows (`float8.cast_rows`); they stand for
            `codes * scale`.

    Returns:
        The gradients of gate and of up; and the output's columns, or None.

    Raises:
        ValueError: for shapes, dtypes or a cast that do not fit.
    """
    if scales is None:
        _check(cast, grad, gate, up)
    else:
        _check(cast, grad)
        _check_codes(grad, (gate, up), scales)
    if output_columns is not None:
        float8.check_input(grad, output_columns)
    if not float8.uses_kernel(grad):
        return reference.swiglu_backward(grad, gate, up, cast, output_columns, scales)
    inputs = [_contiguous_rows(each) for each in (grad, gate, up)]
    return _swiglu_kernel().swiglu_backward(*inputs, cast, output_columns, scales)


def _check_codes(grad: Tensor, codes: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor]) -> None:
    for code, scale in zip(codes, scales, strict=True):
        if code.dtype != float8.E4M3 or code.shape != grad.shape or scale.shape != (grad.shape[0], 1):
            raise ValueError(
                f"expected e4m3 codes {list(grad.shape)} and scales [{grad.shape[0]}, 1], got {code.dtype} "
                f"{list(code.shape)} and {list(scale.shape)}"
            )
