"""Compiled with activation checkpointing, a cast writes only the layout that its graph reads."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.unit.quantization.test_activation import BOTH_LAYOUTS, ROWS_ONLY, profiled
from tests.unit.quantization.test_linear import FULLY_FLOAT8, K, make
from titan_fp8.quantization import ops
from titan_fp8.quantization.graph_pass import DropUnusedLayouts

BOTH = {name: op.name() for name, op in BOTH_LAYOUTS.items()}
ROWS = {name: op.name() for name, op in ROWS_ONLY.items()}
COLUMNS = {
    "tensorwise": ops.cast_tensor_columns.name(),
    "rowwise": ops.cast_columns.name(),
    "blockwise": ops.cast_block_columns.name(),
}
OPTIONS = {"post_grad_custom_pre_pass": DropUnusedLayouts()}


class Block(nn.Module):
    """A layer between two others, so that its input is an intermediate result."""

    def __init__(self, recipe: str, use_checkpoint: bool) -> None:
        super().__init__()
        self.linear = make(recipe, K, K)
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        body = checkpoint(self._body, x, use_reentrant=False) if self.use_checkpoint else self._body(x)
        return body.sigmoid()

    def _body(self, x: Tensor) -> Tensor:
        return self.linear(x.sigmoid())


@FULLY_FLOAT8
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_the_forward_graph_casts_columns_only_where_backward_will_read_them(recipe: str, use_checkpoint: bool) -> None:
    torch._dynamo.reset()
    block = Block(recipe, use_checkpoint)
    compiled = torch.compile(block, fullgraph=True, options=OPTIONS)
    x = torch.randn(20, K, requires_grad=True)
    compiled(x).sum().backward()  # compiles
    expected = torch.autograd.grad(block(x).sum(), [x, block.linear.weight])
    output, forward = profiled(lambda: compiled(x))
    gradients, backward = profiled(lambda: torch.autograd.grad(output.sum(), [x, block.linear.weight]))
    weight_casts = 0 if recipe == "blockwise" else 1
    if use_checkpoint:
        assert forward[BOTH[recipe]] == 0
        assert forward[ROWS[recipe]] == 1 + weight_casts
    else:
        assert forward[BOTH[recipe]] == 1
        assert forward[ROWS[recipe]] == weight_casts
    assert backward[BOTH[recipe]] == 1
    assert backward[COLUMNS[recipe]] == int(use_checkpoint)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_the_pass_leaves_a_cast_alone_whose_layouts_are_both_read() -> None:
    torch._dynamo.reset()
    linear = make("rowwise", K, K)
    compiled = torch.compile(linear, fullgraph=True, options=OPTIONS)
    x = torch.randn(20, K)
    expected = linear(x)
    assert torch.equal(compiled(x), expected)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)
