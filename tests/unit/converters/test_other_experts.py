"""Float8 in experts of other people's models: those written here call PyTorch's grouped product, and know nothing of
this package."""

import copy
import pickle
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

import titan_fp8
from tests.tolerances import GROUPED_SQNR_DB, sqnr_db
from tests.unit.converters.models import CPU
from tests.unit.quantization.test_grouped import columns_of, ends_of, groups, product, random, rows_of
from tests.unit.quantization.test_ops import CountCalls
from titan_fp8.converters import ConversionError
from titan_fp8.converters.float8_grouped import convert_grouped
from titan_fp8.converters.grouped_experts import Float8Experts
from titan_fp8.kernels import float8
from titan_fp8.kernels.moe.functions import plan
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.moe import MoE
from titan_fp8.quantization import grouped_ops as ops
from titan_fp8.quantization import ops as linear_ops
from titan_fp8.runtime.errors import UserError

E, K, H = 4, 64, 48
grouped_mm = torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
SIZES = {
    "aligned": [32, 16, 0, 48],
    "ragged": [5, 17, 0, 31],
    "one has all": [0, 0, 40, 0],
    "one row each": [1, 1, 1, 1],
}
"""Rows of each expert."""
LAYOUTS = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
CALLS = pytest.mark.parametrize("call", [grouped_mm, F.grouped_mm], ids=["torch._grouped_mm", "F.grouped_mm"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
RAGGED = SIZES["ragged"]


class Stacked(nn.Module):
    """Experts as torchtitan has them."""

    def __init__(self, call: Callable[..., Tensor] = grouped_mm, hidden: int = H):
        super().__init__()
        self.call = call
        shapes = {"w1": (E, hidden, K), "w2": (E, K, hidden), "w3": (E, hidden, K)}
        for seed, (name, shape) in enumerate(shapes.items()):
            self.register_parameter(name, nn.Parameter(random(*shape, seed=seed) / 8))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        w1, w2, w3 = (w.to(x.dtype).transpose(-2, -1) for w in (self.w1, self.w2, self.w3))
        hidden = F.silu(self.call(x, w1, offs=ends)) * self.call(x, w3, offs=ends)
        return self.call(hidden, w2, offs=ends)


class Looping(Stacked):
    """The same without a grouped product."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        parts = [
            (F.silu(x[rows] @ self.w1[e].t()) * (x[rows] @ self.w3[e].t())) @ self.w2[e].t() for e, rows in groups(ends)
        ]
        return torch.cat(parts)


class Layer(nn.Module):
    """What has experts, and another module of the same kind that no pattern names."""

    def __init__(self, experts: nn.Module | None = None):
        super().__init__()
        self.experts = Stacked() if experts is None else experts
        self.others = Stacked()

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.experts(x, ends)


def convert(model: nn.Module, **options: Any) -> Any:
    return titan_fp8.convert_to_float8_grouped_training(model, **{"emulate": True} | options)


def ours() -> MoE:
    sizes: dict[str, Any] = {"dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 64, "max_seq_len": 32}
    return MoE(ModelDims(**sizes, n_experts=4, top_k=2, moe_ffn_dim=48), residual_std=0.02)


def converted(experts: nn.Module | None = None, **options: Any) -> Layer:
    layer = Layer(experts)
    convert(layer, **options)
    return layer


def inputs(sizes: list[int], dtype: torch.dtype = torch.float32, behind: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, ends of groups and the gradient of the result, with rows behind the last group."""
    x, grad = (random(sum(sizes) + behind, K, seed=seed, dtype=dtype) for seed in (7, 8))
    return x, ends_of(sizes), grad


def run(model: Any, x: Tensor, ends: Tensor, grad: Tensor, experts: nn.Module | None = None) -> dict[str, Tensor]:
    """The output and every gradient by name."""
    experts = model.experts if experts is None else experts
    x = x.detach().clone().requires_grad_()
    experts.zero_grad()
    output = model(x, ends)
    output.backward(grad)
    return {"output": output.detach(), "x": x.grad} | {name: w.grad for name, w in experts.named_parameters()}


class OneExpert(torch.autograd.Function):
    """`x @ w.T` of the plain casts of one expert's rows and weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return product(rows_of(x), rows_of(w), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        of_x = product(rows_of(grad), float8.columns_from_rows(*rows_of(w)), x.dtype)
        return of_x, product(columns_of(grad), columns_of(x), w.dtype)


def one_by_one(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
    return torch.cat([OneExpert.apply(x[rows], w[e].t()) for e, rows in groups(offs) if rows.start < rows.stop])


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor], least_db: float = torch.inf) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert (result[name].dtype, result[name].shape) == (value.dtype, value.shape), name
        if not torch.equal(result[name], value):
            assert sqnr_db(value, result[name]) >= least_db, f"{name}: {sqnr_db(value, result[name]):.1f} dB"


# ---- what is computed

SUMS_DB = {torch.float32: 100.0, torch.bfloat16: 40.0}
"""The order of a sum in fp32 may depend on the number of rows beside it; in bf16 a value is then rounded otherwise, and
may have another code."""


@LAYOUTS
@CALLS
@DTYPES
def test_output_and_every_gradient_are_those_of_the_plain_casts_of_each_expert(
    sizes: list[int], call: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    case = inputs(sizes, dtype)
    expected = run(Layer(Stacked(one_by_one)), *case)
    assert_same(run(converted(Stacked(call)), *case), expected, SUMS_DB[dtype])


@DTYPES
def test_groups_that_are_multiples_of_16_give_the_same_bits_where_they_are_and_moved(dtype: torch.dtype) -> None:
    case = inputs(SIZES["aligned"], dtype, behind=16)
    moved, left = (run(converted(aligned_groups=aligned), *case) for aligned in (False, True))
    last = int(case[1][-1])
    for each in (moved, left):
        each["output"], each["x"] = each["output"][:last], each["x"][:last]
    assert_same(left, moved)
    with CountCalls() as counter:
        run(converted(aligned_groups=True), *case)
    assert counter.calls[plan] == counter.calls[ops.gather_group_both] == 0


@LAYOUTS
def test_float8_is_near_high_precision_and_differs(sizes: list[int]) -> None:
    case = inputs(sizes)
    expected = run(Layer(Looping()), *case)
    result = run(converted(), *case)
    bound = GROUPED_SQNR_DB["normal"]
    for name, value in expected.items():
        assert getattr(bound, name) - 2 < sqnr_db(value, result[name]) < 40, name


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
    expected = one_by_one(x, Transposed().w.to(x.dtype), offs=ends).detach()
    for options, dtype in (({}, torch.bfloat16), ({"out_dtype": torch.float32}, torch.float32)):
        layer = converted(Transposed(**options))
        output = layer(x, ends)
        assert output.dtype == dtype
        assert sqnr_db(expected, output.detach()) > 45
        output.sum().backward()
        assert layer.experts.w.grad.shape == (E, K, H)


class AddsInPlace(Transposed):
    """A bias that is added to the product where the product is."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        output = F.grouped_mm(x, self.w.to(x.dtype), offs=ends)
        output += 1
        return output.mul_(2)


@DTYPES
@pytest.mark.parametrize("aligned", [False, True])
def test_a_product_may_be_written_to(dtype: torch.dtype, aligned: bool) -> None:
    case = inputs(SIZES["aligned"], dtype)
    case = case[0], case[1], case[2][:, :H].contiguous()
    plain, written = (run(converted(cls(), aligned_groups=aligned), *case) for cls in (Transposed, AddsInPlace))
    expected = {name: 2 * value for name, value in plain.items()}
    expected["output"] = (plain["output"] + 1) * 2
    assert_same(written, expected)


class Holder(nn.Module):
    """Weights that another module multiplies by."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(random(E, K, H, seed=0))


class Multiplies(nn.Module):
    """What holds its weights in a module without a forward pass, or in a dict."""

    def __init__(self, held: nn.Module):
        super().__init__()
        self.experts = held

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(x, self.experts.get_parameter("w").to(x.dtype), offs=ends)


@pytest.mark.parametrize("holder", [Holder, lambda: nn.ParameterDict({"w": random(E, K, H, seed=0)})])
def test_weights_that_a_module_holds_in_another_are_multiplied_in_float8(holder: Callable[[], nn.Module]) -> None:
    x, ends, grad = inputs(RAGGED)
    model = nn.ModuleDict({"moe": Multiplies(holder())})
    report = convert(model, fqns=["moe"])
    assert [row.fqn for row in report.rows] == ["moe.experts.w"]
    result = run(model["moe"], x, ends, grad[:, :H].contiguous(), experts=model["moe"].get_submodule("experts"))
    expected = run(converted(Transposed()), x, ends, grad[:, :H].contiguous())
    assert_same(result, expected)


# ---- what it costs


def test_one_input_is_cast_once_and_its_rows_are_placed_once() -> None:
    layer, (x, ends, grad) = converted(), inputs(RAGGED)
    with CountCalls() as forward:
        output = layer(x.requires_grad_(), ends)
    with CountCalls() as backward:
        output.backward(grad)
    assert (forward.calls[plan], forward.calls[ops.gather_group_both], forward.calls[ops.cast_experts]) == (1, 2, 3)
    assert (forward.calls[ops.grouped_mm_rows], backward.calls[ops.grouped_mm_rows]) == (3, 3)
    assert (backward.calls[ops.gather_group_both], backward.calls[ops.grouped_mm_columns]) == (3, 3)


def test_what_is_frozen_costs_no_columns_and_no_product() -> None:
    layer, (x, ends, grad) = converted(), inputs(RAGGED)
    expected = run(layer, x, ends, grad)
    layer.experts.requires_grad_(False)
    x.requires_grad_()
    with CountCalls() as counter:
        output = layer(x, ends)
        output.backward(grad)
    assert counter.calls[ops.gather_group_both] == counter.calls[ops.grouped_mm_columns] == 0
    assert_same({"output": output.detach(), "x": x.grad}, {name: expected[name] for name in ("output", "x")})
    layer.experts.requires_grad_(True)
    with CountCalls() as counter, torch.no_grad():
        assert torch.equal(layer(x, ends), expected["output"])
    assert counter.calls[ops.gather_group_both] == 0
    assert counter.calls[linear_ops.cast_rows] == 2
    with torch.inference_mode():
        assert torch.equal(layer(x.detach(), ends), expected["output"])


class Several(Stacked):
    """Products of inputs, groups and weights that are alike in part."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        frozen, trained = self.w1.transpose(-2, -1), self.w3.transpose(-2, -1)
        other_ends = torch.stack([ends[-1] - 3] * 3 + [ends[-1]]).int()
        first = self.call(x, frozen, offs=ends) + self.call(x, trained, offs=ends)
        second = self.call(x.flip(0), trained, offs=ends) + self.call(x, trained, offs=other_ends)
        return first + second


def test_what_is_cast_once_is_what_is_the_same_in_every_respect() -> None:
    x, ends, _ = inputs(RAGGED)
    results = []
    for layer in (Layer(Several(one_by_one)), converted(Several())):
        layer.experts.w1.requires_grad_(False)
        output = layer(x.clone(), ends)
        output.sum().backward()
        assert layer.experts.w3.grad is not None
        results.append({"output": output.detach(), "w3": layer.experts.w3.grad})
    assert_same(results[1], results[0], SUMS_DB[torch.float32])


class WritesToItsInput(Stacked):
    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        first = self.call(x, self.w1.transpose(-2, -1), offs=ends)
        return first + self.call(x.mul_(3), self.w3.transpose(-2, -1), offs=ends)


def test_an_input_that_was_written_to_is_cast_again() -> None:
    x, ends, _ = inputs(RAGGED)
    with torch.no_grad():
        layers = Layer(WritesToItsInput(one_by_one)), converted(WritesToItsInput())
        expected, result = (layer(x.clone(), ends) for layer in layers)
    assert_same({"output": result}, {"output": expected}, SUMS_DB[torch.float32])


def test_checkpointing_changes_no_bit() -> None:
    case = inputs(RAGGED)
    layer = converted()
    expected = run(layer, *case)
    again = run(lambda x, ends: checkpoint(layer, x, ends, use_reentrant=False), *case, experts=layer.experts)
    assert_same(again, expected)


# ---- compiled


@CALLS
@pytest.mark.parametrize("aligned", [False, True])
def test_compiled_in_one_graph_equals_eager_bit_for_bit(call: Callable[..., Tensor], aligned: bool) -> None:
    torch._dynamo.reset()
    case = inputs(SIZES["aligned"], torch.bfloat16)
    layer = converted(Stacked(call), aligned_groups=aligned)
    expected, calls = run(layer, *case), Counter()

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls.update(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert_same(run(compiled, *case, experts=layer.experts), expected)
    assert calls[ops.grouped_mm_rows] == 6
    assert calls[plan] == (not aligned)
    assert calls[ops.gather_group_both] + calls[ops.cast_group_both] == 5, "one for gate and up"


def test_varying_numbers_of_rows_compile_twice_at_most() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = converted()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for factor in (1, 2, 3, 5):
        case = inputs([factor * size for size in RAGGED])
        assert_same(run(compiled, *case, experts=layer.experts), run(layer, *case), SUMS_DB[torch.float32])
    assert counter.frame_count <= 2


def test_compiled_modules_without_a_grouped_product_are_refused_too() -> None:
    torch._dynamo.reset()
    layer = converted(Transposed())
    layer.experts.forward.inner = lambda x, ends: x @ layer.experts.w[0]
    x, ends, _ = inputs(RAGGED)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"called neither torch\._grouped_mm"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x, ends)


# ---- what becomes of the model


def test_parameters_names_and_state_dicts_stay() -> None:
    layer = Layer()
    parameters, state = dict(layer.named_parameters()), layer.state_dict()
    kinds = {name: type(module) for name, module in layer.named_modules()}
    convert(layer)
    assert {name: type(module) for name, module in layer.named_modules()} == kinds
    assert all(parameters[name] is parameter for name, parameter in layer.named_parameters())
    assert list(layer.state_dict()) == list(state)
    assert all(type(value) is Tensor for value in layer.state_dict().values())
    Layer().load_state_dict(layer.state_dict())


def test_only_what_is_named_computes_in_float8() -> None:
    layer, (x, ends, _) = converted(), inputs(SIZES["aligned"], torch.bfloat16)
    assert torch.equal(layer.others(x, ends), Stacked()(x, ends))
    assert not torch.equal(layer.experts(x, ends), Stacked()(x, ends))
    assert torch.equal(Stacked()(x, ends), layer.others(x, ends)), "and nothing else afterwards"


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copy_computes_in_float8_with_weights_of_its_own(copied: Callable[[Layer], Layer]) -> None:
    layer, (x, ends, _) = converted(), inputs(RAGGED)
    before = layer(x, ends)
    other = copied(layer)
    assert torch.equal(other(x, ends), before)
    with torch.no_grad():
        other.experts.w2.mul_(2)
    assert torch.equal(other(x, ends), 2 * before)
    assert torch.equal(layer(x, ends), before)


def test_a_report_has_a_row_for_each_weight() -> None:
    report = convert(Layer())
    assert [(row.fqn, row.global_shape, row.recipe) for row in report.rows] == [
        ("experts.w1", (E, H, K), "rowwise"),
        ("experts.w2", (E, K, H), "rowwise"),
        ("experts.w3", (E, H, K), "rowwise"),
    ]
    assert sum(row.flop_share for row in report.rows) == pytest.approx(1.0)
    assert report.mode == "emulated"
    assert "cast in each forward pass" in str(report)
    assert [row.fqn for row in convert(Layer(), fqns=["experts", "others"]).rows][3:] == [
        f"others.w{i}" for i in (1, 2, 3)
    ]


def test_experts_of_both_kinds_are_converted_together() -> None:
    model = nn.ModuleDict({"ours": ours(), "theirs": Layer()})
    report = convert(model)
    assert [row.fqn for row in report.rows] == [f"{of}.experts.w{i}" for of in ("ours", "theirs") for i in (1, 2, 3)]
    assert isinstance(model["ours"].experts, Float8Experts)
    assert sum(row.flop_share for row in report.rows) == pytest.approx(1.0)


# ---- what is refused


class WithSizes(nn.Module):
    """One weight and one bias of three dimensions."""

    def __init__(self, *shape: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0], 1, shape[2]))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(x, self.w, offs=ends) + self.bias[0]


LINEARS = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))


@pytest.mark.parametrize(
    ("experts", "options", "message"),
    [
        (LINEARS, {}, r"fqns: 'experts' matches no module that has weights of experts.*convert_to_float8_training"),
        (nn.LayerNorm(32), {}, r"fqns: 'experts' matches no module that has weights of experts.*take it out"),
        (WithSizes(4, 48, 40), {}, r"an expert is 48 x 40, .* multiples of 16; name experts in filter_fqns, or leave"),
        (None, {"fqns": ["expertz"]}, r"fqns: 'expertz' matches no module of the model.*experts"),
        (None, {"fqns": []}, r"fqns names nothing"),
        (
            None,
            {"cache_weights": True},
            r"^experts: weights of experts that are not this package's are cast in each pass",
        ),
        (None, {"enable_fsdp_float8_all_gather": True}, r"turn cache_weights and enable_fsdp_float8_all_gather off"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_stays(
    experts: nn.Module | None, options: dict[str, Any], message: str
) -> None:
    layer = Layer(experts)
    with pytest.raises(ValueError, match=message):
        convert(layer, **options)
    assert "forward" not in layer.experts.__dict__


def test_modules_without_a_forward_pass_are_refused_and_who_multiplies_is_named() -> None:
    within = nn.ModuleDict({"first": Layer(), "second": Multiplies(Holder())})
    for model, message in (
        (within, r"^second\.experts: it holds .* no forward pass.*multiplies by them, second, in fqns"),
        (Multiplies(Holder()), r"^experts: it holds .* no forward pass.*multiplies by them, the model itself"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(model, fqns=["experts"])
    assert "forward" not in within["first"].experts.__dict__
    assert len(convert(within, fqns=["first.experts", "second"]).rows) == 4


def test_converting_twice_is_refused() -> None:
    layer = converted()
    with pytest.raises(ConversionError, match=r"^experts: its experts are converted to float8 already"):
        convert(layer)


def test_a_promise_about_groups_of_nobody_is_refused() -> None:
    with pytest.raises(ConversionError, match="aligned_groups = True has no effect"):
        convert(ours(), aligned_groups=True)


def test_no_emulation_where_there_is_no_such_product_is_an_error() -> None:
    layer = Layer()
    with pytest.raises(ConversionError, match="emulate = false, but CPU has no"):
        convert_grouped(layer, ["experts"], CPU, emulate=False)
    assert "forward" not in layer.experts.__dict__


class Batched(Transposed):
    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(x.view(E, -1, K), self.w).flatten(0, 1)


class Narrowed(Transposed):
    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(x, self.w[..., :40], offs=ends)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (Looping(), r"^experts: its forward pass has called neither torch._grouped_mm nor"),
        (Batched(), r"^experts: a grouped product of \[4, 24, 64\] with \[4, 64, 48\], and in float8 there is that of"),
        (Transposed(bias=torch.zeros(H)), r"^experts: a grouped product with a bias"),
        (Narrowed(), r"^experts: an expert's weight is 64 x 40, and float8 needs multiples of 16"),
    ],
    ids=["loop", "batched", "bias", "narrow"],
)
def test_what_only_runs_otherwise_is_refused_when_it_runs(experts: nn.Module, message: str) -> None:
    layer = converted(experts)
    x, ends, _ = inputs(SIZES["aligned"])
    with pytest.raises(UserError, match=message):
        layer(x, ends)
    assert torch.equal(layer.others(x, ends), Stacked()(x, ends)), "and nothing else is in float8 afterwards"


@pytest.mark.parametrize(
    ("ends", "given"),
    [
        (torch.tensor([5, 22, 22], dtype=torch.int32), r"torch.int32 \[3\]"),
        (torch.tensor([5, 22, 22, 30, 53], dtype=torch.int32), r"torch.int32 \[5\]"),
        (torch.tensor([[5, 22, 22, 53]], dtype=torch.int32), r"torch.int32 \[1, 4\]"),
        (torch.tensor([5, 22, 22, 53]), r"torch.int64 \[4\]"),
        (torch.tensor([5.5, 22, 22, 53]), r"torch.float32 \[4\]"),
    ],
)
@pytest.mark.parametrize("aligned", [False, True])
def test_ends_of_groups_that_pytorch_refuses_are_refused(ends: Tensor, given: str, aligned: bool) -> None:
    x, layer = random(64, K, seed=7), converted(aligned_groups=aligned)
    with torch.no_grad(), pytest.raises(RuntimeError):
        Stacked()(x, ends)
    for context in (torch.no_grad(), torch.enable_grad()):
        with (
            context,
            pytest.raises(UserError, match=rf"^experts: offs is {given} for weights \[4, 64, 48\].*int32 \[4\]"),
        ):
            layer(x, ends)


@pytest.mark.parametrize("convert_it", [convert, partial(titan_fp8.convert_to_mxfp8_grouped_training, emulate=True)])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ends", [[64, 32, 64, 96], [-32, 32, 64, 96], [32, 64, 96, 128], [96, 96, 96, 64]])
def test_ends_of_groups_that_do_not_ascend_to_the_rows_are_refused_on_the_cpu(
    convert_it: Any, aligned: bool, compiled: bool, ends: list[int]
) -> None:
    torch._dynamo.reset()
    layer = Layer(Stacked(hidden=64))
    convert_it(layer, aligned_groups=aligned)
    model = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    x = random(96, K, seed=7)
    with pytest.raises(UserError, match=rf"^experts: offs = {re.escape(str(ends))} for 96 rows, and the row behind"):
        model(x, torch.tensor(ends, dtype=torch.int32))


@pytest.mark.parametrize("compiled", [False, True])
def test_groups_that_break_the_promise_are_a_value_error_on_the_cpu(compiled: bool) -> None:
    torch._dynamo.reset()
    layer = converted(aligned_groups=True)
    model = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    x, _, _ = inputs([16, 16, 16, 16])
    with pytest.raises(
        ValueError, match=r"expected groups of multiples of 16 rows, and they end at \[16, 30, 48, 64\]"
    ):
        model(x, ends_of([16, 14, 18, 16]))
    with pytest.raises(ValueError, match="60 rows in groups that are said to be multiples of 16"):
        layer(x[:60], ends_of([16, 16, 16, 0]))
