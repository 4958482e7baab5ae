"""The MXFP8 kernels compile for Hopper and Blackwell on a machine without a GPU, with wide loads and stores, and find
exponents without logarithms or divisions; `columns.cu` compiles too where nvcc is."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.unit.kernels.test_float8_compiles import compile_ptx
from titan_fp8.kernels.float8.bits import Tile
from titan_fp8.kernels.mx import columns_cuda, kernel, layout
from titan_fp8.kernels.mx.reference import CARRY, MODES

CAPABILITIES = pytest.mark.parametrize("capability", [90, 100])
NARROW = r"st\.global\.(?:v\d\.)?b8"
NVCC = shutil.which("nvcc")


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_cast(
    x: str, tile: Tile, capability: int, *, rows: bool, columns: bool, swizzled: bool = True, kind: str = kernel.DENSE,
    groups: int = 1, mode: str = "rceil", exact_bits: bool = False, in_pairs: bool | None = None, stride_k: str = "1",
) -> str:  # fmt: skip
    arguments = [x, "*i32", "*u8", "*u8", "*u8", "*u8", "i32", "i32+", "i32+", "i32+", stride_k, "i32"]
    return compile_ptx(
        kernel._cast_tiles_kernel, arguments, capability, tile.warps,
        PAIRS=x == "*bf16" if in_pairs is None else in_pairs, ROWS=rows, COLUMNS=columns, SWIZZLED=swizzled,
        KIND=kind, CARRY=CARRY[mode], EXACT_BITS=exact_bits, PADDED_T=layout.TILE_ROWS if swizzled else 32,
        PADDED_K=layout.TILE_ROWS if swizzled else 32, GROUPS=groups, BLOCK_T=tile.tokens, BLOCK_K=tile.features,
        BAND=tile.band,
    )  # fmt: skip


def compile_quantize_dequantize(tile: Tile, capability: int, *, columns: bool, stride_k: str = "1") -> str:
    arguments = ["*bf16", "*i32", "*i16", "*i16", "i32", "i32+", "i32+", stride_k, "i32"]
    return compile_ptx(
        kernel._quantize_dequantize_kernel, arguments, capability, tile.warps, ROWS=True, COLUMNS=columns,
        KIND=kernel.DENSE, CARRY=CARRY["floor"], EXACT_BITS=False, BLOCK_T=tile.tokens, BLOCK_K=tile.features,
        BAND=tile.band,
    )  # fmt: skip


def compile_columns(arch: str, folder: Path) -> str:
    """The PTX of `columns.cu`, which has a kernel for each format."""
    out = folder / "columns.ptx"
    command = [
        str(NVCC),
        "-ptx",
        "-O3",
        f"-arch={arch}",
        "-Werror",
        "all-warnings",
        "-o",
        str(out),
        columns_cuda.SOURCE,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    ptx = out.read_text()
    assert f".target {arch}" in ptx
    assert len(re.findall(r"\.entry", ptx)) == len(columns_cuda.FORMATS)
    return ptx


def assert_by_bits(ptx: str) -> None:
    """Wide loads, the hardware's conversion, and no exponents by logarithms or divisions."""
    assert "ld.global.v4.b32" in ptx
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert not re.search(r"lg2|ex2|rcp|div\.(?:full|approx|rn)", ptx)


@CAPABILITIES
@pytest.mark.parametrize("layouts", [(True, False), (False, True), (True, True)], ids=["rows", "columns", "both"])
@pytest.mark.parametrize("x", ["*bf16", "*fp32"])
@pytest.mark.parametrize("swizzled", [False, True], ids=["plain", "swizzled"])
def test_casts_compile(x: str, layouts: tuple[bool, bool], swizzled: bool, capability: int) -> None:
    rows, columns = layouts
    tile = kernel._tile_of(x == "*bf16", kernel.DENSE, rows, columns, swizzled)
    ptx = compile_cast(x, tile, capability, rows=rows, columns=columns, swizzled=swizzled)
    assert_by_bits(ptx)
    # Codes leave 8 or 16 bytes at a time; only scales, a thirty-second of them, are words, in a store for each layout
    # and in another for the edges, and bytes, in plain rows that are not whole tiles.
    assert "st.global.v4.b32" in ptx
    assert ptx.count("st.global.b32") <= 2 * (rows + columns)
    assert len(re.findall(NARROW, ptx)) <= (0 if swizzled else 4 * rows)
    # The conversion takes two numbers: each of a thread's, once in each layout.
    per_thread = tile.tokens * tile.features // (32 * tile.warps)
    assert len(re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32", ptx)) == per_thread // 2 * (rows + columns)


@CAPABILITIES
@pytest.mark.parametrize("x", ["*bf16", "*fp16", "*fp32"])
def test_casts_of_any_stride_compile(x: str, capability: int) -> None:
    tile = kernel._tile_of(False, kernel.DENSE, True, True, swizzled=True)
    compile_cast(x, tile, capability, rows=True, columns=True, in_pairs=False, stride_k="i32")
    compile_quantize_dequantize(kernel.QUANTIZE_DEQUANTIZE_TILE, capability, columns=True, stride_k="i32")


@pytest.mark.parametrize("kind", [kernel.EXPERTS, kernel.GROUPS])
@pytest.mark.parametrize("groups", [8, 128])
def test_casts_of_experts_and_groups_compile(kind: str, groups: int) -> None:
    tile = kernel._tile_of(True, kind, True, True, swizzled=True)
    ptx = compile_cast("*bf16", tile, 90, rows=True, columns=True, kind=kind, groups=groups)
    assert_by_bits(ptx)
    assert "st.global.b32" not in ptx
    if kind == kernel.GROUPS:  # wherever groups end, their tiles are whole
        assert not re.search(NARROW, ptx)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_a_number_that_is_added(mode: str) -> None:
    ptx = compile_cast("*fp32", kernel.COLUMNS_TILE, 90, rows=False, columns=True, mode=mode)
    assert_by_bits(ptx)
    if CARRY[mode]:
        assert re.search(rf"add\.s32 \s*%r\d+, %r\d+, {CARRY[mode]};", ptx)


@CAPABILITIES
@pytest.mark.parametrize("columns", [False, True])
def test_quantize_dequantize_compiles(columns: bool, capability: int) -> None:
    ptx = compile_quantize_dequantize(kernel.QUANTIZE_DEQUANTIZE_TILE, capability, columns=columns)
    assert_by_bits(ptx)
    assert "st.global.v4.b32" in ptx
    assert not re.search(NARROW, ptx)
    assert re.search(r"cvt\.rn\.f16x2\.e4m3x2", ptx), "back from codes by hardware"


@CAPABILITIES
@pytest.mark.parametrize("layouts", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("mode", ["floor", "rceil"])
def test_quantize_dequantize_in_pairs_compiles_to_arithmetic_of_pairs(
    layouts: tuple[bool, bool], mode: str, capability: int
) -> None:
    tile, arguments = kernel.QUANTIZE_DEQUANTIZE_PAIRS_TILE, ["*bf16", *["*i32"] * 3, "i32", "i32+", "i32+", "1", "i32"]
    ptx = compile_ptx(
        kernel._quantize_dequantize_pairs_kernel, arguments, capability, tile.warps, ROWS=layouts[0],
        COLUMNS=layouts[1], KIND=kernel.DENSE, CARRY=CARRY[mode], EXACT_BITS=False, BLOCK_T=tile.tokens,
        BLOCK_K=tile.features, BAND=tile.band,
    )  # fmt: skip
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert "e4m3" not in ptx
    assert "st.global.b32" not in ptx
    # Of a thread's words, each is limited once in each layout where a mode lets values be above 448.
    per_thread = tile.tokens * tile.features // (2 * 32 * tile.warps)
    assert ptx.count("min.NaN.xorsign.abs.bf16x2") == (per_thread * sum(layouts) if mode == "floor" else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("rows", True, False),
        ("columns", False, True),
        ("both", True, True),
        ("groups both", True, True),
        ("fp32 columns", False, True),
        ("experts both", True, True),
        ("quantize-dequantize both", True, True),
    ],
)
def test_every_tile_of_the_sweep_compiles(
    name: str, rows: bool, columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run of `bench_mx.py --sweep` on a GPU is not lost to one that does not."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "scripts")
    from scripts.bench_mx import configurations

    for values in configurations()[name]:
        assert all(hasattr(kernel, constant) for constant in values)
        tile = next(iter(values.values()))
        if name.startswith("quantize-dequantize"):
            assert_by_bits(compile_quantize_dequantize(tile, 90, columns=columns))
        else:
            x = "*fp32" if name.startswith(("fp32", "experts")) else "*bf16"
            kind = {"groups": kernel.GROUPS, "experts": kernel.EXPERTS}.get(name.split()[0], kernel.DENSE)
            # Swizzled scales of groups are those of one of the constants alone.
            swizzled = kind != kernel.GROUPS or "BOTH_OF_GROUPS_TILE" in values
            ptx = compile_cast(x, tile, 90, rows=rows, columns=columns, kind=kind, groups=16, swizzled=swizzled)
            assert_by_bits(ptx)


def test_the_integer_conversion_compiles_for_gpus_without_float8() -> None:
    ptx = compile_cast("*bf16", kernel.BOTH_OF_PAIRS_TILE, 80, rows=True, columns=True, exact_bits=True)
    assert "e4m3x2" not in ptx


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_the_cuda_kernel_compiles(arch: str, tmp_path: Path) -> None:
    ptx = compile_columns(arch, tmp_path)
    # 32 values a thread in fp32, 64 in the two formats of 16 bits; branches may have copies of what follows them.
    assert len(re.findall(r"cvt\.rn\.satfinite\.e4m3x2\.f32", ptx)) >= (32 + 64 + 64) // 2
    assert "st.global.v4.u32" in ptx or "st.global.v4.b32" in ptx
    assert not re.search(r"\.local|lg2|div\.rn", ptx)
