"""The Triton kernels of the update equal the reference, shown in Triton's interpreter on the CPU."""

import pytest

pytest.importorskip("triton")

from tests.unit.kernels.interpreter import results_of

CASES = [
    "adamw_and_adam", "clipped_and_not_skipped", "half_precision", "means_of_another_dtype", "nan_and_infinity",
    "sizes", "skipped", "square_sum",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("adam_cases", tmp_path_factory.mktemp("adam"))


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(results: dict[str, str | None], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str | None]) -> None:
    assert set(results) == set(CASES)
