"""The fused producers' kernels write the codes of their own outputs, shown in Triton's interpreter on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
CASES = [
    "norm", "add_and_norm", "norm_of_other_dtypes_and_odd_sizes", "norm_of_strided_rows", "norm_with_nan_and_inf",
    "norm_of_zeros", "norm_of_rows_too_long_for_a_program", "swiglu", "swiglu_of_other_dtypes_and_odd_sizes",
    "swiglu_of_strided_rows", "swiglu_with_nan_and_inf", "swiglu_of_zeros_and_of_large_gates",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("interpreter") / "results.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.kernels.producers_cases", str(out)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert process.returncode == 0, process.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_kernels_write_the_codes_of_an_output_that_is_the_references(results: dict[str, str], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str]) -> None:
    assert set(results) == set(CASES)
