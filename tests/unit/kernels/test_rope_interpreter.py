"""The rotary embedding's kernel equals the reference, shown in Triton's interpreter on the CPU; and it compiles."""

import re

import pytest

triton = pytest.importorskip("triton")

from tests.unit.kernels.interpreter import results_of  # noqa: E402

CASES = [
    "half_precision", "heads_before_tokens", "more_keys_than_queries", "nan_stays_in_its_pair", "odd_lengths",
    "one_tensor", "parts_of_a_wider_tensor", "queries_and_keys", "widths",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("rope_cases", tmp_path_factory.mktemp("rope"))


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_the_reference(results: dict[str, str | None], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str | None]) -> None:
    assert set(results) == set(CASES)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 8, 128), (32, 8, 96), (32, 0, 128)])
def test_the_kernel_compiles_with_wide_loads_and_stores_and_without_shared_memory(
    dtype: str, heads: int, kv_heads: int, width: int
) -> None:
    from tests.unit.kernels.test_producers_compiles import compile_ptx
    from titan_fp8.kernels.rope import kernel

    parts, sizes = kernel.blocks(heads, kv_heads, width, kernel.VALUES, kernel.VALUES_PER_WARP)
    assert parts == 1
    arguments = [*[f"*{dtype}"] * 2, "*fp32", "*fp32", *[f"*{dtype}"] * 2, *["i32"] * 5, *["i32+"] * 6]
    flags = {"INVERSE": False, "BOTH": kv_heads > 0, "D": width}
    ptx = compile_ptx(kernel._rotate_kernel, arguments, **sizes, **flags)
    values = heads + kv_heads
    per_access = 32 * sizes["num_warps"] * (8 if dtype == "bf16" else 4)  # of the values, 16 bytes a thread
    accesses = values * sizes["BLOCK_D"] // per_access
    stores = re.findall(r"st\.global[.\w]*", ptx)
    assert stores == ["st.global.v4.b32"] * accesses
    assert ptx.count("ld.global.v4.b32") >= accesses
    assert not re.findall(r"ld\.global\.b\d+", ptx)
    assert ".shared" not in ptx
    assert "fma.rn.f32" not in ptx, "the reference rounds products"
