"""The block-scaled kernels and the transpose compile for Hopper on a machine without a GPU, with wide loads and stores
and few divisions."""

import re

import pytest

pytest.importorskip("triton")

from tests.unit.kernels.test_float8_compiles import compile_ptx
from titan_fp8.kernels.blockwise import kernel
from titan_fp8.kernels.float8 import transpose
from titan_fp8.kernels.float8.bits import Tile

SIZES = ["i32", "i32+", "i32+", "1"]  # tokens, features, stride_t, stride_k; + is a multiple of 16
FLAGS = {"POWER_OF_TWO": False, "E5M2": False}
HARDWARE = {"EXACT_BITS": False, **FLAGS}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def assert_wide_and_exact(ptx: str, *, casts: bool = True) -> None:
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert not re.search(r"st\.global\.(?:v\d\.)?b8", ptx)
    assert not re.search(r"div\.(full|approx)", ptx)
    assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == casts


def compile_tiles(x: str, tile: Tile, rows: bool, columns: bool, capability: int = 90, **flags: bool) -> str:
    """PTX of the kernel for activations."""
    return compile_ptx(
        kernel._cast_block_tiles_kernel,
        [x, "*u8", "*fp32", "*u8", "*fp32", *SIZES],
        capability,
        tile.warps,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK_T=tile.tokens,
        BAND=tile.band,
        **flags,
    )


@pytest.mark.parametrize(
    ("x", "rows", "columns", "tile"),
    [
        ("*bf16", True, False, kernel.ROWS_TILE),
        ("*fp32", False, True, kernel.COLUMNS_TILE),
        ("*bf16", True, True, kernel.BOTH_TILE),
    ],
)
def test_activation_cast_computes_each_scale_once(x: str, rows: bool, columns: bool, tile: Tile) -> None:
    ptx = compile_tiles(x, tile, rows, columns, **HARDWARE)
    assert_wide_and_exact(ptx)
    # Two for each kind of scale; without `_block_scales` it would be two for each row or column that a thread touches.
    assert len(re.findall(r"div\.rn\.f32", ptx)) == 2 * (rows + columns)


@pytest.mark.parametrize(("find_amax", "cast"), [(True, True), (False, True), (True, False)])
def test_weight_cast_compiles(find_amax: bool, cast: bool) -> None:
    arguments = ["*fp32", "*i32", "*u8", "*fp32", "i32", "i32", "i32+", "i32+", "1"]
    ptx = compile_ptx(kernel._weight_tiles_kernel, arguments, FIND_AMAX=find_amax, CAST=cast, **HARDWARE)
    if cast:
        assert_wide_and_exact(ptx)
    else:
        assert "ld.global.v4.b32" in ptx


def test_scales_compile() -> None:
    ptx = compile_ptx(
        kernel._block_scale_kernel, ["*i32", "*fp32", "i32"], POWER_OF_TWO=True, E5M2=False, BLOCK=kernel.SCALE_BLOCK
    )
    assert "div" not in ptx, "powers of two need no division"


@pytest.mark.parametrize("rescale", [False, True])
def test_transpose_compiles(rescale: bool) -> None:
    tile = transpose.TILE
    ptx = compile_ptx(
        transpose._transpose_kernel,
        ["*u8", "*fp32", "*fp32", "*u8", "i32+", "i32+", "i32+", "1"],
        90,
        tile.warps,
        RESCALE=rescale,
        BLOCK_N=tile.tokens,
        BLOCK_K=tile.features,
        BAND=tile.band,
        **{name: value for name, value in HARDWARE.items() if name != "POWER_OF_TWO"},
    )
    assert_wide_and_exact(ptx, casts=rescale)


def test_the_integer_conversion_compiles_for_gpus_without_float8() -> None:
    ptx = compile_tiles("*bf16", kernel.BOTH_TILE, True, True, 80, EXACT_BITS=True, **FLAGS)
    assert "e4m3x2" not in ptx
