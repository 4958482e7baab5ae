"""RMSNorm straight to codes: the codes of the norm's own output, and every gradient of the norm and of the residual."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titan_fp8.quantization import producer_ops
from titan_fp8.quantization.casts import cast_activation
from titan_fp8.quantization.norm import add_rms_norm, keep_and_rms_norm, rms_norm
from titan_fp8.quantization.recipes import RECIPES

EPS = 1e-5
ALL_RECIPES = pytest.mark.parametrize("recipe", RECIPES)
FULLY_FLOAT8 = pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if r.grad_weight_in_float8])

ADDS = pytest.mark.parametrize("adds", [False, True])


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """x and branch [2, 9, 128], and an fp32 weight, all of which want gradients."""
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(2, 9, 128, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return x, branch, (1 + torch.randn(128, generator=generator) / 8).requires_grad_()


@FULLY_FLOAT8
@ADDS
def test_codes_are_those_that_a_linear_makes_of_the_norm(recipe: str, adds: bool) -> None:
    x, branch, weight = inputs()
    if adds:
        total, result = add_rms_norm(x, branch, weight, EPS, RECIPES[recipe], columns=True, emit=True)
        assert torch.equal(total, x + branch)
    else:
        total, result = x, rms_norm(x, weight, EPS, RECIPES[recipe], columns=True, emit=True)
    normed = F.rms_norm(total, (128,), weight.to(x.dtype), EPS)
    assert torch.equal(result.value, normed)
    rows, columns = cast_activation(
        normed.detach().view(18, 128), RECIPES[recipe], RECIPES[recipe].input_dtype, rows=True, columns=True
    )
    assert rows is not None
    assert columns is not None
    assert result.columns is not None
    for ours, theirs in zip((*result.rows, *result.columns), (*rows, *columns), strict=True):
        assert torch.equal(ours.float(), theirs.float())
        assert ours.stride() == theirs.stride()


class Operators(TorchDispatchMode):
    """Lists what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def outputs(
    x: Tensor, branch: Tensor | None, weight: Tensor, recipe: str = "rowwise"
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """The stream and the norm's value, of x + branch or of x alone; and what wants gradients of them."""
    if branch is None:
        stream, normed = keep_and_rms_norm(x, weight, EPS, RECIPES[recipe], columns=False, emit=False)
        return (stream, normed.value), (x, weight)
    stream, normed = add_rms_norm(x, branch, weight, EPS, RECIPES[recipe], columns=False, emit=False)
    return (stream, normed.value), (x, branch, weight)


@ALL_RECIPES
@ADDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=["both", "stream", "norm"])
def test_every_gradient_is_that_of_the_plain_expression_rounded_once(
    recipe: str, dtype: torch.dtype, adds: bool, used: tuple[bool, bool]
) -> None:
    x, branch, weight = inputs(dtype)
    results, leaves = outputs(x, branch if adds else None, weight, recipe)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    *streams, exact_weight = doubles
    # The sum and the weight are rounded, which gradients do not see.
    total = results[0].detach().double() + sum(t - t.detach() for t in streams)
    rounded = weight.detach().to(dtype).double() + exact_weight - exact_weight.detach()
    exact = total, F.rms_norm(total, (128,), rounded, EPS)
    grads = [torch.randn(2, 9, 128).to(dtype) for _ in range(2)]

    chosen = [index for index in range(2) if used[index]]
    ours = torch.autograd.grad([results[i] for i in chosen], leaves, [grads[i] for i in chosen], allow_unused=True)
    theirs = torch.autograd.grad(
        [exact[i] for i in chosen], doubles, [grads[i].double() for i in chosen], allow_unused=True
    )
    for result, expected, leaf in zip(ours, theirs, leaves, strict=True):
        assert (result is None) == (expected is None)
        if result is not None and expected is not None:
            assert result.dtype == leaf.dtype
            rounding = torch.finfo(dtype).eps / 2
            torch.testing.assert_close(result.double(), expected, rtol=rounding + 2.0**-21, atol=1e-5)


@ADDS
def test_a_gradient_of_one_output_alone_is_enough(adds: bool) -> None:
    x, branch, weight = inputs()
    both = [torch.randn(2, 9, 128).bfloat16() for _ in range(2)]
    (stream, value), leaves = outputs(x, branch if adds else None, weight)
    of_stream = torch.autograd.grad(stream, leaves, both[0], retain_graph=True, allow_unused=True)
    of_norm = torch.autograd.grad(value, leaves, both[1], retain_graph=True)
    of_both = torch.autograd.grad((stream, value), leaves, both)
    assert torch.equal(of_stream[0], both[0])
    assert of_stream[-1] is None
    assert torch.equal(of_both[-1], of_norm[-1])
    torch.testing.assert_close(of_both[0], of_stream[0] + of_norm[0], rtol=2**-6, atol=2**-6)


def test_a_stream_that_is_kept_is_not_copied() -> None:
    x, _, weight = inputs()
    stream, _ = keep_and_rms_norm(x, weight, EPS, RECIPES["rowwise"], columns=True, emit=False)
    assert stream.data_ptr() == x.data_ptr()
    assert stream.shape == x.shape


@ADDS
def test_one_operator_makes_the_gradient_of_stream_and_norm(adds: bool) -> None:
    x, branch, weight = inputs()
    (stream, value), leaves = outputs(x, branch if adds else None, weight)
    with Operators() as operators:
        torch.autograd.grad((stream, value), leaves, [torch.randn(2, 9, 128).bfloat16() for _ in range(2)])
    assert operators.calls.count(producer_ops.rms_norm_backward) == 1
    assert torch.ops.aten.add.Tensor not in operators.calls


@ADDS
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_are_those_of_eager_mode(adds: bool, backend: str) -> None:
    torch._dynamo.reset()
    x, branch, weight = inputs()

    def go_on(x: Tensor, branch: Tensor, weight: Tensor) -> Tensor:
        (stream, value), _ = outputs(x * 1, branch if adds else None, weight)
        return stream * 3 + value.nan_to_num(1.0) * 2

    grad = torch.randn(2, 9, 128).bfloat16()
    expected = torch.autograd.grad(go_on(x, branch, weight), (x, weight), grad)
    compiled = torch.compile(go_on, fullgraph=True, backend=backend)
    for result, exact in zip(
        torch.autograd.grad(compiled(x, branch, weight), (x, weight), grad), expected, strict=True
    ):
        assert torch.equal(result, exact)


@FULLY_FLOAT8
def test_leading_dimensions_do_not_matter(recipe: str) -> None:
    x, _, weight = inputs()
    expected = rms_norm(x.view(18, 128), weight, EPS, RECIPES[recipe], columns=True, emit=False)
    for shape in ((2, 3, 3, 128), (1, 18, 128)):
        result = rms_norm(x.view(shape), weight, EPS, RECIPES[recipe], columns=True, emit=False)
        assert result.value.shape == shape
        assert torch.equal(result.rows.codes.float(), expected.rows.codes.float())


def test_a_frozen_stream_still_gives_the_weight_its_gradient() -> None:
    x, branch, weight = inputs()
    _, result = add_rms_norm(x.detach(), branch.detach(), weight, EPS, RECIPES["rowwise"], columns=False, emit=False)
    result.value.backward(torch.ones(2, 9, 128).bfloat16())
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_only_one_of_stream_and_branch_may_want_a_gradient() -> None:
    x, branch, weight = inputs()
    outputs = add_rms_norm(x.detach(), branch, weight, EPS, RECIPES["rowwise"], columns=False, emit=False)
    expected = add_rms_norm(x, branch, weight, EPS, RECIPES["rowwise"], columns=False, emit=False)
    grads = [torch.randn(2, 9, 128).bfloat16() for _ in range(2)]
    (result,) = torch.autograd.grad((outputs[0], outputs[1].value), branch, grads)
    assert torch.equal(result, torch.autograd.grad((expected[0], expected[1].value), x, grads)[0])
