"""One cast for all linears that read a tensor, none for a layout that nobody will use."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from tests.unit.quantization.test_linear import FULLY_FLOAT8, K, make
from tests.unit.quantization.test_ops import CountCalls
from titan_fp8.quantization import ops
from titan_fp8.quantization.activation import columns_placeholder, is_recomputed_later
from titan_fp8.quantization.casts import cast_activation
from titan_fp8.quantization.recipes import RECIPES

BOTH_LAYOUTS = {
    "tensorwise": ops.cast_tensor_both,
    "rowwise": ops.cast_rows_and_columns,
    "blockwise": ops.cast_block_both,
}
ROWS_ONLY = {"tensorwise": ops.cast_tensor, "rowwise": ops.cast_rows, "blockwise": ops.cast_block_rows}


def activation(seed: int = 0) -> Tensor:
    """An intermediate result, as a norm's output is."""
    torch.manual_seed(seed)
    return torch.randn(20, K).requires_grad_() * 1.0


def profiled(call: Callable[[], Tensor]) -> tuple[Tensor, Counter]:
    """The result of `call`, and how often it ran each operator."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        result = call()
    return result, Counter(event.name for event in profiler.events())


class Siblings(nn.Module):
    """Three linears that read one tensor."""

    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.linears = nn.ModuleList(make(recipe) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        first, second, third = (linear(x) for linear in self.linears)
        return first + second + third


@FULLY_FLOAT8
def test_linears_that_read_one_tensor_share_its_codes(recipe: str) -> None:
    x = activation()
    with CountCalls() as counter:
        Siblings(recipe)(x)
    assert counter.calls[BOTH_LAYOUTS[recipe]] == 1


@FULLY_FLOAT8
def test_the_compiler_finds_the_equal_casts(recipe: str) -> None:
    torch._dynamo.reset()
    seen: list[str] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    x = torch.randn(20, K, requires_grad=True)
    torch.compile(Siblings(recipe), backend=backend, fullgraph=True)(x).sum().backward()
    name = str(BOTH_LAYOUTS[recipe])
    # x once in forward; the three gradients are one tensor here, cast once in backward.
    assert seen.count(name) == 2, seen


@FULLY_FLOAT8
def test_a_linear_that_keeps_its_input_leaves_no_codes_on_it(recipe: str) -> None:
    linear = make(recipe, 128, 128, keeps_input=True)
    x = torch.randn(20, 128, requires_grad=True) * 1.0
    output = linear(x)
    assert not [name for name in vars(x) if "codes" in name]
    output.sum().backward()
    assert linear.weight.grad is not None


@FULLY_FLOAT8
def test_codes_are_not_reused_after_the_tensor_was_written_to(recipe: str) -> None:
    linear = make(recipe)
    with torch.no_grad():
        x = activation()
        expected = linear(activation() * 3)
    linear(x)
    x.detach_().requires_grad_()
    x = x * 1.0
    linear(x)
    with torch.no_grad():
        x.mul_(3)
    torch.testing.assert_close(linear(x), expected)


@FULLY_FLOAT8
def test_a_leaf_is_cast_anew_each_time_since_others_may_write_to_it(recipe: str) -> None:
    linear = make(recipe)
    x = torch.randn(20, K)
    first = linear(x)
    x.data.mul_(-1)
    assert torch.equal(linear(x), -first)


@FULLY_FLOAT8
def test_a_linear_that_needs_columns_gets_them_after_one_that_did_not(recipe: str) -> None:
    frozen, trained = make(recipe), make(recipe)
    frozen.weight.requires_grad_(False)
    x = activation()
    (frozen(x) + trained(x)).sum().backward()
    alone = make(recipe)
    alone(activation()).sum().backward()
    assert torch.equal(trained.weight.grad, alone.weight.grad)


@FULLY_FLOAT8
def test_under_autocast_linears_share_codes_too(recipe: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), CountCalls() as counter:
        Siblings(recipe)(activation())
    assert counter.calls[BOTH_LAYOUTS[recipe]] == 1


@FULLY_FLOAT8
@pytest.mark.parametrize("tokens", [1, 16, 130])
def test_a_placeholder_has_the_shapes_and_dtypes_of_the_codes(recipe: str, tokens: int) -> None:
    x = torch.randn(tokens, K)
    _, columns = cast_activation(x, RECIPES[recipe], torch.float8_e4m3fn, rows=False, columns=True)
    placeholder = columns_placeholder(x, RECIPES[recipe])
    for made, stand_in in zip(columns, placeholder, strict=True):
        assert (made.shape, made.dtype, made.device) == (stand_in.shape, stand_in.dtype, stand_in.device)
        assert stand_in.untyped_storage().nbytes() <= 4


def test_the_first_pass_of_checkpointing_is_told_from_the_second_and_from_an_ordinary_one() -> None:
    passes: list[bool] = []

    def block(x: Tensor) -> Tensor:
        passes.append(is_recomputed_later())
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    block(x)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert passes == [False, True, False]
    with torch.autograd.graph.save_on_cpu():
        block(x)
    assert passes[-1] is False


@FULLY_FLOAT8
def test_the_first_pass_of_checkpointing_casts_rows_alone_and_gradients_keep_their_bits(recipe: str) -> None:
    def gradients(use_checkpoint: bool) -> tuple[list[Tensor], Counter, Counter]:
        model = Siblings(recipe)
        x = activation().detach().requires_grad_()
        output, forward = profiled(lambda: checkpoint(model, x, use_reentrant=False) if use_checkpoint else model(x))
        _, backward = profiled(lambda: output.square().sum().backward())
        return [output.detach(), x.grad, *(linear.weight.grad for linear in model.linears)], forward, backward

    expected, plain, _ = gradients(False)
    result, forward, backward = gradients(True)
    assert plain[BOTH_LAYOUTS[recipe].name()] == 1
    assert forward[BOTH_LAYOUTS[recipe].name()] == 0
    assert forward[ROWS_ONLY[recipe].name()] >= 1
    assert backward[BOTH_LAYOUTS[recipe].name()] >= 1
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


@FULLY_FLOAT8
def test_checkpointing_a_lone_linear_whose_input_outlives_both_passes_is_right(recipe: str) -> None:
    """Codes kept on the input by the first pass have no columns, and the second must not take them for complete."""
    plain, checkpointed = make(recipe), make(recipe)
    x = activation()
    plain(x).square().sum().backward()
    x = activation()
    checkpoint(checkpointed, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(plain.weight.grad, checkpointed.weight.grad)
