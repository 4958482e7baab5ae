"""The fused producers' kernels write the codes of their own outputs, which are the reference's, shown in Triton's
interpreter on the CPU."""

import pytest

pytest.importorskip("triton")

from tests.unit.kernels.interpreter import results_of

pytestmark = pytest.mark.timeout(420)  # the first test waits for all cases
CASES = [
    "norm", "add_and_norm", "norm_of_other_dtypes_and_odd_sizes", "norm_of_strided_rows", "norm_with_nan_and_inf",
    "norm_of_zeros", "norm_of_rows_too_long_for_a_program", "norm_backward", "norm_backward_of_other_dtypes",
    "norm_backward_of_strided_rows", "norm_backward_with_nan_and_inf",
    "norm_backward_of_rows_too_long_for_a_program", "swiglu", "swiglu_of_other_dtypes_and_odd_sizes",
    "swiglu_of_strided_rows", "swiglu_with_nan_and_inf", "swiglu_of_zeros_and_of_large_gates",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("producers_cases", tmp_path_factory.mktemp("interpreter"), timeout_s=400)


@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_what_the_reference_does(results: dict[str, str | None], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str | None]) -> None:
    assert set(results) == set(CASES)
