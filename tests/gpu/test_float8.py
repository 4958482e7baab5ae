"""Float8 on a GPU: the kernels give the reference's bits, the tensor cores agree with the emulation, compiled equals
eager."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.tolerances import EMULATED_VS_NATIVE_SQNR_DB, SQNR_DB, sqnr_db
from tests.unit.kernels.test_float8_reference import UNIT_AMAX, awkward_values
from titan_fp8.kernels import float8
from titan_fp8.kernels.float8 import E4M3, E5M2, reference
from titan_fp8.quantization import ops
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.runtime.device import detect_device

pytestmark = pytest.mark.gpu

NATIVE = pytest.mark.skipif(not detect_device().has_fp8_tensor_cores, reason="needs FP8 tensor cores")
ALL_RECIPES = pytest.mark.parametrize("recipe", RECIPES)
SHAPES = [(1, 16), (33, 48), (17, 63), (1000, 512), (300, 4096), (40, 14336), (20, 20480), (5, 40960), (2100, 272)]


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from titan_fp8.kernels.float8 import bits

    def poisoned(*shape: int, device: torch.device, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype)

    monkeypatch.setattr(bits, "new_codes", poisoned)


def assert_same_bits(results: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for result, reference_result in zip(results, expected, strict=True):
        if result is None or reference_result is None:
            assert result is reference_result
            continue
        assert result.is_cuda
        assert result.shape == reference_result.shape
        assert result.dtype == reference_result.dtype
        as_int = torch.uint8 if result.element_size() == 1 else torch.int32
        assert torch.equal(result.cpu().view(as_int), reference_result.contiguous().view(as_int))


@contextlib.contextmanager
def new_memory_filled_with_nan() -> Iterator[None]:
    """So that a scale that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@new_memory_filled_with_nan()
def assert_every_cast_equals_the_reference(x: Tensor, dtype: torch.dtype) -> None:
    """x is a CPU tensor; it is moved with its strides."""
    gpu = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda").copy_(x) if 0 not in x.stride() else (
        x[:1].cuda().expand_as(x)
    )  # fmt: skip
    amax = reference.amax_bits(x)
    assert_same_bits((float8.amax(gpu),), (amax,))
    for rows, columns in ((True, False), (False, True), (True, True)):
        assert_same_bits(
            float8.cast_tensor(gpu, amax.cuda(), dtype, rows=rows, columns=columns),
            reference.cast_tensor(x, amax, dtype, rows=rows, columns=columns),
        )
    rows_result, columns_result = reference.cast_rows(x, dtype), reference.cast_columns(x, dtype)
    assert_same_bits(float8.cast_rows(gpu, dtype), rows_result)
    assert_same_bits(float8.cast_columns(gpu, dtype), columns_result)
    assert_same_bits(float8.cast_rows_and_columns(gpu, dtype), rows_result + columns_result)
    codes, scale = rows_result
    assert_same_bits(float8.columns_from_rows(codes.cuda(), scale.cuda()), reference.columns_from_rows(codes, scale))


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32])
def test_kernels_equal_the_reference_bit_for_bit(shape: tuple[int, int], input_dtype: torch.dtype) -> None:
    for dtype in (E4M3, E5M2):
        assert_every_cast_equals_the_reference(random(*shape).to(input_dtype), dtype)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, 1e-30, 1e38])
def test_kernels_equal_the_reference_on_special_values(bad: float) -> None:
    for dtype in (E4M3, E5M2):
        x = random(150, 272)
        x[77, 130] = bad
        x[3] *= bad
        assert_every_cast_equals_the_reference(x, dtype)
        assert_every_cast_equals_the_reference(torch.full((20, 32), bad).half(), dtype)


def test_kernels_equal_the_reference_whatever_the_bits_of_a_nan() -> None:
    for bits, dtype in ((0x7FFF, torch.bfloat16), (0x7F81, torch.bfloat16), (-1, torch.float16)):
        x = random(63, 1000).to(dtype)
        x[40, 100] = torch.inf
        x.view(torch.int16)[62, 999] = bits
        assert_every_cast_equals_the_reference(x, E4M3)


def test_kernels_equal_the_reference_on_strided_inputs() -> None:
    for x in (random(128, 96).bfloat16().t(), random(64, 128)[::2, ::2], random(1, 64).expand(50, 64)):
        assert_every_cast_equals_the_reference(x, E4M3)


def test_conversion_rounds_every_midpoint_to_even_and_saturates() -> None:
    for dtype in (E4M3, E5M2):
        special = torch.tensor([[torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 1e-40, -1e-40]])
        x = torch.cat([awkward_values(dtype), special], dim=1)
        amax = UNIT_AMAX[dtype]
        assert_same_bits(
            float8.cast_tensor(x.cuda(), amax.cuda(), dtype, rows=True, columns=True),
            reference.cast_tensor(x, amax, dtype, rows=True, columns=True),
        )


@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (1024, 4096), (4112, 272)], ids=str)
@pytest.mark.parametrize("bad", [1.0, 0.0, torch.nan, 1e38])
def test_transposes_of_weight_codes_equal_the_reference_bit_for_bit(shape: tuple[int, int], bad: float) -> None:
    w = random(*shape)
    w[5] = bad
    for dtype in (E4M3, E5M2):
        codes, scale = reference.cast_rows(w, dtype)
        gpu, gpu_scale = codes.cuda(), scale.cuda()
        assert_same_bits((float8.transpose_codes(gpu),), (reference.transpose_codes(codes),))
        assert_same_bits((float8.transpose_codes(gpu.t()),), (codes,))
        assert_same_bits(
            float8.tensor_columns_from_rows(gpu, gpu_scale), reference.tensor_columns_from_rows(codes, scale)
        )


def test_empty_input_gives_empty_codes() -> None:
    x = torch.empty(0, 32, device="cuda")
    assert float8.amax(x) == 0
    codes, scale, codes_t, scale_t = float8.cast_rows_and_columns(x, E4M3)
    assert (codes.shape, scale.shape, codes_t.shape, scale_t.shape) == ((0, 32), (0, 1), (32, 0), (32, 1))


def test_a_captured_graph_casts_what_is_there_when_it_is_replayed() -> None:
    """Maxima start from zero each time, and no launch is left out of the graph."""
    x = torch.empty(300, 512, device="cuda", dtype=torch.bfloat16)

    def casts() -> tuple[Tensor | None, ...]:
        by_tensor = float8.cast_tensor(x, float8.amax(x), E4M3, rows=True, columns=True)
        return *by_tensor, *float8.cast_rows_and_columns(x, E4M3), *float8.cast_columns(x, E4M3)

    x.copy_(1e4 * random(300, 512))
    casts()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = casts()
    for factor in (1e3, 1.0):
        values = (factor * random(300, 512)).bfloat16()
        x.copy_(values)
        graph.replay()
        by_tensor = reference.cast_tensor(values, reference.amax_bits(values), E4M3, rows=True, columns=True)
        columns = reference.cast_columns(values, E4M3)
        assert_same_bits(results, (*by_tensor, *reference.cast_rows(values, E4M3), *columns, *columns))


@pytest.mark.slow
def test_offsets_beyond_32_bits_are_reached() -> None:
    tokens, features = 70_000, 32_768
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = -3.5
    assert float8.amax(x).view(torch.float32) == 3.5
    codes, codes_t, scale = float8.cast_tensor(x, float8.amax(x), E4M3, rows=True, columns=True)
    assert codes is not None
    assert codes_t is not None
    assert codes[-1, -1].float() * scale == -3.5
    assert codes_t[-1, tokens - 1].float() * scale == -3.5
    del codes, codes_t
    codes, scale, codes_t, scale_t = float8.cast_rows_and_columns(x, E4M3)
    assert codes[-1, -1].float() * scale[-1] == -3.5
    assert codes_t[-1, tokens - 1].float() * scale_t[-1] == -3.5
    del codes_t
    assert float8.transpose_codes(codes)[-1, -1].float() * scale[-1] == -3.5
    codes_t, one = float8.tensor_columns_from_rows(codes, scale)
    assert codes_t[-1, -1].float() * one == -3.5
    codes_t, scale_t = float8.columns_from_rows(codes, scale)
    assert codes_t[-1, tokens - 1].float() * scale_t[-1] == -3.5
    del codes_t
    codes, scale = float8.cast_rows(x, E4M3)
    assert codes[-1, -1].float() * scale[-1] == -3.5


@pytest.mark.slow
def test_offsets_beyond_32_bits_are_reached_where_a_program_holds_whole_rows() -> None:
    tokens, features = 140_000, 16_384
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = -3.5
    codes, scale, codes_t, scale_t = float8.cast_rows_and_columns(x, E4M3)
    assert codes[-1, -1].float() * scale[-1] == -3.5
    assert codes_t[-1, tokens - 1].float() * scale_t[-1] == -3.5
    assert codes.view(torch.int64).count_nonzero() == codes_t.view(torch.int64).count_nonzero() == 1
    del codes, codes_t
    codes_t, scale_t = float8.cast_columns(x, E4M3)
    assert codes_t[-1, tokens - 1].float() * scale_t[-1] == -3.5


@NATIVE
@pytest.mark.parametrize("tokens", [1, 17, 1000])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_tensor_cores_take_a_scale_a_row_beside_one_for_the_tensor(tokens: int, out_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a_codes, a_scale = ops.cast_rows(torch.randn(tokens, 512, device="cuda"), E4M3)
    w_codes, w_scale = ops.cast_rows(torch.randn(512, 272, device="cuda"), E4M3)
    b_codes, b_scale = ops.tensor_columns_from_rows(w_codes, w_scale)
    native, emulated = (
        ops.scaled_mm(a_codes, b_codes, a_scale, b_scale, None, out_dtype, False, emulate) for emulate in (False, True)
    )
    assert (native.shape, native.dtype) == ((tokens, 272), out_dtype)
    assert sqnr_db(emulated, native) > EMULATED_VS_NATIVE_SQNR_DB


@NATIVE
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 1000])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fast_accum", [True, False])
def test_tensor_cores_agree_with_the_emulation(
    recipe: str, tokens: int, out_dtype: torch.dtype, fast_accum: bool
) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(tokens, 512, device="cuda"), torch.randn(272, 512, device="cuda")
    formats = (RECIPES[recipe].grad_output_dtype, RECIPES[recipe].weight_dtype)
    operands = []
    for x, dtype in zip((a, b), formats, strict=True):
        cast = ops.cast_rows(x, dtype) if recipe == "rowwise" else ops.cast_tensor(x, ops.amax(x), dtype)
        operands.append(cast)
    (a_codes, a_scale), (b_codes, b_scale) = operands
    native, emulated = (
        ops.scaled_mm(a_codes, b_codes, a_scale, b_scale, None, out_dtype, fast_accum, emulate)
        for emulate in (False, True)
    )
    assert native.dtype == out_dtype
    assert native.shape == (tokens, 272)
    assert sqnr_db(emulated, native) > EMULATED_VS_NATIVE_SQNR_DB


def run(module: nn.Module, x: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    output = module(x)
    output.backward(grad_output.to(output.dtype))
    gradients = {f"grad_{name.split('.')[-1]}": p.grad.clone() for name, p in module.named_parameters()}
    return {"output": output.detach(), "grad_input": x.grad, **gradients}


def make(recipe: str, k: int, n: int, **config) -> Float8Linear:
    torch.manual_seed(1)
    linear = nn.Linear(k, n, device="cuda")
    with torch.no_grad():
        linear.weight.normal_()
    return Float8Linear.from_linear(linear, Float8Config(RECIPES[recipe], **config))


@NATIVE
@ALL_RECIPES
@pytest.mark.parametrize("emulate", [True, False])
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [200, 333])
def test_output_and_every_gradient_are_as_exact_as_the_recipe_allows(
    recipe: str, emulate: bool, input_dtype: torch.dtype, tokens: int
) -> None:
    linear = make(recipe, 256, 128, emulate=emulate, grad_weight_dtype=torch.float32)
    x = torch.randn(tokens, 256, device="cuda").to(input_dtype)
    grad_output = torch.randn(tokens, 128, device="cuda").to(input_dtype)
    result = run(linear, x, grad_output)
    exact = nn.Linear(256, 128, device="cuda").double()
    exact.load_state_dict(linear.state_dict())
    expected = run(exact, x.double(), grad_output.double())
    minimum = SQNR_DB[recipe, "normal"]
    for name in ("output", "grad_input", "grad_weight"):
        assert sqnr_db(expected[name], result[name]) > getattr(minimum, name), name
    assert result["output"].dtype == input_dtype


@NATIVE
@ALL_RECIPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_equals_eager_bit_for_bit(recipe: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    linear = make(recipe, 512, 256)
    x, grad_output = (torch.randn(333, n, device="cuda", dtype=dtype) for n in (512, 256))
    eager = run(linear, x, grad_output)
    compiled = run(torch.compile(nn.Sequential(linear), fullgraph=True), x, grad_output)
    for name, value in eager.items():
        assert torch.equal(compiled[name], value), name


@NATIVE
@ALL_RECIPES
def test_a_step_repeats_bit_for_bit(recipe: str) -> None:
    linear = make(recipe, 1024, 768)
    x, grad_output = (torch.randn(2000, n, device="cuda", dtype=torch.bfloat16) for n in (1024, 768))
    first, second = run(linear, x, grad_output), run(linear, x, grad_output)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@NATIVE
@ALL_RECIPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_reach_output_and_gradients(recipe: str, bad: float) -> None:
    linear = make(recipe, 256, 128)
    x, grad_output = (torch.randn(100, n, device="cuda", dtype=torch.bfloat16) for n in (256, 128))
    x[3, 5] = bad
    result = run(linear, x, grad_output)
    assert not result["output"][3].isfinite().any()
    assert not result["grad_weight"][:, 5].isfinite().any()


@NATIVE
@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.grad_weight_in_float8])
def test_the_gpu_holds_codes_and_not_the_input_for_backward(recipe: str) -> None:
    linear = make(recipe, 1024, 1024)
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x)
    held = sum(t.nbytes for t in saved if t is not linear.weight)
    scales = 4 * 1024 * 4096 // 128  # blockwise; others have fewer
    assert held <= 4096 * 1024 + 1024 * 1024 + scales + 4 * 1024
