"""MXFP8 in experts of other people's models, which call PyTorch's grouped product and know nothing of this package."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import titan_fp8
from tests.tolerances import MX_OTHER_EXPERTS_SQNR_DB, sqnr_db
from tests.unit.converters.test_mx_grouped import BLACKWELL
from tests.unit.converters.test_other_experts import (
    CALLS,
    DTYPES,
    RAGGED,
    SUMS_DB,
    Holder,
    Looping,
    Several,
    Stacked,
    WritesToItsInput,
    assert_same,
    grouped_mm,
    inputs,
    run,
)
from tests.unit.quantization.test_grouped import groups, random
from tests.unit.quantization.test_mx_grouped import values
from tests.unit.quantization.test_ops import CountCalls
from titan_fp8.converters import ConversionError
from titan_fp8.converters.mx_grouped import convert_mx_grouped
from titan_fp8.kernels.moe.functions import plan
from titan_fp8.kernels.mx import BLOCK
from titan_fp8.quantization import mx_grouped_ops as ops
from titan_fp8.runtime.errors import UserError

E, K, H = 4, 64, 96
SIZES = {
    "aligned": [32, 64, 0, 32],
    "ragged": RAGGED,
    "one has all": [0, 0, 40, 0],
    "one row each": [1, 1, 1, 1],
}
"""Rows of each expert."""
LAYOUTS = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


class Layer(nn.Module):
    """What has experts, and another module of the same kind that no pattern names."""

    def __init__(self, experts: nn.Module | None = None):
        super().__init__()
        self.experts = Stacked(hidden=H) if experts is None else experts
        self.others = Stacked(hidden=H)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.experts(x, ends)


def convert(model: nn.Module, **options: Any) -> Any:
    return titan_fp8.convert_to_mxfp8_grouped_training(model, **{"emulate": True} | options)


def converted(experts: nn.Module | None = None, **options: Any) -> Layer:
    layer = Layer(experts)
    convert(layer, **options)
    return layer


class OneExpert(torch.autograd.Function):
    """`x @ w.T` of what one expert's rows and weight are in MXFP8, each by blocks along what is summed over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return (values(x, 1) @ values(w, 1).t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        blocks = [values(F.pad(t, (0, 0, 0, -t.shape[0] % BLOCK)), 0) for t in (grad, x)]
        return (values(grad, 1) @ values(w, 0)).to(x.dtype), (blocks[0].t() @ blocks[1]).to(w.dtype)


def one_by_one(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
    return torch.cat([OneExpert.apply(x[rows], w[e].t()) for e, rows in groups(offs) if rows.start < rows.stop])


# ---- what is computed


@LAYOUTS
@CALLS
@DTYPES
def test_output_and_every_gradient_are_those_of_each_expert_in_mxfp8(
    sizes: list[int], call: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    case = inputs(sizes, dtype)
    expected = run(Layer(Stacked(one_by_one, H)), *case)
    assert_same(run(converted(Stacked(call, H)), *case), expected, SUMS_DB[dtype])


@DTYPES
def test_groups_that_are_whole_blocks_give_the_same_bits_where_they_are_and_moved(dtype: torch.dtype) -> None:
    case = inputs(SIZES["aligned"], dtype, behind=BLOCK)
    moved, left = (run(converted(aligned_groups=aligned), *case) for aligned in (False, True))
    last = int(case[1][-1])
    for each in (moved, left):
        each["output"], each["x"] = each["output"][:last], each["x"][:last]
    assert_same(left, moved)
    with CountCalls() as counter:
        run(converted(aligned_groups=True), *case)
    assert counter.calls[plan] == 0


@LAYOUTS
def test_mxfp8_is_near_high_precision_and_differs(sizes: list[int]) -> None:
    case = inputs(sizes)
    expected = run(Layer(Looping(hidden=H)), *case)
    least, most = MX_OTHER_EXPERTS_SQNR_DB
    for name, value in run(converted(), *case).items():
        assert least < sqnr_db(expected[name], value) < most, name


@pytest.mark.parametrize("garbage", [1e4, torch.nan])
def test_rows_behind_the_last_group_influence_nothing(garbage: float) -> None:
    x, ends, grad = inputs(RAGGED, behind=9)
    last = int(ends[-1])
    expected = run(converted(), x[:last], ends, grad[:last])
    x[last:], grad[last:] = garbage, garbage
    result = run(converted(), x, ends, grad)
    assert result["output"].shape == x.shape
    result["output"], result["x"] = result["output"][:last], result["x"][:last]
    assert_same(result, expected, SUMS_DB[torch.float32])


def test_nan_in_one_group_stays_there() -> None:
    x, ends, grad = inputs(RAGGED)
    expected = run(converted(), x, ends, grad)
    bad = x.clone()
    bad[7, 3] = torch.nan  # of the second expert
    result = run(converted(), bad, ends, grad)
    assert result["output"][7].isnan().all()
    assert result["w1"][1].isnan().any()
    others = [0, 2, 3]
    for name in ("w1", "w2", "w3"):
        assert torch.equal(result[name][others], expected[name][others]), name
    rows = torch.cat([torch.arange(5), torch.arange(22, 53)])
    assert torch.equal(result["output"][rows], expected["output"][rows])
    assert torch.equal(result["x"][rows], expected["x"][rows])


@pytest.mark.parametrize("aligned", [False, True])
def test_no_rows_at_all_give_gradients_of_zero(aligned: bool) -> None:
    result = run(converted(aligned_groups=aligned), *inputs([0, 0, 0, 0]))
    assert result["output"].shape == (0, K)
    assert not any(result[name].any() for name in ("w1", "w2", "w3"))


class Transposed(nn.Module):
    """One product, of a weight that is stored the other way round, whose result leaves in another dtype."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options
        self.w = nn.Parameter(random(E, K, H, seed=0))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(x, self.w.to(x.dtype), offs=ends, **self.options)


def test_weights_may_be_stored_either_way_round_and_results_leave_as_asked() -> None:
    x, ends, _ = inputs(RAGGED, torch.bfloat16)
    w = Transposed().w.detach().to(x.dtype).requires_grad_()
    expected = one_by_one(x, w, offs=ends)
    expected.sum().backward()
    for options, dtype in (({}, torch.bfloat16), ({"out_dtype": torch.float32}, torch.float32)):
        layer = converted(Transposed(**options))
        output = layer(x, ends)
        assert output.dtype == dtype
        assert sqnr_db(expected.detach(), output.detach()) > 45
        output.sum().backward()
        assert sqnr_db(w.grad, layer.experts.w.grad) > 45  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [Several, WritesToItsInput])
def test_inputs_groups_and_weights_that_are_alike_in_part_are_told_apart(kind: type[Stacked]) -> None:
    x, ends, _ = inputs(RAGGED)
    results = []
    for layer in (Layer(kind(one_by_one, H)), converted(kind(hidden=H))):
        layer.experts.w1.requires_grad_(False)
        with torch.set_grad_enabled(kind is Several):
            results.append({"output": layer(x.clone(), ends)})
        if kind is Several:
            results[-1]["output"].sum().backward()
            results[-1] = {"output": results[-1]["output"].detach(), "w3": layer.experts.w3.grad}
    assert_same(results[1], results[0], SUMS_DB[torch.float32])


# ---- in a loop


def test_what_is_frozen_costs_no_columns_and_no_product() -> None:
    layer, (x, ends, grad) = converted(), inputs(RAGGED)
    expected = run(layer, x, ends, grad)
    layer.experts.requires_grad_(False)
    x.requires_grad_()
    with CountCalls() as counter:
        output = layer(x, ends)
        output.backward(grad)
    assert counter.calls[ops.values] == counter.calls[ops.multiply_columns] == 0
    assert_same({"output": output.detach(), "x": x.grad}, {name: expected[name] for name in ("output", "x")})
    layer.experts.requires_grad_(True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with CountCalls() as counter, context:
            assert torch.equal(layer(x.detach(), ends), expected["output"])
        assert counter.calls[ops.values] == counter.calls[ops.column_values] == 0


def test_weights_have_the_same_gradients_where_the_input_needs_none() -> None:
    layer, (x, ends, grad) = converted(Transposed()), inputs(RAGGED)
    grad = random(x.shape[0], H, seed=8)
    expected = run(layer, x, ends, grad)
    layer.experts.zero_grad()
    layer(x, ends).backward(grad)
    assert_same({"w": layer.experts.w.grad}, {"w": expected["w"]})  # pyright: ignore[reportArgumentType]


def test_the_optimizer_made_before_the_conversion_trains_it() -> None:
    layer, (x, ends, target) = Layer(), inputs(RAGGED)
    optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=1e-2)
    convert(layer)
    losses = []
    for _ in range(30):
        loss = (layer(x, ends) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_copy_computes_in_mxfp8_with_weights_of_its_own() -> None:
    layer, (x, ends, _) = converted(), inputs(RAGGED)
    before = layer(x, ends)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x, ends), before)
    with torch.no_grad():
        other.experts.w2.mul_(2)
    assert torch.equal(other(x, ends), 2 * before)
    assert torch.equal(layer(x, ends), before)


def test_under_autocast_it_computes_what_it_is_given() -> None:
    layer, (x, ends, grad) = converted(), inputs(RAGGED, torch.bfloat16)
    expected = run(layer, x, ends, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(layer, x, ends, grad)
    assert_same(result, expected)


def test_checkpointing_changes_no_bit() -> None:
    case, layer = inputs(RAGGED), converted()
    expected = run(layer, *case)
    again = run(lambda x, ends: checkpoint(layer, x, ends, use_reentrant=False), *case, experts=layer.experts)
    assert_same(again, expected)


@CALLS
@pytest.mark.parametrize("aligned", [False, True])
def test_compiled_in_one_graph_equals_eager_bit_for_bit(call: Callable[..., Tensor], aligned: bool) -> None:
    torch._dynamo.reset()
    case = inputs(SIZES["aligned"], torch.bfloat16)
    layer = converted(Stacked(call, H), aligned_groups=aligned)
    expected = run(layer, *case)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(run(compiled, *case, experts=layer.experts), expected)


def test_native_products_have_shapes_and_dtypes_of_the_emulated_ones() -> None:
    layer = Layer()
    assert convert_mx_grouped(layer, ["experts"], BLACKWELL).mode == "native"
    case = inputs(RAGGED, torch.bfloat16)
    expected = run(converted(), *case)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, CountCalls() as counter:
        fake = [mode.from_tensor(t) for t in case]
        for weight in layer.experts.parameters():
            weight.data = mode.from_tensor(weight.data)
        result = run(layer, *fake)
    assert (counter.calls[ops.scaled_mm_rows], counter.calls[ops.scaled_mm_columns]) == (6, 3)
    for name, value in expected.items():
        assert (result[name].shape, result[name].dtype) == (value.shape, value.dtype), name


# ---- what becomes of the model


def test_parameters_stay_and_a_report_has_a_row_for_each_weight() -> None:
    layer = Layer()
    parameters, kinds = dict(layer.named_parameters()), {name: type(m) for name, m in layer.named_modules()}
    report = convert(layer)
    assert {name: type(module) for name, module in layer.named_modules()} == kinds
    assert all(parameters[name] is parameter for name, parameter in layer.named_parameters())
    assert [(row.fqn, row.recipe) for row in report.rows] == [(f"experts.w{i}", "mxfp8") for i in (1, 2, 3)]
    assert "cast in each forward and each backward pass" in str(report)
    x, ends, _ = inputs(RAGGED)
    assert torch.equal(layer.others(x, ends), Stacked(hidden=H)(x, ends)), "what is not named"


# ---- what is refused


@pytest.mark.parametrize(
    ("experts", "options", "message"),
    [
        (
            Stacked(hidden=48),
            {},
            r"^experts.w1: an expert is 48 x 64, and MXFP8 needs multiples of 32; leave it out of fqns",
        ),
        (Holder(), {}, r"experts: it holds .* no forward pass.*would run in MXFP8"),
        (nn.Linear(32, 32), {}, r"experts.*convert_to_mxfp8_training"),
        (None, {"fqns": ["expertz"]}, r"fqns: 'expertz' matches no module of the model.*experts"),
        (None, {"cache_weights": True}, r"^experts: weights of experts that are not this package's are cast"),
        (None, {"enable_fsdp_mxfp8_all_gather": True}, r"turn cache_weights and enable_fsdp_mxfp8_all_gather off"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_stays(
    experts: nn.Module | None, options: dict[str, Any], message: str
) -> None:
    layer = Layer(experts)
    with pytest.raises(ConversionError, match=message):
        convert(layer, **options)
    assert "forward" not in layer.experts.__dict__


@pytest.mark.parametrize("first", ["mxfp8", "float8"])
def test_experts_have_one_format(first: str) -> None:
    layer = Layer()
    each = {"mxfp8": convert, "float8": titan_fp8.convert_to_float8_grouped_training}
    each[first](layer, emulate=True)
    for again in each.values():
        with pytest.raises(ConversionError, match=rf"^experts: its experts are converted to (?i:{first}) already"):
            again(layer, emulate=True)


@pytest.mark.parametrize("convert_it", [convert, titan_fp8.convert_to_float8_grouped_training])
def test_without_experts_the_message_says_what_experts_are(convert_it: Any) -> None:
    with pytest.raises(ConversionError, match=r"has no experts.*parameters \[E, \.\.\.\] of three") as error:
        convert_it(nn.Sequential(nn.Linear(32, 32)), emulate=True)
    assert "model.converters" not in str(error.value)


class Batched(Transposed):
    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(x.view(E, -1, K), self.w).flatten(0, 1)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (Looping(hidden=H), r"called neither torch._grouped_mm nor .* has run in MXFP8"),
        (Batched(), r"^experts: a grouped product of \[4, 32, 64\] .* in MXFP8 there is that of"),
        (Transposed(bias=torch.zeros(H)), r"^experts: a grouped product with a bias, which MXFP8 has not"),
    ],
    ids=["loop", "batched", "bias"],
)
def test_what_only_runs_otherwise_is_refused_when_it_runs(experts: nn.Module, message: str) -> None:
    x, ends, _ = inputs(SIZES["aligned"])
    with pytest.raises(UserError, match=message):
        converted(experts)(x, ends)


def test_groups_that_break_the_promise_are_a_value_error_on_the_cpu() -> None:
    layer = converted(aligned_groups=True)
    x, ends, _ = inputs([16, 48, 32, 32])
    with pytest.raises(
        ValueError, match=r"expected groups of multiples of 32 rows, and they end at \[16, 64, 96, 128\]"
    ):
        layer(x, ends)
    with pytest.raises(ValueError, match="60 rows in groups that are said to be multiples of 32"):
        layer(x[:60], ends.clamp(max=60))
