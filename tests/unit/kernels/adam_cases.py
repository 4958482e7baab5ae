"""Compares the Triton kernels of the update with the reference in Triton's interpreter; run by
test_adam_interpreter.py.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.adam_cases OUT.json

Blocks are made tiny so that tiny inputs need several programs and partial blocks.
"""

import itertools

import torch
from torch import Tensor

from tests.unit.kernels import interpreter
from titan_fp8.kernels.adam import Constants, kernel, reference
from titan_fp8.kernels.float8.reference import amax_bits

ADAMW = Constants(0.9, 0.95, 1e-8, 0.1, decoupled=True)
ADAM = Constants(0.8, 0.999, 1e-6, 0.02, decoupled=False)
ULPS = 4


def shrink_blocks() -> None:
    """Tiny blocks."""
    kernel.UPDATE_BLOCK = 64
    kernel.SQUARES_BLOCK, kernel.SQUARES_STEPS = 32, 2


def tensors(numel: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weight, gradient, mean and square of a training under way."""
    generator = torch.Generator().manual_seed(numel)
    w, g, m, v = (torch.randn(numel, generator=generator) for _ in range(4))
    return [tensor.to(dtype) for tensor in (w, g * 3, m, v.square())]


def ulps(actual: Tensor, expected: Tensor) -> float:
    """The largest difference in units in the last place of the expected values, or of a hundredth of the largest."""
    spacing = torch.finfo(expected.dtype).eps * expected.float().abs().clamp(min=float(expected.abs().max()) / 100)
    return float(((actual.float() - expected.float()).abs() / spacing).max())


def compare(
    constants: Constants,
    dtype: torch.dtype,
    *,
    of_means: torch.dtype | None = None,
    clip: float | None = None,
    skip: float | None = None,
    numel: int = 150,
) -> str:
    """One update by the kernel and by the reference: "" or what differs. of_means: their dtype, if not `dtype`."""
    given = [None if value is None else torch.tensor(value) for value in (clip, skip)]
    factors = reference.step_factors([torch.tensor(3.0)], 1e-2, constants)[0]
    ours, theirs = ([*tensors(numel, dtype)[:2], *tensors(numel, of_means or dtype)[2:]] for _ in range(2))
    amax = torch.zeros((), dtype=torch.int32)
    kernel.update(*ours, factors, *given, constants, amax)
    reference.update(*theirs, factors, *given, constants)
    wrong = [] if torch.equal(amax, amax_bits(ours[0].view(1, -1))) else ["amax is not that of the weight"]
    for name, actual, expected in zip(("weight", "grad", "mean", "square"), ours, theirs, strict=True):
        if skip or name == "grad":
            wrong += [] if torch.equal(actual, expected) else [f"{name} changed"]
        elif ulps(actual, expected) > ULPS:
            wrong.append(f"{name} differs by {ulps(actual, expected):.1f} ulps")
    return "; ".join(wrong)


def case_adamw_and_adam() -> str:
    return "; ".join(compare(constants, torch.float32) for constants in (ADAMW, ADAM))


def case_clipped_and_not_skipped() -> str:
    clipped = [compare(constants, torch.float32, clip=0.25, skip=0.0) for constants in (ADAMW, ADAM)]
    return "; ".join(clipped)


def case_skipped() -> str:
    return compare(ADAMW, torch.float32, clip=0.25, skip=1.0)


def case_sizes() -> str:
    return "; ".join(compare(ADAMW, torch.float32, numel=numel) for numel in (1, 63, 64, 65, 128))


def case_half_precision() -> str:
    # The interpreter truncates to bf16 where a GPU rounds, so float16 alone.
    return compare(ADAMW, torch.float16)


def case_means_of_another_dtype() -> str:
    dtypes = (torch.float32, torch.float16), (torch.float16, torch.float32)
    return "; ".join(compare(ADAMW, dtype, of_means=of_means, clip=0.25) for dtype, of_means in dtypes)


def case_nan_and_infinity() -> str:
    wrong = []
    for value in (float("nan"), float("inf")):
        w, g, m, v = tensors(100)
        g[70] = value
        factors = reference.step_factors([torch.tensor(1.0)], 1e-2, ADAMW)[0]
        amax = torch.zeros((), dtype=torch.int32)
        kernel.update(w, g, m, v, factors, None, None, ADAMW, amax)
        if not bool(w[70].isnan()) or not bool(amax.view(torch.float32).isnan()):
            wrong.append(f"{value} does not show")
        if bool(w[:70].isnan().any()):
            wrong.append(f"{value} spreads")
    return "; ".join(wrong)


def case_square_sum() -> str:
    wrong = []
    for sizes in ((1,), (64, 65), (200, 3, 64)):
        parts = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in sizes]
        actual, expected = kernel.square_sum(parts), reference.square_sum(parts)
        if not torch.allclose(actual, expected, rtol=1e-6):
            wrong.append(f"{sizes}: {actual} in place of {expected}")
    for position, value in itertools.product((0, 63, 129), (float("inf"), float("nan"))):
        part = torch.ones(130)
        part[position] = value
        if kernel.square_sum([part]).isfinite():
            wrong.append(f"{value} at {position} does not show")
    return "; ".join(wrong)


if __name__ == "__main__":
    interpreter.main(interpreter.cases_of(globals()), shrink_blocks)
