"""MXFP8 on a GPU: Triton, CUDA C++ and PyTorch give the reference's bits, and tensor cores take the results."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, scaled_grouped_mm, scaled_mm
from torch.utils import cpp_extension

from tests.gpu.test_blockwise import to_gpu
from tests.tolerances import EMULATED_VS_NATIVE_SQNR_DB, sqnr_db
from tests.unit.kernels.test_mx_reference import values
from titan_fp8.kernels import mx
from titan_fp8.kernels.mx import columns_cuda, reference

pytestmark = pytest.mark.gpu

BLACKWELL = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 10, reason="needs SM100"
)
SHAPES = [(1, 32), (31, 64), (200, 160), (1000, 512), (300, 4096), (130, 14336)]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
ALL_MODES = pytest.mark.parametrize("mode", mx.MODES)
SWIZZLED = pytest.mark.parametrize("swizzled", [False, True], ids=["plain", "swizzled"])
GROUPS = {
    "uneven, and rows behind": ([64, 0, 160, 32, 512], 1024),
    "all in one": ([0, 1024, 0], 1024),
    "many": ([32 * (number % 5) for number in range(70)], 4480),
    "none": ([0, 0], 96),
    "as much padding as there can be, and rows behind": ([32] * 5, 256),
}


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from titan_fp8.kernels.float8 import bits

    def poisoned(*shape: int, device: torch.device, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype)

    monkeypatch.setattr(bits, "new_codes", poisoned)


@pytest.fixture
def cuda_kernel() -> None:
    """The CUDA kernel can be built here."""
    missing = columns_cuda._missing_tools(cpp_extension.CUDA_HOME)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def assert_same(results: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    """The same bits in the same shape, contiguous; plain scales by columns may be so once they are transposed."""
    for position, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert result is not None
        assert wanted is not None
        assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape), position
        of_columns = result.dtype == mx.E8M0 and result.transpose(-2, -1).is_contiguous()
        assert result.is_contiguous() or of_columns, position
        one, other = (t.contiguous().view(torch.uint8) for t in (result.cpu(), wanted))
        assert torch.equal(one, other), f"output {position}: {int((one != other).sum())} bytes differ"


def assert_casts_equal_the_reference(x: Tensor, mode: str, swizzled: bool) -> None:
    """x is a CPU tensor; it is moved with its strides."""
    gpu, expected = to_gpu(x), mx.cast_both(x, mode, swizzled=swizzled)
    assert_same(mx.cast_rows(gpu, mode, swizzled=swizzled), expected[:2])
    assert_same(mx.cast_columns(gpu, mode, swizzled=swizzled), expected[2:])
    assert_same(mx.cast_both(gpu, mode, swizzled=swizzled), expected)


def assert_quantize_dequantize_equals_the_reference(x: Tensor, mode: str) -> None:
    gpu, (by_rows, by_columns) = to_gpu(x), mx.quantize_dequantize(x, mode)
    assert_same(mx.quantize_dequantize(gpu, mode), (by_rows, by_columns))
    assert_same(mx.quantize_dequantize(gpu, mode, columns=False)[:1], (by_rows,))
    assert_same(mx.quantize_dequantize(gpu, mode, rows=False)[1:], (by_columns,))


@DTYPES
@SWIZZLED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_casts_equal_the_reference_bit_for_bit(shape: tuple[int, int], swizzled: bool, dtype: torch.dtype) -> None:
    for mode in mx.MODES if shape[0] * shape[1] < 2**16 else ("rceil",):
        assert_casts_equal_the_reference(values(*shape).to(dtype), mode, swizzled)


@DTYPES
@ALL_MODES
def test_quantize_dequantize_equals_the_reference_bit_for_bit(mode: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[:4]:
        assert_quantize_dequantize_equals_the_reference(values(*shape).to(dtype), mode)


@ALL_MODES
def test_every_scale_there_is_has_the_reference_bits(mode: str) -> None:
    mantissas = torch.tensor([0, 1, 0x600000, 0x600001, 0x6FFFFF, 0x700000, 0x77FFFF, 0x780000, 0x7FFFFF])
    amax = ((torch.arange(255).unsqueeze(1) << 23) + mantissas).int().flatten()
    x = amax.view(torch.float32).unsqueeze(1) * 2.0 ** -torch.arange(32)
    x[:, 1::2] *= -1
    assert_casts_equal_the_reference(x, mode, False)
    assert_quantize_dequantize_equals_the_reference(x, mode)


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, 1e-40, 6e4])
def test_bad_values_have_the_reference_bits(bad: float, dtype: torch.dtype) -> None:
    x = values(170, 160)
    x[3, 40], x[169, 7], x[:64, 9] = bad, bad, bad
    for swizzled in (False, True):
        assert_casts_equal_the_reference(x.to(dtype), "rceil", swizzled)
    assert_quantize_dequantize_equals_the_reference(x.to(dtype), "floor")


def test_strides_do_not_matter() -> None:
    base = values(256, 516).bfloat16()
    for x in (
        base[:, :256].t(),
        base[::2, 2:258],
        base[:, 1:257],
        base[:, ::2][:, :256],
        base[:1, :64].expand(130, 64),
    ):
        assert_casts_equal_the_reference(x, "rceil", True)
        assert_quantize_dequantize_equals_the_reference(x, "rceil")


@SWIZZLED
@pytest.mark.parametrize("name", GROUPS)
def test_casts_of_groups_equal_the_reference_bit_for_bit(name: str, swizzled: bool) -> None:
    sizes, rows = GROUPS[name]
    ends = torch.tensor(sizes).cumsum(0).int()
    x = values(rows, 160).bfloat16()
    x[ends[-1] :] = torch.nan
    gpu, gpu_ends = x.cuda(), ends.cuda()
    expected = mx.cast_group_both(x, ends, "rceil", swizzled=swizzled)
    assert_same(mx.cast_group_rows(gpu, gpu_ends, "rceil", swizzled=swizzled), expected[:2])
    assert_same(mx.cast_group_columns(gpu, gpu_ends, "rceil", swizzled=swizzled), expected[2:])
    assert_same(mx.cast_group_both(gpu, gpu_ends, "rceil", swizzled=swizzled), expected)
    assert_same(mx.quantize_dequantize_groups(gpu, gpu_ends, "rceil"), mx.quantize_dequantize_groups(x, ends, "rceil"))


@SWIZZLED
@pytest.mark.parametrize("shape", [(3, 64, 160), (2, 128, 96), (8, 512, 256)], ids=str)
def test_casts_of_experts_equal_the_reference_bit_for_bit(shape: tuple[int, int, int], swizzled: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = values(*shape).to(dtype)
        expected = mx.cast_experts(weight, "rceil", swizzled=swizzled)
        assert_same(mx.cast_experts(weight.cuda(), "rceil", swizzled=swizzled), expected)


@DTYPES
@SWIZZLED
@ALL_MODES
def test_the_cuda_kernel_gives_the_reference_bits(
    mode: str, swizzled: bool, dtype: torch.dtype, cuda_kernel: None
) -> None:
    for shape in SHAPES:
        x = values(*shape)
        x[-1, 3], x[0, 5] = torch.nan, -torch.inf
        expected = mx.cast_columns(x.to(dtype), mode, swizzled=swizzled)
        assert_same(mx.cast_columns(x.to(dtype).cuda(), mode, swizzled=swizzled, kernel="cuda"), expected)


def test_the_cuda_kernel_takes_any_strides_and_no_tokens(cuda_kernel: None) -> None:
    base = values(256, 516).bfloat16()
    for x in (base[:, :256].t(), base[::2, 2:258], base[:, 1:257], base[:1, :64].expand(130, 64)):
        assert_same(mx.cast_columns(to_gpu(x), "rceil", kernel="cuda"), mx.cast_columns(x, "rceil"))
    codes_t, scale_t = mx.cast_columns(torch.empty(0, 64, device="cuda"), "rceil", kernel="cuda")
    assert (codes_t.shape, scale_t.shape) == ((64, 0), (64, 0))


def test_plain_scales_by_columns_lie_as_x_does(cuda_kernel: None) -> None:
    x, weight, ends = values(96, 64), values(2, 96, 64), torch.tensor([32, 96], dtype=torch.int32)
    for kernel in mx.DIM1_KERNELS:
        assert mx.cast_columns(x.cuda(), "rceil", kernel=kernel)[1].stride() == (1, 64)
    assert mx.cast_both(x.cuda(), "rceil")[3].stride() == (1, 64)
    assert mx.cast_group_both(x.cuda(), ends.cuda(), "rceil")[3].stride() == (1, 64)
    assert mx.cast_experts(weight.cuda(), "rceil")[3].stride() == (192, 1, 64)


def test_the_torch_choice_gives_the_reference_bits_on_the_gpu() -> None:
    x = values(200, 160).bfloat16()
    x[3, 3] = torch.nan
    for mode in mx.MODES:
        assert_same(mx.cast_columns(x.cuda(), mode, kernel="torch"), mx.cast_columns(x, mode))


def test_without_triton_the_triton_choice_is_refused_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.float8, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="needs Triton, which is not installed here"):
        mx.cast_columns(torch.ones(32, 32, device="cuda"), "floor")


@pytest.mark.parametrize(("shape", "dim"), [((96, 64), -1), ((96, 64), 0), ((96, 40), 0), ((3, 64, 96), 1), ((64,), 0)])
def test_the_public_format_is_the_same_on_both_devices(shape: tuple[int, ...], dim: int) -> None:
    t = torch.randn(shape)
    scale, data = mx.to_mx(t, dim=dim)
    gpu_scale, gpu_data = mx.to_mx(t.cuda(), dim=dim)
    assert (gpu_scale.stride(), gpu_data.stride()) == (scale.stride(), data.stride())
    assert torch.equal(gpu_scale.cpu().view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(gpu_data.cpu().view(torch.uint8), data.view(torch.uint8))
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(mx.from_mx(gpu_scale, gpu_data, dtype).cpu(), mx.from_mx(scale, data, dtype))


def test_layouts_of_scales_are_the_same_on_both_devices() -> None:
    ends = torch.tensor([64, 64, 320], dtype=torch.int32)
    _, scale, _, scale_t = mx.cast_group_both(values(384, 160), ends, "rceil")
    pairs = (mx.swizzle, scale), (mx.swizzle_row_groups, scale, ends), (mx.swizzle_column_groups, scale_t, ends)
    for function, *arguments in pairs:
        assert_same((function(*(a.cuda() for a in arguments)),), (function(*arguments),))


def test_a_cast_repeats_bit_for_bit() -> None:
    x = torch.randn(1000, 4096, device="cuda", dtype=torch.bfloat16)
    first, second = (mx.cast_both(x, "rceil", swizzled=True) for _ in range(2))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))


def test_a_bf16_product_of_what_is_quantized_is_that_of_the_codes() -> None:
    """Products of two e4m3 numbers with their scales are exact in fp32, so only the order of sums differs."""
    x, w = (torch.randn(size, 1024, device="cuda", dtype=torch.bfloat16) for size in (256, 384))
    (x_q, _), (w_q, _) = (mx.quantize_dequantize(t, "rceil", columns=False) for t in (x, w))
    assert x_q is not None
    assert w_q is not None
    exact = (mx.from_mx(*mx.to_mx(t), torch.float32).double() for t in (x, w))
    left, right = exact
    assert sqnr_db(left @ right.t(), x_q @ w_q.t()) > EMULATED_VS_NATIVE_SQNR_DB


@pytest.mark.slow
def test_offsets_beyond_32_bits_are_reached(cuda_kernel: None) -> None:
    tokens, features = 70_016, 32_768
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = -3.5
    for kernel in ("triton", "cuda"):
        codes_t, scale_t = mx.cast_columns(x, "rceil", kernel=kernel)
        assert codes_t.view(torch.int64).count_nonzero() == 1
        assert codes_t[-1, tokens - 1].float() * reference.scale_values(scale_t[-1, -1]) == -3.5
        del codes_t
    codes, scale = mx.cast_rows(x, "rceil")
    assert codes.view(torch.int64).count_nonzero() == 1
    assert codes[-1, -1].float() * reference.scale_values(scale[-1, -1]) == -3.5
    del codes
    by_rows, by_columns = mx.quantize_dequantize(x, "rceil")
    for result in (by_rows, by_columns):
        assert result is not None
        assert result[-1, -1] == -3.5
        assert result.view(torch.int64).count_nonzero() == 1


@BLACKWELL
@pytest.mark.parametrize("tokens", [32, 100, 1000])
def test_block_scaled_tensor_cores_agree_with_the_emulation(tokens: int) -> None:
    x, w = (values(size, 1024).cuda() for size in (tokens, 384))
    (a, scale_a), (b, scale_b) = (mx.cast_rows(t, "rceil", swizzled=True) for t in (x, w))
    recipe, layout = ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4
    native = scaled_mm(a, b.t(), scale_a, recipe, scale_b, recipe, layout, layout)
    left, right = (mx.from_mx(*mx.to_mx(t), torch.float32).double() for t in (x, w))
    assert sqnr_db(left @ right.t(), native) > EMULATED_VS_NATIVE_SQNR_DB


@BLACKWELL
def test_block_scaled_grouped_products_agree_with_the_emulation() -> None:
    sizes, (n, k) = [64, 0, 160, 288], (256, 512)
    ends = torch.tensor(sizes).cumsum(0).int().cuda()
    x, grad, w = values(512, k).cuda(), values(512, n, seed=1).cuda(), values(len(sizes), n, k).cuda()
    recipe, layout = ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4
    arguments = {"swizzle_a": layout, "swizzle_b": layout, "offs": ends}
    codes, scale, codes_t, scale_t = mx.cast_group_both(x, ends, "rceil", swizzled=True)
    w_codes, w_scale = mx.cast_experts(w, "rceil", swizzled=True)[:2]
    grad_t, grad_scale = mx.cast_group_columns(grad, ends, "rceil", swizzled=True)
    output = scaled_grouped_mm(codes, w_codes.transpose(1, 2), scale, recipe, w_scale, recipe, **arguments)
    grad_w = scaled_grouped_mm(grad_t, codes_t.t(), grad_scale, recipe, scale_t, recipe, **arguments)
    x_rows, x_columns = (t.double() for t in mx.quantize_dequantize_groups(x, ends, "rceil") if t is not None)
    grad_columns = mx.quantize_dequantize_groups(grad, ends, "rceil", rows=False)[1]
    assert grad_columns is not None
    begin = 0
    for e, size in enumerate(sizes):
        group = slice(begin, begin + size)
        begin += size
        if size:
            right = mx.from_mx(*mx.to_mx(w[e]), torch.float32).double()
            assert sqnr_db(x_rows[group] @ right.t(), output[group]) > EMULATED_VS_NATIVE_SQNR_DB
            exact = grad_columns[group].double().t() @ x_columns[group]
            assert sqnr_db(exact, grad_w[e]) > EMULATED_VS_NATIVE_SQNR_DB
