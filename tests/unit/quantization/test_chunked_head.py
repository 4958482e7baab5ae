"""A float8 head that computes the loss some tokens at a time equals one that computes all logits, in every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.tolerances import CHUNK_SIZES_SQNR_DB, CHUNKED_VS_WHOLE_SQNR_DB, sqnr_db
from tests.unit.quantization.test_ops import CountCalls
from titan_fp8.models.loss import IGNORE_INDEX, cross_entropy_sum
from titan_fp8.quantization import ops
from titan_fp8.quantization.chunked_head import Float8ChunkedHead, chunk_float8_loss
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.runtime.errors import UserError

ALL_RECIPES = pytest.mark.parametrize("recipe", RECIPES)
TOKENS, FEATURES, WORDS = (2, 150), 128, 512
WHOLE = 300
CHUNKS = [WHOLE, 64, 100]
"""Of 300 tokens; 64 becomes 128 where that is a block, and 100 a multiple of 16 or 128 that does not divide them."""

Result = dict[str, Tensor]


def make(recipe: str, chunk: int | None = None, **config: Any) -> Float8Linear:
    """A head, always with the same weight; with a chunk, one that computes the loss."""
    torch.manual_seed(0)
    config = {"emulate": True, "grad_weight_dtype": torch.float32, **config}
    head = Float8Linear.from_linear(nn.Linear(FEATURES, WORDS, bias=False), Float8Config(RECIPES[recipe], **config))
    if chunk is not None:
        chunk_float8_loss(head, chunk)
    return head


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(WORDS, TOKENS)
    labels[0, :3] = labels[1, 7] = IGNORE_INDEX
    return torch.randn(*TOKENS, FEATURES).bfloat16(), labels


def run(head: nn.Linear, dtype: torch.dtype = torch.bfloat16, divisor: int = 1) -> Result:
    """The loss and every gradient by name."""
    x, labels = inputs()
    x = x.to(dtype).requires_grad_()
    chunked = isinstance(head, Float8ChunkedHead)
    loss = head(x, labels) if chunked else cross_entropy_sum(head(x), labels)
    (loss / divisor).backward()
    assert x.grad is not None
    assert head.weight.grad is not None
    return {"loss": loss.detach(), "grad_input": x.grad, "grad_weight": head.weight.grad}


def assert_same(actual: Result, expected: Result, minimum_db: float) -> None:
    assert actual["loss"].dtype == torch.float32
    assert actual["loss"].shape == ()
    torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-6, atol=0)
    for name in ("grad_input", "grad_weight"):
        assert actual[name].dtype == expected[name].dtype
        assert sqnr_db(expected[name], actual[name]) > minimum_db, name


@ALL_RECIPES
@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradients_are_those_of_all_logits_at_once(recipe: str, chunk: int) -> None:
    assert_same(run(make(recipe, chunk)), run(make(recipe)), CHUNKED_VS_WHOLE_SQNR_DB)


@ALL_RECIPES
@pytest.mark.parametrize("chunk", CHUNKS[1:])
def test_the_size_of_the_chunks_changes_the_order_of_sums_and_rowwise_subnormals(recipe: str, chunk: int) -> None:
    minimum_db = CHUNKED_VS_WHOLE_SQNR_DB if recipe == "rowwise" else CHUNK_SIZES_SQNR_DB
    # fp32, in which the largest gradient of a chunk is not quite 1.
    chunked, whole = (run(make(recipe, size), torch.float32) for size in (chunk, WHOLE))
    assert_same(chunked, whole, minimum_db)


@ALL_RECIPES
@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_are_as_exact_as_those_of_all_logits_at_once(recipe: str, chunk: int) -> None:
    exact = nn.Linear(FEATURES, WORDS, bias=False).double()
    exact.load_state_dict(make(recipe).state_dict())
    x, labels = inputs()
    x = x.double().requires_grad_()
    torch.nn.functional.cross_entropy(exact(x).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    assert x.grad is not None
    wanted = {"grad_input": x.grad, "grad_weight": exact.weight.grad}
    ours, theirs = run(make(recipe, chunk), divisor=13), run(make(recipe), divisor=13)
    for name, gradient in wanted.items():
        assert gradient is not None
        assert sqnr_db(gradient, ours[name] * 13) > sqnr_db(gradient, theirs[name] * 13) - 0.2, name


@ALL_RECIPES
def test_the_gradient_of_the_loss_scales_both_gradients(recipe: str) -> None:
    once, scaled = run(make(recipe, 64)), run(make(recipe, 64), divisor=64)
    for name in ("grad_input", "grad_weight"):
        assert torch.equal(scaled[name] * 64, once[name])


@ALL_RECIPES
def test_the_gradient_of_the_weight_has_the_precision_that_was_asked_for(recipe: str) -> None:
    wide, narrow = (run(make(recipe, 64, grad_weight_dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert narrow["grad_weight"].dtype == torch.float32
    assert torch.equal(narrow["grad_weight"], wide["grad_weight"].bfloat16().float())
    assert not torch.equal(narrow["grad_weight"], wide["grad_weight"])


def test_fp32_activations() -> None:
    for recipe in RECIPES:
        actual, expected = (run(make(recipe, chunk), torch.float32) for chunk in (64, None))
        assert_same(actual, expected, CHUNKED_VS_WHOLE_SQNR_DB)


def test_autocast_decides_the_precision_of_the_logits() -> None:
    for recipe in RECIPES:
        expected = run(make(recipe, 64), torch.bfloat16)
        x, labels = inputs()
        x = x.float().requires_grad_()
        head = make(recipe, 64)
        with torch.autocast("cpu", torch.bfloat16):
            loss = head(x, labels)
        loss.backward()
        assert torch.equal(loss, expected["loss"])
        assert x.grad is not None
        assert torch.equal(x.grad, expected["grad_input"].float())
        assert torch.equal(head.weight.grad, expected["grad_weight"])  # pyright: ignore[reportArgumentType]


@ALL_RECIPES
def test_gradients_of_several_microbatches_add_up(recipe: str) -> None:
    x, labels = inputs()
    heads = make(recipe, 64), make(recipe)
    for part in range(2):
        heads[0](x[part], labels[part]).backward()
        cross_entropy_sum(heads[1](x[part : part + 1]), labels[part : part + 1]).backward()
    chunked, whole = (head.weight.grad for head in heads)
    assert chunked is not None
    assert whole is not None
    assert sqnr_db(whole, chunked) > CHUNKED_VS_WHOLE_SQNR_DB


@ALL_RECIPES
def test_only_what_is_asked_for_is_computed(recipe: str) -> None:
    head, (x, labels), expected = make(recipe, 64), inputs(), run(make(recipe, 64))
    chunks = -(-WHOLE // head.chunk_tokens)  # pyright: ignore[reportOperatorIssue]

    def products(x: Tensor) -> tuple[Tensor, float]:
        with CountCalls() as counts:
            loss = head(x, labels)
        return loss, sum(counts.calls[op] for op in ops.GEMM_OPS) / chunks

    with torch.no_grad():
        loss, count = products(x.requires_grad_())
    assert torch.equal(loss, expected["loss"])
    assert not loss.requires_grad
    assert count == 1

    head.weight.requires_grad_(False)
    loss, count = products(x)
    loss.backward()
    assert count == 2
    assert x.grad is not None
    assert torch.equal(x.grad, expected["grad_input"])
    assert head.weight.grad is None

    head.weight.requires_grad_(True)
    loss, count = products(x.detach())
    loss.backward()
    assert count == 1 + RECIPES[recipe].grad_weight_in_float8
    assert head.weight.grad is not None
    assert torch.equal(head.weight.grad, expected["grad_weight"])


@ALL_RECIPES
def test_hidden_states_and_weight_are_cast_once(recipe: str) -> None:
    x, labels = inputs()
    calls = []
    for head in (make(recipe, 128), make(recipe, 16)):
        with CountCalls() as counts, torch.no_grad():
            head(x, labels)
        calls.append({op: n for op, n in counts.calls.items() if op not in ops.GEMM_OPS})
    assert calls[0] == calls[1]
    assert max(calls[0].values()) <= 2


def test_without_labels_it_is_an_ordinary_float8_linear() -> None:
    plain, chunked = make("rowwise"), make("rowwise", 64)
    x, _ = inputs()
    assert isinstance(chunked, Float8ChunkedHead)
    assert torch.equal(chunked(x), plain(x))
    assert list(chunked.state_dict()) == ["weight"]


@ALL_RECIPES
def test_all_labels_left_out_give_zero_and_an_unknown_one_nan(recipe: str) -> None:
    head, (x, labels) = make(recipe, 64), inputs()
    x.requires_grad_()
    loss = head(x, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert not x.grad.any()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    for unknown in (WORDS, -1):
        labels[0, 5] = unknown
        assert head(x, labels).isnan()


@ALL_RECIPES
def test_a_hidden_state_that_is_no_number_shows_in_loss_and_gradients(recipe: str) -> None:
    head, (x, labels) = make(recipe, 64), inputs()
    x[1, 20, 3] = torch.inf
    x.requires_grad_()
    loss = head(x, labels)
    loss.backward()
    assert loss.isnan()
    assert x.grad is not None
    assert x.grad[1, 20].isnan().all()
    assert head.weight.grad is not None
    assert head.weight.grad.isnan().all()


class _Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(each.numel() for each in tree_iter(result) if isinstance(each, Tensor))])
        return result


@ALL_RECIPES
def test_no_tensor_holds_the_logits_of_more_than_a_chunk(recipe: str) -> None:
    head, (x, labels) = make(recipe, 128), inputs()
    saved = []
    with saved_tensors_hooks(lambda each: saved.append(each.numel()) or each, lambda each: each), _Largest() as largest:
        head(x.requires_grad_(), labels).backward()
    assert largest.elements == 128 * WORDS
    assert sorted(saved) == [WHOLE * FEATURES, WORDS * FEATURES]


def test_a_chunk_is_a_whole_number_of_blocks() -> None:
    sizes = {"tensorwise": {1: 16, 16: 16, 100: 112}, "blockwise": {1: 128, 128: 128, 300: 384}}
    for recipe, expected in sizes.items():
        for asked, taken in expected.items():
            head = make(recipe, asked)
            assert isinstance(head, Float8ChunkedHead)
            assert head.chunk_tokens == taken


def test_a_head_with_a_bias_is_refused() -> None:
    head = Float8Linear.from_linear(nn.Linear(32, 32), Float8Config(RECIPES["tensorwise"], emulate=True))
    with pytest.raises(
        UserError, match=r"training\.loss_chunk_tokens = 7: .* a Float8Linear with one; set the key to 0"
    ):
        chunk_float8_loss(head, 7)
