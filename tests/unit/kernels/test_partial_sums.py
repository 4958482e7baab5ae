"""The sum of ranks' parts: its order and rounding, its kernel in Triton's interpreter, what is refused."""

import re

import pytest
import torch

from titan_fp8.kernels.partial_sums import square_count, sum_parts

CASES = ["added_to_what_is_there", "every_rank_of_up_to_five", "nan_and_infinity", "sizes_and_dtypes"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    pytest.importorskip("triton")
    from tests.unit.kernels.interpreter import results_of

    return results_of("partial_sums_cases", tmp_path_factory.mktemp("partial_sums"))


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_the_reference(results: dict[str, str | None], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str | None]) -> None:
    assert set(results) == set(CASES)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_the_kernel_moves_16_bytes_at_a_time(adds: bool, squares: bool) -> None:
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    from tests.unit.kernels.test_float8_compiles import compile_ptx
    from titan_fp8.kernels.partial_sums import kernel

    constants = {"RANK": 1, "RANKS": 2, "ADDS": adds, "SQUARES": squares, "BLOCK": kernel.BLOCK}
    pointers = ["*bf16", "*bf16", "*fp32", "*fp32"]
    ptx = compile_ptx(kernel._sum_parts_kernel, [*pointers, "i32+"], 90, kernel.WARPS, **constants)
    assert len(re.findall(r"ld\.global[.\w]*\.v4\.b32", ptx)) == 2 * len(re.findall(r"ld\.global", ptx)) // 2 > 0
    assert re.search(r"st\.global[.\w]*\.v4\.b32", ptx)


@pytest.mark.parametrize("numel", [0, 1, 4096, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_those_of_the_sum_as_it_is_stored(numel: int, dtype: torch.dtype) -> None:
    own, others = torch.randn(numel), torch.randn(2, numel)
    out, squares = torch.full((numel,), 3.0, dtype=dtype), torch.empty(square_count(numel))
    sum_parts(own, others, 1, out, adds=True, squares=squares)
    assert square_count(numel) == -(-numel // 4096)
    for block, square in zip(out.split(4096), squares, strict=numel > 0):
        torch.testing.assert_close(square.double(), block.double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("squares", [torch.empty(1), torch.empty(3), torch.empty(2).double(), torch.empty(4)[::2]])
def test_squares_that_do_not_fit_are_refused(squares: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected squares as 2 contiguous float32 on cpu"):
        sum_parts(torch.ones(5000), torch.ones(1, 5000), 0, torch.empty(5000), squares=squares)


def test_every_rank_gets_the_sum_in_fp32() -> None:
    parts = torch.tensor([[1.0], [2.0**-9], [2.0**-9], [-1.0]], dtype=torch.bfloat16)
    for rank in range(4):
        out = torch.empty(1)
        sum_parts(parts[rank], torch.cat([parts[:rank], parts[rank + 1 :]]), rank, out)
        assert out.item() == 2.0**-8  # in bf16 each small part would be lost beside the one


def test_a_sum_is_added_before_it_is_rounded() -> None:
    own, others = torch.ones(1, dtype=torch.bfloat16), torch.full((1, 1), 2.0**-8, dtype=torch.bfloat16)
    out = torch.full((1,), 2.0**-8, dtype=torch.bfloat16)
    sum_parts(own, others, 0, out, adds=True)
    assert out.item() == 1 + 2.0**-7  # 1 + 2^-8 alone lies between two numbers, of which 1 is the even one


def test_the_order_is_that_of_the_ranks_on_every_rank() -> None:
    parts = torch.tensor([[2.0**-24], [2.0**-24], [1.0]])  # beside the one each of the others would be lost
    for rank in range(3):
        out = torch.empty(1)
        sum_parts(parts[rank], torch.cat([parts[:rank], parts[rank + 1 :]]), rank, out)
        assert out.item() == 1 + 2.0**-23


@pytest.mark.parametrize(
    ("own", "others", "rank", "out"),
    [
        (torch.zeros(4), torch.zeros(1, 4), 2, torch.zeros(4)),
        (torch.zeros(4), torch.zeros(1, 5), 0, torch.zeros(4)),
        (torch.zeros(4), torch.zeros(1, 4), 0, torch.zeros(5)),
        (torch.zeros(4), torch.zeros(1, 4).half(), 0, torch.zeros(4)),
        (torch.zeros(4).double(), torch.zeros(1, 4).double(), 0, torch.zeros(4)),
        (torch.zeros(8)[::2], torch.zeros(1, 4), 0, torch.zeros(4)),
    ],
)
def test_what_does_not_fit_is_refused(own: torch.Tensor, others: torch.Tensor, rank: int, out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected contiguous parts"):
        sum_parts(own, others, rank, out)
