"""RMSNorm that keeps the residual stream: the plain expression's numbers, with one gradient of the stream."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titan_fp8.models import norm as norm_module
from titan_fp8.models.norm import RMSNorm

EPS = 1e-5


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether norms compute as on a GPU; on a CPU that is with the kernel's reference."""
    monkeypatch.setattr(norm_module, "_takes_kernel", lambda x: request.param)
    return request.param


def build(dtype: torch.dtype = torch.bfloat16) -> tuple[RMSNorm, Tensor, Tensor]:
    """A norm, and x and branch [2, 9, 64]."""
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(64, EPS)
    norm.weight.data = 1 + torch.randn(64, generator=generator) / 8
    x, branch = (torch.randn(2, 9, 64, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return norm, x, branch


@pytest.mark.parametrize("kernel", [False, True], indirect=True)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_plain_expression(kernel: bool, adds: bool, dtype: torch.dtype) -> None:
    norm, x, branch = build(dtype)
    stream, normed = norm.add_and_norm(x, branch) if adds else norm.keep_and_norm(x)
    plain = x + branch if adds else x
    assert torch.equal(stream, plain)
    assert torch.equal(normed, F.rms_norm(plain, (64,), norm.weight.to(dtype), EPS))
    assert torch.equal(norm(stream), normed)
    leaves = [x, branch, norm.weight] if adds else [x, norm.weight]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    total = stream.detach().double() + sum(t - t.detach() for t in doubles[:-1])
    rounded = norm.weight.detach().to(dtype).double() + doubles[-1] - doubles[-1].detach()
    exact = total, F.rms_norm(total, (64,), rounded, EPS)
    grads = [torch.randn(2, 9, 64).to(dtype) for _ in range(2)]
    results = torch.autograd.grad((stream, normed), leaves, grads)
    expected = torch.autograd.grad(exact, doubles, [grad.double() for grad in grads])
    eps = torch.finfo(dtype).eps
    # Where two operators make the gradient of the stream, what is added is rounded first.
    tolerance = {"rtol": eps / 2 + 2.0**-21, "atol": 4e-6} if kernel else {"rtol": eps, "atol": max(eps, 4e-6)}
    for result, value, leaf in zip(results, expected, leaves, strict=True):
        assert result.dtype == leaf.dtype
        torch.testing.assert_close(result.double(), value, **tolerance)


@pytest.mark.parametrize("kernel", [True], indirect=True)
def test_one_output_alone_may_be_used(kernel: bool) -> None:
    norm, x, _ = build()
    stream, normed = norm.keep_and_norm(x)
    grad = torch.randn(2, 9, 64).bfloat16()
    of_stream = torch.autograd.grad(stream, (x, norm.weight), grad, retain_graph=True, allow_unused=True)
    assert torch.equal(of_stream[0], grad)
    assert of_stream[1] is None
    of_norm = torch.autograd.grad(normed, (x, norm.weight), grad)
    plain = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    assert all(map(torch.equal, of_norm, plain))
    assert stream.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("kernel", [True], indirect=True)
@pytest.mark.parametrize("adds", [False, True])
def test_who_watches_a_norm_sees_what_goes_in_and_comes_out(kernel: bool, adds: bool) -> None:
    norm, x, branch = build()
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, inputs, output: seen.extend((*inputs, output)))
    stream, normed = norm.add_and_norm(x, branch) if adds else norm.keep_and_norm(x)
    assert [id(t) for t in seen] == [id(stream), id(normed)]


def test_on_a_cpu_the_stream_is_the_input_itself() -> None:
    norm, x, _ = build()
    assert norm.keep_and_norm(x)[0] is x
