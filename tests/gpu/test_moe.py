"""Mixtures of experts on a GPU: kernels equal references, native products emulated ones, compiled layers eager ones."""

import pytest
import torch
from torch import Tensor

from tests.tolerances import EMULATED_VS_NATIVE_SQNR_DB, sqnr_db
from tests.unit.converters.test_other_experts import RAGGED, Layer, converted, inputs
from tests.unit.converters.test_other_experts import run as run_layer
from tests.unit.kernels.grouped_cases import _apart
from titan_fp8.converters.api import convert_to_float8_grouped_training
from titan_fp8.kernels import grouped, moe
from titan_fp8.kernels.float8 import E4M3
from titan_fp8.kernels.grouped import reference as grouped_reference
from titan_fp8.kernels.moe import reference
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.quantization import grouped_gemm
from titan_fp8.runtime.device import detect_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not detect_device().has_fp8_tensor_cores, reason="needs FP8 tensor cores"),
]

LOADS = {
    "balanced": [256] * 8,
    "skewed": [16, 0, 1024, 32, 0, 640, 304, 32],
    "one": [0, 0, 0, 2048, 0, 0, 0, 0],
    "none": [0] * 8,
}
FAMILIES = ("llama4", "qwen3_moe", "deepseek_v3", "mixtral")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).cuda()


def ends_of(load: str) -> Tensor:
    return torch.tensor(LOADS[load], device="cuda").cumsum(0).int()


def assert_products_agree(native: Tensor, emulated: Tensor) -> None:
    assert native.isfinite().all()
    # Without rows there is nothing, or zeros.
    assert torch.equal(native, emulated) or sqnr_db(emulated, native) > EMULATED_VS_NATIVE_SQNR_DB


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "features"), [(1000, 1, 8, 5120), (63, 8, 128, 2048), (17, 3, 4, 96)]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_travel_as_in_the_reference(tokens: int, top_k: int, experts: int, features: int, scaled: bool) -> None:
    choices = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
    _, ends, position, source = moe.plan(choices, experts, 16)
    assert int(ends[-1]) <= source.shape[0]
    x, y = random(tokens, features), random(source.shape[0], features, seed=1)
    scores = torch.rand(tokens, top_k, device="cuda") if scaled else None
    rows, back = reference.permute(x, source, scores, top_k), reference.unpermute(y, position, scores)
    assert torch.equal(moe.permute(x, source, scores, top_k), rows)
    assert torch.equal(moe.unpermute(y, position, scores), back)
    if scores is not None:
        products = reference.row_products(x, y, position)
        grad_x, of_scores = moe.permute_backward(y, x, position, scores)
        assert torch.equal(grad_x, back)
        torch.testing.assert_close(of_scores, products, rtol=1e-4, atol=1e-3)
        grad_y, of_scores = moe.unpermute_backward(x, y, position, source, scores)
        assert torch.equal(grad_y, rows)
        torch.testing.assert_close(of_scores, products, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(moe.row_products(x, y, position), products, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("features", [1408, 5120])
def test_codes_of_groups_are_the_references(load: str, features: int) -> None:
    ends, x = ends_of(load), random(2112, features)
    x[5, 3] = torch.nan
    last = int(ends[-1])
    codes, scale, codes_t, scale_t = grouped.cast_both(x, ends, E4M3)
    rows, row_scale = grouped_reference.float8.cast_rows(x, E4M3)
    columns, column_scale = grouped_reference.cast_columns(x, ends, E4M3)
    pairs = ((codes[:last], rows[:last]), (scale[:last], row_scale[:last]), (codes_t, columns), (scale_t, column_scale))
    for mine, theirs in pairs:
        # Of a NaN only that it is one.
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(grouped.cast_columns(x, ends, E4M3)[0].view(torch.uint8), columns.view(torch.uint8))


@pytest.mark.parametrize("load", LOADS)
def test_codes_of_swiglu_gradients_are_the_references(load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.kernels.grouped_cases.ROWS", 2112)
    ends = ends_of(load)
    grad, gate, up = (random(2112, 768, seed=seed) for seed in range(3))
    mine = grouped.swiglu_backward(grad, gate, up, ends, E4M3)
    theirs = grouped_reference.swiglu_backward(grad, gate, up, ends, E4M3)
    assert [word for one, other in zip(mine, theirs, strict=True) for word in _apart(one, other, ends)] == []


@pytest.mark.parametrize("shape", [(4, 256, 512), (3, 1408, 2048), (2, 208, 144), (5, 16, 16)])
def test_columns_of_experts_are_the_references(shape: tuple[int, int, int]) -> None:
    codes, scale = grouped_reference.float8.cast_rows(random(*shape).view(-1, shape[2]), E4M3)
    codes, scale = codes.view(shape), scale.view(shape[:2])
    mine, theirs = grouped.columns_of_experts(codes, scale), grouped_reference.columns_of_experts(codes, scale)
    assert torch.equal(mine[0].view(torch.uint8), theirs[0].view(torch.uint8))
    assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("load", LOADS)
def test_native_products_are_the_emulated_ones(load: str) -> None:
    ends, x, w = ends_of(load), random(2112, 512), random(8 * 256, 512, seed=1)
    last = int(ends[-1])
    codes, scale, codes_t, scale_t = grouped.cast_both(x, ends, E4M3)
    w_codes, w_scale = grouped_reference.float8.cast_rows(w, E4M3)
    operands = codes, w_codes.view(8, 256, 512), scale, w_scale.view(8, 256), ends, torch.bfloat16
    native, emulated = (grouped_gemm.grouped_mm_rows(*operands, False, emulate)[:last] for emulate in (False, True))
    assert_products_agree(native, emulated)
    g_t, g_scale_t = grouped.cast_columns(random(2112, 256, seed=2), ends, E4M3)
    operands = g_t, codes_t, g_scale_t, scale_t, ends, torch.bfloat16
    native, emulated = (grouped_gemm.grouped_mm_columns(*operands, emulate) for emulate in (False, True))
    assert_products_agree(native, emulated)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("n", "k"), [(256, 512), (208, 5136), (1408, 80)])
def test_sums_of_gradients_are_exact_to_fp32(load: str, n: int, k: int) -> None:
    """Products of whole numbers are whole: in fp32 to the bit, where fast accumulation is not."""
    counts, ends = LOADS[load], ends_of(load)
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(0, 8, shape, generator=generator).cuda()

    def power(*shape: int) -> Tensor:
        return torch.exp2(torch.randint(-3, 4, shape, generator=generator)).cuda()

    a, b, a_t, b_t = whole(2112, k), whole(8, n, k), whole(n, 2112), whole(k, 2112)
    scale_a, scale_b, scale_n, scale_k = power(2112, 1), power(8, n), power(8, n), power(8, k)
    rows = grouped.mm_rows(a.to(E4M3), b.to(E4M3), scale_a, scale_b, ends, torch.float32, False)
    columns = grouped.mm_columns(a_t.to(E4M3), b_t.to(E4M3), scale_n, scale_k, ends, torch.float32)
    begin = 0
    for e, count in enumerate(counts):
        of_e = slice(begin, begin + count)
        product = (a[of_e].double() @ b[e].double().t()) * scale_a[of_e] * scale_b[e]
        assert torch.equal(rows[of_e], product.float()), e
        product = (a_t[:, of_e].double() @ b_t[:, of_e].double().t()) * scale_n[e].unsqueeze(1) * scale_k[e]
        assert torch.equal(columns[e], product.float()), e
        begin += count


def test_nan_stays_in_its_group() -> None:
    ends = torch.tensor([48, 64, 112], dtype=torch.int32, device="cuda")
    a, b, x = random(112, 80).to(E4M3), random(3, 48, 80, seed=1).to(E4M3), random(64, 112, seed=2).to(E4M3)
    a.view(torch.uint8)[50, 3] = 0x7F
    ones = torch.ones(112, 1, device="cuda"), torch.ones(3, 48, device="cuda")
    rows = grouped.mm_rows(a, b, *ones, ends, torch.float32, False)
    assert rows.isnan().any(1).nonzero().flatten().tolist() == [50]
    assert rows[50].isnan().all()
    ones = torch.ones(3, 80, device="cuda"), torch.ones(3, 64, device="cuda")
    columns = grouped.mm_columns(a.t().contiguous(), x, *ones, ends, torch.float32)
    assert columns.isnan().any(2).nonzero().tolist() == [[1, 3]]
    a, x = random(112, 80, seed=3).to(E4M3), x.clone()
    x.view(torch.uint8)[5, 50] = 0x7F
    columns = grouped.mm_columns(a.t().contiguous(), x, *ones, ends, torch.float32)
    assert columns.isnan().any(1).nonzero().tolist() == [[1, 5]], "of the other operand too"


def decoder(family: str) -> Decoder:
    dims = resolve_dims(family, "debugmodel", {"n_layers": 4})
    model = Decoder(dims, seq_len=128, compute_dtype=torch.bfloat16)
    initialize(model, seed=0)
    return model.cuda()


def run(model: Decoder) -> dict[str, Tensor]:
    model.zero_grad()
    tokens = torch.randint(2048, (2, 128), generator=torch.Generator().manual_seed(0)).cuda()
    loss = cross_entropy_sum(model(tokens), tokens.roll(-1, 1)) / tokens.numel()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize("family", FAMILIES)
def test_float8_experts_are_near_those_in_bf16_and_native_ones_near_emulated_ones(family: str) -> None:
    plain = run(decoder(family))
    results = []
    for emulate in (False, True):
        model = decoder(family)
        convert_to_float8_grouped_training(model, emulate=emulate)
        results.append(run(model))
    native, emulated = results
    torch.testing.assert_close(native["loss"], plain["loss"], rtol=1e-2, atol=0)
    torch.testing.assert_close(native["loss"], emulated["loss"], rtol=1e-3, atol=0)
    for name, value in plain.items():
        if "experts.w" in name:
            assert sqnr_db(value, native[name]) > 10, name


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_with_experts_equal_eager_ones_and_count_tokens_once(family: str, float8: bool) -> None:
    torch._dynamo.reset()
    model = decoder(family)
    if float8:
        convert_to_float8_grouped_training(model)
    eager = run(model)
    for block in model.layers.values():
        block.compile(fullgraph=True)
        if block.moe is not None:
            block.moe.tokens_per_expert.zero_()
    compiled = run(model)
    torch.testing.assert_close(compiled["loss"], eager["loss"], rtol=2e-3, atol=0)
    counted = [block.moe.tokens_per_expert.sum() for block in model.layers.values() if block.moe is not None]
    assert all(int(count) == 2 * 128 * model.dims.top_k for count in counted)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize("float8", [False, True])
def test_nothing_waits_for_the_device(float8: bool) -> None:
    model = decoder("qwen3_moe")
    if float8:
        convert_to_float8_grouped_training(model)
    layer = model.layers["0"].moe
    assert layer is not None
    x = random(4, 64, 256).requires_grad_()
    layer(x).sum().backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_experts_of_other_models_are_near_emulated_ones_and_wait_for_nothing(aligned: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    sizes = [32, 0, 1024, 48] if aligned else [30 * size for size in RAGGED]
    case = [each.cuda() for each in inputs(sizes, torch.bfloat16)]
    plain = run_layer(Layer().cuda(), *case)
    emulated = run_layer(converted(aligned_groups=aligned).cuda(), *case)
    layer = converted(emulate=False, aligned_groups=aligned).cuda()
    model = torch.compile(layer, fullgraph=True) if compiled else layer
    native = run_layer(model, *case, experts=layer.experts)
    try:
        torch.cuda.set_sync_debug_mode("error")
        again = run_layer(model, *case, experts=layer.experts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in emulated.items():
        assert torch.equal(again[name], native[name]), name
        assert sqnr_db(value, native[name]) > 25, name
        assert sqnr_db(plain[name], native[name]) > 15, name
