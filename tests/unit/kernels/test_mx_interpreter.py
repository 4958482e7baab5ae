"""The MXFP8 kernels equal their reference bit for bit, shown in Triton's interpreter on the CPU."""

import pytest

pytest.importorskip("triton")

from tests.cases import some_by_hand
from tests.unit.kernels.interpreter import results_of, selected_cases

pytestmark = pytest.mark.timeout(420)  # the first test waits for all cases
CASES = [
    "modes", "bfloat16_of_more_than_a_tile_of_scales", "float16", "few_tokens", "strides", "every_scale_there_is",
    "nan_and_inf", "zeros_and_extreme_magnitudes", "groups", "groups_with_garbage_behind_the_last",
    "groups_with_nan_and_inf", "groups_of_bfloat16", "experts", "experts_of_bfloat16", "experts_with_nan",
    "several_squares_of_a_warp_and_tiles_that_fit", "plain_scales_by_columns_lie_as_x_does",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("mx_cases", tmp_path_factory.mktemp("interpreter"), timeout_s=400, only=selected_cases(request))


@pytest.mark.parametrize("case", some_by_hand(CASES, "several_squares_of_a_warp_and_tiles_that_fit"))
def test_kernels_equal_the_reference_bit_for_bit(results: dict[str, str | None], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str | None]) -> None:
    assert set(results) == set(CASES)
