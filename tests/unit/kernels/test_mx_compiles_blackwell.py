"""What a job in MXFP8 launches on a B200 compiles for it on a machine without a GPU: each variant of the casts, and the
kernels of all else that it runs."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from tests.unit.kernels import test_producers_compiles as producers
from tests.unit.kernels.test_float8_compiles import compile_ptx
from tests.unit.kernels.test_mx_compiles import NVCC, compile_cast, compile_columns
from titan_fp8.kernels.cross_entropy import kernel as cross_entropy
from titan_fp8.kernels.moe import kernel as moe
from titan_fp8.kernels.moe import plan_kernel
from titan_fp8.kernels.mx import dequantize, kernel
from titan_fp8.kernels.mx.reference import CARRY, MODES
from titan_fp8.kernels.partial_sums import kernel as partial_sums
from titan_fp8.kernels.producers import norm_backward_kernel as norm_backward
from titan_fp8.kernels.producers import swiglu_kernel as swiglu
from titan_fp8.kernels.rope import kernel as rope

B200 = 100
BOTH, ROWS, COLUMNS = (True, True), (True, False), (False, True)
LAYOUTS = pytest.mark.parametrize("layouts", [ROWS, COLUMNS, BOTH], ids=["rows", "columns", "both"])


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def assert_for_blackwell(ptx: str) -> None:
    """No logarithm and no division finds an exponent, nor the conversion to e8m0, which saturates where a block has NaN
    or Inf; no kernel of ours multiplies matrices."""
    assert ".target sm_100a" in ptx
    assert not re.search(r"lg2|ex2|rcp|div\.(?:full|approx|rn)|ue8m0|tcgen05\.mma|mma\.sync", ptx)


@LAYOUTS
@pytest.mark.parametrize("kind", [kernel.EXPERTS, kernel.GROUPS])
def test_casts_of_experts_and_groups(kind: str, layouts: tuple[bool, bool]) -> None:
    rows, columns = layouts
    tile = kernel._tile_of(True, kind, rows, columns, swizzled=True)
    ptx = compile_cast("*bf16", tile, B200, rows=rows, columns=columns, kind=kind, groups=16)
    assert_for_blackwell(ptx)
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx


@pytest.mark.parametrize(("kind", "x"), [(kernel.GROUPS, "*bf16"), (kernel.DENSE, "*fp16")])
def test_casts_of_16_bits_that_are_not_in_pairs(kind: str, x: str) -> None:
    tile = kernel._tile_of(False, kind, True, True, swizzled=True)
    assert_for_blackwell(compile_cast(x, tile, B200, rows=True, columns=True, in_pairs=False, kind=kind, groups=16))


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_a_number_that_is_added(mode: str) -> None:
    ptx = compile_cast("*fp32", kernel.COLUMNS_TILE, B200, rows=False, columns=True, mode=mode)
    assert_for_blackwell(ptx)
    if CARRY[mode]:
        assert re.search(rf"add\.s32 \s*%r\d+, %r\d+, {CARRY[mode]};", ptx)


@LAYOUTS
@pytest.mark.parametrize("kind", [pytest.param(kernel.DENSE, marks=pytest.mark.slow), kernel.GROUPS])
@pytest.mark.parametrize("pairs", [False, True], ids=["numbers", "pairs"])
def test_quantize_dequantize(pairs: bool, kind: str, layouts: tuple[bool, bool]) -> None:
    tile = kernel.QUANTIZE_DEQUANTIZE_PAIRS_TILE if pairs else kernel.QUANTIZE_DEQUANTIZE_TILE
    function: Any = dequantize._quantize_dequantize_pairs_kernel if pairs else dequantize._quantize_dequantize_kernel
    word = "*i32" if pairs else "*i16"
    ptx = compile_ptx(
        function, ["*bf16", "*i32", word, word, "i32", "i32+", "i32+", "1", "i32"], B200, tile.warps,
        ROWS=layouts[0], COLUMNS=layouts[1], KIND=kind, CARRY=CARRY["rceil"], EXACT_BITS=False, BLOCK_T=tile.tokens,
        BLOCK_K=tile.features, BAND=tile.band,
    )  # fmt: skip
    assert_for_blackwell(ptx)


_, ROPE = rope.blocks(32, 8, 128, rope.VALUES, rope.VALUES_PER_WARP)
BLOCKS = moe._blocks(5120, moe.MAX_BLOCK, moe.VALUES_PER_WARP)
PLAN = plan_kernel._constants(16, plan_kernel.BLOCK)
OTHERS: dict[str, tuple[Any, list[str], dict[str, Any]]] = {
    "rotary embedding": (
        rope._rotate_kernel,
        ["*bf16", "*bf16", "*fp32", "*fp32", "*bf16", "*bf16", *["i32"] * 5, *["i32+"] * 6],
        {"INVERSE": False, "BOTH": True, "D": 128, **ROPE},
    ),
    "cross-entropy": (
        cross_entropy._cross_entropy_kernel,
        ["*bf16", "*i64", "*fp32", "i32+", "i32+"],
        {"GRAD": True, "BLOCK": cross_entropy.BLOCK, "num_warps": cross_entropy.WARPS},
    ),
    "tokens to experts": (
        moe._to_groups_kernel,
        ["*bf16", "*i32", "*fp32", "*bf16", "*bf16", "*fp32", "i32+", "i32+", "i32+", "i32"],
        {"SCALED": True, "PRODUCTS": True, **BLOCKS},
    ),
    "tokens from experts": (
        moe._to_tokens_kernel,
        ["*bf16", "*i32", "*fp32", "*bf16", "*bf16", "*fp32", "i32+", "i32+", "i32+"],
        {"SCALED": True, "SUMS": True, "PRODUCTS": True, "TOP_K": 2, "STEPS": 3, **BLOCKS},
    ),
    "counts of experts": (plan_kernel._count_kernel, ["*i64", "*i32", "i32", "i32"], PLAN),
    "sums of counts": (
        plan_kernel._before_kernel,
        ["*i32", "*i32", "i32", "i32"],
        {"SCAN_BLOCK": plan_kernel.SCAN_BLOCK, "num_warps": 4},
    ),
    "places of tokens": (plan_kernel._place_kernel, ["*i64", *["*i32"] * 5, "i32", "i32", "i32"], PLAN),
    "sums of gradients": (
        partial_sums._sum_parts_kernel,
        ["*bf16", "*bf16", "*fp32", "*fp32", "i32+"],
        {
            "RANK": 1,
            "RANKS": 4,
            "ADDS": True,
            "SQUARES": True,
            "BLOCK": partial_sums.BLOCK,
            "num_warps": partial_sums.WARPS,
        },
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_of_a_step(name: str) -> None:
    function, arguments, constants = OTHERS[name]
    warps = constants["num_warps"]
    sizes = {key: value for key, value in constants.items() if key != "num_warps"}
    ptx = compile_ptx(function, arguments, B200, warps, **sizes)
    assert ".target sm_100a" in ptx
    assert "ld.global" in ptx


def test_producers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that `test_producers_compiles.py` asks of them on Hopper."""
    targets = []

    def target(kind: str, _: int, width: int) -> GPUTarget:
        targets.append(B200)
        return GPUTarget(kind, B200, width)

    monkeypatch.setattr(producers, "GPUTarget", target)
    producers.test_norm_of_rows_compiles("row", True, True)
    producers.test_norm_of_rows_compiles("row", False, False)
    producers.test_the_backward_of_a_norm_compiles_and_loads_rows_ahead(4096, norm_backward.SHORT_ROWS, 3)
    producers.test_the_sum_over_programs_compiles()
    producers.test_swiglu_compiles(False, "row", swiglu.FORWARD_TILE, codes=False)
    for codes in (False, True):
        producers.test_swiglu_compiles(True, "row", swiglu.BACKWARD_ROW_TILE, codes)
    assert len(targets) == 7


@pytest.mark.slow
@LAYOUTS
def test_every_tile_of_the_sweep(layouts: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "scripts")
    from scripts.bench_mx import configurations

    rows, columns = layouts
    compiled = 0
    for name, all_values in configurations().items():
        if name.split()[-1] != {ROWS: "rows", COLUMNS: "columns", BOTH: "both"}[layouts]:
            continue
        for values in all_values:
            tile = next(iter(values.values()))
            compiled += 1
            if name.startswith("quantize-dequantize"):
                in_pairs = "PAIRS" in next(iter(values))
                function: Any = dequantize._quantize_dequantize_kernel
                if in_pairs:
                    function = dequantize._quantize_dequantize_pairs_kernel
                word = "*i32" if in_pairs else "*i16"
                arguments = ["*bf16", "*i32", word, word, "i32", "i32+", "i32+", "1", "i32"]
                ptx = compile_ptx(
                    function, arguments, B200, tile.warps, ROWS=rows, COLUMNS=columns, KIND=kernel.DENSE,
                    CARRY=CARRY["rceil"], EXACT_BITS=False, BLOCK_T=tile.tokens, BLOCK_K=tile.features, BAND=tile.band,
                )  # fmt: skip
            else:
                x = "*fp32" if name.startswith(("fp32", "experts")) else "*bf16"
                kind = {"groups": kernel.GROUPS, "experts": kernel.EXPERTS}.get(name.split()[0], kernel.DENSE)
                swizzled = kind != kernel.GROUPS or "BOTH_OF_GROUPS_TILE" in values
                ptx = compile_cast(
                    x, tile, B200, rows=rows, columns=columns, kind=kind, groups=16, swizzled=swizzled
                )  # fmt: skip
            assert_for_blackwell(ptx)
    assert compiled


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", *(pytest.param(f"sm_{n}", marks=pytest.mark.slow) for n in (89, 120))])
def test_the_cuda_kernel_compiles_for_other_gpus(arch: str, tmp_path: Path) -> None:
    """Those with the arithmetic of bf16 pairs and the conversion to e4m3, and those without."""
    ptx = compile_columns(arch, tmp_path)
    assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == (arch != "sm_80")
