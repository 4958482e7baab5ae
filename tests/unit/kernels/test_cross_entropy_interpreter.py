"""The kernel of the cross-entropy equals the reference, shown in Triton's interpreter on the CPU; and it compiles."""

import re

import pytest

triton = pytest.importorskip("triton")

from tests.unit.kernels.interpreter import results_of  # noqa: E402

CASES = [
    "half_precision", "labels_left_out_and_unknown", "large_logits", "nan_and_infinity", "rows_apart", "sizes",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return results_of("cross_entropy_cases", tmp_path_factory.mktemp("cross_entropy"))


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_the_reference(results: dict[str, str | None], case: str) -> None:
    assert results[case] == ""


def test_no_case_is_left_out(results: dict[str, str | None]) -> None:
    assert set(results) == set(CASES)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("grad", [True, False])
def test_the_kernel_compiles_with_wide_loads(grad: bool) -> None:
    from tests.unit.kernels.test_float8_compiles import compile_ptx
    from titan_fp8.kernels.cross_entropy import kernel

    arguments = ["*bf16", "*i64", "*fp32", "i32+", "i32+"]
    ptx = compile_ptx(kernel._cross_entropy_kernel, arguments, 90, kernel.WARPS, GRAD=grad, BLOCK=kernel.BLOCK)
    assert re.search(r"ld\.global[.\w]*\.v4\.b32", ptx)
    assert bool(re.search(r"st\.global[.\w]*\.v4\.b32", ptx)) is grad
