"""Every kernel compiles for Hopper (and the integer path for Ampere) on a machine without a GPU, with wide loads."""

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from titan_fp8.kernels.float8 import kernel  # noqa: E402

SIZES = ["i32", "i32+", "i32+", "1"]  # tokens, features, stride_t, stride_k; + is a multiple of 16
TILE_SIZES = ["i32", "i32+", "i32+", "i32+", "1"]
TILES = {"BLOCK_T": kernel.TILE_T, "BLOCK_K": kernel.TILE_K}
GROUPS = {
    "BLOCK_T": kernel.GROUP_AMAX_BLOCK_T,
    "BLOCK_K": kernel.GROUP_AMAX_BLOCK_K,
    "STEPS": kernel.GROUP_AMAX_STEPS,
}
E4M3_HARDWARE = {"E5M2": False, "EXACT_BITS": False}
E5M2_HARDWARE = {"E5M2": True, "EXACT_BITS": False}


def compile_ptx(function: Any, arguments: list[str], capability: int = 90, **constants: Any) -> str:
    """PTX of a kernel for pointers aligned to 16 bytes and sizes as marked."""
    signature: dict[str, str] = {}
    values = dict(constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    remaining = iter(arguments)
    for position, name in enumerate(function.arg_names):
        argument = "constexpr" if name in constants else next(remaining)
        if argument == "1":
            argument, values[name] = "constexpr", 1
        if argument.endswith("+") or argument.startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
        signature[name] = argument.rstrip("+")
    source = ASTSource(function, signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("x", ["*bf16", "*fp32"])
def test_amax_compiles_and_loads_16_bytes_at_a_time(x: str) -> None:
    ptx = compile_ptx(
        kernel._amax_kernel,
        [x, "*i32", "i32+", "i32+", "i32+", "1"],
        DENSE=True,
        BLOCK=kernel.AMAX_BLOCK,
        STEPS=kernel.AMAX_STEPS,
    )
    assert "ld.global.v4.b32" in ptx
    assert "max.s32" in ptx


def test_strided_amax_compiles_with_64_bit_offsets() -> None:
    compile_ptx(kernel._amax_kernel, ["*fp16", "*i32", "i64", "i32", "i64", "i32"], DENSE=False, BLOCK=1024, STEPS=2)


@pytest.mark.parametrize(("x", "rows", "from_codes"), [("*bf16", True, False), ("*u8", False, True)])
def test_group_amax_compiles(x: str, rows: bool, from_codes: bool) -> None:
    arguments = [x, "*fp32", "*i32", "*i32", *SIZES]
    ptx = compile_ptx(kernel._group_amax_kernel, arguments, ROWS=rows, FROM_CODES=from_codes, **E4M3_HARDWARE, **GROUPS)
    assert "ld.global.v4.b32" in ptx


@pytest.mark.parametrize("one_block", [True, False])
def test_rowwise_cast_compiles_with_correct_division_and_saturating_conversion(one_block: bool) -> None:
    arguments = ["*fp32", "*u8", "*fp32", *SIZES]
    ptx = compile_ptx(
        kernel._cast_rows_kernel, arguments, ONE_BLOCK=one_block, BLOCK_T=1, BLOCK_K=4096, **E4M3_HARDWARE
    )
    assert "div.rn.f32" in ptx
    assert not re.search(r"div\.(full|approx)", ptx)
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize(
    ("x", "layouts", "per_tensor", "from_codes", "format_"),
    [
        ("*bf16", "rows", True, False, E4M3_HARDWARE),
        ("*fp32", "columns", True, False, E4M3_HARDWARE),
        ("*bf16", "rows columns", True, False, E5M2_HARDWARE),
        ("*bf16", "rows columns", False, False, E4M3_HARDWARE),
        ("*u8", "columns", False, True, E4M3_HARDWARE),
    ],
)
def test_tile_cast_compiles_with_wide_stores_in_each_layout(
    x: str, layouts: str, per_tensor: bool, from_codes: bool, format_: dict[str, bool]
) -> None:
    arguments = [x, "*fp32", "*i32", "*i32", "*u8", "*u8", "*fp32", "*fp32", *TILE_SIZES]
    flags = {"ROWS": "rows" in layouts, "COLUMNS": "columns" in layouts}
    ptx = compile_ptx(
        kernel._cast_tiles_kernel, arguments, **flags, PER_TENSOR=per_tensor, FROM_CODES=from_codes, **format_, **TILES
    )
    assert "ld.global.v4.b32" in ptx
    assert f"cvt.rn.satfinite.{'e5m2' if format_['E5M2'] else 'e4m3'}x2.f32" in ptx
    narrow = re.findall(r"st\.global\.(?:v\d\.)?b8", ptx)
    assert not narrow, narrow


def test_the_integer_conversion_compiles_for_gpus_without_float8() -> None:
    arguments = ["*bf16", "*fp32", "*i32", "*i32", "*u8", "*u8", "*fp32", "*fp32", *TILE_SIZES]
    flags = {"ROWS": True, "COLUMNS": True, "PER_TENSOR": True, "FROM_CODES": False}
    ptx = compile_ptx(
        kernel._cast_tiles_kernel, arguments, capability=80, **flags, E5M2=False, EXACT_BITS=True, **TILES
    )
    assert "e4m3x2" not in ptx
