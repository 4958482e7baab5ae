"""Blockwise scales on a GPU: the kernels give the reference's bits, the tensor cores agree with the emulation."""

import pytest
import torch
from torch import Tensor

from tests.gpu.test_float8 import assert_same_bits
from tests.tolerances import EMULATED_VS_NATIVE_SQNR_DB, sqnr_db
from tests.unit.kernels.test_blockwise_reference import values
from titan_fp8.kernels import blockwise
from titan_fp8.kernels.blockwise import reference
from titan_fp8.kernels.float8 import E4M3, E5M2
from titan_fp8.quantization import gemm, ops

pytestmark = pytest.mark.gpu

NATIVE = pytest.mark.skipif(
    not gemm.blockwise_is_native(torch.device("cuda")), reason="needs SM90 and CUDA 12.9 for blockwise products"
)
SHAPES = [(1, 128), (127, 256), (200, 384), (1000, 512), (300, 4096), (130, 14336)]
POWERS = pytest.mark.parametrize("power_of_two", [False, True], ids=["exact", "power of two"])


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from titan_fp8.kernels.float8 import bits

    def poisoned(*shape: int, device: torch.device, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype)

    monkeypatch.setattr(bits, "new_codes", poisoned)


def to_gpu(x: Tensor) -> Tensor:
    """A copy with the same strides."""
    if 0 in x.stride():
        return x[:1].cuda().expand_as(x)
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda").copy_(x)


def assert_same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The same bits in the same layout."""
    assert [r.stride() for r in results] == [e.stride() for e in expected]
    assert_same_bits(tuple(r.contiguous() for r in results), expected)


def assert_activation_casts_equal_the_reference(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> None:
    """x is a CPU tensor; it is moved with its strides."""
    gpu = to_gpu(x)
    rows = reference.cast_block_rows(x, dtype, power_of_two)
    columns = reference.cast_block_columns(x, dtype, power_of_two)
    assert_same(blockwise.cast_block_rows(gpu, dtype, power_of_two), rows)
    assert_same(blockwise.cast_block_columns(gpu, dtype, power_of_two), columns)
    assert_same(blockwise.cast_block_both(gpu, dtype, power_of_two), rows + columns)


@POWERS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_activation_casts_equal_the_reference_bit_for_bit(
    shape: tuple[int, int], input_dtype: torch.dtype, power_of_two: bool
) -> None:
    for dtype in (E4M3, E5M2):
        assert_activation_casts_equal_the_reference(values(*shape).to(input_dtype), dtype, power_of_two)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, 1e-30, 1e38])
def test_bad_values_have_the_reference_bits(bad: float) -> None:
    for input_dtype in (torch.float32, torch.bfloat16):
        x = values(200, 256)
        x[3, 130], x[199, 7], x[:128, 9] = bad, bad, bad
        assert_activation_casts_equal_the_reference(x.to(input_dtype), E4M3, False)
        weight = values(256, 256)
        weight[130, 5], weight[:128, 128:] = bad, bad
        gpu = weight.to(input_dtype).cuda()
        assert_same(blockwise.cast_blocks(gpu, E4M3, False), reference.cast_blocks(weight.to(input_dtype), E4M3, False))


def test_strides_do_not_matter() -> None:
    base = values(256, 520).bfloat16()
    for x in (base[:, :512].t(), base[::2, 2:514:2], base[:1, :128].expand(130, 128)):
        assert_activation_casts_equal_the_reference(x, E4M3, False)


def test_no_tokens_give_empty_codes() -> None:
    shapes = [tuple(r.shape) for r in blockwise.cast_block_both(torch.empty(0, 256, device="cuda"), E4M3, False)]
    assert shapes == [(0, 256), (0, 2), (256, 0), (256, 0)]


@POWERS
@pytest.mark.parametrize("shape", [(128, 128), (384, 256), (1024, 4096)], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32])
def test_weight_casts_equal_the_reference_bit_for_bit(
    shape: tuple[int, int], input_dtype: torch.dtype, power_of_two: bool
) -> None:
    weight = values(*shape).to(input_dtype)
    for x in (weight, weight.t()):
        assert_same(blockwise.cast_blocks(to_gpu(x), E4M3, power_of_two), reference.cast_blocks(x, E4M3, power_of_two))


@pytest.mark.parametrize(("rows", "ranks"), [(384, 5), (1024, 7), (256, 300)])
def test_shards_that_cut_tiles_give_the_codes_and_scales_of_the_whole_weight(rows: int, ranks: int) -> None:
    weight = values(rows, 512).cuda()
    weight[rows // 2, 7] = torch.nan
    codes, scale = blockwise.cast_blocks(weight, E4M3, False)
    each = -(-rows // ranks)
    firsts = [min(rank * each, rows) for rank in range(ranks)]
    shards = [weight[first : first + each] for first in firsts]
    parts = [blockwise.block_amax(shard, first, rows) for shard, first in zip(shards, firsts, strict=True)]
    amax = torch.stack(parts).amax(0)
    assert torch.equal(blockwise.block_scale(amax, E4M3, False).view(torch.int32), scale.view(torch.int32))
    for shard, first in zip(shards, firsts, strict=True):
        part = blockwise.cast_blocks_from_amax(shard, amax, E4M3, False, first)
        assert torch.equal(part.view(torch.uint8), codes.view(torch.uint8)[first : first + each])


def test_a_cast_repeats_bit_for_bit() -> None:
    x = torch.randn(1000, 4096, device="cuda", dtype=torch.bfloat16)
    first, second = (blockwise.cast_block_both(x, E4M3, False) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.view(torch.uint8) if a.dtype == E4M3 else a, b.view(torch.uint8) if b.dtype == E4M3 else b)


@pytest.mark.slow
def test_offsets_beyond_32_bits_are_reached() -> None:
    tokens, features = 70_016, 32_768
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = -3.5
    codes, scale, codes_t, scale_t = blockwise.cast_block_both(x, E4M3, False)
    assert codes[-1, -1].float() * scale[-1, -1] == -3.5
    assert codes_t[-1, tokens - 1].float() * scale_t[-1, -1] == -3.5
    assert codes.view(torch.int64).count_nonzero() == codes_t.view(torch.int64).count_nonzero() == 1
    del codes, codes_t
    codes, scale = blockwise.cast_blocks(x, E4M3, False)
    assert codes[-1, -1].float() * scale[-1, -1] == -3.5
    shard = x[100:]
    amax = blockwise.block_amax(shard, 100, tokens)
    assert amax[-1, -1].view(torch.float32) == 3.5
    codes = blockwise.cast_blocks_from_amax(shard, amax, E4M3, False, 100)
    assert codes[-1, -1].float() * scale[-1, -1] == -3.5


def operands(m: int, n: int, k: int, tiles: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    a, b = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
    (a, scale_a) = ops.cast_block_rows(a, E4M3, False)
    (b, scale_b) = ops.cast_blocks(b, E4M3, False) if tiles else ops.cast_block_rows(b, E4M3, False)
    return a, b, scale_a, scale_b


@NATIVE
@pytest.mark.parametrize("tiles", [True, False], ids=["128x128", "1x128"])
@pytest.mark.parametrize("m", [1, 7, 16, 130, 1000])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 384), (128, 640), (384, 2048)])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_tensor_cores_agree_with_the_emulation(m: int, n: int, k: int, out_dtype: torch.dtype, tiles: bool) -> None:
    given = operands(m, n, k, tiles)
    native, emulated = (ops.scaled_mm_blockwise(*given, None, out_dtype, True, emulate) for emulate in (False, True))
    assert (native.shape, native.dtype) == ((m, n), out_dtype)
    assert native.is_contiguous()
    assert sqnr_db(emulated, native) > EMULATED_VS_NATIVE_SQNR_DB
    bias = torch.randn(n, device="cuda")
    with_bias = ops.scaled_mm_blockwise(*given, bias, out_dtype, False, False)
    assert torch.equal(with_bias, (native.float() + bias).to(out_dtype))


@NATIVE
def test_a_product_repeats_bit_for_bit() -> None:
    given = operands(1000, 1024, 4096, True)
    first, second = (ops.scaled_mm_blockwise(*given, None, torch.bfloat16, True, False) for _ in range(2))
    assert torch.equal(first, second)


@NATIVE
def test_nan_in_a_block_reaches_its_rows_and_no_others() -> None:
    a, b, scale_a, scale_b = operands(64, 256, 512, True)
    codes = a.view(torch.uint8).clone()
    codes[3, 128:256], scale_a[3, 1] = 0x7F, torch.nan
    result = ops.scaled_mm_blockwise(codes.view(E4M3), b, scale_a, scale_b, None, torch.bfloat16, True, False)
    assert result.isnan().all(1).nonzero().tolist() == [[3]]
    assert result.isnan().any(1).nonzero().tolist() == [[3]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_where_it_is_not_native_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_has_cublas_scales", lambda device: False)
    with pytest.raises(RuntimeError, match=r"compute capability \d+\.\d+ with CUDA.*emulate=True"):
        gemm.scaled_mm_blockwise(*operands(16, 128, 128, True), None, torch.bfloat16, True, False)
