"""The Triton kernels equal the reference bit for bit, shown in Triton's interpreter on the CPU."""

import pytest

pytest.importorskip("triton")

from tests.cases import some_by_hand
from tests.unit.kernels.interpreter import results_of, selected_cases

CASES = [
    "rounding", "float32", "bfloat16_e5m2", "float16_odd_sizes", "one_row", "transposed_input", "strided_input",
    "broadcast_input", "nan", "nan_of_other_bits", "inf", "power_of_two_scales_of_every_mantissa",
    "scales_of_every_exponent", "zeros", "extreme_magnitudes",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("interpreter_cases", tmp_path_factory.mktemp("interpreter"), only=selected_cases(request))


@pytest.mark.parametrize("case", some_by_hand(CASES, "power_of_two_scales_of_every_mantissa"))
def test_kernels_equal_the_reference_bit_for_bit(results: dict[str, str | None], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str | None]) -> None:
    assert set(results) == set(CASES)
