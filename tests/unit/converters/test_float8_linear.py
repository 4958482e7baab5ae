"""The float8 converter: what it converts, what it leaves, and that it refuses the rest with every reason at once."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.unit.converters.models import CPU, H200, Model, converted_names, converter, violations
from titan_fp8.converters import ConversionError, build_converters
from titan_fp8.converters.config import QuantizeSection
from titan_fp8.converters.protocol import Placement
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.models.linear import Linear
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.runtime.device import DeviceCapabilities


def test_every_linear_is_converted_but_what_filters_name() -> None:
    model = Model()
    report = converter(filter_fqns=["output", "attention.wk"]).convert(model)
    expected = {f"layers.{i}.{name}" for i in range(2) for name in ("attention.wq", "attention.wo", "w1")}
    assert converted_names(model) == expected
    assert {row.fqn for row in report.converted} == expected
    assert {row.fqn: row.reason for row in report.rows if row.reason} == {
        "layers.0.attention.wk": 'filter "attention.wk"',
        "layers.1.attention.wk": 'filter "attention.wk"',
        "output": 'filter "output"',
    }


def test_a_filter_that_leaves_no_linear_alone_is_refused() -> None:
    model = Model()
    model.norm = nn.LayerNorm(8)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConversionError, match="filter_fqns: 'norm' matches no linear of the model; correct it or take"):
        converter(filter_fqns=["output", "norm"]).convert(model)


def test_parameters_stay_the_same_objects_under_the_same_names() -> None:
    model = Model()
    before = dict(model.named_parameters())
    converter(recipe_name="rowwise").convert(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_conversion_works_on_the_meta_device_and_gives_the_same_report() -> None:
    with torch.device("meta"):
        model = Model()
    report = converter(filter_fqns=["output"]).convert(model)
    assert report == converter(filter_fqns=["output"]).convert(Model())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_report_counts_flops_and_survives_json() -> None:
    report = converter(filter_fqns=["output"]).convert(Model())
    assert sum(row.flop_share for row in report.rows) == pytest.approx(1)
    inside, head = 2 * (32 * 32 * 2 + 32 * 16 + 32 * 64), 32 * 128
    assert report.flop_share == pytest.approx(inside / (inside + head))
    assert report.rows[1].global_shape == (16, 32)
    assert json.loads(json.dumps(report.to_json()))["rows"][-1]["reason"] == 'filter "output"'
    summary = report.summary()
    assert "\n" not in summary
    assert "8 of 9 linears" in summary
    assert "CPU has no FP8 tensor cores" in summary
    table = str(report).splitlines()
    assert len(table) == 11
    assert "layers.1.attention.wk" in table[6]
    assert "16 x 32" in table[6]


def test_a_decoder_writes_float8_where_all_readers_are_converted_and_the_report_says_so() -> None:
    with torch.device("meta"):
        model = Decoder(resolve_dims("llama3", "debugmodel", {"n_layers": 2}))
    report = converter(filter_fqns=["layers.1.attention.wk", "layers.1.feed_forward.w2"]).convert(model)
    parts = ("feed_forward", "attention", "attention_norm", "ffn_norm")
    assert set(report.fused) == {*(f"layers.0.{name}" for name in parts), "layers.1.ffn_norm"}
    assert "; 5 modules around them are fused with them" in report.summary()
    assert report.to_json()["fused"] == report.fused
    assert converter().convert(Model()).fused == []


def test_a_section_reaches_the_layers() -> None:
    model = Model()
    converter(
        H200, recipe_name="rowwise", emulate=True, fast_accum_in_backward=True, grad_weight_dtype="float32"
    ).convert(model)
    config = model.output.config
    assert (config.recipe.name, config.emulate, config.fast_accum_in_backward) == ("rowwise", True, True)
    assert config.grad_weight_dtype == torch.float32
    model = Model()
    converter(H200).convert(model)
    config = model.output.config
    assert (config.recipe.name, config.emulate, config.fast_accum_in_backward) == ("tensorwise", False, False)
    assert config.grad_weight_dtype == torch.bfloat16


def test_feed_forwards_keep_codes_where_asked_and_only_where_they_can() -> None:
    dims = resolve_dims("llama3", "debugmodel")
    model = Decoder(dims)
    converter(filter_fqns=["output"], keep_gate_up_in_float8=True).convert(model)
    assert model.layers["0"].feed_forward.w1.config.keeps_gate_up_in_float8
    for cannot in (
        {"filter_fqns": ["output", "w2"]},
        {"recipe_name": "rowwise_with_gw_hp"},
        {"recipe_by_fqn": ["w3=rowwise"]},
    ):
        (problem,) = violations(Decoder(dims), keep_gate_up_in_float8=True, **cannot)
        assert "keep_gate_up_in_float8 = true is for feed-forwards whose w1, w2 and w3 are converted" in problem
    violations(Model(), keep_gate_up_in_float8=True)
    for linear in ("w1", "w3"):
        model = Decoder(dims)
        for block in model.layers.values():
            getattr(block.feed_forward, linear).bias = nn.Parameter(torch.zeros(block.feed_forward.w1.out_features))
        violations(model, keep_gate_up_in_float8=True)
    two_ranks = Placement(ranks=2, tensor=2)
    converter(placement=two_ranks, recipe_name="rowwise", keep_gate_up_in_float8=True).convert(Decoder(dims))
    with pytest.raises(ConversionError, match="under tensor parallelism not tensorwise"):
        converter(placement=two_ranks, keep_gate_up_in_float8=True).convert(Decoder(dims))


@pytest.mark.parametrize(
    ("device", "emulate", "outcome"),
    [(CPU, "auto", True), (CPU, True, True), (H200, "auto", False), (H200, True, True), (H200, False, False)],
)
def test_emulation_is_used_exactly_where_asked(device: DeviceCapabilities, emulate: bool | str, outcome: bool) -> None:
    model = Model()
    report = converter(device, emulate=emulate).convert(model)
    assert model.output.config.emulate == outcome
    assert report.mode.startswith("emulated") == outcome


def test_no_emulation_without_tensor_cores_is_an_error_that_names_both_remedies() -> None:
    (problem,) = violations(Model(), emulate=False)
    assert "quantize.linear.float8.emulate = false, but CPU has no FP8 tensor cores" in problem
    assert 'true (emulate) or "auto"' in problem


def test_all_violations_come_at_once_and_the_model_stays_as_it_was() -> None:
    model = Model()
    model.layers[0].w1 = nn.Linear(30, 32)
    problems = violations(model, emulate=False, filter_fqns=["outptu", ""])
    assert len(problems) == 4
    assert any(
        "layers.0.w1: in_features=30 is not a multiple of 16, which tensorwise needs; add it to" in p for p in problems
    )


@pytest.mark.parametrize("filters", [["no_such_module"], ["no_such_module", "auto_filter_small_kn"]])
def test_linears_that_ranks_cannot_divide_are_told_with_all_else(filters: list[str]) -> None:
    model = Model()
    model.gate, model.output = Linear(32, 32), nn.Linear(32, 129, bias=False)
    with pytest.raises(ConversionError) as error:
        converter(placement=Placement(ranks=2, tensor=2), filter_fqns=filters, emulate=False).convert(model)
    assert converted_names(model) == set()
    degree = "parallelism.tensor_parallel_degree = 2"
    found = [[part for part in error.value.violations if words in part] for words in ("no_such_module", degree, "emul")]
    assert [len(each) for each in found] == [1, 2, 1], error.value.violations
    assert found[1][0] == f"output: out_features=129 is not a multiple of {degree}; change one of them"
    assert found[1][1].startswith(f"gate: {degree} divides linears by their names")


def test_odd_dimensions_may_be_filtered_by_name_or_by_the_rule_of_size() -> None:
    for pattern in ("layers.0.w1", "auto_filter_small_kn"):
        model = Model()
        model.layers[0].w1 = nn.Linear(30, 32)
        report = converter(filter_fqns=[pattern]).convert(model)
        assert {row.fqn for row in report.rows if row.reason} >= {"layers.0.w1"}


def test_the_rule_of_size_may_leave_every_linear_alone_but_names_may_not() -> None:
    """Commands of torchtitan's documents have the rule, and are to run for a model of any size."""
    report = converter(filter_fqns=["auto_filter_small_kn"]).convert(Model())
    assert report.converted == []
    assert report.flop_share == 0
    (problem,) = violations(Model(), filter_fqns=["layers", "output"])
    assert "leaves every linear of the model alone" in problem


class Scaled(nn.Linear):
    """Its forward is not a plain product."""

    def forward(self, input):
        return 2 * super().forward(input)


class ScaledModelLinear(Linear):
    """Overrides the forward of a class that declared its own to be plain."""

    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("kind", [Scaled, ScaledModelLinear])
def test_a_subclass_with_a_forward_of_its_own_is_refused_unless_filtered(kind: type) -> None:
    model = Model()
    model.layers[1].w1 = kind(32, 64)
    (problem,) = violations(model)
    assert "layers.1.w1" in problem
    assert kind.__name__ in problem
    converter(filter_fqns=["layers.1.w1"]).convert(model)
    assert type(model.layers[1].w1) is kind


def test_a_parametrized_linear_is_refused_by_name() -> None:
    model = Model()
    nn.utils.parametrizations.weight_norm(model.layers[0].w1)
    (problem,) = violations(model)
    assert "layers.0.w1" in problem
    assert "parametrization" in problem


def test_a_linear_whose_forward_was_replaced_is_refused_instead_of_converted_without_effect() -> None:
    model = Model()
    plain = model.layers[0].w1.forward
    model.layers[0].w1.forward = lambda x: plain(x)
    (problem,) = violations(model)
    assert "layers.0.w1: its forward was replaced on the instance" in problem
    converter(filter_fqns=["layers.0.w1"]).convert(model)


def test_a_sharded_model_is_refused() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = fully_shard(Model(), mesh=init_device_mesh("cpu", (2,)))
        problems = violations(model)
    finally:
        dist.destroy_process_group()
    assert len(problems) == 9
    assert "layers.0.attention.wq: its weight is sharded already" in problems[0]


def test_converting_twice_is_refused() -> None:
    model = Model()
    converter().convert(model)
    with pytest.raises(ConversionError, match=r"layers\.0\.attention\.wq: it is converted to float8 already"):
        converter().convert(model)


def test_a_weight_in_float64_is_refused() -> None:
    problems = violations(Model().double())
    assert len(problems) == 9
    assert "torch.float64" in problems[0]


def test_a_router_stays_in_high_precision() -> None:
    model = Model()
    model.layers[0].router = nn.ModuleDict({"gate": nn.Linear(32, 16)})
    report = converter().convert(model)
    (row,) = [row for row in report.rows if row.fqn == "layers.0.router.gate"]
    assert row.recipe is None
    assert "router" in row.reason


def test_one_module_under_two_names_stays_one_module() -> None:
    model = Model()
    model.layers[1].w1 = model.layers[0].w1
    converter().convert(model)
    assert isinstance(model.layers[0].w1, Float8Linear)
    assert model.layers[1].w1 is model.layers[0].w1


def test_a_model_that_is_a_linear_or_has_none_is_refused() -> None:
    assert "nn.Sequential(model)" in violations(nn.Linear(32, 32))[0]
    assert "no nn.Linear" in violations(nn.Sequential(nn.ReLU()))[0]


def test_unknown_and_duplicate_converters_are_refused_together() -> None:
    names = ["quantize.linear.float8", "quantize.linear.flaot8", "quantize.linear.float8"]
    with pytest.raises(ConversionError) as error:
        build_converters(names, QuantizeSection(), CPU)
    text = str(error.value)
    assert len(error.value.violations) == 2
    assert "'quantize.linear.float8' is named twice" in text
    assert 'did you mean "quantize.linear.float8"?' in text
    assert build_converters([], QuantizeSection(), CPU) == []
