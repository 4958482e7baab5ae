#!/usr/bin/env python3
"""How exact an MXFP8 linear is in each scaling mode: signal over quantization noise in dB, against fp64.

    python scripts/mx_sqnr.py

The worst of six seeds at T = 200 tokens, K = 256 and N = 128 features; x and the output's gradient are standard normal,
weights that too or uniform in +-2^-6, where an unrounded-up scale saturates most. Emulated, on a CPU.
"""

import torch
from bench_common import markdown_table
from torch import Tensor, nn

from titan_fp8.kernels.mx import MODES
from titan_fp8.quantization.mx_linear import MXConfig, MXFP8Linear
from titan_fp8.quantization.mx_recipes import get_mx_recipe

SEEDS, TOKENS, K, N = 6, 200, 256, 128


def sqnr_db(exact: Tensor, result: Tensor) -> float:
    """`10 log10(|exact|^2 / |exact - result|^2)`."""
    noise = (exact - result.double()).square().sum()
    return float(10 * torch.log10(exact.square().sum() / noise))


def ratios(mode: str, weights: str, seed: int) -> list[float]:
    """Of the output, the input's gradient and the weight's."""
    torch.manual_seed(seed)
    linear = MXFP8Linear.from_linear(nn.Linear(K, N, bias=False), MXConfig(get_mx_recipe("mxfp8_emulated", mode), True))
    with torch.no_grad():
        linear.weight.normal_() if weights == "normal" else linear.weight.uniform_(-(2.0**-6), 2.0**-6)
    x, grad = torch.randn(TOKENS, K, requires_grad=True), torch.randn(TOKENS, N)
    output = linear(x)
    output.backward(grad)
    exact_x, exact_w, exact_grad = x.detach().double(), linear.weight.detach().double(), grad.double()
    assert x.grad is not None
    assert linear.weight.grad is not None
    pairs = (
        (exact_x @ exact_w.t(), output.detach()),
        (exact_grad @ exact_w, x.grad),
        (exact_grad.t() @ exact_x, linear.weight.grad),
    )
    return [sqnr_db(*pair) for pair in pairs]


def main() -> None:
    rows = []
    for mode in MODES:
        for weights in ("normal", "uniform"):
            worst = map(min, *(ratios(mode, weights, seed) for seed in range(SEEDS)))
            rows.append((mode, weights, *(f"{value:.1f}" for value in worst)))
    print(markdown_table(("mode", "weights", "output", "grad_input", "grad_weight"), rows))


if __name__ == "__main__":
    main()
