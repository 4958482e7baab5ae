"""The kernels of grouped products with exact sums, in Triton's interpreter on the CPU; and they compile."""

import pytest

triton = pytest.importorskip("triton")

from tests.unit.kernels.interpreter import results_of  # noqa: E402

CASES = ["columns", "nothing", "rows", "views"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("grouped_gemm_cases", tmp_path_factory.mktemp("grouped_gemm"))


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_equal_exact_products(results: dict[str, str | None], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str | None]) -> None:
    assert set(results) == set(CASES)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("kind", ["rows", "fast rows", "columns"])
@pytest.mark.parametrize("out", ["*bf16", "*fp32"])
def test_the_kernels_compile_to_tensor_cores_fed_by_the_memory_accelerator(
    kind: str, out: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit.kernels.test_producers_compiles import compile_ptx
    from titan_fp8.kernels.grouped import gemm_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = {"rows": "ROWS_TILE", "fast rows": "FAST_ROWS_TILE", "columns": "COLUMNS_TILE"}
    tile = getattr(gemm_kernel, tiles[kind])
    operands = [f"tensordesc<fp8e4nv[{block}, {tile.depth}]>" for block in (tile.first, tile.second)]
    arguments = [*operands, "*i32", "*fp32", "*fp32", out, "i32+", "i32+"]
    constants = {"BAND": tile.band, "num_warps": tile.warps, "maxnreg": tile.registers}
    if kind != "columns":
        constants["FAST"] = kind == "fast rows"
        blocks = {"BLOCK_M": tile.first, "BLOCK_N": tile.second, "BLOCK_K": tile.depth, "GROUPS": 16}
        ptx = compile_ptx(gemm_kernel._rows_kernel, [*arguments, "i32"], **constants, **blocks)
    else:
        blocks = {"BLOCK_N": tile.first, "BLOCK_K": tile.second, "BLOCK_M": tile.depth}
        ptx = compile_ptx(gemm_kernel._columns_kernel, arguments, **constants, **blocks)
    assert "wgmma.mma_async" in ptx
    assert "e4m3.e4m3" in ptx
    assert "cp.async.bulk.tensor.2d" in ptx
