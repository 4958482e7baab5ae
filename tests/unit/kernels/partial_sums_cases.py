"""Compares the kernel that adds up ranks' parts with the reference in Triton's interpreter; run by
test_partial_sums.py.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.partial_sums_cases OUT.json
"""

import itertools

import torch

from tests.unit.kernels import interpreter
from titan_fp8.kernels.partial_sums import kernel, reference


def shrink_blocks() -> None:
    """Tiny blocks; and memory that shows what is not written."""
    kernel.BLOCK = 64
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def compare(
    ranks: int, rank: int, numel: int, dtype: torch.dtype, out_dtype: torch.dtype, *, adds: bool = False
) -> str:
    """One sum: "" or what differs."""
    generator = torch.Generator().manual_seed(97 * ranks + numel)
    parts = (torch.randn(ranks, numel, generator=generator) * 10 ** torch.randn(ranks, numel)).to(dtype)
    others = torch.cat([parts[:rank], parts[rank + 1 :]])
    before = torch.randn(numel, generator=generator).to(out_dtype)
    results = [before.clone() if adds else torch.empty(numel, dtype=out_dtype) for _ in range(3)]
    squares = torch.empty(-(-numel // kernel.BLOCK))
    kernel.sum_parts(parts[rank], others, rank, results[0], adds=adds, squares=squares)
    kernel.sum_parts(parts[rank], others, rank, results[1], adds=adds)
    reference.sum_parts(parts[rank], others, rank, results[2], adds=adds)
    wanted = torch.stack([block.double().square().sum() for block in results[2].split(kernel.BLOCK)])
    is_right = torch.equal(results[0], results[2]) and torch.equal(results[1], results[2])
    is_right &= torch.allclose(squares.double(), wanted, rtol=1e-6)
    return "" if is_right else f"{ranks} ranks, {rank}, {numel} values, {dtype}, {out_dtype}, {adds=}"


def case_every_rank_of_up_to_five() -> str:
    pairs = [(ranks, rank) for ranks in range(1, 6) for rank in range(ranks)]
    dtypes = (torch.bfloat16, torch.float32)  # sums of few bf16 numbers are often exact in any order
    return "; ".join(compare(*pair, 150, dtype, torch.float32) for pair in pairs for dtype in dtypes)


def case_sizes_and_dtypes() -> str:
    sizes, dtypes = (1, 64, 65, 256), (torch.float32, torch.float16)
    return "; ".join(compare(3, 1, *each) for each in itertools.product(sizes, dtypes, dtypes))


def case_added_to_what_is_there() -> str:
    sizes, dtypes = (1, 64, 150), (torch.float32, torch.float16)
    return "; ".join(compare(3, 1, *each, adds=True) for each in itertools.product(sizes, dtypes, dtypes))


def case_nan_and_infinity() -> str:
    parts = torch.zeros(2, 70)
    parts[0, 65], parts[1, 3] = float("nan"), float("inf")
    out, squares = torch.empty(70), torch.empty(2)
    kernel.sum_parts(parts[0], parts[1:], 0, out, squares=squares)
    if not (squares[0].isinf() and squares[1].isnan()):
        return f"squares are {squares}"
    return "" if out[65].isnan() and out[3].isinf() and out.nan_to_num(0, 0, 0).abs().sum() == 0 else str(out)


if __name__ == "__main__":
    interpreter.main(interpreter.cases_of(globals()), shrink_blocks)
