"""The one tolerance table: how exact each recipe must be, measured against the same products in fp64.

Figures are signal-to-quantization-noise ratios in dB, `10 log10(|reference|^2 / |reference - result|^2)`, each about
0.2 dB under the worst of six seeds at T=200, K=256, N=128. The distributions: activations and gradients standard
normal; weights "normal" (standard normal) or "uniform" in +-2^-6, where a power-of-two scale is at its best or worst.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sqnr:
    """Least ratio in dB for each of a linear's three products."""

    output: float
    grad_input: float
    grad_weight: float


SQNR_DB: dict[tuple[str, str], Sqnr] = {
    ("tensorwise", "normal"): Sqnr(28.2, 24.3, 24.3),
    ("tensorwise", "uniform"): Sqnr(28.4, 24.3, 24.3),
    ("rowwise", "normal"): Sqnr(28.2, 28.2, 28.2),
    ("rowwise", "uniform"): Sqnr(28.7, 28.7, 28.2),
    ("rowwise_with_gw_hp", "normal"): Sqnr(28.2, 28.2, 120.0),
    ("rowwise_with_gw_hp", "uniform"): Sqnr(28.7, 28.7, 120.0),
    ("blockwise", "normal"): Sqnr(28.4, 28.4, 28.5),
    ("blockwise", "uniform"): Sqnr(28.5, 28.5, 28.5),
}
"""By recipe and distribution of the weights. A layer that meets these in one place and not in another is wrong
there."""


MX_SQNR_DB: dict[tuple[str, str], Sqnr] = {
    ("floor", "normal"): Sqnr(27.3, 27.3, 27.2),
    ("floor", "uniform"): Sqnr(24.5, 24.4, 27.2),
    ("ceil", "normal"): Sqnr(28.2, 28.2, 28.2),
    ("ceil", "uniform"): Sqnr(28.8, 28.7, 28.2),
    ("even", "normal"): Sqnr(27.9, 27.9, 27.8),
    ("even", "uniform"): Sqnr(27.7, 27.7, 27.8),
    ("rceil", "normal"): Sqnr(28.2, 28.2, 28.2),
    ("rceil", "uniform"): Sqnr(28.8, 28.7, 28.2),
}
"""The same for MXFP8 by the mode in which scales are rounded: down (`floor`, of `mxfp8_cublas`), so that the largest
values of a block may saturate, to nearest, or up (`rceil`, of `mxfp8_cublas_rceil`). `scripts/mx_sqnr.py` prints the
worst of the six seeds."""


@dataclass(frozen=True)
class GroupedSqnr:
    """Least ratio in dB for the result of experts and each gradient."""

    output: float
    x: float
    w1: float
    w3: float
    w2: float


GROUPED_SQNR_DB: dict[str, GroupedSqnr] = {
    "normal": GroupedSqnr(output=23.4, x=20.4, w1=18.9, w3=23.3, w2=23.4),
    "uniform": GroupedSqnr(output=23.8, x=23.9, w1=23.6, w3=23.7, w2=23.6),
}
"""The gated feed-forward of experts, by distribution of the weights: worst of six seeds at K=256, H=128 and groups of
48, 0, 64 and 80 rows. A linear has one product between its ends, this has three, one after the other. Standard normal
weights make gates of 16 times the size of x, where the slope of silu turns small errors into large ones."""

MX_GROUPED_SQNR_DB = GroupedSqnr(output=23.0, x=22.0, w1=20.6, w3=22.8, w2=23.2)
"""The same of experts in MXFP8 at K=64, H=96 and groups of 64, 32, 0 and 128 rows; weights normal, of other magnitudes
for each expert."""
MX_EXPERTS_IN_A_MODEL_SQNR_DB = {"logits": 63.0, "experts": 19.9}
"""Small models of each family whose experts alone are in MXFP8, against the same in fp32: logits, to which experts add
little at first, and gradients of experts' weights. Where a token then chooses another expert in a later layer these
fall from 23.7 dB to 20."""
MX_OTHER_EXPERTS_SQNR_DB = (20.0, 40.0)
"""Experts that are not this package's against high precision: near it, and not the same."""

BIAS_GRAD_SQNR_DB = 120.0
"""A bias's gradient is summed in fp32 from unquantized gradients."""

EMULATED_VS_NATIVE_SQNR_DB = 40.0
"""The same codes multiplied on tensor cores and in fp32, both rounded to bf16: only the accumulation differs, which
in the fast mode is less exact than fp32."""


FUSED_VS_EAGER_SQNR_DB = 25.0
"""Gradients of a model whose SwiGLU is one kernel and of one that runs it op by op: the second rounds silu to bf16 in
between, which moves some hidden values by one unit in the last place of bf16, some of these by one float8 code, and all
that follows accordingly. With equal rounding points the two are equal bit for bit."""

FUSED_VS_UNFUSED_LOSS_DB = 0.5
"""By how much the error of a fused model's gradients, against fp64, may exceed that of one that is not fused, on the
mean over parameters."""

CHUNKED_VS_WHOLE_SQNR_DB = 60.0
"""Gradients of a head in float8 or MXFP8 that computes the loss some tokens at a time and of one that computes all
logits, for a loss that is not divided by anything. The codes are the same but where the two round a logit's gradient to
different bf16 neighbours, where the largest one is not quite 1 (tensorwise; 67 dB for fp32 logits of a small
vocabulary, all other cases have over 90), and where a chunk's own column scales make other values subnormal
(rowwise)."""
CHUNK_SIZES_SQNR_DB = 120.0
"""The same for two sizes of chunks, but for rowwise: only sums in fp32 differ."""


TRANSFORMERS_RELATIVE_ERROR = 1e-4
"""Of logits and of each gradient in float32, by norm: our models beside those of transformers and of torchtitan."""


def relative_error(result: Tensor, reference: Tensor) -> float:
    """`|result - reference| / |reference|`, by the Euclidean norm over all values."""
    wanted = reference.detach().double()
    return float((result.detach().double() - wanted).norm() / wanted.norm())


ADAM_ULPS = 8
"""Weights and moments after a step of the fused update and of `torch.optim`'s, in fp32, as `ulps` measures them. The
largest found is 2.5 for the plain expressions beside torch's loops on a CPU, and 3.9 for four million elements beside
the arithmetic of torch's fused kernel, which rounds at other places."""


def ulps(actual: Tensor, expected: Tensor, *terms: Tensor) -> float:
    """The largest difference in units in the last place: a machine epsilon times the expected value or, if it is
    larger, a term of the sum that made it, since where terms cancel the rest has fewer digits."""
    size = expected.detach().double().abs()
    for term in terms:
        size = torch.maximum(size, term.detach().double().abs())
    unit = size.clamp(min=1e-30) * torch.finfo(expected.dtype).eps
    return float(((actual.detach().double() - expected.detach().double()).abs() / unit).max())


def sqnr_db(reference: Tensor, result: Tensor) -> float:
    """Signal-to-noise ratio of `result` in dB; infinite when they are equal."""
    signal = reference.double()
    noise = signal - result.to(signal.device).double()
    return float(10 * torch.log10(signal.square().sum() / noise.square().sum()))
