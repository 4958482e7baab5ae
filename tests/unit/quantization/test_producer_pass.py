"""The compiler's pass leaves out the columns of a fused producer exactly where nobody reads them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from tests.unit.converters.fused_models import build
from titan_fp8.converters.fusion import fuse_producers
from titan_fp8.kernels.float8 import E4M3
from titan_fp8.kernels.producers import GRANULARITIES, TENSOR
from titan_fp8.quantization import producer_ops as ops
from titan_fp8.quantization.graph_pass import DropUnusedLayouts
from titan_fp8.quantization.producer_pass import _place, drop_unused_columns

X = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))


def traced(function: Callable[[Tensor], list[Tensor]]) -> torch.fx.GraphModule:
    module = make_fx(function, tracing_mode="fake")(X)
    drop_unused_columns(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def asks_for_columns(module: torch.fx.GraphModule) -> list[bool]:
    nodes = [node for node in module.graph.nodes if str(node.target).startswith("titan_fp8")]
    return [node.args[_place(node.target, "columns")] for node in nodes]


def reader(cast: tuple, read: int) -> Callable[[Tensor], list[Tensor]]:
    """Uses the first `read` results of a SwiGLU."""
    return lambda x: [result.clone() for result in ops.swiglu_cast(x, x, *cast)[:read]]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("emit", [False, True])
def test_columns_are_made_only_if_they_are_read(granularity: str, emit: bool) -> None:
    cast = (granularity, E4M3, False, True, True, emit)
    count = len(ops.swiglu_cast(X, X, *cast))
    rows = count - (1 if granularity == TENSOR else 2)
    for read, expected in ((rows, False), (rows + 1, True), (count, True)):
        module = traced(reader(cast, read))
        assert asks_for_columns(module) == [expected]
        for result, plain in zip(module(X), ops.swiglu_cast(X, X, *cast), strict=False):
            assert torch.equal(result.float(), plain.float())


def test_every_forward_producer_is_looked_at() -> None:
    cast = ("row", E4M3, True, True, True, False)

    def norms(x: Tensor) -> list[Tensor]:
        weight = torch.ones(128)
        alone = ops.rms_norm_cast(x, weight, 1e-5, *cast)
        return [alone[1].clone(), ops.add_rms_norm_cast(x, x, weight, 1e-5, *cast)[0].clone()]

    assert asks_for_columns(traced(norms)) == [False, False]


class _Pass(DropUnusedLayouts):
    def __init__(self) -> None:
        self.asked: list[bool] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        drop_unused_columns(graph)
        nodes = [node for node in graph.nodes if node.target is ops.rms_norm_cast]
        self.asked += [node.args[_place(node.target, "columns")] for node in nodes]


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._feed_forward, x.sigmoid(), use_reentrant=False).sigmoid()

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.block.feed_forward(self.block.ffn_norm(x))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_a_compiled_checkpointed_block_computes_the_same_with_the_pass(recipe: str) -> None:
    torch._dynamo.reset()
    model = build(recipe, fused=False)
    # Linears that compute differently are called one by one, so the norm makes the columns.
    w3 = model.layers["0"].feed_forward.w3
    w3.config = replace(w3.config, fast_accum_in_backward=True)
    fuse_producers(model)
    module = _Checkpointed(model.layers["0"])
    rewrite = _Pass()
    options = {"post_grad_custom_pre_pass": rewrite, "fx_graph_cache": False}
    compiled = torch.compile(module, fullgraph=True, options=options)
    x = torch.randn(2, 20, 128).bfloat16().requires_grad_()
    leaves = [x, *module.block.feed_forward.parameters()]
    expected = torch.autograd.grad(module(x).sum(), leaves)
    for gradient, other in zip(torch.autograd.grad(compiled(x).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0.02, atol=0.02)
    assert rewrite.asked == [False, True], "forward; recomputation"
