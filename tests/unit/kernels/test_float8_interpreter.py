"""The Triton kernels equal the reference bit for bit, shown in Triton's interpreter on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
CASES = [
    "rounding", "float32", "bfloat16_e5m2", "float16_odd_sizes", "one_row", "transposed_input", "strided_input",
    "broadcast_input", "nan", "nan_of_other_bits", "inf", "power_of_two_scales_of_every_mantissa",
    "scales_of_every_exponent", "zeros", "extreme_magnitudes",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("interpreter") / "results.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.kernels.interpreter_cases", str(out)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert process.returncode == 0, process.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference_bit_for_bit(results: dict[str, str], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str]) -> None:
    assert set(results) == set(CASES)
