"""The fused producers' kernels compile for Hopper on a machine without a GPU, with wide loads and stores."""

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from titan_fp8.kernels.float8.bits import Tile  # noqa: E402
from titan_fp8.kernels.producers import norm_backward_kernel as norm_backward  # noqa: E402
from titan_fp8.kernels.producers import norm_kernel as norm  # noqa: E402
from titan_fp8.kernels.producers import swiglu_amax_kernel as swiglu_amax  # noqa: E402
from titan_fp8.kernels.producers import swiglu_kernel as swiglu  # noqa: E402
from titan_fp8.kernels.producers.tiles import LAUNCH  # noqa: E402

CODES = {"E5M2": False, "POWER_OF_TWO": True, "EXACT_BITS": False}
FORMS = ["*bf16", "*u8", "*fp32", "*u8", "*fp32"]
ROW_WARPS = 8


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_ptx(
    function: Any, arguments: list[str], num_warps: int, maxnreg: int | None = None, **constants: Any
) -> str:
    """PTX of a kernel for pointers aligned to 16 bytes and for sizes that + marks as multiples of 16."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    remaining = iter(arguments)
    for position, name in enumerate(function.arg_names):
        argument = "constexpr" if name in constants else next(remaining)
        if argument.endswith("+") or argument.startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
        signature[name] = argument.rstrip("+")
    assert not list(remaining)
    source = ASTSource(function, signature, constexprs=dict(constants), attrs=attributes)
    options = {"num_warps": num_warps, "maxnreg": maxnreg, **LAUNCH}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def assert_wide_and_exact(ptx: str, *, writes_codes: bool = True) -> None:
    # Loaded ahead, 16 bytes go to shared memory at a time, otherwise to registers.
    assert "ld.global.v4.b32" in ptx or re.search(r"cp\.async\.c[ag]\.shared\.global \[.*\], \[.*\], 0x10", ptx)
    assert "fma.rn.f32" not in ptx, "two passes may compute an output differently"
    assert "acq_rel" not in ptx
    if writes_codes:
        assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
        narrow = re.findall(r"st\.global\.(?:v\d\.)?b8", ptx)
        assert not narrow, narrow


@pytest.mark.parametrize(
    ("granularity", "amax", "add"),
    [("tensor", True, False), ("row", True, True), ("row", False, False), ("block", False, True)],
)
def test_norm_of_rows_compiles(granularity: str, amax: bool, add: bool) -> None:
    arguments = ["*bf16", "*bf16", "*fp32", "*bf16", "*fp32", *FORMS[:3], "*i32"]
    arguments += ["i32", "i32+", "i32", "i32+", "i32+", "fp32"]
    flags = {"ADD": add, "EMIT": False, "GRANULARITY": granularity, "AMAX": amax, **CODES}
    stages = norm.AMAX_STAGES if amax else 1 if add else norm.STAGES
    blocks = {"BLOCK_T": 1, "BLOCK_K": 4096, "STAGES": stages}
    ptx = compile_ptx(norm._norm_rows_kernel, arguments, ROW_WARPS, **flags, **blocks)
    assert ("cp.async" in ptx) == (stages > 1)
    assert "sqrt.rn.f32" in ptx
    if not amax:
        assert_wide_and_exact(ptx)


@pytest.mark.parametrize(
    ("granularity", "rows", "tile"),
    [
        ("tensor", True, norm.BOTH_TILE),
        ("row", False, norm.COLUMNS_TILE),
        ("block", False, norm.BLOCK_TILE),
    ],
)
def test_the_second_pass_of_a_norm_compiles(granularity: str, rows: bool, tile: Tile) -> None:
    arguments = ["*bf16", "*fp32", "*fp32", "*i32", "*i32", *FORMS[1:], "i32", "i32+", "i32+", "i32+"]
    flags = {"GRANULARITY": granularity, "ROWS": rows, "COLUMNS": True, **CODES}
    assert_wide_and_exact(compile_ptx(norm._norm_tiles_kernel, arguments, tile.warps, **flags, **blocks_of(tile)))


@pytest.mark.parametrize("grads", [1, 3])
@pytest.mark.parametrize(
    ("features", "walk"), [(4096, norm_backward.SHORT_ROWS), (8192, norm_backward.LONG_ROWS)], ids=["short", "long"]
)
def test_the_backward_of_a_norm_compiles_and_loads_rows_ahead(
    features: int, walk: norm_backward.Walk, grads: int
) -> None:
    arguments = ["*bf16"] * 5 + ["*fp32", "*fp32", "*bf16", "*fp32"] + ["i32", "i32+", "i32"] + ["i32+"] * 5
    constants = {"GRADS": grads, "ADD": True, "EXACT_BITS": False, "BLOCK_T": 1, "BLOCK_K": features}
    constants["STAGES"] = walk.stages
    registers = norm_backward.REGISTERS
    ptx = compile_ptx(norm_backward._rms_norm_backward_kernel, arguments, walk.warps, registers, **constants)
    assert_wide_and_exact(ptx, writes_codes=False)
    # 16 values a thread of each operand, and rstd, for each row on its way and once in the loop.
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*\], \[.*\], (\w+)", ptx)
    assert copies.count("0x10") == (2 + grads) * 2 * walk.stages
    assert copies.count("0x4") == walk.stages
    assert set(re.findall(r"st\.global\.([\w.]+)", ptx)) == {"v4.b32"}


def test_the_sum_over_programs_compiles() -> None:
    constants = {
        "EXACT_BITS": False,
        "BLOCK_P": norm_backward.SUM_PROGRAMS,
        "BLOCK_K": norm_backward.SUM_FEATURES,
    }
    arguments = ["*fp32", "*bf16", "i32", "i32+"]
    ptx = compile_ptx(norm_backward._rms_norm_backward_sum_kernel, arguments, norm_backward.SUM_WARPS, **constants)
    assert "ld.global.v4.b32" in ptx


def blocks_of(tile: Tile) -> dict[str, int]:
    return {"BLOCK_T": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band}


@pytest.mark.parametrize(
    ("backward", "granularity", "tile"),
    [
        (False, "row", swiglu.FORWARD_TILE),
        (False, "block", swiglu.FORWARD_BLOCK_TILE),
        (True, "tensor", swiglu.BACKWARD_TILE),
        (True, "row", swiglu.BACKWARD_ROW_TILE),
        (True, "block", swiglu.BACKWARD_BLOCK_TILE),
    ],
)
@pytest.mark.parametrize("codes", [False, True])
def test_swiglu_compiles(backward: bool, granularity: str, tile: Tile, codes: bool) -> None:
    if codes and not backward:
        pytest.skip("forward has gate and up")
    pointers = ["*i32", "*i32", *FORMS] * 2 + ["*i32", "*u8", "*fp32"]
    arguments = [*inputs_of_swiglu(codes), *pointers, "i32", *["i32+"] * 5]
    flags = {
        "BACKWARD": backward,
        "CODES": codes,
        "GRANULARITY": granularity,
        "ROWS": True,
        "COLUMNS": True,
        "EMIT": False,
        **CODES,
    }
    flags |= {"OUTPUT": backward, "OUTPUT_GRANULARITY": granularity, "OUTPUT_E5M2": False}
    assert_wide_and_exact(compile_ptx(swiglu._swiglu_tiles_kernel, arguments, tile.warps, **flags, **blocks_of(tile)))


def inputs_of_swiglu(codes: bool) -> list[str]:
    """Pointers to the gradient, gate and up, and to the scales of these."""
    return ["*bf16", "*u8", "*u8", "*fp32", "*fp32"] if codes else ["*bf16"] * 5


@pytest.mark.parametrize(
    ("backward", "tensor", "codes"),
    [(False, True, False), (True, True, False), (True, False, False), (True, True, True), (True, False, True)],
)
def test_amax_of_swiglu_compiles(backward: bool, tensor: bool, codes: bool) -> None:
    block = swiglu_amax.BACKWARD_AMAX if backward else swiglu_amax.FORWARD_AMAX
    arguments = [*inputs_of_swiglu(codes), *["*i32"] * 5, "i32", *["i32+"] * 4]
    flags = {
        "BACKWARD": backward,
        "CODES": codes,
        "OUTPUT": backward,
        "TENSOR": tensor,
        "ROWS": not tensor,
        "COLUMNS": not tensor,
        "EXACT_BITS": False,
    }
    blocks = {"BLOCK_T": block.tokens, "BLOCK_K": block.features, "STEPS": block.steps, "STAGES": block.stages}
    ptx = compile_ptx(swiglu_amax._swiglu_amax_kernel, arguments, block.warps, **flags, **blocks)
    assert_wide_and_exact(ptx, writes_codes=False)


def test_swiglu_of_whole_rows_compiles() -> None:
    arguments = ["*bf16"] * 3 + ["*u8", "*fp32", "i32", "i32+", "i32+", "i32+"]
    flags = {"EMIT": False, "ONE_BLOCK": True, "BLOCK_T": 1, "BLOCK_K": 16384, **CODES}
    warps = 16384 // swiglu.ROW_VALUES_PER_WARP
    ptx = compile_ptx(swiglu._swiglu_rows_kernel, arguments, warps, swiglu.ROW_REGISTERS, **flags)
    assert_wide_and_exact(ptx)
