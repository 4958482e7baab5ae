"""The loss of some tokens at a time is that of all at once, with every gradient, and no tensor holds all logits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from titan_fp8.kernels.cross_entropy import cross_entropy_
from titan_fp8.models.chunked_loss import ChunkedHead, chunk_loss
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.linear import Linear
from titan_fp8.models.loss import IGNORE_INDEX, cross_entropy_sum
from titan_fp8.runtime.errors import UserError

TOKENS, FEATURES, WORDS = (2, 15), 24, 37
CHUNKS = [1, 7, 10, 30, 1000]


def _head(chunk: int, dtype: torch.dtype = torch.float32) -> tuple[Linear, ChunkedHead]:
    """An ordinary head, and one of the same weight that computes the loss."""
    torch.manual_seed(0)
    plain, chunked = Linear(FEATURES, WORDS, bias=False), Linear(FEATURES, WORDS, bias=False)
    chunked.load_state_dict(plain.state_dict())
    chunk_loss(chunked, chunk)
    assert isinstance(chunked, ChunkedHead)
    return plain.to(dtype), chunked.to(dtype)


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(WORDS, TOKENS)
    labels[0, :3] = labels[1, 7] = IGNORE_INDEX
    return torch.randn(*TOKENS, FEATURES).to(dtype), labels


def _whole(head: Linear, x: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy_sum(head(x), labels)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradients_are_those_of_all_tokens_at_once(chunk: int) -> None:
    plain, chunked = _head(chunk)
    x, labels = _inputs()
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss, expected = chunked(left, labels), _whole(plain, right, labels)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for each in (loss, expected):
        (each / 13).backward()  # as the trainer divides by the tokens that count
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(chunked.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-6)


def test_bf16_activations_and_an_fp32_weight() -> None:
    plain, chunked = _head(7)
    x, labels = _inputs(torch.bfloat16)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    chunked(left, labels).backward()
    _whole(plain, right, labels).backward()
    assert left.grad is not None
    assert left.grad.dtype == torch.bfloat16
    assert chunked.weight.grad is not None
    assert chunked.weight.grad.dtype == torch.float32
    for actual, expected in ((left.grad, right.grad), (chunked.weight.grad, plain.weight.grad)):
        assert expected is not None
        assert (actual.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()


@pytest.mark.parametrize("tokens_that_count", [255, 256, 257])
def test_the_number_of_tokens_makes_no_bf16_gradient_longer_or_shorter(tokens_that_count: int) -> None:
    torch.manual_seed(0)
    plain, chunked = (Linear(128, 64, bias=False) for _ in range(2))
    chunked.load_state_dict(plain.state_dict())
    chunk_loss(chunked, 50)
    x, labels = torch.randn(4, 64, 128).bfloat16(), torch.randint(64, (4, 64))
    left, right = x.clone().requires_grad_(), x.float().requires_grad_()
    (chunked(left, labels) / tokens_that_count).backward()
    (_whole(plain, right, labels) / tokens_that_count).backward()
    assert left.grad is not None
    assert right.grad is not None
    along = (left.grad.double() * right.grad).sum() / right.grad.double().square().sum()
    assert along.item() == pytest.approx(1, abs=5e-4)


def test_gradients_of_several_microbatches_add_up() -> None:
    plain, chunked = _head(7)
    x, labels = _inputs()
    for part in range(2):
        chunked(x[part], labels[part]).backward()
        _whole(plain, x[part : part + 1], labels[part : part + 1]).backward()
    torch.testing.assert_close(chunked.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-6)


def test_only_what_is_asked_for_is_computed() -> None:
    _, chunked = _head(7)
    x, labels = _inputs()
    with torch.no_grad():
        assert not chunked(x.requires_grad_(), labels).requires_grad
    chunked.weight.requires_grad_(False)
    chunked(x, labels).backward()
    assert x.grad is not None
    assert chunked.weight.grad is None
    chunked.weight.requires_grad_(True)
    chunked(x.detach(), labels).backward()
    assert chunked.weight.grad is not None


def test_without_labels_it_is_an_ordinary_head() -> None:
    plain, chunked = _head(7)
    x, _ = _inputs()
    assert torch.equal(chunked(x), plain(x))
    assert list(chunked.state_dict()) == ["weight"]


def test_all_labels_left_out_give_zero_and_an_unknown_one_nan() -> None:
    _, chunked = _head(7)
    x, labels = _inputs()
    x.requires_grad_()
    loss = chunked(x, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert not x.grad.any()
    for unknown in (WORDS, -1):
        labels[0, 5] = unknown
        assert chunked(x, labels).isnan()


class _Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [each.numel() for each in tree_iter(result) if isinstance(each, Tensor)]
        self.elements = max([self.elements, *found])
        return result


def test_no_tensor_holds_the_logits_of_more_than_a_chunk() -> None:
    x, labels = torch.randn(300, 8, requires_grad=True), torch.randint(500, (300,))
    head = Linear(8, 500, bias=False)
    chunk_loss(head, 20)
    with _Largest() as largest:
        head(x, labels).backward()
    assert largest.elements == 20 * 500


def test_a_decoder_computes_its_loss() -> None:
    dims = ModelDims(dim=32, n_layers=1, n_heads=2, ffn_dim=48, vocab_size=67, max_seq_len=16, tied_embeddings=True)
    plain, chunked = Decoder(dims), Decoder(dims)
    for model in (plain, chunked):
        initialize(model, seed=3, device=torch.device("cpu"))
    chunk_loss(chunked.output, 5)
    tokens = torch.randint(67, (2, 17))
    tokens, labels = tokens[:, :-1], tokens[:, 1:]
    loss, expected = chunked(tokens, labels=labels), cross_entropy_sum(plain(tokens), labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for (name, p), (_, q) in zip(chunked.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "head",
    [nn.Linear(8, 8, bias=False), Linear(8, 8, bias=True), None],
    ids=["another class", "a bias", "none"],
)
def test_a_head_of_another_kind_is_refused(head: Any) -> None:
    with pytest.raises(UserError, match=r"training\.loss_chunk_tokens = 7: .* set the key to 0"):
        chunk_loss(head, 7)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(3, 4, 5), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(5, 4).t(), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 5), torch.zeros(3, dtype=torch.int64)),
    ],
    ids=["dimensions", "strides", "dtype", "labels"],
)
def test_logits_of_another_form_are_refused(logits: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="expected logits"):
        cross_entropy_(logits, labels, grad=True)
