"""What a block with fused producers keeps for backward: no codes of activations, none of weights in a second layout."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from tests.cases import some_by_hand
from tests.unit.converters.fused_models import build
from tests.unit.converters.test_fusion import FULLY_FLOAT8
from titan_fp8.converters.fusion import fuse_producers
from titan_fp8.quantization.activation import QuantizedActivation
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES


@FULLY_FLOAT8
@pytest.mark.parametrize("compiled", [False, True])
def test_no_codes_of_activations_are_kept(recipe: str, compiled: bool) -> None:
    model = build(recipe, fused=True)
    block, kept = model.layers["0"], []
    if compiled:
        torch._dynamo.reset()
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager_decomp_partition")
    x = torch.randn(32, 32, 128).bfloat16().requires_grad_() * 1.0

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.element_size() == 1 and t.dim() == 2 and t.shape[1] == 32 * 32:
            kept.append(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x, model.rope(32, x.device))
    assert not kept


@pytest.mark.parametrize(
    ("recipe", "recompute"),
    some_by_hand(
        product(RECIPES, (False, True)), ("tensorwise", True), ("rowwise", True), ("rowwise_with_gw_hp", False)
    ),
)
def test_compiled_code_makes_columns_of_weights_in_backward(recipe: str, recompute: bool) -> None:
    torch._dynamo.reset()
    model = build(recipe, fused=False)
    for module in model.layers.modules():
        if isinstance(module, Float8Linear):
            module.config = replace(module.config, recompute_weight_in_backward=recompute)
    fuse_producers(model)
    block, kept = model.layers["0"], []
    forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager_decomp_partition")

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.element_size() == 1:
            kept.append(tuple(t.shape))
        return t

    x = torch.randn(32, 32, 128).bfloat16().requires_grad_() * 1.0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward(x, model.rope(32, x.device))
    weights = [tuple(module.weight.shape) for module in block.modules() if isinstance(module, nn.Linear)]
    assert sorted(kept) == ([] if recompute else sorted(weights))


@FULLY_FLOAT8
def test_what_passes_between_modules_takes_no_memory_and_is_nan(recipe: str) -> None:
    block = build(recipe, fused=True).layers["0"]
    x = torch.randn(2, 10, 128).bfloat16().requires_grad_()
    normed = block.attention_norm(x)
    hidden = block.feed_forward.hidden(block.ffn_norm.add_and_norm(x, x)[1])
    for passed, features in ((normed, 128), (hidden, 256)):
        assert isinstance(passed, QuantizedActivation)
        assert passed.value.shape == (2, 10, features)
        assert passed.value.untyped_storage().nbytes() == 2
        assert passed.value.isnan().all()
        assert passed.value.requires_grad


@FULLY_FLOAT8
def test_backward_keeps_the_stream_and_the_two_products_alone_of_the_feed_forward(recipe: str) -> None:
    def saved_bytes(fused: bool) -> int:
        block = build(recipe, fused=fused).layers["0"]
        x = torch.randn(2, 150, 128).bfloat16().requires_grad_() * 1.0
        sizes: dict[int, int] = {}
        weights = {parameter.numel() for parameter in block.parameters()}

        def keep(t: torch.Tensor) -> torch.Tensor:
            if t.numel() not in weights:  # neither a weight nor its codes
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            block.feed_forward(block.ffn_norm(x))
        return sum(sizes.values())

    tokens, padded, dim, hidden = 300, 384 if recipe == "blockwise" else 304, 128, 256
    least = tokens * 2 * dim + tokens * 4 * hidden  # x, gate and up
    assert least <= saved_bytes(True) < least + 8192
    # The columns of the norm and of hidden, and silu's output.
    assert saved_bytes(False) >= least + padded * (dim + hidden) + tokens * 2 * hidden
