"""The fused producers as operators `torch.ops.titan_fp8.*`, opaque to the compiler as those of `ops.py` are.

What they return depends on what is asked for, so each returns a list, in a fixed order without what was not asked for:

    rms_norm_cast            rstd, [amax], [output], codes, scale, [codes_t, [scale_t]]
    add_rms_norm_cast        sum, and as rms_norm_cast
    norm_columns             codes_t, scale
    swiglu_cast              [output], codes, scale, [codes_t, [scale_t]]
    swiglu_backward_cast     for grad_gate and then for grad_up: [output], [codes, scale], [codes_t, [scale_t]]; then,
                             if asked, for the output of the forward pass: codes_t and its scale

One scale for the tensor belongs to both layouts and comes once, as `scale`. `forms` sorts such a list.

An operator that makes again in backward what a compiler could keep from forward takes a tensor `after`, which it does
not read: a gradient, without which the compiler would compute it in the forward graph, and keep the result.

T tokens, K features of a norm, H hidden features; see `kernels/producers` for what is computed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_fp8.kernels import blockwise, float8, producers
from titan_fp8.kernels.producers import BLOCK, TENSOR, Cast, Produced
from titan_fp8.kernels.producers.reference import columns_alone, output_cast
from titan_fp8.quantization.casts import Codes
from titan_fp8.runtime.operators import register_operator

_CAST = "str granularity, ScalarType dtype, bool power_of_two, bool rows, bool columns, bool emit"


class Forms(NamedTuple):
    """A producer's output in the forms asked for; None for the others.

    Attributes:
        output: in the activations' dtype.
        rows: codes in the output's own layout.
        columns: codes of the transposed layout.
    """

    output: Tensor | None
    rows: Codes | None
    columns: Codes | None


def forms(tensors: Iterator[Tensor], cast: Cast) -> Forms:
    """Take the forms of one output from the front of an operator's results."""
    output = next(tensors) if cast.emit else None
    rows = columns = None
    if cast.granularity == TENSOR:
        codes = next(tensors) if cast.rows else None
        scale = next(tensors) if cast.rows or cast.columns else None
        codes_t = next(tensors) if cast.columns else None
        rows = None if codes is None or scale is None else Codes(codes, scale)
        columns = None if codes_t is None or scale is None else Codes(codes_t, scale)
        return Forms(output, rows, columns)
    if cast.rows:
        rows = Codes(next(tensors), next(tensors))
    if cast.columns:
        columns = Codes(next(tensors), next(tensors))
    return Forms(output, rows, columns)


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _fake_forms(x: Tensor, cast: Cast) -> Produced:
    """Shapes, dtypes and strides of an output of x's shape and dtype."""

    def fp32(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    tokens, features = x.shape
    codes = scale = codes_t = scale_t = None
    is_block = cast.granularity == BLOCK
    padded = blockwise.padded(tokens) if is_block else float8.padded(tokens)
    if cast.rows:
        codes = x.new_empty((tokens, features), dtype=cast.dtype)
        scale = fp32(blockwise.blocks(features), tokens).t() if is_block else fp32(tokens, 1)
    if cast.columns:
        codes_t = x.new_empty((features, padded), dtype=cast.dtype)
        scale_t = fp32(blockwise.blocks(tokens), features).t() if is_block else fp32(features, 1)
    if cast.granularity == TENSOR and (cast.rows or cast.columns):
        scale, scale_t = fp32(), None
    output = x.new_empty((tokens, features)) if cast.emit else None
    return Produced(output, codes, scale, codes_t, scale_t)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, *options: Any) -> list[Tensor]:
    cast, keeps_amax = _split(options)
    _, rstd, amax, produced = producers.rms_norm(x, None, weight, eps, cast, keeps_amax=keeps_amax)
    return [rstd, *_given(amax, *produced)]


def _fake_rms_norm(x: Tensor, weight: Tensor, eps: float, *options: Any) -> list[Tensor]:
    cast, keeps_amax = _split(options)
    amax = None
    if keeps_amax and cast.granularity != BLOCK:
        amax = x.new_empty(() if cast.granularity == TENSOR else x.shape[1:], dtype=torch.int32)
    return [x.new_empty((x.shape[0],), dtype=torch.float32), *_given(amax, *_fake_forms(x, cast))]


def _add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float, *options: Any) -> list[Tensor]:
    cast, keeps_amax = _split(options)
    total, rstd, amax, produced = producers.rms_norm(x, branch, weight, eps, cast, keeps_amax=keeps_amax)
    return [*_given(total), rstd, *_given(amax, *produced)]


def _fake_add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float, *options: Any) -> list[Tensor]:
    return [x.new_empty(x.shape), *_fake_rms_norm(x, weight, eps, *options)]


def _norm_columns(
    x: Tensor, weight: Tensor, rstd: Tensor, amax: Tensor | None, after: Tensor, *cast: Any
) -> list[Tensor]:
    return _given(*producers.norm_columns(x, weight, rstd, amax, _cast(*cast)))


def _fake_norm_columns(
    x: Tensor, weight: Tensor, rstd: Tensor, amax: Tensor | None, after: Tensor, *cast: Any
) -> list[Tensor]:
    return _given(*_fake_forms(x, columns_alone(_cast(*cast))))


def _swiglu(gate: Tensor, up: Tensor, *cast: Any) -> list[Tensor]:
    return _given(*producers.swiglu(gate, up, _cast(*cast)))


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, *options: Any) -> list[Tensor]:
    cast, output_columns, *scales = _split_backward(options)
    kept = None if scales[0] is None else (scales[0], scales[1])
    of_gate, of_up, output = producers.swiglu_backward(grad, gate, up, cast, output_columns, kept)
    return _given(*of_gate, *of_up, *(output or ()))


def _fake_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, *options: Any) -> list[Tensor]:
    cast, output_columns, *_ = _split_backward(options)
    output = () if output_columns is None else _fake_forms(grad, output_cast(cast, output_columns))
    return _given(*_fake_forms(grad, cast), *_fake_forms(grad, cast), *output)


def _split(options: tuple[Any, ...]) -> tuple[Cast, bool]:
    """A cast, and what may follow it: a default is not passed on."""
    return _cast(*options[:6]), bool(options[6:] and options[6])


def _split_backward(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """A cast, and the three options that may follow it."""
    return _cast(*options[:6]), *options[6:], *[None] * (9 - len(options))


def _cast(granularity: str, dtype: torch.dtype, power_of_two: bool, rows: bool, columns: bool, emit: bool) -> Cast:
    return Cast(granularity, dtype, power_of_two, rows, columns, emit)


rms_norm_cast = register_operator(
    f"rms_norm_cast(Tensor x, Tensor weight, float eps, {_CAST}, bool keeps_amax=False) -> Tensor[]",
    _rms_norm,
    _fake_rms_norm,
)
"""`rms_norm_cast(x [T, K], weight [K], eps, *Cast, keeps_amax)`: RMSNorm of x, as float8; keeps_amax: and what
`norm_columns` needs, if that is something."""

add_rms_norm_cast = register_operator(
    f"add_rms_norm_cast(Tensor x, Tensor branch, Tensor weight, float eps, {_CAST}, bool keeps_amax=False) -> Tensor[]",
    _add_rms_norm,
    _fake_add_rms_norm,
)
"""`add_rms_norm_cast(x [T, K], branch [T, K], weight [K], eps, *Cast, keeps_amax)`: x + branch, and its RMSNorm as
float8."""

norm_columns = register_operator(
    f"norm_columns(Tensor x, Tensor weight, Tensor rstd, Tensor? amax, Tensor after, {_CAST}) -> Tensor[]",
    _norm_columns,
    _fake_norm_columns,
)
"""`norm_columns(x [T, K], weight [K], rstd [T], amax, after, *Cast)`: the columns of RMSNorm of x once more, from what
the norm returned."""

rms_norm_backward = register_operator(
    "rms_norm_backward(Tensor[] grads, Tensor x, Tensor weight, Tensor rstd, Tensor? residual_grad=None)"
    " -> (Tensor, Tensor)",
    producers.rms_norm_backward,
    lambda grads, x, weight, rstd, residual_grad=None: (x.new_empty(x.shape), x.new_empty(weight.shape)),
)
"""`rms_norm_backward(grads [T, K] each, x [T, K], weight [K], rstd [T], residual_grad [T, K])` -> grad_x [T, K],
grad_weight [K], in x's dtype, for the sum of the gradients."""

swiglu_cast = register_operator(
    f"swiglu_cast(Tensor gate, Tensor up, {_CAST}) -> Tensor[]",
    _swiglu,
    lambda gate, up, *cast: _given(*_fake_forms(gate, _cast(*cast))),
)
"""`swiglu_cast(gate [T, H], up [T, H], *Cast)`: silu(gate) * up, as float8."""

swiglu_backward_cast = register_operator(
    f"swiglu_backward_cast(Tensor grad, Tensor gate, Tensor up, {_CAST}, ScalarType? output_columns=None,"
    " Tensor? gate_scale=None, Tensor? up_scale=None) -> Tensor[]",
    _swiglu_backward,
    _fake_swiglu_backward,
)
"""`swiglu_backward_cast(grad [T, H], gate [T, H], up [T, H], *Cast, output_columns, gate_scale [T, 1], up_scale [T,
1])`: the gradients of gate and up, as float8, and if asked the columns of silu(gate) * up in the format
`output_columns`. With scales, gate and up are e4m3 codes by rows."""
