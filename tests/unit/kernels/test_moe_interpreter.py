"""The kernels of the dispatch equal the reference, shown in Triton's interpreter on the CPU; and they compile."""

import re

import pytest

triton = pytest.importorskip("triton")

from tests.unit.kernels.interpreter import results_of  # noqa: E402

CASES = [
    "half_precision", "nan_reaches_its_token_alone", "negative_zero", "parts_of_wider_tensors", "plan", "scaled",
    "unscaled",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("moe_cases", tmp_path_factory.mktemp("moe"))


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_equal_the_reference(results: dict[str, str | None], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str | None]) -> None:
    assert set(results) == set(CASES)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("features", [2048, 5120])
def test_the_kernels_compile_with_wide_loads_and_stores(features: int, products: bool) -> None:
    from tests.unit.kernels.test_producers_compiles import compile_ptx
    from titan_fp8.kernels.moe import kernel

    sizes = kernel._blocks(features, kernel.MAX_BLOCK, kernel.VALUES_PER_WARP)
    flags = {"SCALED": True, "PRODUCTS": products}
    pointers = ["*bf16", "*i32", "*fp32", "*bf16", "*bf16", "*fp32"]
    to_groups = compile_ptx(kernel._to_groups_kernel, [*pointers, *["i32+"] * 3, "i32"], **sizes, **flags)
    flags |= {"TOP_K": 2, "STEPS": 1}
    arguments = [*pointers, *["i32+"] * 3]
    to_tokens = compile_ptx(kernel._to_tokens_kernel, arguments, SUMS=True, **sizes, **flags)
    alone = compile_ptx(kernel._to_tokens_kernel, arguments, SUMS=False, **sizes, **flags | {"PRODUCTS": True})
    for ptx in (to_groups, to_tokens, alone):
        assert ("st.global.v4.b32" in ptx) == (ptx is not alone)
        assert "ld.global.v4.b32" in ptx
        assert not re.findall(r"ld\.global\.b16", ptx)
        assert "fma.rn.f32" not in ptx, "the reference rounds products"


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("experts", [8, 256])
@pytest.mark.parametrize("dtype", ["*i32", "*i64"])
def test_the_kernels_of_a_plan_compile(experts: int, dtype: str) -> None:
    from tests.unit.kernels.test_producers_compiles import compile_ptx
    from titan_fp8.kernels.moe import plan_kernel

    sizes = plan_kernel._constants(experts, plan_kernel.BLOCK)
    compile_ptx(plan_kernel._count_kernel, [dtype, "*i32", "i32", "i32"], **sizes)
    compile_ptx(plan_kernel._place_kernel, [dtype, *["*i32"] * 5, *["i32"] * 3], **sizes)
    before = ["*i32", "*i32", "i32", "i32"]
    compile_ptx(plan_kernel._before_kernel, before, SCAN_BLOCK=plan_kernel.SCAN_BLOCK, num_warps=4)
