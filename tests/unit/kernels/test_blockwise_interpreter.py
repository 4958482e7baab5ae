"""The block-scaled kernels equal their reference bit for bit, shown in Triton's interpreter on the CPU."""

import pytest

pytest.importorskip("triton")

from tests.unit.kernels.interpreter import results_of

CASES = [
    "activation", "activation_of_few_tokens", "activation_in_e5m2", "activation_of_other_strides",
    "activation_with_nan_and_inf", "activation_of_zeros_and_extreme_magnitudes", "weight",
    "weight_by_powers_of_two", "weight_in_other_strides", "weight_with_nan_inf_and_zeros", "transposes",
    "transposes_with_nan_and_zeros",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("blockwise_cases", tmp_path_factory.mktemp("interpreter"))


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference_bit_for_bit(results: dict[str, str | None], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str | None]) -> None:
    assert set(results) == set(CASES)
