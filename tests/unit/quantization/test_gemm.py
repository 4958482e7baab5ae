"""The scaled product: emulation is exact to fp32 whatever the process has set, and nothing is emulated unasked."""

import pytest
import torch
from torch import Tensor

from tests.tolerances import sqnr_db
from titan_fp8.kernels.float8 import E4M3, E5M2, reference
from titan_fp8.quantization import gemm
from titan_fp8.quantization.gemm import scaled_mm


def codes(rows: int, columns: int, dtype: torch.dtype = E4M3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 40).to(dtype)


def exact(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    return (a.double() @ b.double().t()) * scale_a.double() * scale_b.double().t()


def emulated(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None) -> Tensor:
    return scaled_mm(a, b, scale_a, scale_b, bias, torch.float32, True, True)


@pytest.mark.parametrize("a_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("per_row", [False, True])
def test_emulated_product_is_exact_to_fp32(a_dtype: torch.dtype, per_row: bool) -> None:
    a, b = codes(20, 64, a_dtype), codes(32, 64, seed=1)
    scale_a = torch.logspace(-2, 2, 20).unsqueeze(1) if per_row else torch.tensor(0.37)
    scale_b = torch.logspace(2, -3, 32).unsqueeze(1) if per_row else torch.tensor(1.9)
    result = emulated(a, b, scale_a, scale_b)
    assert sqnr_db(exact(a, b, scale_a, scale_b), result) > 120


def test_emulated_product_ignores_autocast_and_reduced_precision_modes() -> None:
    a, b, one = codes(32, 512), codes(32, 512, seed=1), torch.tensor(1.0)
    expected = emulated(a, b, one, one)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = emulated(a, b, one, one)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(result, expected)


def test_bias_is_added_unrounded() -> None:
    a, b, scale = codes(4, 16), codes(16, 16, seed=1), torch.tensor(1e-3)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(2))
    plain = scaled_mm(a, b, scale, scale, None, torch.bfloat16, True, True)
    result = scaled_mm(a, b, scale, scale, bias, torch.bfloat16, True, True)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, (plain.float() + bias).bfloat16())


@pytest.mark.parametrize(("m", "k"), [(0, 16), (3, 0)])
def test_a_product_over_nothing_is_zero(m: int, k: int) -> None:
    one = torch.tensor(1.0)
    result = emulated(codes(m, k), codes(16, k), one, one)
    assert torch.equal(result, torch.zeros(m, 16))


def test_nan_in_a_scale_or_a_code_reaches_the_result() -> None:
    a, b = codes(4, 16), codes(16, 16)
    scale_a = torch.tensor([1.0, torch.nan, 1.0, 1.0]).unsqueeze(1)
    result = emulated(a, b, scale_a, torch.ones(16, 1))
    assert result.isnan().any(1).tolist() == [False, True, False, False]
    poisoned = a.view(torch.uint8).clone()
    poisoned[2, 5] = reference.NAN_CODE
    result = emulated(poisoned.view(E4M3), b, torch.ones(4, 1), torch.ones(16, 1))
    assert result.isnan().all(1).tolist() == [False, False, True, False]


def test_without_emulation_a_cpu_tensor_is_refused_with_the_remedies() -> None:
    one = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match=r"emulate=True or emulate=\"auto\""):
        scaled_mm(codes(16, 16), codes(16, 16), one, one, None, torch.bfloat16, True, False)


@pytest.mark.parametrize(
    ("capability", "cuda", "any_dtype"),
    [((9, 0), "13.0", True), ((9, 0), "12.8", False), ((8, 9), "13.0", False), ((10, 0), "13.0", False)],
)
def test_row_scales_go_into_the_product_only_where_torch_takes_them(
    capability: tuple[int, int], cuda: str, any_dtype: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule of aten/src/ATen/native/cuda: away from cuBLAS's kernel, a product with row scales is bf16 only."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    gemm._cublas_takes_row_scales.cache_clear()
    try:
        for dtype in (torch.float32, torch.float16):
            assert gemm._takes_row_scales(codes(2, 16), dtype) == any_dtype
        assert gemm._takes_row_scales(codes(2, 16), torch.bfloat16)
        assert not gemm._takes_row_scales(codes(1, 16), torch.bfloat16)
    finally:
        gemm._cublas_takes_row_scales.cache_clear()
