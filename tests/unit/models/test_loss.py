"""Cross-entropy as a float32 sum over labelled positions."""

import torch

from titan_fp8.models.loss import cross_entropy_sum


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator).requires_grad_()
    labels = torch.randint(0, 11, (2, 5), generator=generator)
    labels[0, 1] = labels[1, 4] = -100
    return logits, labels


def test_sum_and_gradient_are_those_of_the_formula() -> None:
    logits, labels = _batch()
    loss = cross_entropy_sum(logits, labels)
    loss.backward()
    kept = labels != -100
    log_probabilities = logits.detach().double().log_softmax(-1)
    expected = -log_probabilities[kept].gather(-1, labels[kept][:, None]).sum()
    torch.testing.assert_close(loss.double(), expected)
    gradient = log_probabilities.exp()
    gradient[kept] -= torch.nn.functional.one_hot(labels[kept], 11)
    gradient[~kept] = 0
    torch.testing.assert_close(logits.grad.double(), gradient)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, labels = _batch()
    loss = cross_entropy_sum(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert loss == cross_entropy_sum(logits.bfloat16().float(), labels)


def test_no_label_at_all_gives_zero_with_zero_gradients() -> None:
    logits, labels = _batch()
    loss = cross_entropy_sum(logits, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
