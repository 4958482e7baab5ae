"""Every kernel compiles for Hopper (and the integer path for Ampere) on a machine without a GPU, with wide loads."""

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from scripts.bench_casts import configurations  # noqa: E402
from titan_fp8.kernels.float8 import bits, kernel  # noqa: E402
from titan_fp8.kernels.float8.bits import Tile  # noqa: E402

SIZES = ["i32", "i32+", "i32+", "1"]  # tokens, features, stride_t, stride_k; + is a multiple of 16
TILE_SIZES = ["i32", "i32+", "i32+", "i32+", "1"]
TILES = {
    "rows": kernel.ROWS_TILE,
    "columns": kernel.COLUMNS_TILE,
    "rows columns": kernel.BOTH_TILE,
}
COLUMN_AMAX = {
    "BLOCK_T": kernel.COLUMN_AMAX_BLOCK_T,
    "BLOCK_K": kernel.COLUMN_AMAX_BLOCK_K,
    "STEPS": kernel.COLUMN_AMAX_STEPS,
}
E4M3_HARDWARE = {"E5M2": False, "EXACT_BITS": False}
E5M2_HARDWARE = {"E5M2": True, "EXACT_BITS": False}


def source_of(function: Any, arguments: list[str], **constants: Any) -> ASTSource:
    """A kernel for pointers aligned to 16 bytes and sizes as marked."""
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
    return ASTSource(function, signature, constexprs=values, attrs=attributes)


def compile_ptx(function: Any, arguments: list[str], capability: int = 90, num_warps: int = 8, **constants: Any) -> str:
    """PTX of a kernel; see `source_of`."""
    source = source_of(function, arguments, **constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps}).asm["ptx"]


TILE_ARGUMENTS = ["*fp32", "*i32", "*i32", "*u8", "*fp32", "*u8", "*fp32", *TILE_SIZES]


def tile_constants(layouts: str, tile: Tile) -> dict[str, Any]:
    """Of the tile kernel."""
    layout_flags = {"ROWS": "rows" in layouts, "COLUMNS": "columns" in layouts}
    return {**layout_flags, "BLOCK_T": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band}


def compile_tiles(x: str, layouts: str, tile: Tile, capability: int = 90, **constants: Any) -> str:
    """PTX of the tile kernel."""
    constants |= tile_constants(layouts, tile)
    return compile_ptx(kernel._cast_tiles_kernel, [x, *TILE_ARGUMENTS], capability, tile.warps, **constants)


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


@pytest.mark.parametrize(
    ("x", "rows", "from_codes"), [("*bf16", False, False), ("*bf16", True, False), ("*u8", False, True)]
)
def test_amax_of_columns_compiles_without_fences(x: str, rows: bool, from_codes: bool) -> None:
    arguments = [x, "*fp32", "*i32", "*i32", *SIZES]
    flags = {"ROWS": rows, "FROM_CODES": from_codes, **E4M3_HARDWARE}
    ptx = compile_ptx(kernel._column_amax_kernel, arguments, **flags, **COLUMN_AMAX)
    assert "ld.global.v4.b32" in ptx
    assert "acq_rel" not in ptx


@pytest.mark.parametrize("one_block", [True, False])
def test_rowwise_cast_compiles_without_division_and_with_saturating_conversion(one_block: bool) -> None:
    arguments = ["*bf16", "*u8", "*fp32", *SIZES]
    ptx = compile_ptx(
        kernel._cast_rows_kernel, arguments, ONE_BLOCK=one_block, BLOCK_T=1, BLOCK_K=4096, **E4M3_HARDWARE
    )
    assert "div" not in ptx
    assert "acq_rel" not in ptx
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert re.search(r"st\.global\.v[24]\.b32", ptx)


@pytest.mark.parametrize(
    ("x", "layouts", "per_tensor", "from_codes", "format_"),
    [
        ("*bf16", "rows", True, False, E4M3_HARDWARE),
        ("*fp32", "columns", True, False, E4M3_HARDWARE),
        ("*bf16", "rows columns", True, False, E5M2_HARDWARE),
        ("*bf16", "columns", False, False, E4M3_HARDWARE),
        ("*bf16", "rows columns", False, False, E4M3_HARDWARE),
        ("*u8", "columns", False, True, E4M3_HARDWARE),
    ],
)
def test_tile_cast_compiles_with_wide_stores_in_each_layout(
    x: str, layouts: str, per_tensor: bool, from_codes: bool, format_: dict[str, bool]
) -> None:
    flags = {"PER_TENSOR": per_tensor, "FROM_CODES": from_codes}
    ptx = compile_tiles(x, layouts, TILES[layouts], **flags, **format_)
    assert "ld.global.v4.b32" in ptx
    assert f"cvt.rn.satfinite.{'e5m2' if format_['E5M2'] else 'e4m3'}x2.f32" in ptx
    narrow = re.findall(r"st\.global\.(?:v\d\.)?b8", ptx)
    assert not narrow, narrow
    if "columns" in layouts:
        assert "st.global.v4.b32" in ptx, "words of four tokens each, four words at a time"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layouts"), {"tensor columns": "columns", "tensor both": "rows columns"}.items())
def test_every_tile_of_the_sweep_compiles(name: str, layouts: str) -> None:
    """So that a run of `bench_casts.py --sweep` on a GPU is not lost to one that does not."""
    for config in configurations()[name]:
        (tile,) = config.values()
        for per_tensor in {True, "rows" in layouts}:
            flags = {"PER_TENSOR": per_tensor, "FROM_CODES": False}
            compile_tiles("*bf16", layouts, tile, **flags, **E4M3_HARDWARE)


@pytest.mark.slow
def test_every_block_of_the_sweep_compiles_for_amax() -> None:
    for values in (tuple(config.values()) for config in configurations()["amax"]):
        sizes = dict(zip(("BLOCK", "STEPS", "num_warps"), values, strict=True))
        compile_ptx(kernel._amax_kernel, ["*bf16", "*i32", "i32+", "i32+", "i32+", "1"], DENSE=True, **sizes)
    for values in (tuple(config.values()) for config in configurations()["amax of columns"]):
        sizes = dict(zip(("BLOCK_T", "BLOCK_K", "STEPS", "num_warps"), values, strict=True))
        arguments = ["*bf16", "*fp32", "*i32", "*i32", *SIZES]
        for rows in (False, True):
            compile_ptx(kernel._column_amax_kernel, arguments, ROWS=rows, FROM_CODES=False, **E4M3_HARDWARE, **sizes)


def test_the_integer_conversion_compiles_for_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose compiler takes none of the instructions of NVIDIA's GPUs, in a process that it ends on meeting one."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert bits.exact_bits.__wrapped__(0)
    flags = {"PER_TENSOR": True, "FROM_CODES": False, "E5M2": False, "EXACT_BITS": True}
    constants = tile_constants("rows columns", kernel.BOTH_TILE)
    source = source_of(kernel._cast_tiles_kernel, ["*bf16", *TILE_ARGUMENTS], **flags, **constants)
    compiled = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options={"num_warps": 4})
    assert "global_store" in compiled.asm["amdgcn"]


def test_the_integer_conversion_compiles_for_gpus_without_float8() -> None:
    flags = {"PER_TENSOR": True, "FROM_CODES": False, "E5M2": False, "EXACT_BITS": True}
    assert "e4m3x2" not in compile_tiles("*bf16", "rows columns", kernel.BOTH_TILE, 80, **flags)
