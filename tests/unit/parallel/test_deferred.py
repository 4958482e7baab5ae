"""Gradients of weights that are computed later: nothing before, and then the same."""

import copy
import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from titan_fp8.converters.fusion import fuse_producers
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.linear import Linear
from titan_fp8.parallel.activation_checkpoint import apply_activation_checkpointing
from titan_fp8.parallel.compile import apply_compile
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection
from titan_fp8.parallel.pipeline import defer_weight_gradients
from titan_fp8.quantization import ops
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES

DIMS = ModelDims(dim=256, n_layers=2, n_heads=4, ffn_dim=256, vocab_size=67, max_seq_len=16)
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, ops.high_precision_mm, *ops.GEMM_OPS)
LINEARS = 7 * DIMS.n_layers + 1  # with the head


def _model(recipe: str | None, *, fused: bool = False) -> Decoder:
    model = Decoder(DIMS)
    initialize(model, seed=0, device=torch.device("cpu"))
    if recipe is not None:
        config = Float8Config(RECIPES[recipe], emulate=True)
        for block in model.layers.values():
            for parent in (block.attention, block.feed_forward):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, Float8Linear.from_linear(child, config))
    if fused:
        assert fuse_producers(model, tensor_parallel=False)
    return model


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def _loss(model: Decoder, seed: int) -> Tensor:
    tokens = torch.randint(67, (1, 16), generator=torch.Generator().manual_seed(seed))
    return model(tokens).float().square().mean()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recipe", [None, "tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"])
def test_weights_wait_and_inputs_do_not(recipe: str | None, fused: bool) -> None:
    if fused and recipe is None:
        pytest.skip("nothing to fuse")
    model = _model(recipe, fused=fused)
    expected = copy.deepcopy(model)
    for seed in (1, 2):
        _loss(expected, seed).backward()
    queue = defer_weight_gradients(model)
    loss = _loss(model, 1)
    with _Products() as inputs:
        loss.backward()
    weights = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, Linear | Float8Linear)}
    assert all(module.weight.grad is None for module in weights.values())
    run = queue.take()
    with _Products() as of_weights:
        run()
    assert inputs.count == LINEARS
    assert of_weights.count == LINEARS
    _loss(model, 2).backward()
    queue.take()()
    assert all(module.weight.grad is None for module in weights.values())
    queue.flush()
    for name, parameter in expected.named_parameters():
        actual = model.get_parameter(name).grad
        assert parameter.grad is not None
        assert actual is not None
        # Microbatches are added up in fp32, and products have the dtype of the configuration.
        torch.testing.assert_close(actual, parameter.grad, rtol=1e-5, atol=1e-7)


def test_what_is_recomputed_is_recomputed_once() -> None:
    model = _model("tensorwise")
    apply_activation_checkpointing(model, ActivationCheckpointSection(mode="full"), compile_config=CompileSection())
    queue = defer_weight_gradients(model)
    loss = _loss(model, 1)
    with _Products() as inputs:
        loss.backward()
    with _Products() as of_weights:
        queue.take()()
    blocks = 7 * DIMS.n_layers
    assert inputs.count in (
        2 * blocks + 1,
        2 * blocks + 1 - DIMS.n_layers,
    )  # the last product of a block may be left out
    assert of_weights.count == LINEARS


def test_compiled_blocks_are_left_alone() -> None:
    model = _model("tensorwise")
    apply_compile(model, CompileSection(enable=True, backend="aot_eager"))
    defer_weight_gradients(model)
    sinks = Counter(m.weight_sink is not None for m in model.modules() if isinstance(m, Linear | Float8Linear))
    assert sinks == {False: LINEARS - 1, True: 1}, "the head is not compiled"


def test_compiled_parts_of_a_block_with_experts_are_left_alone() -> None:
    model = Decoder(dataclasses.replace(DIMS, n_experts=4, top_k=1, n_shared_experts=1, first_dense_layers=0))
    initialize(model, seed=0, device=torch.device("cpu"))
    apply_compile(model, CompileSection(enable=True, backend="aot_eager"), around_experts=True)
    queue = defer_weight_gradients(model)
    _loss(model, 0).backward()
    assert model.output.weight.grad is None
    assert all(p.grad is not None for p in model.layers.parameters())
    queue.take()()
    queue.flush()
    assert model.output.weight.grad is not None


def test_a_frozen_weight_has_no_sink_and_a_gradient_that_is_there_is_added_to() -> None:
    model = nn.Sequential(Linear(4, 4, bias=True), Linear(4, 4, bias=False))
    model[1].weight.requires_grad_(False)
    queue = defer_weight_gradients(model)
    assert model[1].weight_sink is None
    x = torch.randn(3, 4)
    expected = copy.deepcopy(model)
    expected[0].weight_sink = None
    for each in (model, expected):
        each[0].weight.grad = torch.ones(4, 4)
        each(x).sum().backward()
    queue.take()()
    queue.flush()
    queue.flush()  # nothing is left
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert p.grad is q.grad or torch.allclose(p.grad, q.grad)
