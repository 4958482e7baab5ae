"""The kernels of the update compile for Hopper on a machine without a GPU, with wide loads and stores."""

import re

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tests.unit.kernels.test_float8_compiles import compile_ptx  # noqa: E402
from titan_fp8.kernels.adam import kernel  # noqa: E402

ARGUMENTS = ["*fp32", "*fp32", "*fp32", "*fp32", "*fp32", "*fp32", "*fp32", "*i32", "i32+"]
CONSTANTS = {
    "BETA1": 0.9,
    "REST1": 0.1,
    "BETA2": 0.95,
    "REST2": 0.05,
    "EPS": 1e-8,
    "WEIGHT_DECAY": 0.0,
    "BLOCK": kernel.UPDATE_BLOCK,
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("flags", [(True, True, True), (False, False, False)])
@pytest.mark.parametrize("means", ["*fp32", "*bf16"])
def test_an_update_moves_16_bytes_at_a_time(capability: int, flags: tuple[bool, bool, bool], means: str) -> None:
    chosen = dict(zip(("CLIPS", "SKIPS", "AMAX"), flags, strict=True))
    arguments = [*ARGUMENTS[:2], means, means, *ARGUMENTS[4:]]
    ptx = compile_ptx(kernel._update_kernel, arguments, capability, kernel.UPDATE_WARPS, **CONSTANTS, **chosen)
    moves = re.findall(r"(?:ld|st)\.global[.\w]*", ptx)
    assert {move.partition(".v4")[1] for move in moves if not move.endswith("global.b32")} == {".v4"}
    assert re.search(r"ld\.global[.\w]*\.v4\.b32", ptx)
    assert re.search(r"st\.global[.\w]*\.v4\.b32", ptx)
    # What is found out costs a program one reduction that waits for nothing.
    assert len(re.findall(r"\b(?:atom|red)\.", ptx)) == flags[2]


def test_a_sum_of_squares_reads_16_bytes_at_a_time() -> None:
    constants = {"BLOCK": kernel.SQUARES_BLOCK, "STEPS": kernel.SQUARES_STEPS}
    ptx = compile_ptx(kernel._squares_kernel, ["*fp32", "*fp32", "i32+"], 90, kernel.SQUARES_WARPS, **constants)
    assert re.search(r"ld\.global[.\w]*\.v4\.b32", ptx)
    assert "atom" not in ptx
