"""Compares the kernels of grouped products with exact sums in Triton's interpreter; run by test_grouped_gemm.py.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.grouped_gemm_cases OUT.json

Codes are small integers and scales powers of two, so that sums are exact in any order and results in fp32 are equal to
the bit. The interpreter rounds to bf16 in a way of its own, and NaN codes are numbers to it: those are for a GPU
(tests/gpu/test_moe.py).
"""

import torch
from torch import Tensor

from tests.unit.kernels import interpreter
from titan_fp8.kernels.grouped import gemm_kernel
from titan_fp8.kernels.grouped.gemm_kernel import GemmTile
from titan_fp8.quantization import grouped_gemm

COUNTS = {
    "uneven": [16, 32, 0, 64],
    "all in one": [0, 0, 112, 0],
    "none": [0, 0, 0],
    "one group": [96],
    "more than a tile, and a rest": [48, 16, 144],
}
TAIL = 32
"""Rows behind the last group."""
N, K = 48, 80


def shrink_blocks() -> None:
    """Blocks so small that groups, rows and features come in several and none is full."""
    gemm_kernel.ROWS_TILE = GemmTile(32, 32, 32, 4, 1, band=2)
    gemm_kernel.FAST_ROWS_TILE = GemmTile(64, 32, 64, 4, 1, band=2)
    gemm_kernel.COLUMNS_TILE = GemmTile(32, 64, 32, 4, 1, band=2)
    # What is not written is NaN.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def codes(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).float().to(torch.float8_e4m3fn)


def scales(*shape: int, seed: int) -> Tensor:
    return torch.exp2(torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float())


def _differ(result: Tensor, expected: Tensor) -> bool:
    if result.dtype != expected.dtype:
        return True
    of_bf16 = 2**-7 if result.dtype == torch.bfloat16 else 0.0
    return not torch.allclose(result.float(), expected.float(), rtol=of_bf16, atol=0.0)


def case_rows() -> str:
    wrong = []
    for name, counts in COUNTS.items():
        ends, experts = torch.tensor(counts).cumsum(0).int(), len(counts)
        rows = int(ends[-1])
        a, b = codes(rows + TAIL, K, seed=0), codes(experts, N, K, seed=1)
        operands = a, b, scales(rows + TAIL, 1, seed=2), scales(experts, N, seed=3), ends
        for dtype in (torch.bfloat16, torch.float32):
            expected = grouped_gemm.grouped_mm_rows(*operands, dtype, fast_accum=False, emulate=True)
            for fast in (False, True):
                result = gemm_kernel.grouped_mm_rows(*operands, dtype, fast)
                if _differ(result[:rows], expected[:rows]) or not result[rows:].isnan().all():
                    wrong.append(f"{name} {dtype} {fast}")
    return "; ".join(wrong)


def case_columns() -> str:
    wrong = []
    for name, counts in COUNTS.items():
        ends, experts = torch.tensor(counts).cumsum(0).int(), len(counts)
        rows = int(ends[-1])
        a, b = codes(N, rows + TAIL, seed=0), codes(K, rows + TAIL, seed=1)
        scale_a, scale_b = scales(experts, N, seed=2), scales(experts, K, seed=3)
        empty = torch.tensor(counts) == 0
        scale_a[empty] = torch.nan
        for x in (a, b):  # what is behind the last group is read beside its last rows
            x[:, rows:] = 448.0
        for dtype in (torch.bfloat16, torch.float32):
            expected = grouped_gemm.grouped_mm_columns(a, b, scale_a, scale_b, ends, dtype, emulate=True)
            result = gemm_kernel.grouped_mm_columns(a, b, scale_a, scale_b, ends, dtype)
            if _differ(result, expected) or result[empty].any():
                wrong.append(f"{name} {dtype}")
    return "; ".join(wrong)


def case_views() -> str:
    """Operands whose rows lie apart, begin anywhere or are columns, and ends that lie apart."""
    ends, wrong = torch.tensor([[16, 0], [48, 0]], dtype=torch.int32)[:, 0], []
    a, b = codes(48, K, seed=0), codes(2, N, K, seed=1)
    scale_a, scale_b = scales(48, 1, seed=2), scales(2, N, seed=3)
    expected = gemm_kernel.grouped_mm_rows(a, b, scale_a, scale_b, ends.contiguous(), torch.float32, False)
    apart, shifted = (
        torch.empty(48, 2 * K, dtype=a.dtype)[:, :K],
        torch.empty(48 * K + 1, dtype=a.dtype)[1:].view(48, K),
    )
    by_columns = torch.empty(K, 48, dtype=a.dtype).t()
    b_apart = torch.empty(2, 2 * N, K, dtype=b.dtype)[:, :N].copy_(b)
    scale_b_apart = torch.empty(N, 2).t().copy_(scale_b)
    for name, view in (("apart", apart), ("shifted", shifted), ("columns", by_columns)):
        operands = view.copy_(a), b_apart, scale_a, scale_b_apart
        if _differ(gemm_kernel.grouped_mm_rows(*operands, ends, torch.float32, False), expected):
            wrong.append(name)
    return "; ".join(wrong)


def case_nothing() -> str:
    ends = torch.zeros(3, dtype=torch.int32)
    no_rows = gemm_kernel.grouped_mm_rows(
        codes(0, K, seed=0), codes(3, N, K, seed=1), torch.ones(0, 1), torch.ones(3, N), ends, torch.bfloat16, False
    )
    columns = codes(N, 0, seed=0), codes(K, 0, seed=1), torch.ones(3, N), torch.ones(3, K)
    zeros = gemm_kernel.grouped_mm_columns(*columns, ends, torch.float32)
    return "" if no_rows.shape == (0, N) and zeros.shape == (3, N, K) and not zeros.any() else "wrong"


if __name__ == "__main__":
    interpreter.main(interpreter.cases_of(globals()), shrink_blocks)
