"""The package imports lazily, and converts and trains on a machine without Triton."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
IMPORT_IS_LIGHT = """
import sys
import titan_fp8
assert "convert_to_float8_training" in dir(titan_fp8)
heavy = {"torch", "triton", "numpy", "pydantic"} & set(sys.modules)
assert not heavy, heavy
"""
TRAINS = """
import sys
sys.modules["triton"] = None
import torch, titan_fp8
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
titan_fp8.convert_to_float8_training(model, emulate="auto")
model(torch.randn(4, 16)).sum().backward()
assert model[0].weight.grad.abs().sum() > 0
"""


def run(code: str) -> None:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 0, process.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    run(IMPORT_IS_LIGHT)


def test_a_model_converts_and_trains_without_triton() -> None:
    run(TRAINS)
