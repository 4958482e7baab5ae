"""The scaled product: emulation is exact to fp32 whatever the process has set, and nothing is emulated unasked."""

import pytest
import torch
from torch import Tensor

from tests.tolerances import sqnr_db
from titan_fp8.kernels.float8 import E4M3, E5M2, reference
from titan_fp8.quantization import gemm
from titan_fp8.quantization.gemm import scaled_mm, scaled_mm_blockwise


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


EXTREMES = [(7e35, 1e-3), (1e-3, 7e35), (2e-15, 7e35), (7e35, 2e-15), (1e17, 1e15), (2e-15, 2e-15), (3.0, 1e-12)]
"""Pairs of scales at the limits of what casts give."""
LARGE, SMALL = torch.logspace(-15, 35.8, 20).unsqueeze(1), torch.logspace(-15, -3, 32).unsqueeze(1)
"""Scales a row, of which any two have a product far from the limits of fp32."""


def one_term(rows: int, k: int) -> Tensor:
    """Codes `[rows, k]` of which one in a row is not zero, so that products are exact in fp32."""
    is_zero = (torch.arange(rows).unsqueeze(1) + torch.arange(k)) % k != 0
    return torch.full((rows, k), 448.0).masked_fill(is_zero, 0).to(E4M3)


def assert_near(result: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() < torch.finfo(torch.float32).max
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scales", EXTREMES, ids=str)
def test_emulated_product_of_extreme_scales_is_exact_where_the_result_is_a_number(scales: tuple[float, float]) -> None:
    a, b, scale_a, scale_b = one_term(20, 32), codes(32, 32), *map(torch.tensor, scales)
    assert_near(emulated(a, b, scale_a, scale_b), exact(a, b, scale_a, scale_b))


def test_emulated_product_of_extreme_scales_a_row_is_exact_where_the_result_is_a_number() -> None:
    a, b = one_term(20, 32), codes(32, 32)
    assert_near(emulated(a, b, LARGE, SMALL), exact(a, b, LARGE, SMALL))
    assert_near(emulated(b, a, SMALL, LARGE), exact(b, a, SMALL, LARGE))


@pytest.mark.parametrize("row_operand", ["a", "b"])
def test_a_scale_a_row_goes_with_one_scale_for_the_tensor(row_operand: str) -> None:
    a, b = codes(20, 64), codes(32, 64, seed=1)
    one = torch.tensor(0.37)
    scale_a = torch.logspace(-2, 2, 20).unsqueeze(1) if row_operand == "a" else one
    scale_b = torch.logspace(2, -3, 32).unsqueeze(1) if row_operand == "b" else one
    result = emulated(a, b, scale_a, scale_b)
    assert sqnr_db(exact(a, b, scale_a, scale_b), result) > 120


@pytest.mark.parametrize("row_operand", ["a", "b"])
def test_natively_one_scale_beside_a_scale_a_row_becomes_one_a_row(
    row_operand: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that torch sees the layout of a rowwise product."""
    monkeypatch.setattr(gemm, "_takes_row_scales", lambda a, out_dtype: True)
    scales = {"a": torch.ones(20, 1, device="meta"), "b": torch.ones(32, 1, device="meta")}
    scales = {name: scale if name == row_operand else scale.new_ones(()) for name, scale in scales.items()}
    a, b = codes(20, 64).to("meta"), codes(32, 64).to("meta")
    result = gemm._native(a, b, scales["a"], scales["b"], torch.bfloat16, False)
    assert (result.shape, result.dtype) == ((20, 32), torch.bfloat16)


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
    gemm._has_cublas_scales.cache_clear()
    try:
        for dtype in (torch.float32, torch.float16):
            assert gemm._takes_row_scales(codes(2, 16), dtype) == any_dtype
        assert gemm._takes_row_scales(codes(2, 16), torch.bfloat16)
        assert not gemm._takes_row_scales(codes(1, 16), torch.bfloat16)
    finally:
        gemm._has_cublas_scales.cache_clear()


def block_operands(m: int, n: int, k: int, tiles: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(a, b, scale_a, scale_b)` with scales of very different magnitudes."""
    generator = torch.Generator().manual_seed(2)

    def scale(rows: int) -> Tensor:
        return torch.randn(k // 128, rows, generator=generator).exp().t()

    return codes(m, k), codes(n, k, seed=1), scale(m), scale(n // 128).contiguous() if tiles else scale(n)


def exact_blockwise(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    rows = b.shape[0] // scale_b.shape[0]
    scale_b = scale_b.repeat_interleave(rows, 0)
    values = (x.double() * s.double().repeat_interleave(128, 1) for x, s in ((a, scale_a), (b, scale_b)))
    left, right = values
    return left @ right.t()


TILES = pytest.mark.parametrize("tiles", [True, False], ids=["128x128", "1x128"])


@TILES
@pytest.mark.parametrize(("m", "n", "k"), [(20, 256, 384), (1, 128, 128), (130, 128, 256)])
def test_emulated_blockwise_product_is_exact_to_fp32(m: int, n: int, k: int, tiles: bool) -> None:
    operands = block_operands(m, n, k, tiles)
    result = scaled_mm_blockwise(*operands, None, torch.float32, True, True)
    assert sqnr_db(exact_blockwise(*operands), result) > 120
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3))
    with_bias = scaled_mm_blockwise(*operands, bias, torch.bfloat16, True, True)
    assert torch.equal(with_bias, (result.bfloat16().float() + bias).bfloat16())


@TILES
@pytest.mark.parametrize("scales", EXTREMES, ids=str)
def test_emulated_blockwise_product_of_extreme_scales_is_exact_where_the_result_is_a_number(
    scales: tuple[float, float], tiles: bool
) -> None:
    _, b, *like = block_operands(20, 256, 256, tiles)
    operands = (one_term(20, 256), b, *map(torch.full_like, like, scales))
    assert_near(scaled_mm_blockwise(*operands, None, torch.float32, True, True), exact_blockwise(*operands))


def test_emulated_blockwise_product_ignores_autocast() -> None:
    operands = block_operands(16, 128, 256, True)
    expected = scaled_mm_blockwise(*operands, None, torch.float32, True, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = scaled_mm_blockwise(*operands, None, torch.float32, True, True)
    assert torch.equal(result, expected)


@TILES
@pytest.mark.parametrize(("m", "k"), [(0, 128), (3, 0)])
def test_a_blockwise_product_over_nothing_is_zero(m: int, k: int, tiles: bool) -> None:
    result = scaled_mm_blockwise(*block_operands(m, 128, k, tiles), None, torch.float32, True, True)
    assert torch.equal(result, torch.zeros(m, 128))


def test_nan_in_the_scale_of_a_block_reaches_what_the_block_is_part_of() -> None:
    a, b, scale_a, scale_b = block_operands(4, 256, 256, True)
    scale_a[2, 1] = torch.nan
    result = scaled_mm_blockwise(a, b, scale_a, scale_b, None, torch.bfloat16, True, True)
    assert result.isnan().all(1).tolist() == [False, False, True, False]
    scale_a[2, 1], scale_b[1, 0] = 1.0, torch.nan
    result = scaled_mm_blockwise(a, b, scale_a, scale_b, None, torch.bfloat16, True, True)
    assert result.isnan().all(0).tolist() == [False] * 128 + [True] * 128


@TILES
@pytest.mark.parametrize("m", [1, 127, 128, 130])
@pytest.mark.parametrize("blocks", [1, 2, 4, 5])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_native_operands_are_what_torch_checks_for(m: int, blocks: int, out_dtype: torch.dtype, tiles: bool) -> None:
    """On meta tensors torch checks shapes and strides of scales as it does on a GPU."""
    operands = [x.to("meta") for x in block_operands(m, 256, 128 * blocks, tiles)]
    result = gemm._native_blockwise(*operands, tiles, out_dtype)
    assert (result.shape, result.dtype) == ((m, 256), out_dtype)


def test_native_operands_come_in_multiples_that_cublas_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, output_dtype):
        calls.append((a, b, scale_a, recipe_a.name, scale_b, recipe_b.name))
        return torch.zeros(a.shape[0], b.shape[1], dtype=output_dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    a, b, scale_a, scale_b = block_operands(7, 128, 640, True)
    assert gemm._native_blockwise(a, b, scale_a, scale_b, True, torch.bfloat16).shape == (7, 128)
    a_given, b_given, scale_a_given, name_a, scale_b_given, name_b = calls[0]
    assert (name_a, name_b) == ("BlockWise1x128", "BlockWise128x128")
    assert a_given.shape == (8, 640)
    assert torch.equal(a_given[:7].float(), a.float())
    assert (a_given[7:].float() == 0).all()
    assert torch.equal(b_given.float(), b.t().float())
    assert (scale_a_given.shape, scale_a_given.stride()) == ((8, 5), (1, 8))
    assert torch.equal(scale_a_given[:7], scale_a)
    assert (scale_b_given.shape, scale_b_given.stride()) == ((8, 1), (1, 8))
    assert torch.equal(scale_b_given[:5], scale_b.t())


@pytest.mark.parametrize(
    ("capability", "cuda", "native"),
    [((9, 0), "12.9", True), ((9, 0), "13.0", True), ((9, 0), "12.8", False), ((10, 0), "13.0", False),
     ((8, 9), "13.0", False), ((12, 0), "13.0", False)],
)  # fmt: skip
def test_blockwise_is_native_on_hopper_with_a_cublas_that_has_it(
    capability: tuple[int, int], cuda: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    gemm._has_cublas_scales.cache_clear()
    try:
        assert gemm.blockwise_is_native(torch.device("cuda", 0)) == native
    finally:
        gemm._has_cublas_scales.cache_clear()


def test_without_emulation_a_blockwise_product_is_refused_where_it_is_not_native() -> None:
    assert not gemm.blockwise_is_native(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"tensors on cpu.*capability 9\.0 and CUDA 12\.9.*emulate=True"):
        scaled_mm_blockwise(*block_operands(16, 128, 128, True), None, torch.bfloat16, True, False)


def test_blockwise_scales_of_other_shapes_are_refused() -> None:
    a, b, scale_a, scale_b = block_operands(16, 256, 256, True)
    for wrong in (
        (a, b, scale_a, scale_b[:1]),
        (a, b, scale_a.t(), scale_b),
        (a[:, :200], b[:, :200], scale_a, scale_b),
    ):
        with pytest.raises(ValueError, match=r"multiples of 128.*\[N/128, K/128\]"):
            scaled_mm_blockwise(*wrong, None, torch.float32, True, True)
