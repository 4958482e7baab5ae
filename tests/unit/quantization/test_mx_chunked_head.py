"""An MXFP8 head that computes the loss some tokens at a time equals one that computes all logits, in every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.tolerances import CHUNK_SIZES_SQNR_DB, CHUNKED_VS_WHOLE_SQNR_DB, sqnr_db
from titan_fp8.converters.mx_weights import MXWeights, prepare_weights
from titan_fp8.models.loss import IGNORE_INDEX, cross_entropy_sum
from titan_fp8.quantization.mx_chunked_head import MXFP8ChunkedHead, chunk_mx_loss
from titan_fp8.quantization.mx_linear import MXConfig, MXFP8Linear
from titan_fp8.quantization.mx_recipes import MX_RECIPES
from titan_fp8.runtime.errors import UserError

TOKENS, FEATURES, WORDS = (2, 150), 128, 512
WHOLE = 300
CHUNKS = [WHOLE, 64, 100]
"""Of 300 tokens; 100 becomes a multiple of 32 that does not divide them."""
HIGH_PRECISION = pytest.mark.parametrize("high_precision", [False, True])

Result = dict[str, Tensor]


def make(chunk: int | None = None, *, emulate: bool = True, **config: Any) -> MXFP8Linear:
    """A head, always with the same weight; with a chunk, one that computes the loss."""
    torch.manual_seed(0)
    recipe = MX_RECIPES["mxfp8_cublas_rceil"]
    head = MXFP8Linear.from_linear(nn.Linear(FEATURES, WORDS, bias=False), MXConfig(recipe, emulate, "torch", **config))
    if chunk is not None:
        chunk_mx_loss(head, chunk)
    return head


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(WORDS, TOKENS)
    labels[0, :3] = labels[1, 7] = IGNORE_INDEX
    return torch.randn(*TOKENS, FEATURES).bfloat16(), labels


def run(head: nn.Module, dtype: torch.dtype = torch.bfloat16, divisor: int = 1) -> Result:
    """The loss and every gradient by name."""
    x, labels = inputs()
    x = x.to(dtype).requires_grad_()
    loss = head(x, labels) if isinstance(head, MXFP8ChunkedHead) else cross_entropy_sum(head(x), labels)
    (loss / divisor).backward()
    assert x.grad is not None
    assert isinstance(head.weight.grad, Tensor)
    return {"loss": loss.detach(), "grad_input": x.grad, "grad_weight": head.weight.grad}


def assert_same(actual: Result, expected: Result, minimum_db: float) -> None:
    assert actual["loss"].dtype == torch.float32
    assert actual["loss"].shape == ()
    torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-6, atol=0)
    for name in ("grad_input", "grad_weight"):
        assert actual[name].dtype == expected[name].dtype
        assert sqnr_db(expected[name], actual[name]) > minimum_db, name


@HIGH_PRECISION
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    dtype: torch.dtype, chunk: int, high_precision: bool
) -> None:
    chunked, whole = (run(make(size, grad_weight_in_high_precision=high_precision), dtype) for size in (chunk, None))
    assert_same(chunked, whole, CHUNKED_VS_WHOLE_SQNR_DB)


@HIGH_PRECISION
@pytest.mark.parametrize("chunk", CHUNKS[1:])
def test_the_size_of_the_chunks_changes_the_order_of_sums_alone(chunk: int, high_precision: bool) -> None:
    chunked, whole = (
        run(make(size, grad_weight_in_high_precision=high_precision), torch.float32) for size in (chunk, WHOLE)
    )
    assert_same(chunked, whole, CHUNK_SIZES_SQNR_DB)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("chunk", CHUNKS)
def test_native_products_get_the_codes_that_are_emulated(chunk: int) -> None:
    expected = run(make(chunk))
    for name, value in run(make(chunk, emulate=False)).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("weights", [MXWeights.CACHED, MXWeights.GATHERED_CODES])
def test_the_weight_may_be_kept_from_step_to_step(weights: MXWeights) -> None:
    expected, model = run(make(64)), nn.Sequential(make(64))
    prepare_weights(model, {"0": model[0]}, ["weight"], model[0].config.weight_cast, weights, True)
    for name, value in run(model[0]).items():
        assert torch.equal(value, expected[name]), name


def test_the_gradient_of_the_loss_scales_both_gradients() -> None:
    once, scaled = run(make(64)), run(make(64), divisor=64)
    for name in ("grad_input", "grad_weight"):
        assert torch.equal(scaled[name] * 64, once[name])


def test_autocast_decides_the_precision_of_the_logits() -> None:
    expected, head = run(make(64)), make(64)
    x, labels = inputs()
    x = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(x, labels)
    loss.backward()
    assert torch.equal(loss, expected["loss"])
    assert x.grad is not None
    assert torch.equal(x.grad, expected["grad_input"].float())


def test_only_what_is_asked_for_is_computed() -> None:
    head, (x, labels), expected = make(64), inputs(), run(make(64))
    with torch.no_grad():
        loss = head(x.requires_grad_(), labels)
    assert torch.equal(loss, expected["loss"])
    assert not loss.requires_grad
    head.weight.requires_grad_(False)
    head(x, labels).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, expected["grad_input"])
    assert head.weight.grad is None
    head.weight.requires_grad_(True)
    head(x.detach(), labels).backward()
    assert head.weight.grad is not None
    assert torch.equal(head.weight.grad, expected["grad_weight"])


def test_without_labels_it_is_an_ordinary_mx_linear() -> None:
    plain, chunked = make(), make(64)
    x, _ = inputs()
    assert isinstance(chunked, MXFP8ChunkedHead)
    assert torch.equal(chunked(x), plain(x))
    assert list(chunked.state_dict()) == ["weight"]


def test_all_labels_left_out_give_zero_and_an_unknown_one_nan() -> None:
    head, (x, labels) = make(64), inputs()
    x.requires_grad_()
    loss = head(x, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert not x.grad.any()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    labels[0, 5] = WORDS
    assert head(x, labels).isnan()


def test_no_tokens_give_no_loss_and_gradients_of_zero() -> None:
    head, x = make(64), torch.zeros(0, FEATURES, requires_grad=True)
    head(x, torch.zeros(0, dtype=torch.int64)).backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


class _Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(each.numel() for each in tree_iter(result) if isinstance(each, Tensor))])
        return result


def test_no_tensor_holds_the_logits_of_more_than_a_chunk() -> None:
    head, (x, labels) = make(128), inputs()
    saved = []
    with saved_tensors_hooks(lambda each: saved.append(each.numel()) or each, lambda each: each), _Largest() as largest:
        head(x.requires_grad_(), labels).backward()
    assert largest.elements == 128 * WORDS
    assert sorted(saved) == [WHOLE * FEATURES, WORDS * FEATURES]


def test_a_chunk_is_a_whole_number_of_blocks() -> None:
    for asked, taken in {1: 32, 32: 32, 100: 128}.items():
        head = make(asked)
        assert isinstance(head, MXFP8ChunkedHead)
        assert head.chunk_tokens == taken


def test_what_it_cannot_be_made_of_is_refused() -> None:
    head = MXFP8Linear.from_linear(nn.Linear(32, 32), MXConfig(MX_RECIPES["mxfp8_cublas"], emulate=True))
    with pytest.raises(
        UserError, match=r"training\.loss_chunk_tokens = 7: .* of class MXFP8Linear without .* a MXFP8Linear with one"
    ):
        chunk_mx_loss(head, 7)
    native = make(64)
    native.config = replace(native.config, emulate=False)
    with pytest.raises(RuntimeError, match="which has no products of blocks"):
        run(native)
