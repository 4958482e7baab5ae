"""The norm of plain gradients against torch's own; sharded ones are in tests/distributed/test_clipping.py."""

import math

import pytest
import torch
from torch import Tensor, nn

from titan_fp8.optim import build_optimizer, clip_grad_norm_
from titan_fp8.optim.config import OptimizerSection
from titan_fp8.runtime.known_squares import note_squares


def _parameters(*grads: Tensor | None) -> list[nn.Parameter]:
    parameters = []
    for grad in grads:
        parameters.append(nn.Parameter(torch.zeros(3) if grad is None else torch.zeros_like(grad)))
        parameters[-1].grad = grad
    return parameters


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_equals_torch(max_norm: float, foreach: bool | None) -> None:
    torch.manual_seed(0)
    grads = [torch.randn(7, 5), torch.randn(3), torch.randn(())]
    ours, theirs = _parameters(*[g.clone() for g in grads]), _parameters(*[g.clone() for g in grads])
    norm = clip_grad_norm_(ours, max_norm, foreach=foreach)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_squares_that_are_known_are_taken_if_nobody_has_written_in_between() -> None:
    whole = torch.full((6,), 2.0)
    parameters = _parameters(whole[:2], whole[2:], torch.tensor([3.0]))
    note_squares(whole, torch.tensor([7.0]))
    assert clip_grad_norm_(parameters, 0, one_read=True).item() == pytest.approx(math.sqrt(24 + 9))
    assert clip_grad_norm_(parameters, 0, is_untouched=True).item() == pytest.approx(math.sqrt(24 + 9))
    assert clip_grad_norm_(parameters, 0, one_read=True, is_untouched=True).item() == 4
    assert clip_grad_norm_(parameters, 0, one_read=True, is_untouched=True).item() == pytest.approx(math.sqrt(24 + 9))


@pytest.mark.parametrize("has_hook", [False, True])
def test_the_optimizer_takes_them_when_told_and_if_there_are_no_hooks(has_hook: bool) -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizers = build_optimizer([model], OptimizerSection(implementation="one_pass"))
    whole = torch.ones(6)
    if has_hook:
        model.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    for is_untouched, expected in ((False, 6), (True, 6 if has_hook else 16)):
        model.weight.grad = whole.view(2, 3)
        note_squares(whole, torch.tensor([16.0]))
        norm = optimizers.clip_grad_norm(1.0, is_untouched=is_untouched)
        assert norm.item() == pytest.approx(math.sqrt(expected))


@pytest.mark.parametrize("foreach", [None, False])
def test_norm_of_bf16_gradients_is_taken_in_fp32(foreach: bool | None) -> None:
    # 4096 ones: a running bf16 sum would stop at 256
    parameters = _parameters(torch.ones(4096, dtype=torch.bfloat16), torch.ones(4, dtype=torch.float32))
    norm = clip_grad_norm_(parameters, 1.0, foreach=foreach)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(math.sqrt(4100))
    assert parameters[0].grad is not None
    assert parameters[0].grad.dtype == torch.bfloat16


def test_max_norm_zero_measures_and_leaves_the_gradients_alone() -> None:
    parameters = _parameters(torch.tensor([3.0, 4.0]))
    assert clip_grad_norm_(parameters, 0.0) == 5.0
    assert torch.equal(parameters[0].grad, torch.tensor([3.0, 4.0]))


def test_gradients_below_the_limit_are_bit_for_bit_unchanged() -> None:
    grad = torch.randn(100)
    parameters = _parameters(grad.clone())
    clip_grad_norm_(parameters, 1e4)
    assert torch.equal(parameters[0].grad, grad)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_gradient_gives_a_non_finite_norm(bad: float) -> None:
    norm = clip_grad_norm_(_parameters(torch.ones(3), torch.tensor([1.0, bad])), 1.0)
    assert not norm.isfinite()


def test_parameters_without_a_gradient_are_left_out() -> None:
    assert clip_grad_norm_(_parameters(None, torch.tensor([2.0]), torch.zeros(0)), 1.0) == 2.0


def test_no_gradient_at_all_has_norm_zero() -> None:
    assert clip_grad_norm_(_parameters(None), 1.0) == 0.0


@pytest.mark.parametrize("max_norm", [-1.0, float("nan")])
def test_negative_limit_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm_(_parameters(torch.ones(1)), max_norm)
