"""The kernels of grouped casts equal the reference, shown in Triton's interpreter on the CPU; and they compile."""

import re

import pytest

triton = pytest.importorskip("triton")

from tests.unit.kernels.interpreter import results_of  # noqa: E402

CASES = [
    "experts", "gather", "garbage_behind_the_last_group", "groups", "half_precision_and_strides",
    "nan_and_inf_stay_in_their_column_and_group", "nan_and_inf_stay_in_their_expert",
    "rows_of_experts_of_any_magnitude", "swiglu_backward", "widths",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("grouped_cases", tmp_path_factory.mktemp("grouped"))


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_equal_the_reference(results: dict[str, str | None], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str | None]) -> None:
    assert set(results) == set(CASES)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("groups", [8, 128])
def test_the_kernels_compile_with_wide_loads_and_stores(groups: int) -> None:
    from tests.unit.kernels.test_producers_compiles import compile_ptx
    from titan_fp8.kernels.grouped import gather_kernel, kernel, swiglu_kernel

    tile, flags = kernel.TILE, {"EXACT_BITS": False, "GROUPS": groups}
    sizes = {"BLOCK_T": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band, "num_warps": tile.warps}
    pointers = ["*bf16", "*i32", "*i32", "*fp32", "*u8", "*fp32", "*u8"]
    cast = compile_ptx(kernel._cast_kernel, [*pointers, *["i32+"] * 3, "i32"], ROWS=True, **sizes, **flags)
    pointers = ["*bf16", "*i32", "*fp32", "*i32", "*i32", "*fp32", "*u8", "*fp32", "*u8"]
    integers = ["i32+", "i32+", "i32+", "i32", "i32"]
    gather = compile_ptx(gather_kernel._gather_cast_kernel, pointers + integers, SCALED=True, **sizes, **flags)
    tile = swiglu_kernel.TILE
    sizes = {"BLOCK_T": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band, "num_warps": tile.warps}
    gradient = ["*i32", "*fp32", "*u8", "*fp32", "*u8"]
    pointers = [*["*bf16"] * 3, "*i32", *gradient, *gradient, "*fp32", "*u8"]
    backward = compile_ptx(
        swiglu_kernel._swiglu_groups_cast_kernel, [*pointers, *["i32+"] * 5, "i32"], **sizes, **flags
    )
    for ptx in (cast, gather, backward):
        assert "ld.global.v4.b32" in ptx
        assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
        assert not re.findall(r"st\.global\.(?:v\d\.)?b8", ptx)
    assert "fma.rn.f32" not in backward, "both passes must compute the same"


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
def test_the_kernels_of_weights_compile_with_wide_loads_and_stores_and_no_lookup_of_groups() -> None:
    from tests.unit.kernels.test_producers_compiles import compile_ptx
    from titan_fp8.kernels.grouped import experts_kernel as experts

    tile = experts.TILE
    sizes = {"BLOCK_N": tile.tokens, "BLOCK_K": tile.features, "BAND": tile.band, "num_warps": tile.warps}
    arguments = ["*u8", "*fp32", "*i32", "*u8", "*fp32", "i32+", "i32+"]
    columns = compile_ptx(experts._columns_kernel, arguments, EXACT_BITS=False, **sizes)
    sizes = {"BLOCK_N": experts.AMAX_BLOCK_N, "BLOCK_K": experts.AMAX_BLOCK_K, "num_warps": experts.AMAX_WARPS}
    arguments = ["*u8", "*fp32", "*i32", "i32+", "i32+"]
    amax = compile_ptx(experts._amax_kernel, arguments, EXACT_BITS=False, STEPS=experts.AMAX_STEPS, **sizes)
    for ptx in (columns, amax):
        assert "ld.global.v4.b32" in ptx
        assert not re.findall(r"ld\.global\.(?:v\d\.)?b8", ptx)
    assert "cvt.rn.satfinite.e4m3x2.f32" in columns
    assert "st.global.v4.b32" in columns
    assert not re.findall(r"st\.global\.(?:v\d\.)?b8", columns)
    # Of each of its rows a thread loads the scale, and of one column the amax.
    rows_of_thread = tile.tokens * tile.features // (32 * tile.warps) // 16
    assert len(re.findall(r"ld\.global\.b32", columns)) == rows_of_thread + 1
