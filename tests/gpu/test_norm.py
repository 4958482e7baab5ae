"""RMSNorm in high precision on a GPU: its backward is our kernel in eager mode, and the compiler's own otherwise."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerances import sqnr_db
from titan_fp8.models.norm import RMSNorm

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

EPS = 1e-5


def build(dim: int) -> tuple[RMSNorm, list[Tensor]]:
    """A norm, and x, branch and two gradients [3, 50, dim]."""
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(dim, EPS)
    norm.weight.data = 1 + torch.randn(dim, generator=generator) / 8
    tensors = (torch.randn(3, 50, dim, generator=generator).bfloat16().cuda() for _ in range(4))
    return norm.cuda(), list(tensors)


def gradients(outputs: tuple[Tensor, Tensor], leaves: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves, [grad.to(outputs[0].dtype) for grad in grads])


@pytest.mark.parametrize("dim", [100, 4096, 20480])
@pytest.mark.parametrize("adds", [False, True])
def test_outputs_are_those_of_pytorch_and_gradients_are_as_exact(dim: int, adds: bool) -> None:
    norm, (x, branch, *grads) = build(dim)
    x, branch = x.requires_grad_(), branch.requires_grad_()
    leaves = [x, branch, norm.weight] if adds else [x, norm.weight]
    stream, normed = norm.add_and_norm(x, branch) if adds else norm.keep_and_norm(x)
    assert type(normed.grad_fn).__name__ == "_KeepAndNormBackward"
    total = x + branch if adds else x
    plain = F.rms_norm(total, (dim,), norm.weight.to(x.dtype), EPS)
    assert torch.equal(stream, total)
    assert torch.equal(normed, plain)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact_total = total.detach().double() + sum(t - t.detach() for t in doubles[:-1])
    rounded = norm.weight.detach().to(x.dtype).double() + doubles[-1] - doubles[-1].detach()
    exact = gradients((exact_total, F.rms_norm(exact_total, (dim,), rounded, EPS)), doubles, grads)
    results = gradients((stream, normed), leaves, grads)
    for result, theirs, value in zip(results, gradients((total, plain), leaves, grads), exact, strict=True):
        assert sqnr_db(value, result) > sqnr_db(value, theirs) - 0.1


def test_a_compiled_norm_is_left_to_the_compiler() -> None:
    norm, (x, *grads) = build(512)
    x = x.requires_grad_()
    compiled = torch.compile(lambda x: norm.keep_and_norm(x * 1), fullgraph=True)
    leaves = [x, norm.weight]
    results = gradients(compiled(x), leaves, grads[1:])
    for result, value in zip(results, gradients(norm.keep_and_norm(x * 1), leaves, grads[1:]), strict=True):
        assert sqnr_db(value, result) > 40
