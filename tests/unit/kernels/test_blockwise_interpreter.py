"""The block-scaled kernels equal their reference bit for bit, shown in Triton's interpreter on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
CASES = [
    "activation", "activation_of_few_tokens", "activation_in_e5m2", "activation_of_other_strides",
    "activation_with_nan_and_inf", "activation_of_zeros_and_extreme_magnitudes", "weight",
    "weight_by_powers_of_two", "weight_in_other_strides", "weight_with_nan_inf_and_zeros", "transposes",
    "transposes_with_nan_and_zeros",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("interpreter") / "results.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.kernels.blockwise_cases", str(out)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert process.returncode == 0, process.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference_bit_for_bit(results: dict[str, str], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str]) -> None:
    assert set(results) == set(CASES)
