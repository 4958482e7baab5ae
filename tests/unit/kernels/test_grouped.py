"""Casts of rows that are sorted into groups: each group is cast as if it were alone, bit for bit.

The functions are taken from `titan_fp8.kernels.grouped` and run on a GPU where there is one, so whatever computes them
there is what is tested; what they must equal are the plain casts of each group's rows by themselves.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from titan_fp8.kernels import grouped, moe
from titan_fp8.kernels.float8 import E4M3, E5M2
from titan_fp8.kernels.float8 import reference as float8
from titan_fp8.kernels.producers import reference as producers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN_CODE = 0x7F
K = 40
"""Columns; only rows come in multiples of 16."""
GROUPS = {
    "even": ([32, 32, 32], 96),
    "one has all rows": ([0, 96, 0], 96),
    "one group": ([48], 48),
    "empty first, between and last": ([0, 16, 0, 0, 64, 0], 80),
    "rows behind the last": ([16, 0, 48], 112),
    "no rows in any group": ([0, 0], 32),
    "no rows": ([0, 0, 0], 0),
    "many": ([16 * (number % 4) for number in range(40)], 1000 // 16 * 16),
}
"""Rows of each group, and all rows."""
ALL_GROUPS = pytest.mark.parametrize("name", GROUPS)
DTYPES = pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float32])


@pytest.fixture(autouse=True, scope="module")
def _unwritten_results_show() -> Iterator[None]:
    """Memory is NaN before something is written there, codes too."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(sizes)), dtype=torch.int32)


def rows_of(ends: Tensor) -> list[slice]:
    return [slice(begin, end) for begin, end in pairwise([0, *ends.tolist()])]


def values(rows: int, columns: int = K, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Of another magnitude in every row and column, so that no two groups would have the same scales; with a column of
    zeros, one of the least numbers, and largest values on both sides of where a scale steps."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.randn(rows, 1, generator=generator).mul(2).exp()
    x *= torch.linspace(-6, 6, columns).exp2()
    x[:, 1], x[:, 2] = 0.0, x[:, 2].sign() * torch.finfo(dtype).tiny
    x[::2, 3], x[::3, 4] = 1.75 * 64, 1.7578125 * 64
    return x.to(dtype)


def on_device(function: Callable[..., Any], *arguments: Any) -> list[Tensor]:
    """The tensors that `function` returns for arguments on the device, back on the CPU."""
    moved = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]
    return [result.cpu() for result in tree_leaves(function(*moved))]


def bits(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def assert_codes(result: Tensor, expected: Tensor, name: str = "") -> None:
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape), name
    assert result.is_contiguous(), name
    assert torch.equal(bits(result), bits(expected)), name


def assert_scales(result: Tensor, expected: Tensor, name: str = "") -> None:
    assert result.dtype == torch.float32, name
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True, msg=name or None)


def assert_rows(codes: Tensor, scale: Tensor, x: Tensor, ends: Tensor, of: str = "") -> None:
    """The plain cast, as far as the last group goes."""
    assert (codes.shape, scale.shape) == (x.shape, (x.shape[0], 1))
    expected, expected_scale = float8.cast_rows(x, E4M3)
    here = int(ends[-1])
    assert_codes(codes[:here], expected[:here], f"rows{of}")
    assert_scales(scale[:here], expected_scale[:here], f"scales{of}")


def assert_columns(codes_t: Tensor, scale_t: Tensor, x: Tensor, ends: Tensor, dtype: torch.dtype) -> None:
    """Each group as its rows by themselves, and nothing behind them."""
    rows = x.shape[0]
    assert (codes_t.dtype, codes_t.shape, scale_t.shape) == (dtype, (x.shape[1], rows), (len(ends), x.shape[1]))
    assert codes_t.is_contiguous()
    for group, its_rows in enumerate(rows_of(ends)):
        codes, scale = float8.cast_columns(x[its_rows], dtype)
        assert torch.equal(bits(codes_t[:, its_rows].contiguous()), bits(codes)), f"codes of group {group}"
        assert_scales(scale_t[group], scale.view(-1), f"scales of group {group}")
    assert not bits(codes_t)[:, int(ends[-1]) :].any()


TOKENS = {
    "one choice": (50, 1, 4),
    "several choices": (33, 3, 8),
    "experts without tokens": (3, 2, 32),
    "no tokens": (0, 2, 4),
}
"""T, k, E."""


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scores"])
@pytest.mark.parametrize("name", TOKENS)
@DTYPES
def test_tokens_cast_on_their_way_are_the_cast_of_the_rows_they_become(
    name: str, scaled: bool, input_dtype: torch.dtype
) -> None:
    tokens, top_k, experts = TOKENS[name]
    generator = torch.Generator().manual_seed(1)
    choices = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    _, ends, _, source = moe.plan(choices, experts, grouped.ALIGNMENT)
    x = values(tokens, K + 8, dtype=input_dtype)[:, :K]
    scores = torch.rand(tokens, top_k, generator=generator) * 3 if scaled else None
    result = on_device(grouped.gather, x, source, scores, top_k, ends, E4M3)
    rows = moe.permute(x, source, scores, top_k)
    expected = (*float8.cast_rows(rows, E4M3), *grouped.reference.cast_columns(rows, ends, E4M3))
    here = int(ends[-1])
    for number, (mine, theirs) in enumerate(zip(result, expected, strict=True)):
        assert mine.shape == theirs.shape
        mine, theirs = (each[:here] if number < 2 else each for each in (mine, theirs))
        (assert_scales if number % 2 else assert_codes)(mine.contiguous(), theirs.contiguous(), str(number))


@ALL_GROUPS
@DTYPES
def test_columns_of_a_group_are_the_plain_cast_of_its_rows(name: str, input_dtype: torch.dtype) -> None:
    sizes, rows = GROUPS[name]
    x, ends = values(rows, dtype=input_dtype), ends_of(sizes)
    assert_columns(*on_device(grouped.cast_columns, x, ends, E4M3), x, ends, E4M3)


@pytest.mark.parametrize("columns", [1, 8, 63, 130])
def test_any_number_of_columns(columns: int) -> None:
    x, ends = values(112, 130)[:, :columns], ends_of([48, 0, 32])
    assert_columns(*on_device(grouped.cast_columns, x, ends, E4M3), x, ends, E4M3)


def test_groups_differ_in_their_scales() -> None:
    """What makes the comparisons above more than one with a cast of the whole."""
    x, ends = values(96), ends_of([32, 32, 32])
    _, scale_t = on_device(grouped.cast_columns, x, ends, E4M3)
    _, whole = float8.cast_columns(x, E4M3)
    assert (scale_t != whole.view(1, -1)).any(1).all()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -3e38, 1.0])
def test_rows_behind_the_last_group_have_codes_of_zero_whatever_is_in_them(garbage: float) -> None:
    x, ends = values(112), ends_of([16, 0, 48])
    codes_t, scale_t = on_device(grouped.cast_columns, x, ends, E4M3)
    x[64:] = garbage
    assert_columns(*on_device(grouped.cast_columns, x, ends, E4M3), x, ends, E4M3)
    again = on_device(grouped.cast_both, x, ends, E4M3)[2:]
    assert_codes(again[0], codes_t)
    assert_scales(again[1], scale_t)


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_in_their_group_and_column(bad: float, input_dtype: torch.dtype) -> None:
    x, ends = values(112, dtype=input_dtype), ends_of([32, 16, 0, 48])
    codes_t, scale_t = on_device(grouped.cast_columns, x, ends, E4M3)
    poisoned = x.clone()
    poisoned[5, 7], poisoned[95, 0] = bad, bad
    bits(codes_t)[7, :32], bits(codes_t)[0, 48:96] = NAN_CODE, NAN_CODE
    scale_t[0, 7], scale_t[3, 0] = torch.nan, torch.nan
    result = on_device(grouped.cast_columns, poisoned, ends, E4M3)
    assert_codes(result[0], codes_t)
    assert_scales(result[1], scale_t)


@ALL_GROUPS
def test_both_layouts_are_the_two_casts(name: str) -> None:
    sizes, rows = GROUPS[name]
    x, ends = values(rows), ends_of(sizes)
    codes, scale, codes_t, scale_t = on_device(grouped.cast_both, x, ends, E4M3)
    assert_rows(codes, scale, x, ends)
    assert_columns(codes_t, scale_t, x, ends, E4M3)


@DTYPES
def test_strides_of_the_input_do_not_matter(input_dtype: torch.dtype) -> None:
    base, ends = values(192, 96, dtype=input_dtype), ends_of([48, 0, 32])
    for x in (base.t(), base[::2, ::3], base[:1].expand(96, 96)):
        results = on_device(grouped.cast_both, x, ends, E4M3)
        for result, expected in zip(results, on_device(grouped.cast_both, x.contiguous(), ends, E4M3), strict=True):
            assert result.is_contiguous()
            assert torch.equal(result.float(), expected.float())


@DTYPES
@pytest.mark.parametrize("rows", [0, 16, 112])
def test_rows_of_swiglu_are_the_plain_cast_of_its_output(rows: int, input_dtype: torch.dtype) -> None:
    gate, up = (values(rows, seed=seed, dtype=input_dtype) for seed in (1, 2))
    codes, scale = on_device(grouped.swiglu_rows, gate, up, E4M3)
    expected, expected_scale = float8.cast_rows(*on_device(producers.swiglu_output, gate, up), E4M3)
    assert_codes(codes, expected)
    assert_scales(scale, expected_scale)


@ALL_GROUPS
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32])
def test_the_backward_of_swiglu_gives_the_plain_casts_of_gradients_and_output(
    name: str, input_dtype: torch.dtype
) -> None:
    sizes, rows = GROUPS[name]
    ends = ends_of(sizes)
    grad, gate, up = (values(rows, seed=seed, dtype=input_dtype) for seed in range(3))
    results = on_device(grouped.swiglu_backward, grad, gate, up, ends, E4M3)
    assert len(results) == 10
    for number, gradient in enumerate(on_device(producers.swiglu_gradients, grad, gate, up)):
        codes, scale, codes_t, scale_t = results[4 * number : 4 * number + 4]
        assert_rows(codes, scale, gradient, ends, f" of gradient {number}")
        assert_columns(codes_t, scale_t, gradient, ends, E4M3)
    assert_columns(*results[8:], *on_device(producers.swiglu_output, gate, up), ends, E4M3)


def test_a_bad_row_in_the_backward_of_swiglu_spoils_its_own_group_alone() -> None:
    ends = ends_of([32, 32])
    grad, gate, up = (values(96, seed=seed) for seed in range(3))
    gate[3, 5], gate[70, 5] = torch.nan, torch.nan
    results = on_device(grouped.swiglu_backward, grad, gate, up, ends, E4M3)
    for codes_t, scale_t in (results[2:4], results[6:8], results[8:]):
        assert torch.equal(scale_t.isnan().nonzero(), torch.tensor([[0, 5]]))
        assert (bits(codes_t)[5, :32] == NAN_CODE).all()
        assert not codes_t[:, 32:].float().isnan().any()


EXPERTS = [(1, 16, 32), (3, 48, 16), (5, 32, 64)]


@pytest.mark.parametrize(("experts", "n", "k"), EXPERTS)
def test_columns_of_an_expert_are_made_from_its_row_codes(experts: int, n: int, k: int) -> None:
    codes, scale = float8.cast_rows(values(experts * n, k, dtype=torch.float32), E4M3)
    codes, scale = codes.view(experts, n, k), scale.view(experts, n)
    scale[-1, 3], bits(codes)[-1, 3] = torch.nan, NAN_CODE
    codes_t, scale_t = on_device(grouped.columns_of_experts, codes, scale)
    assert (codes_t.shape, scale_t.shape) == ((experts, k, n), (experts, k))
    for expert in range(experts):
        expected, expected_scale = float8.columns_from_rows(codes[expert], scale[expert].unsqueeze(1))
        assert_codes(codes_t[expert], expected, f"codes of expert {expert}")
        assert_scales(scale_t[expert], expected_scale.view(-1), f"scales of expert {expert}")
    assert torch.equal(scale_t.isnan().all(1), torch.arange(experts) == experts - 1)


def test_columns_of_experts_have_the_values_of_their_rows() -> None:
    """But for what becomes subnormal, which these weights have nothing of."""
    w = torch.rand(2, 48, 32, generator=torch.Generator().manual_seed(0)) + 1.0
    codes, scale = float8.cast_rows(w.view(96, 32), E4M3)
    codes_t, scale_t = on_device(grouped.columns_of_experts, codes.view(2, 48, 32), scale.view(2, 48))
    by_columns = codes_t.float() * scale_t.unsqueeze(2)
    assert torch.equal(by_columns.transpose(1, 2).reshape(96, 32), codes.float() * scale)


CAST = {"cast_columns": grouped.cast_columns, "cast_both": grouped.cast_both}
CAST["swiglu_backward"] = lambda x, ends, dtype: grouped.swiglu_backward(x, x, x, ends, dtype)
ENDS = torch.tensor([16, 32], dtype=torch.int32)


@pytest.mark.parametrize("function", CAST)
@pytest.mark.parametrize(
    ("x", "ends", "dtype", "message"),
    [
        (torch.ones(40, 8), ENDS, E4M3, r"multiple of 16.*\[40, 8\]"),
        (torch.ones(32, 8), ENDS.long(), E4M3, "int32 ends of their groups, got .*int64"),
        (torch.ones(32, 8), ENDS.view(1, 2), E4M3, r"int32 \[1, 2\]"),
        (torch.ones(32, 8), ENDS[:0], E4M3, r"int32 \[0\]"),
        (torch.ones(32), ENDS, E4M3, "2-D"),
        (torch.ones(32, 8, dtype=torch.float64), ENDS, E4M3, "float64"),
        (torch.ones(32, 8), ENDS, torch.float16, "float8_e4m3fn"),
        (torch.ones(32, 8), ENDS, E5M2, "codes of groups are in .*e4m3fn, not in .*e5m2"),
    ],
    ids=["rows", "dtype of ends", "2-D ends", "no groups", "1-D", "fp64", "no codes", "e5m2"],
)
def test_wrong_rows_and_groups_are_refused(
    function: str, x: Tensor, ends: Tensor, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CAST[function](x.to(DEVICE), ends.to(DEVICE), dtype)


@pytest.mark.parametrize(
    ("codes", "scale"),
    [
        (torch.ones(32, 16), torch.ones(32)),
        (torch.ones(2, 24, 16), torch.ones(2, 24)),
        (torch.ones(2, 16, 8), torch.ones(2, 16)),
        (torch.ones(2, 16, 32), torch.ones(2, 32)),
        (torch.ones(2, 16, 32), torch.ones(2, 16, 1)),
    ],
    ids=["one expert", "N", "K", "scale a column", "3-D scale"],
)
def test_wrong_weights_of_experts_are_refused(codes: Tensor, scale: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected codes \[E, N, K\], N and K multiples of 16, and scale \[E, N\]"):
        grouped.columns_of_experts(codes.to(E4M3).to(DEVICE), scale.to(DEVICE))


def test_weights_of_experts_in_e5m2_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes of groups are in .*e4m3fn, not in .*e5m2"):
        grouped.columns_of_experts(torch.ones(2, 16, 32).to(E5M2).to(DEVICE), torch.ones(2, 16).to(DEVICE))
