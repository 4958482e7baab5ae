"""Dispatch to experts: every choice gets a row of its own in its expert's group, and rows go there and back exactly.

The functions are taken from `titan_fp8.kernels.moe` and run on a GPU where there is one, so whatever computes them
there is what is tested; they are compared on the CPU with loops in fp64.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from titan_fp8.kernels import moe
from titan_fp8.kernels.moe import rows_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Half a unit in the last place, relative; for fp32, the roundings of a product and of a sum over a token's choices.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-21}
HALF_SUBNORMAL = 2**-25
"""Half of the least number in fp16."""
SIZES = [
    *((0, 2, 4, 8), (1, 1, 1, 1), (1, 4, 4, 8), (5, 8, 8, 16), (63, 2, 5, 8), (63, 3, 7, 16)),
    *((64, 1, 130, 4), (1000, 6, 64, 8)),
]
"""Tokens, choices of each, experts, alignment."""


@pytest.fixture(autouse=True, scope="module")
def _unwritten_results_show() -> Iterator[None]:
    """Memory is NaN, or the largest integer, before something is written there."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return tree_map_only(Tensor, Tensor.cpu, function(*tree_map_only(Tensor, lambda t: t.to(DEVICE), arguments)))

    return call


plan, permute, unpermute = _on_device(moe.plan), _on_device(moe.permute), _on_device(moe.unpermute)
permute_backward, unpermute_backward = _on_device(moe.permute_backward), _on_device(moe.unpermute_backward)
row_products = _on_device(moe.row_products)


def chosen(tokens: int, top_k: int, n_experts: int, seed: int = 0) -> Tensor:
    """Distinct experts for each token, `[T, k]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, n_experts, generator=generator).topk(top_k, dim=-1).indices


def check_plan(experts: Tensor, n_experts: int, alignment: int) -> None:
    """All that a plan promises, by loops over its numbers."""
    counts, ends, position, source = plan(experts, n_experts, alignment)
    tokens, top_k = experts.shape
    assert {part.dtype for part in (counts, ends, position, source)} == {torch.int32}
    assert (counts.shape, ends.shape) == ((n_experts,), (n_experts,))
    assert position.shape == experts.shape
    assert source.shape == (rows_for(tokens * top_k, n_experts, alignment),)

    ends_of, begin = ends.tolist(), 0
    rows_of_choices = position.flatten().tolist()
    choices = experts.flatten().tolist()
    for expert, end in enumerate(ends_of):
        theirs = [row for row, choice in zip(rows_of_choices, choices, strict=True) if choice == expert]
        assert counts[expert] == len(theirs)
        assert theirs == list(range(begin, begin + len(theirs))), "tokens in their order from the group's first row on"
        assert end == begin + -(-len(theirs) // alignment) * alignment
        begin = end
    assert begin <= source.numel(), "the rows suffice"

    expected = [-1] * source.numel()
    for choice, row in enumerate(rows_of_choices):
        assert expected[row] == -1, "a row holds one choice"
        expected[row] = choice
    assert source.tolist() == expected


@st.composite
def routings(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """Any choices of some tokens, the number of experts, an alignment."""
    n_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, n_experts))
    row = st.permutations(range(n_experts)).map(lambda experts: list(experts[:top_k]))
    return draw(st.lists(row, min_size=1, max_size=40)), n_experts, draw(st.sampled_from([1, 2, 3, 8, 16]))


@settings(deadline=None)
@given(routings())
@example(([[0]], 1, 1))
@example(([[3, 1]] * 63, 5, 8))
def test_every_choice_has_a_row_of_its_own_in_its_experts_aligned_group(
    routing: tuple[list[list[int]], int, int],
) -> None:
    experts, n_experts, alignment = routing
    check_plan(torch.tensor(experts), n_experts, alignment)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_plans_of_odd_and_empty_sizes_keep_every_promise(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, top_k, n_experts, alignment = size
    check_plan(chosen(tokens, top_k, n_experts).to(dtype), n_experts, alignment)


@pytest.mark.parametrize("tokens", [1, 8, 63, 1000])
@pytest.mark.parametrize("favourite", [0, 2, 4])
def test_all_tokens_may_go_to_one_expert_and_none_to_the_others(tokens: int, favourite: int) -> None:
    experts = torch.full((tokens, 1), favourite)
    check_plan(experts, 5, 8)
    counts, ends, position, _ = plan(experts, 5, 8)
    assert counts.tolist() == [tokens * (expert == favourite) for expert in range(5)]
    assert ends[:favourite].tolist() == [0] * favourite, "experts without tokens have no rows"
    assert torch.equal(position.flatten(), torch.arange(tokens, dtype=torch.int32))


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 16))
def test_the_rows_suffice_however_the_choices_fall(counts: list[int], alignment: int) -> None:
    rows = rows_for(sum(counts), len(counts), alignment)
    assert rows % alignment == 0
    assert sum(-(-count // alignment) * alignment for count in counts) <= rows


def test_no_rows_are_spent_on_what_cannot_happen() -> None:
    assert rows_for(0, 8, 8) == 0
    assert rows_for(3, 8, 8) == 24  # three experts of one token each, and no more
    assert rows_for(1000, 8, 1) == 1000


@pytest.mark.parametrize("shape", [(6,), (2, 3, 1), ()])
def test_choices_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected choices \[T, k\]"):
        plan(torch.zeros(shape, dtype=torch.int64), 4, 8)


@pytest.mark.parametrize("alignment", [0, -8])
def test_an_alignment_below_one_is_refused(alignment: int) -> None:
    with pytest.raises(ValueError, match=f"an alignment of at least 1, got .* {alignment}"):
        plan(torch.zeros(4, 2, dtype=torch.int64), 4, alignment)


def inputs(size: tuple[int, ...], dtype: torch.dtype, width: int = 24) -> tuple[Tensor, ...]:
    """Of a routing: tokens `[T, D]`, rows of groups `[M, D]` whose rows without a token are NaN, scores `[T, k]`,
    position, source."""
    tokens, top_k, n_experts, alignment = size
    experts = chosen(tokens, top_k, n_experts)
    _, _, position, source = plan(experts, n_experts, alignment)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    y = torch.randn(source.numel(), width, generator=generator).to(dtype)
    y[source < 0] = torch.nan  # what a row without a token holds reaches nobody
    scores = torch.rand(tokens, top_k, generator=generator) + 0.1
    return x, y, scores, position, source


WITH_SCORES = pytest.mark.parametrize("with_scores", [False, True], ids=["plain", "scores"])
ALL_DTYPES = pytest.mark.parametrize("dtype", ROUNDING)
ALL_SIZES = pytest.mark.parametrize("size", SIZES, ids=str)


@ALL_SIZES
@ALL_DTYPES
@WITH_SCORES
def test_permute_brings_each_token_to_its_rows_and_fills_up_with_zeros(
    size: tuple[int, ...], dtype: torch.dtype, with_scores: bool
) -> None:
    x, _, scores, _, source = inputs(size, dtype)
    top_k = size[1]
    rows = permute(x, source, scores if with_scores else None, top_k)
    assert (rows.dtype, rows.shape) == (dtype, (source.numel(), x.shape[1]))
    expected = torch.zeros(rows.shape, dtype=torch.float64)
    for row, choice in enumerate(source.tolist()):
        if choice >= 0:
            token, number = divmod(choice, top_k)
            expected[row] = x[token].double() * (scores[token, number].double() if with_scores else 1.0)
    if with_scores:
        torch.testing.assert_close(rows.double(), expected, rtol=ROUNDING[dtype], atol=HALF_SUBNORMAL)
    else:
        assert torch.equal(rows.double(), expected), "nothing is rounded"
    assert not rows[source < 0].any()


@ALL_SIZES
@ALL_DTYPES
@WITH_SCORES
def test_unpermute_sums_each_tokens_rows_and_rounds_once(
    size: tuple[int, ...], dtype: torch.dtype, with_scores: bool
) -> None:
    x, y, scores, position, _ = inputs(size, dtype)
    result = unpermute(y, position, scores if with_scores else None)
    assert (result.dtype, result.shape) == (dtype, x.shape)
    expected, magnitude = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    for token, rows in enumerate(position.tolist()):
        for number, row in enumerate(rows):
            part = y[row].double() * (scores[token, number].double() if with_scores else 1.0)
            expected[token] += part
            magnitude[token] += part.abs()
    # Half a unit of the result's dtype, beside what sums in fp32 are off by.
    allowed = ROUNDING[dtype] * expected.abs() + ROUNDING[torch.float32] * magnitude + HALF_SUBNORMAL
    assert ((result.double() - expected).abs() <= allowed).all()


def check_products(products: Tensor, x: Tensor, y: Tensor, position: Tensor) -> None:
    """Inner products in fp32 of tokens x `[T, D]` with their rows of y `[M, D]`."""
    assert (products.dtype, products.shape) == (torch.float32, position.shape)
    for token, rows in enumerate(position.tolist()):
        for number, row in enumerate(rows):
            terms = x[token].double() * y[row].double()
            error = (products[token, number].double() - terms.sum()).abs()
            assert error <= 2**-20 * terms.abs().sum(), f"token {token}, choice {number}"


@ALL_SIZES
@ALL_DTYPES
def test_row_products_are_inner_products_in_fp32(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y, _, position, _ = inputs(size, dtype)
    check_products(row_products(x, y, position), x, y, position)


@ALL_SIZES
@ALL_DTYPES
@pytest.mark.parametrize("width", [24, 130])
def test_gradients_of_rows_and_of_scores_come_together(size: tuple[int, ...], dtype: torch.dtype, width: int) -> None:
    """Of permute: those of tokens and scores for y as the gradient of rows; of unpermute the other way round."""
    x, y, scores, position, source = inputs(size, dtype, width)
    of_x, of_scores = permute_backward(y, x, position, scores)
    assert torch.equal(of_x, unpermute(y, position, scores))
    check_products(of_scores, x, y, position)
    of_y, of_scores = unpermute_backward(x, y, position, source, scores)
    assert torch.equal(of_y, permute(x, source, scores, size[1]))
    check_products(of_scores, x, y, position)


def test_rows_longer_than_a_kernels_block_come_whole() -> None:
    x, y, scores, position, source = inputs((5, 2, 3, 8), torch.float32, 8200)
    check_products(permute_backward(y, x, position, scores)[1], x, y, position)
    check_products(unpermute_backward(x, y, position, source, scores)[1], x, y, position)
    back = unpermute(permute(x, source, None, 2), position, None)
    assert torch.equal(back, 2 * x)


@ALL_SIZES
def test_there_and_back_each_token_comes_once_for_each_choice(size: tuple[int, ...]) -> None:
    x, _, _, position, source = inputs(size, torch.float32)
    back = unpermute(permute(x, source, None, size[1]), position, None)
    torch.testing.assert_close(back, size[1] * x, rtol=2**-21, atol=0)


@pytest.mark.parametrize("width", [1, 7, 8, 130])
@WITH_SCORES
def test_unpermute_is_the_gradient_of_permute_at_any_width(width: int, with_scores: bool) -> None:
    """`<permute(x), y> = <x, unpermute(y)>`, and its derivatives by scores are the row products."""
    x, y, scores, position, source = inputs((63, 3, 7, 8), torch.float32, width)
    y = torch.where((source >= 0).unsqueeze(-1), y, 0.0)
    given_scores = scores if with_scores else None
    there = (permute(x, source, given_scores, 3).double() * y.double()).sum()
    back = (x.double() * unpermute(y, position, given_scores).double()).sum()
    by_scores = row_products(x, y, position).double() * (scores.double() if with_scores else 1.0)
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there, by_scores.sum(), rtol=1e-5, atol=1e-5)


@ALL_DTYPES
@pytest.mark.parametrize("token", [0, 17])  # the first one is what rows without a token are next to
def test_nan_of_a_token_reaches_its_own_rows_alone(dtype: torch.dtype, token: int) -> None:
    x, y, scores, position, source = inputs((63, 2, 5, 8), dtype)
    x[token, 3] = torch.nan
    rows = permute(x, source, scores, 2)
    assert rows.isnan().nonzero().tolist() == [[row, 3] for row in sorted(position[token].tolist())]
    y = torch.where((source >= 0).unsqueeze(-1), y, 0.0)
    y[position[token, 1].long(), 3] = torch.nan
    assert unpermute(y, position, scores).isnan().nonzero().tolist() == [[token, 3]]


def test_strides_change_nothing() -> None:
    """Gradients come as they are: of a sum, one number with strides of zero."""
    _, y, *others = inputs((63, 3, 7, 8), torch.float32)
    scores, position, source = (each.to(DEVICE) for each in others)
    y = torch.where((source >= 0).unsqueeze(-1), y.to(DEVICE), 0.0)
    wide = torch.randn(63, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    one = torch.ones((), device=DEVICE)
    for x in (wide[:, ::2], wide.t().contiguous().t()[:, :24], one.expand(63, 24)):
        dense = x.contiguous()
        assert torch.equal(moe.permute(x, source, scores, 3), moe.permute(dense, source, scores, 3))
        products = moe.unpermute_backward(x, y, position, source, scores)[1]
        assert torch.equal(products, moe.unpermute_backward(dense, y, position, source, scores)[1])
    for rows in (y.t().contiguous().t(), one.expand(y.shape)):
        assert torch.equal(moe.unpermute(rows, position, scores), moe.unpermute(rows.contiguous(), position, scores))
