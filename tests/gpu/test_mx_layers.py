"""MX linears and experts on a GPU: what they compute there is what they compute on a CPU, eager and compiled."""

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tolerances import EMULATED_VS_NATIVE_SQNR_DB, sqnr_db
from titan_fp8.converters.api import convert_to_mxfp8_grouped_training, convert_to_mxfp8_training
from titan_fp8.kernels import mx
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.quantization.mx_grouped import MXGroupedConfig, mx_grouped_feed_forward
from titan_fp8.quantization.mx_linear import MXConfig, MXFP8Linear
from titan_fp8.quantization.mx_recipes import MX_RECIPES
from titan_fp8.quantization.mx_sharded import GatheredMXWeight, cast_weight
from titan_fp8.quantization.mx_weight import Cast, MXWeightCache, column_operand, made_of, row_operand
from titan_fp8.runtime.device import detect_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CAPABILITY = detect_device().compute_capability or (0, 0)
MODES_OF_COMPUTING = [
    True,
    pytest.param(
        False, marks=pytest.mark.skipif(CAPABILITY[0] != 10, reason="needs products of MX blocks (Blackwell)")
    ),
]
EMULATE = pytest.mark.parametrize(
    "emulate", MODES_OF_COMPUTING, ids=lambda emulate: "emulated" if emulate else "native"
)


def linear(recipe: str = "mxfp8_cublas_rceil", **config: Any) -> MXFP8Linear:
    torch.manual_seed(0)
    return MXFP8Linear.from_linear(nn.Linear(512, 384), MXConfig(MX_RECIPES[recipe], **config))


def run(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    output = module(x)
    output.backward(grad)
    gradients = {
        name.removeprefix("_orig_mod."): p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
    }
    assert x.grad is not None
    return {"output": output.detach(), "x": x.grad, **gradients}


def data(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, 512, generator=generator).to(dtype), torch.randn(tokens, 384, generator=generator).to(
        dtype
    )


@EMULATE
@pytest.mark.parametrize("shape", [(384, 512), (3, 160, 96)], ids=["a linear", "experts"])
def test_a_weights_operands_are_the_same_wherever_they_come_from(shape: tuple[int, ...], emulate: bool) -> None:
    weight, cast = torch.randn(shape, device="cuda"), Cast("rceil", "triton", emulate)
    module, cache, grad = SimpleNamespace(w=weight), MXWeightCache(cast), torch.ones(1, device="cuda")
    gathered = GatheredMXWeight(*cast_weight(weight, "rceil"), torch.bfloat16)
    sources = [made_of(module, "w", w, c) for w, c in ((weight, None), (weight, cache), (gathered, None))]  # pyright: ignore
    for operand in (row_operand, partial(column_operand, after=grad)):
        expected, *others = (operand(weight, made, cast) for made in sources)
        for other in others:
            for wanted, found in zip(expected, other, strict=True):
                assert (wanted is None) == (found is None)
                assert wanted is None or torch.equal(wanted.view(torch.uint8), found.view(torch.uint8))


@EMULATE
@pytest.mark.parametrize("tokens", [64, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", ["mxfp8_cublas", "mxfp8_cublas_rceil"])
def test_a_linear_computes_what_it_computes_on_a_cpu(
    recipe: str, dtype: torch.dtype, tokens: int, emulate: bool
) -> None:
    x, grad = data(tokens, dtype)
    expected = run(linear(recipe, emulate=True), x, grad)
    result = run(linear(recipe, emulate=emulate).cuda(), x.cuda(), grad.cuda())
    for name, value in expected.items():
        assert result[name].dtype == value.dtype
        assert sqnr_db(value, result[name].cpu()) > EMULATED_VS_NATIVE_SQNR_DB, name


@EMULATE
@pytest.mark.parametrize("kernel", mx.DIM1_KERNELS)
def test_every_kernel_of_the_second_dimension_gives_the_same(kernel: str, emulate: bool) -> None:
    x, grad = (each.cuda() for each in data(100, torch.bfloat16))
    expected = run(linear(emulate=emulate).cuda(), x, grad)
    for name, value in run(linear(emulate=emulate, dim1_kernel=kernel).cuda(), x, grad).items():
        assert torch.equal(value, expected[name]), name


@EMULATE
def test_a_compiled_linear_gives_the_same_bits(emulate: bool) -> None:
    torch._dynamo.reset()
    module = linear(emulate=emulate).cuda()
    x, grad = (each.cuda() for each in data(200, torch.bfloat16))
    expected = run(module, x, grad)
    for name, value in run(torch.compile(copy.deepcopy(module), fullgraph=True), x, grad).items():
        assert sqnr_db(expected[name], value) > 60, name


@EMULATE
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_in_high_precision_beyond_the_range_of_fp16_is_kept(emulate: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    module = linear(emulate=emulate, grad_weight_in_high_precision=True).cuda()
    called = torch.compile(module, fullgraph=True) if compiled else module
    x, grad = (torch.full((32, n), value, dtype=torch.float16) for n, value in ((512, 64.0625), (384, 64.0)))
    called(x.cuda()).backward(grad.cuda())
    assert torch.equal(module.weight.grad.cpu(), torch.full((384, 512), 32 * 64 * 64.0625))


@pytest.mark.parametrize("dim", [0, 1])
def test_compiled_casts_of_tensors_give_the_bits_of_eager_ones(dim: int) -> None:
    def cast(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, codes = mx.to_mx(t, dim=dim)
        return scale, codes, mx.from_mx(scale, codes, torch.float32)

    torch._dynamo.reset()
    t = data(256, torch.bfloat16)[0].cuda()
    for found, expected in zip(torch.compile(cast, fullgraph=True)(t), cast(t), strict=True):
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
        assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@EMULATE
@pytest.mark.parametrize("sizes", [[256] * 4, [0, 32, 992, 0], [1024, 0, 0, 0], [0, 0, 0, 0]], ids=str)
def test_experts_compute_what_they_compute_on_a_cpu(sizes: list[int], emulate: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor(sizes).cumsum(0).int()
    shapes = {"x": (1088, 256), "w1": (4, 128, 256), "w3": (4, 128, 256), "w2": (4, 256, 128)}
    leaves = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
    leaves["x"] = leaves["x"].bfloat16()
    grad = torch.randn(1088, 256, generator=generator).bfloat16()
    results = []
    for device, emulated in (("cpu", True), ("cuda", emulate)):
        mine = {name: t.detach().clone().to(device).requires_grad_() for name, t in leaves.items()}
        x, *weights = mine.values()
        output = mx_grouped_feed_forward(x, weights, ends.to(device), MXGroupedConfig("rceil", emulated))
        output.backward(grad.to(device))
        results.append({"output": output.detach().cpu(), **{name: t.grad.cpu() for name, t in mine.items()}})
    expected, result = results
    here = int(ends[-1])
    for name, value in expected.items():
        rows = slice(here) if name in ("output", "x") else slice(None)
        same = torch.equal(value[rows], result[name][rows])
        assert same or sqnr_db(value[rows], result[name][rows]) > 30, name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["llama3", "llama4", "qwen3_moe"])
def test_a_model_in_mxfp8_is_near_one_in_bf16(family: str, compiled: bool) -> None:
    torch._dynamo.reset()
    losses = []
    for converts in (False, True):
        dims = resolve_dims(family, "debugmodel", {"n_layers": 4})
        model = Decoder(dims, seq_len=128, compute_dtype=torch.bfloat16)
        initialize(model, seed=0)
        model.cuda()
        if converts:
            convert_to_mxfp8_training(model, filter_fqns=["output"], emulate="auto")
            if dims.n_experts is not None:
                convert_to_mxfp8_grouped_training(model, emulate="auto")
        if compiled:
            for block in model.layers.values():
                block.compile(fullgraph=True)
        tokens = torch.randint(2048, (2, 128), generator=torch.Generator().manual_seed(0)).cuda()
        loss = cross_entropy_sum(model(tokens), tokens.roll(-1, 1)) / tokens.numel()
        loss.backward()
        losses.append(loss.detach())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
