"""Experts in float8: each expert computes, in every product, what the plain casts of its own rows make of it."""

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.tolerances import GROUPED_SQNR_DB, sqnr_db
from tests.unit.quantization.test_ops import CountCalls
from titan_fp8.kernels import float8, grouped
from titan_fp8.kernels.float8 import E4M3
from titan_fp8.kernels.float8.reference import NAN_CODE
from titan_fp8.kernels.moe.functions import Rows, permute, plan, row_products, unpermute_backward
from titan_fp8.kernels.producers import reference as producers
from titan_fp8.quantization import grouped_gemm
from titan_fp8.quantization import grouped_ops as ops
from titan_fp8.quantization import ops as linear_ops
from titan_fp8.quantization.gemm import scaled_mm
from titan_fp8.quantization.grouped import Float8GroupedConfig, cast_experts, grouped_feed_forward

K, H = 64, 48
EMULATED = Float8GroupedConfig(emulate=True)
SIZES = {
    "even": [32, 32, 32],
    "one has all": [0, 96, 0],
    "empty first, between and last": [0, 16, 0, 64, 0],
    "one expert": [48],
}
"""Rows of each expert; in the tests there are 32 more behind them."""
LAYOUTS = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
BEHIND = 32


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(sizes)), dtype=torch.int32)


def groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert, those without rows too."""
    for expert, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        yield expert, slice(begin, end)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_of(experts: int, k: int = K, h: int = H) -> dict[str, Tensor]:
    """Of other magnitudes for each expert and row."""
    shapes = {"w1": (experts, h, k), "w3": (experts, h, k), "w2": (experts, k, h)}
    scales = {name: random(*shape[:2], 1, seed=9).exp() / 8 for name, shape in shapes.items()}
    return {name: random(*shape, seed=seed) * scales[name] for seed, (name, shape) in enumerate(shapes.items(), 3)}


def feed_forward(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, ends: Tensor, config: Float8GroupedConfig) -> Tensor:
    """Of weights that are cast for this pass."""
    weights = (w1, w3, w2)
    return grouped_feed_forward(x, weights, [cast_experts(weight) for weight in weights], ends, config)


def run(
    x: Tensor,
    weights: dict[str, Tensor],
    ends: Tensor,
    grad: Tensor,
    *,
    frozen: tuple[str, ...] = (),
    config: Float8GroupedConfig = EMULATED,
    call: Callable[..., Tensor] = feed_forward,
) -> dict[str, Tensor]:
    """The output and every gradient by name, None of what is frozen."""
    leaves = {name: t.detach().clone().requires_grad_(name not in frozen) for name, t in {"x": x, **weights}.items()}
    output = call(leaves["x"], leaves["w1"], leaves["w3"], leaves["w2"], ends, config)
    output.backward(grad)
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def inputs(sizes: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """x, weights, ends and the gradient of the output, with rows behind the last group."""
    rows = sum(sizes) + BEHIND
    x, grad = (random(rows, K, seed=seed, dtype=dtype) for seed in (1, 2))
    return x, weights_of(len(sizes)), ends_of(sizes), grad


def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """`a @ b.T` of (codes, scale a row) each, in `dtype`."""
    return scaled_mm(a[0], b[0], a[1], b[1], None, dtype, True, True)


def rows_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return float8.cast_rows(x, E4M3)


def columns_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return float8.cast_columns(x, E4M3)


def composed(x: Tensor, weights: dict[str, Tensor], ends: Tensor, grad: Tensor, padding: int = 0) -> dict[str, Tensor]:
    """What experts are to compute: one at a time, of the plain casts and products of the recipe `rowwise`. `padding`
    rows at the end of each group hold nothing."""
    dtype = x.dtype
    result = {"output": torch.zeros_like(x), "x": torch.zeros_like(x)}
    result |= {name: torch.zeros_like(w) for name, w in weights.items()}
    for expert, rows in groups(ends):
        rows = slice(rows.start, max(rows.start, rows.stop - padding))
        w1, w3, w2 = (rows_of(weights[name][expert]) for name in ("w1", "w3", "w2"))
        x_rows = rows_of(x[rows])
        gate, up = product(x_rows, w1, dtype), product(x_rows, w3, dtype)
        hidden = producers.swiglu_output(gate, up)
        result["output"][rows] = product(rows_of(hidden), w2, dtype)

        w1_t, w3_t, w2_t = (float8.columns_from_rows(*w) for w in (w1, w3, w2))
        grad_hidden = product(rows_of(grad[rows]), w2_t, dtype)
        grad_gate, grad_up = producers.swiglu_gradients(grad_hidden, gate, up)
        result["x"][rows] = product(rows_of(grad_gate), w1_t, dtype) + product(rows_of(grad_up), w3_t, dtype)
        for name, left, right in (("w1", grad_gate, x[rows]), ("w3", grad_up, x[rows]), ("w2", grad[rows], hidden)):
            result[name][expert] = product(columns_of(left), columns_of(right), dtype)  # rounded as activations are
    return result


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], ends: Tensor, least_db: float = torch.inf):
    """By name, for the rows of groups: bit for bit, or to a ratio in dB."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        result = actual[name]
        assert (result.dtype, result.shape) == (value.dtype, value.shape), name
        if name in ("output", "x"):
            result, value = result[: ends[-1]], value[: ends[-1]]
        if not torch.equal(result, value):
            assert sqnr_db(value, result) >= least_db, f"{name}: {sqnr_db(value, result):.1f} dB"


# ---- the products


def codes(*shape: int, seed: int) -> Tensor:
    return (random(*shape, seed=seed) * 40).to(E4M3)


def scales(*shape: int, seed: int) -> Tensor:
    """Powers of two, as scales by rows are, far apart."""
    return random(*shape, seed=seed).mul(3).round().exp2()


@LAYOUTS
def test_the_emulated_product_by_rows_is_exact_to_fp32_for_each_expert(sizes: list[int]) -> None:
    ends, rows, experts = ends_of(sizes), sum(sizes) + BEHIND, len(sizes)
    a, b = codes(rows, K, seed=1), codes(experts, H, K, seed=2)
    scale_a, scale_b = scales(rows, 1, seed=3), scales(experts, H, seed=4)
    result = ops.grouped_mm_rows(a, b, scale_a, scale_b, ends, torch.float32, True, True)
    assert result.shape == (rows, H)
    for expert, its_rows in groups(ends):
        if its_rows.start < its_rows.stop:
            exact = (a[its_rows].double() * scale_a[its_rows]) @ (b[expert].double() * scale_b[expert, :, None]).t()
            assert sqnr_db(exact, result[its_rows]) > 120, f"expert {expert}"
    rounded = ops.grouped_mm_rows(a, b, scale_a, scale_b, ends, torch.bfloat16, True, True)
    assert torch.equal(rounded[: ends[-1]], result[: ends[-1]].bfloat16())


@LAYOUTS
def test_the_emulated_product_by_columns_is_exact_to_fp32_for_each_expert(sizes: list[int]) -> None:
    ends, rows, experts = ends_of(sizes), sum(sizes) + BEHIND, len(sizes)
    a, b = codes(H, rows, seed=1), codes(K, rows, seed=2)
    scale_a, scale_b = scales(experts, H, seed=3), scales(experts, K, seed=4)
    result = ops.grouped_mm_columns(a, b, scale_a, scale_b, ends, torch.float32, True)
    assert result.shape == (experts, H, K)
    for expert, its_rows in groups(ends):
        left, right = a[:, its_rows].double(), b[:, its_rows].double()
        exact = (left * scale_a[expert, :, None]) @ (right * scale_b[expert, :, None]).t()
        assert torch.equal(exact, result[expert].double()) or sqnr_db(exact, result[expert]) > 120, f"expert {expert}"
        assert (its_rows.start < its_rows.stop) == bool(result[expert].any()), "no rows, no gradient"
    rounded = ops.grouped_mm_columns(a, b, scale_a, scale_b, ends, torch.bfloat16, True)
    assert torch.equal(rounded, result.bfloat16())


def test_emulated_products_of_extreme_scales_are_numbers_where_the_result_is_one() -> None:
    ends, large, small = ends_of([32, 16]), 2.0**118, 2.0**-50
    a, b = codes(48, K, seed=1), codes(2, H, K, seed=2)
    a_t, b_t = codes(H, 48, seed=3), codes(K, 48, seed=4)

    def products(of_a: float, of_b: float) -> tuple[Tensor, Tensor]:
        filled = [torch.full(shape, scale) for scale in (of_a, of_b) for shape in ((48, 1), (2, H), (2, K))]
        a_rows, a_columns, _, _, b_rows, b_columns = filled
        return (
            ops.grouped_mm_rows(a, b, a_rows, b_rows, ends, torch.float32, True, True),
            ops.grouped_mm_columns(a_t, b_t, a_columns, b_columns, ends, torch.float32, True),
        )

    expected = products(large * small, 1.0)
    for scales_of_both in ((large, small), (small, large)):
        for result, value in zip(products(*scales_of_both), expected, strict=True):
            assert torch.equal(result, value)


def test_emulated_products_ignore_autocast_and_reduced_precision_modes() -> None:
    ends = ends_of([32, 16])
    by_rows = (codes(48, 512, seed=1), codes(2, H, 512, seed=2), scales(48, 1, seed=3), scales(2, H, seed=4), ends)
    by_columns = (codes(H, 48, seed=1), codes(K, 48, seed=2), scales(2, H, seed=3), scales(2, K, seed=4), ends)

    def products() -> tuple[Tensor, Tensor]:
        return (
            ops.grouped_mm_rows(*by_rows, torch.float32, True, True),
            ops.grouped_mm_columns(*by_columns, torch.float32, True),
        )

    expected = products()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = products()
    finally:
        torch.set_float32_matmul_precision(before)
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


def test_nan_in_a_code_or_a_scale_reaches_the_results_of_its_expert_alone() -> None:
    ends = ends_of([16, 16])
    a, b = codes(32, K, seed=1), codes(2, H, K, seed=2)
    a.view(torch.uint8)[3, 5] = NAN_CODE
    scale_b = torch.ones(2, H)
    scale_b[1, 7] = torch.nan
    is_nan = ops.grouped_mm_rows(a, b, torch.ones(32, 1), scale_b, ends, torch.bfloat16, True, True).isnan()
    expected = torch.zeros(32, H, dtype=torch.bool)
    expected[3], expected[16:, 7] = True, True
    assert torch.equal(is_nan, expected)
    a_t, b_t = codes(H, 32, seed=1), codes(K, 32, seed=2)
    b_t.view(torch.uint8)[5, 20] = NAN_CODE
    is_nan = ops.grouped_mm_columns(a_t, b_t, torch.ones(2, H), torch.ones(2, K), ends, torch.bfloat16, True).isnan()
    expected = torch.zeros(2, H, K, dtype=torch.bool)
    expected[1, :, 5] = True
    assert torch.equal(is_nan, expected)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_native_operands_are_what_torch_checks_for(
    experts: int, out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fake tensors of a GPU torch checks shapes and strides of codes and scales as on a real one."""
    monkeypatch.setattr(grouped, "multiplies", lambda x: False)  # nor do kernels of our own take fake tensors

    def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    with FakeTensorMode():
        ends = fake(experts, dtype=torch.int32)
        a, b = fake(64, K, dtype=E4M3), fake(experts, H, K, dtype=E4M3)
        result = ops.grouped_mm_rows(a, b, fake(64, 1), fake(experts, H), ends, out_dtype, True, False)
        real = grouped_gemm.grouped_mm_rows(a, b, fake(64, 1), fake(experts, H), ends, out_dtype, True, False)
        assert (real.shape, real.dtype, real.stride()) == (result.shape, result.dtype, result.stride())
        a, b = fake(H, 64, dtype=E4M3), fake(K, 64, dtype=E4M3)
        scales_of_both = fake(experts, H), fake(experts, K)
        result = ops.grouped_mm_columns(a, b, *scales_of_both, ends, out_dtype, False)
        real = grouped_gemm.grouped_mm_columns(a, b, *scales_of_both, ends, out_dtype, False)
        assert (real.shape, real.dtype, real.stride()) == (result.shape, result.dtype, result.stride())


# ---- the operators

ENDS = ends_of([16, 0, 32])
X, NO_ROWS = random(64, K, seed=0), torch.empty(0, K)
CODES_OF_EXPERTS, SCALE_OF_EXPERTS = ops.cast_experts(random(3, H, K, seed=1), E4M3)
CODES_T, SCALE_T = ops.cast_group_columns(X, ENDS, E4M3)
CALLS = [
    (ops.checked_ends, (ENDS, 64, "experts")),
    (ops.cast_experts, (random(3, K, H, seed=1).transpose(1, 2), E4M3)),
    (ops.cast_group_both, (X, ENDS, E4M3)),
    (ops.cast_group_both, (X.bfloat16(), ENDS, E4M3)),
    (ops.cast_group_both, (NO_ROWS, ENDS * 0, E4M3)),
    (ops.cast_group_columns, (X, ENDS, E4M3)),
    (ops.gather_group_both, (X, torch.arange(48, dtype=torch.int32), random(24, 2, seed=2), 2, ENDS, E4M3)),
    (ops.gather_group_both, (X.bfloat16(), torch.arange(48, dtype=torch.int32), None, 1, ENDS, E4M3)),
    (ops.cast_experts, (random(3, H, K, seed=1), E4M3)),
    (ops.columns_of_experts, (CODES_OF_EXPERTS, SCALE_OF_EXPERTS)),
    (ops.columns_of_experts, (CODES_OF_EXPERTS, SCALE_OF_EXPERTS, X)),
    (ops.swiglu_group_rows, (X, X, E4M3)),
    (ops.swiglu_group_backward, (X, X, X, ENDS, E4M3)),
    (ops.swiglu_group_backward, (X.bfloat16(), X.bfloat16(), X.bfloat16(), ENDS, E4M3)),
    (
        ops.grouped_mm_rows,
        (X.to(E4M3), CODES_OF_EXPERTS, X[:, :1].contiguous(), SCALE_OF_EXPERTS, ENDS, torch.bfloat16, True, True),
    ),
    (ops.grouped_mm_columns, (CODES_T, CODES_T, SCALE_T, SCALE_T, ENDS, torch.float32, True)),
]
ALL_CALLS = pytest.mark.parametrize(("op", "arguments"), CALLS, ids=[str(op) for op, _ in CALLS])


@ALL_CALLS
def test_fake_implementation_and_schema_agree_with_the_operator(op: Any, arguments: tuple) -> None:
    # The schema check does arithmetic on its inputs, which float8 tensors do not have.
    takes_codes = any(isinstance(a, Tensor) and a.dtype == E4M3 for a in arguments)
    utils = ("test_faketensor",) if takes_codes else ("test_schema", "test_faketensor")
    torch.library.opcheck(op, arguments, test_utils=utils)


@ALL_CALLS
def test_strides_of_fake_and_real_results_agree(op: Any, arguments: tuple) -> None:
    def strides(results: Tensor | tuple[Tensor, ...]) -> list:
        results = (results,) if isinstance(results, Tensor) else results
        return [(r.shape, r.stride(), r.dtype) for r in results]

    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)
    assert strides(op(*arguments)) == strides(op(*meta))


# ---- the feed-forward


@LAYOUTS
@DTYPES
def test_output_and_every_gradient_are_those_of_the_plain_casts_of_each_expert(
    sizes: list[int], dtype: torch.dtype
) -> None:
    case = inputs(sizes, dtype)
    assert_same(run(*case), composed(*case), case[2])


def test_the_parts_of_the_composition_matter() -> None:
    """What makes the comparison above more than one of two numbers that are both near the exact ones."""
    x, weights, ends, grad = inputs(SIZES["even"], torch.bfloat16)
    result = run(x, weights, ends, grad)
    apart = run(x.float(), weights, ends, grad.float())
    for name, value in apart.items():
        value = value.to(result[name].dtype)
        assert 20 < sqnr_db(value[: ends[-1]], result[name][: ends[-1]]) < 60, f"{name} is rounded to bf16 on its way"


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distribution", GROUPED_SQNR_DB)
def test_output_and_every_gradient_are_as_exact_as_the_recipe_allows(
    distribution: str, input_dtype: torch.dtype
) -> None:
    sizes, k, h = [48, 0, 64, 80], 256, 128
    torch.manual_seed(1)
    x, grad = (torch.randn(sum(sizes), k).to(input_dtype) for _ in range(2))
    shapes = {"w1": (4, h, k), "w3": (4, h, k), "w2": (4, k, h)}
    weights = {
        name: torch.randn(shape) if distribution == "normal" else torch.empty(shape).uniform_(-(2.0**-6), 2.0**-6)
        for name, shape in shapes.items()
    }
    ends = ends_of(sizes)
    result = run(x, weights, ends, grad)

    def exact(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, ends: Tensor, config: Float8GroupedConfig) -> Tensor:
        parts = [(F.silu(x[rows] @ w1[e].t()) * (x[rows] @ w3[e].t())) @ w2[e].t() for e, rows in groups(ends)]
        return torch.cat(parts)

    expected = run(x.double(), {n: w.double() for n, w in weights.items()}, ends, grad.double(), call=exact)
    minimum = GROUPED_SQNR_DB[distribution]
    for name, value in expected.items():
        assert sqnr_db(value, result[name]) > getattr(minimum, name), name
    assert result["output"].dtype == result["x"].dtype == input_dtype
    assert {result[name].dtype for name in weights} == {torch.float32}


@DTYPES
@pytest.mark.parametrize("garbage", [1e4, torch.nan])
def test_rows_behind_the_last_group_influence_nothing(garbage: float, dtype: torch.dtype) -> None:
    x, weights, ends, grad = inputs(SIZES["empty first, between and last"], dtype)
    expected = run(x, weights, ends, grad)
    x[ends[-1] :], grad[ends[-1] :] = garbage, -garbage
    assert_same(run(x, weights, ends, grad), expected, ends)


PADDED_DB = 100.0
"""The order of a sum in fp32 may depend on the number of rows beside it. Here nothing is rounded to bf16, and no code
is at the brink of another."""


@pytest.mark.parametrize("padding", [1, 9, 15])
def test_rows_that_hold_nothing_influence_nothing(padding: int) -> None:
    sizes = [32, 16, 0, 48]
    x, weights, ends, grad = inputs(sizes)
    for _, rows in groups(ends):
        if rows.start < rows.stop:
            x[rows.stop - padding : rows.stop] = grad[rows.stop - padding : rows.stop] = 0.0
    result, expected = run(x, weights, ends, grad), composed(x, weights, ends, grad, padding)
    assert_same(result, expected, ends, PADDED_DB)
    for _, rows in groups(ends):
        for name in ("output", "x"):
            assert not result[name][rows][-padding:].any(), "and nothing comes of them"


def test_experts_without_rows_get_gradients_of_zero() -> None:
    x, weights, ends, grad = inputs([0, 48, 0])
    result = run(x, weights, ends, grad)
    for name in weights:
        assert torch.equal(result[name].flatten(1).any(1), torch.tensor([False, True, False])), name


@pytest.mark.parametrize("rows", [0, 32])
def test_no_tokens_at_all_give_gradients_of_zero(rows: int) -> None:
    x, weights, ends, grad = torch.zeros(rows, K), weights_of(3), ends_of([0, 0, 0]), torch.zeros(rows, K)
    result = run(x, weights, ends, grad)
    assert result["output"].shape == result["x"].shape == (rows, K)
    assert not any(result[name].any() for name in weights)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_are_seen_in_what_they_are_part_of_and_in_no_other_expert(bad: float) -> None:
    x, weights, ends, grad = inputs([32, 16, 32])
    expected = run(x, weights, ends, grad)
    poisoned = x.clone()
    poisoned[40, 5] = bad
    result = run(poisoned, weights, ends, grad)
    assert not result["output"][40].isfinite().any()
    assert not result["w1"][1, :, 5].isfinite().any()
    assert not result["w3"][1, :, 5].isfinite().any()
    others = torch.tensor([0, 2])
    assert_same({n: result[n][others] for n in weights}, {n: expected[n][others] for n in weights}, ends)
    is_finite = result["output"][: ends[-1]].isfinite().all(1)
    assert is_finite.logical_not().nonzero().tolist() == [[40]]

    weights["w2"][2, 7, 3] = bad
    result = run(x, weights, ends, grad)
    assert not result["output"][48:80, 7].isfinite().any()
    assert result["output"][:48].isfinite().all()
    assert result["x"][:48].isfinite().all()


@pytest.mark.parametrize(
    ("frozen", "casts_x_by_columns", "products_by_columns", "products_by_rows"),
    [
        ((), True, 3, 6),
        (("w1",), True, 2, 6),
        (("w1", "w3"), False, 1, 6),
        (("w2",), True, 2, 6),
        (("w1", "w2", "w3"), False, 0, 6),
        (("x",), True, 3, 4),
    ],
    ids=lambda value: "+".join(value) or "nothing" if isinstance(value, tuple) else None,
)
def test_what_is_frozen_gets_no_gradient_and_costs_no_columns_and_no_product(
    frozen: tuple[str, ...], casts_x_by_columns: bool, products_by_columns: int, products_by_rows: int
) -> None:
    x, weights, ends, grad = inputs(SIZES["even"])
    expected = run(x, weights, ends, grad)
    leaves = {name: t.clone().requires_grad_(name not in frozen) for name, t in {"x": x, **weights}.items()}
    with CountCalls() as forward:
        output = feed_forward(leaves["x"], leaves["w1"], leaves["w3"], leaves["w2"], ends, EMULATED)
    with CountCalls() as backward:
        output.backward(grad)
    assert forward.calls[ops.cast_group_both] == casts_x_by_columns
    assert forward.calls[linear_ops.cast_rows] == (not casts_x_by_columns)
    assert forward.calls[ops.grouped_mm_rows] == 3
    assert forward.calls[ops.grouped_mm_rows] + backward.calls[ops.grouped_mm_rows] == products_by_rows
    assert backward.calls[ops.grouped_mm_columns] == products_by_columns
    result = {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}
    assert_same(result, {name: value for name, value in expected.items() if name not in frozen}, ends)


def test_without_gradients_nothing_is_cast_by_columns() -> None:
    x, weights, ends, grad = inputs(SIZES["even"])
    trained = {name: w.requires_grad_() for name, w in weights.items()}
    with torch.no_grad(), CountCalls() as counter:
        output = feed_forward(x, *(trained[name] for name in ("w1", "w3", "w2")), ends, EMULATED)
    assert set(counter.calls) == {
        linear_ops.cast_rows, ops.cast_experts, ops.grouped_mm_rows, ops.swiglu_group_rows
    }  # fmt: skip
    assert torch.equal(output, run(x, weights, ends, grad)["output"])


def test_codes_of_the_rows_are_saved_for_backward_and_not_the_rows() -> None:
    x, weights, ends, _ = inputs(SIZES["even"], torch.bfloat16)
    leaves = [weights[name].requires_grad_() for name in ("w1", "w3", "w2")]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        feed_forward(x.requires_grad_(), *leaves, ends, EMULATED)
    rows, wide = x.shape[0], [t.shape for t in saved if t.element_size() == 2]
    assert sorted(t.numel() for t in saved if t.element_size() == 1) == sorted([rows * K, *3 * [3 * H * K]])
    assert wide == [(rows, H), (rows, H)], "gate and up"
    assert sum(t.numel() for t in saved if t.element_size() == 4) == 3 * (K + 2 * H + K) + len(ends)


@pytest.mark.parametrize("fast", [False, True])
def test_outputs_accumulate_fast_and_gradients_of_activations_as_asked(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    by_rows = ops.grouped_mm_rows

    def record(*arguments: Any) -> Tensor:
        calls.append(arguments[6])
        return by_rows(*arguments)

    monkeypatch.setattr(ops, "grouped_mm_rows", record)
    run(*inputs(SIZES["even"]), config=Float8GroupedConfig(emulate=True, fast_accum_in_backward=fast))
    assert calls == [True, True, True, fast, fast, fast]


def test_strides_of_rows_and_gradient_do_not_matter() -> None:
    x, weights, ends, grad = inputs(SIZES["even"])
    expected = run(x, weights, ends, grad)
    wide_x, wide_grad = x.repeat_interleave(2, 1), grad.t().contiguous().t()
    result = run(x, weights, ends, wide_grad, call=lambda x, *rest: feed_forward(wide_x[:, ::2] + 0 * x, *rest))
    assert_same(result, expected | {"x": result["x"]}, ends)

    def transposed(x: Tensor, *rest: Any) -> Tensor:
        return feed_forward(x.t().contiguous().t(), *rest)

    assert_same(run(x, weights, ends, wide_grad, call=transposed), expected, ends)


def _of_tokens(
    dtype: torch.dtype, *, as_rows: bool, frozen: tuple[str, ...], scores: Tensor | None, factors: Tensor | None
) -> dict[str, Tensor | None]:
    """The output of tokens with two choices of four experts each, and all gradients by name."""
    choices = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)).topk(2).indices
    _, ends, position, source = plan(choices, 4, 16)
    of_choices = {"scores": scores, "factors": factors}
    leaves = {"x": random(40, K, seed=1, dtype=dtype), **weights_of(4)}
    leaves |= {name: each for name, each in of_choices.items() if each is not None}
    leaves = {name: leaf.clone().requires_grad_(name not in frozen) for name, leaf in leaves.items()}
    rows = Rows(leaves["x"], leaves.get("scores"), position, source, leaves.get("factors"))
    weights = [leaves[name] for name in ("w1", "w3", "w2")]
    codes = [cast_experts(weight) for weight in weights]
    output = grouped_feed_forward(rows if as_rows else rows.make(), weights, codes, ends, EMULATED)
    output = output if as_rows else rows.bring_back(output)
    output.backward(random(*output.shape, seed=3, dtype=dtype))
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


FROZEN = {
    "nothing": (), "tokens": ("x",), "tokens and factors": ("x", "factors"), "w1 and w3": ("w1", "w3"),
    "all but scores and factors": ("x", "w1", "w2", "w3"),
}  # fmt: skip


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("scaled", [(), ("scores",), ("factors",), ("scores", "factors")], ids="+".join)
@DTYPES
def test_tokens_and_gradients_cast_on_their_way_give_what_their_rows_do(
    dtype: torch.dtype, scaled: tuple[str, ...], frozen: str
) -> None:
    each: dict[str, Any] = {"scores": None, "factors": None}
    each |= {name: random(40, 2, seed=seed).abs() for seed, name in enumerate(scaled, 4)}
    if not scaled and frozen == "all but scores and factors":
        return
    made, fused = (_of_tokens(dtype, as_rows=as_rows, frozen=FROZEN[frozen], **each) for as_rows in (False, True))
    assert made.keys() == fused.keys()
    for name, theirs in made.items():
        mine = fused[name]
        assert (mine is None) == (theirs is None) == (name in FROZEN[frozen]), name
        assert mine is None or torch.equal(mine, theirs), name


def test_rows_of_tokens_exist_in_high_precision_neither_forward_nor_backward() -> None:
    each = {"scores": None, "factors": random(40, 2, seed=4)}
    for as_rows in (True, False):
        with CountCalls() as counter:
            _of_tokens(torch.bfloat16, as_rows=as_rows, frozen=(), **each)
        calls = counter.calls
        assert (calls[permute], calls[unpermute_backward]) == ((0, 0) if as_rows else (1, 1))
        assert (calls[ops.gather_group_both], calls[row_products]) == ((2, 1) if as_rows else (0, 0))
        assert calls[ops.cast_group_both] == (0 if as_rows else 2)


def test_the_output_of_tokens_is_saved_for_the_gradient_of_factors_alone() -> None:
    def wide(frozen: tuple[str, ...]) -> list[int]:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            _of_tokens(torch.bfloat16, as_rows=True, frozen=frozen, scores=None, factors=random(40, 2, seed=4))
        return [t.shape[1] for t in saved if t.dtype == torch.bfloat16]

    assert wide(("factors",)) == [H, H], "gate and up"
    assert wide(()) == [H, H, K]


@DTYPES
def test_compiled_equals_eager_bit_for_bit(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(feed_forward, backend="aot_eager", fullgraph=True)
    for frozen in ((), ("w1", "w3")):
        case = inputs(SIZES["empty first, between and last"], dtype)
        eager = run(*case, frozen=frozen)
        result = run(*case, frozen=frozen, call=compiled)
        assert {name for name, value in result.items() if value is None} == set(frozen)
        present = [name for name in result if name not in frozen]
        assert_same({n: result[n] for n in present}, {n: eager[n] for n in present}, case[2])


def test_varying_numbers_of_rows_compile_twice_at_most() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(feed_forward, backend=counter, fullgraph=True)
    for sizes in ([16, 0, 32], [32, 32, 32], [0, 0, 64], [160, 16, 48]):
        case = inputs(sizes)
        assert_same(run(*case, call=compiled), run(*case), case[2])
    assert counter.frame_count <= 2


def test_differentiating_twice_is_an_error() -> None:
    x, weights, ends, _ = inputs(SIZES["even"])
    x.requires_grad_()
    output = feed_forward(x, weights["w1"], weights["w3"], weights["w2"], ends, EMULATED)
    (gradient,) = torch.autograd.grad(output[: ends[-1]].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_without_emulation_a_cpu_tensor_is_refused_with_the_remedies() -> None:
    x, weights, ends, grad = inputs(SIZES["even"])
    refusal = r"emulate=False got tensors on cpu.*emulate=True or emulate=\"auto\""
    with pytest.raises(RuntimeError, match=refusal):
        run(x, weights, ends, grad, config=Float8GroupedConfig())
    with pytest.raises(RuntimeError, match=refusal):
        ops.grouped_mm_columns(CODES_T, CODES_T, SCALE_T, SCALE_T, ENDS, torch.bfloat16, False)
