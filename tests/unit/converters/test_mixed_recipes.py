"""Several recipes in one model: who gets which, what comes first, and what the report and a checkpoint say of it."""

import json

import pytest
import torch
from torch import nn

from tests.unit.converters.models import B200, CPU, H200, Model, converted_names, converter, violations
from titan_fp8.checkpoint.fingerprint import differences
from titan_fp8.quantization.linear import Float8Linear

WO, W1 = [[f"layers.{i}.{name}" for i in range(2)] for name in ("attention.wo", "w1")]


def recipes(model: nn.Module) -> dict[str, str]:
    return {
        name: module.config.recipe.name for name, module in model.named_modules() if isinstance(module, Float8Linear)
    }


def test_the_first_entry_that_matches_gives_a_linear_its_recipe_and_the_others_get_the_default() -> None:
    model = Model(256)
    table = ["layers.1.attention=rowwise", "attention.wo=blockwise", "attention=rowwise_with_gw_hp"]
    report = converter(recipe_name="tensorwise", recipe_by_fqn=table, filter_fqns=["output"]).convert(model)
    expected = {
        **{f"layers.0.attention.{name}": "rowwise_with_gw_hp" for name in ("wq", "wk")},
        "layers.0.attention.wo": "blockwise",
        **{f"layers.1.attention.{name}": "rowwise" for name in ("wq", "wk", "wo")},
        **dict.fromkeys(W1, "tensorwise"),
    }
    assert recipes(model) == expected
    assert {row.fqn: row.recipe for row in report.converted} == expected


def test_each_linear_of_a_mixed_model_computes_what_its_recipe_computes_alone() -> None:
    torch.manual_seed(0)
    mixed = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)))
    names = ["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"]
    alone = [nn.Sequential(nn.Linear(128, 128)) for _ in names]
    for number, (name, model) in enumerate(zip(names, alone, strict=True)):
        model[0].load_state_dict(mixed[number].state_dict())
        converter(recipe_name=name).convert(model)
    converter(recipe_by_fqn=[f"{number}={name}" for number, name in enumerate(names)]).convert(mixed)
    x = torch.randn(48, 128)
    outputs = [mixed(x), nn.Sequential(*alone)(x)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for output in outputs:
        output.square().sum().backward()
    for number, model in enumerate(alone):
        for parameter, other in zip(mixed[number].parameters(), model.parameters(), strict=True):
            assert torch.equal(parameter.grad, other.grad), (names[number], parameter.shape)
    weights = {name: mixed[number].weight.grad for number, name in enumerate(names)}
    assert len({weight.sum().item() for weight in weights.values()}) == len(names)


def test_a_filter_comes_before_an_entry_and_so_do_kept_blocks() -> None:
    model = Model(256)
    table = ["attention=rowwise", "w1=blockwise"]
    report = converter(recipe_by_fqn=table, filter_fqns=["attention.wk"], keep_first_blocks_hp=1).convert(model)
    assert recipes(model) == {
        **{f"layers.1.attention.{name}": "rowwise" for name in ("wq", "wo")},
        "layers.1.w1": "blockwise",
        "output": "tensorwise",
    }
    reasons = {row.fqn: row.reason for row in report.rows if row.reason}
    assert reasons == {
        **{f"layers.{i}.attention.wk": 'filter "attention.wk"' for i in range(2)},
        **{f"layers.0.{name}": "first block" for name in ("attention.wq", "attention.wo", "w1")},
    }


def test_kept_blocks_stay_in_high_precision() -> None:
    model = nn.Sequential(nn.ModuleList(Model() for _ in range(12)))
    converter(keep_first_blocks_hp=2, keep_last_blocks_hp=1).convert(model)
    assert {name.split(".")[1] for name in converted_names(model)} == {str(i) for i in range(2, 11)}


def test_blocks_that_cannot_be_kept_are_refused_with_the_remedy() -> None:
    (problem,) = violations(Model(), keep_first_blocks_hp=2, keep_last_blocks_hp=1)
    keys = [f"quantize.linear.float8.keep_{which}_blocks_hp" for which in ("first", "last")]
    assert problem.startswith(f"{keys[0]} = 2 and {keys[1]} = 1: 2 + 1 blocks are more than the 2 ")
    assert "in quantize.linear.float8.filter_fqns" in problem
    (problem,) = violations(nn.Sequential(nn.Linear(32, 32)), keep_last_blocks_hp=1)
    assert "keep_last_blocks_hp = 1: the model has no nn.ModuleList" in problem


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe_by_fqn": ["attention.wkk=rowwise"]}, 'matches no linear of the model (did you mean "attention.wk"?)'),
        ({"recipe_by_fqn": ["norm=rowwise"]}, "'norm=rowwise' matches no linear of the model; correct it"),
        ({"recipe_by_fqn": ["output=rowwise"], "filter_fqns": ["output"]}, 'stays in high precision (filter "output")'),
        ({"recipe_by_fqn": ["layers.1=rowwise"], "keep_last_blocks_hp": 1}, "stays in high precision (last block)"),
        ({"recipe_by_fqn": ["layers=rowwise", "w1=tensorwise"]}, "are matched by 'layers' before it"),
    ],
)
def test_an_entry_without_effect_is_refused(settings: dict, message: str) -> None:
    (problem,) = violations(Model(), **settings)
    assert problem.startswith("quantize.linear.float8.recipe_by_fqn: ")
    assert message in problem


def test_an_entry_whose_linears_are_all_too_small_is_accepted_as_a_whole_model_is() -> None:
    report = converter(recipe_by_fqn=["w1=rowwise"], filter_fqns=["auto_filter_small_kn"]).convert(Model())
    assert report.converted == []


def test_the_rule_of_size_goes_by_each_linears_own_recipe() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8192, 1040), nn.Linear(8192, 1040))
    report = converter(recipe_by_fqn=["1=blockwise"], filter_fqns=["auto_filter_small_kn"]).convert(model)
    assert [row.reason for row in report.rows] == [None, "auto_filter_small_kn"]


def test_a_router_is_converted_only_where_it_is_asked_for_by_name() -> None:
    for table, outcome in ((["layers.0=rowwise"], None), (["layers.0.router.gate=rowwise"], "rowwise")):
        model = Model()
        model.layers[0].router = nn.ModuleDict({"gate": nn.Linear(32, 16)})
        report = converter(recipe_by_fqn=table).convert(model)
        assert {row.fqn: row.recipe for row in report.rows}["layers.0.router.gate"] == outcome


@pytest.mark.parametrize("settings", [{"filter_fqns": ["layers.0.w1"]}, {"recipe_by_fqn": ["layers.0=rowwise"]}])
def test_one_module_under_two_names_has_one_outcome(settings: dict) -> None:
    model = Model()
    model.layers[1].w1 = model.layers[0].w1
    (problem,) = violations(model, **settings)
    assert problem.startswith("layers.0.w1 and layers.1.w1 are one module, but layers.0.w1 is to be ")


def test_one_module_in_two_blocks_of_which_one_is_kept_is_refused() -> None:
    model = Model()
    model.layers[1] = model.layers[0]
    problems = violations(model, keep_first_blocks_hp=1)
    assert len(problems) == 4
    assert "layers.0.w1 is to be in high precision and layers.1.w1 tensorwise" in problems[-1]


def test_linears_of_different_recipes_may_share_a_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False))
    model[1].weight = model[0].weight
    converter(recipe_by_fqn=["0=blockwise", "1=rowwise"]).convert(model)
    assert model[0].weight is model[1].weight
    x = torch.randn(16, 128)
    parts = []
    for number, name in enumerate(["blockwise", "rowwise"]):
        part = nn.Sequential(nn.Linear(128, 128, bias=False))
        part[0].weight = nn.Parameter(model[number].weight.detach().clone())
        converter(recipe_name=name).convert(part)
        parts.append(part)
    output, expected = model(x), nn.Sequential(*parts)(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    expected.sum().backward()
    assert torch.equal(model[0].weight.grad, parts[0][0].weight.grad + parts[1][0].weight.grad)


# ---- what a recipe needs


def test_dimensions_that_blockwise_cannot_take_are_named() -> None:
    problems = violations(Model(64), recipe_name="blockwise")
    assert (
        "layers.0.attention.wq: in_features=64 is not a multiple of 128, which blockwise needs; add it to"
        in problems[0]
    )
    problems = violations(Model(64), recipe_by_fqn=["attention.wo=blockwise"])
    assert [problem.split(":")[0] for problem in problems] == WO


def test_only_the_recipes_that_the_device_lacks_are_emulated_and_the_report_says_so() -> None:
    model = Model(256)
    report = converter(B200, recipe_by_fqn=["attention.wo=blockwise"]).convert(model)
    emulated = {name for name, m in model.named_modules() if isinstance(m, Float8Linear) and m.config.emulate}
    assert emulated == set(WO)
    summary = report.summary()
    assert summary.startswith(
        "quantize.linear.float8: tensorwise (native) in 7, blockwise (emulated: NVIDIA B200 has no"
    )
    assert "in 2, together in 9 of 9 linears, 100.0 %" in summary
    data = json.loads(json.dumps(report.to_json()))
    assert data["recipe"] == "tensorwise + blockwise"
    assert {name: one["linears"] for name, one in data["recipes"].items()} == {"tensorwise": 7, "blockwise": 2}
    assert data["recipes"]["blockwise"]["mode"].startswith("emulated: NVIDIA B200")


def test_without_emulation_a_recipe_that_the_device_lacks_is_named() -> None:
    (problem,) = violations(Model(256), B200, recipe_by_fqn=["attention.wo=blockwise"], emulate=False)
    assert "emulate = false, but NVIDIA B200 has no blockwise product" in problem
    assert "(recipe blockwise)" in problem


def test_a_default_that_no_linear_gets_needs_no_device() -> None:
    report = converter(
        B200, recipe_name="blockwise", recipe_by_fqn=["*=rowwise"], emulate=False, filter_fqns=["output"]
    ).convert(Model(256))
    assert report.modes == {"rowwise": "native"}


def test_rounded_scales_are_those_of_the_blockwise_linears() -> None:
    model = Model(256)
    report = converter(round_scales_to_power_of_2=True, recipe_by_fqn=["attention.wo=blockwise"]).convert(model)
    rounded = {
        name for name, m in model.named_modules() if isinstance(m, Float8Linear) and m.config.recipe.power_of_two_scales
    }
    assert rounded == set(WO)
    assert list(report.modes) == ["tensorwise", "blockwise with power-of-two scales"]
    model = Model(256)
    converter(recipe_name="blockwise").convert(model)
    assert not model.output.config.recipe.power_of_two_scales


# ---- what a checkpoint must agree with


def fingerprint(device=CPU, **settings) -> dict:
    return converter(device, **settings).convert(Model(256)).fingerprint()


def test_the_fingerprint_names_the_recipe_of_most_linears_and_the_exceptions() -> None:
    assert fingerprint(recipe_name="rowwise") == {"recipe": "rowwise", "exceptions": {}}
    table = ["layers.0.attention.wq=tensorwise", "w1=blockwise"]
    assert fingerprint(recipe_name="rowwise", recipe_by_fqn=table, filter_fqns=["output"]) == {
        "recipe": "rowwise",
        "exceptions": {"output": "high precision", "layers.0.attention.wq": "tensorwise", "layers.*.w1": "blockwise"},
    }
    left_alone = {"recipe": "tensorwise", "exceptions": {"layers.*.attention.wq": "high precision"}}
    assert fingerprint(filter_fqns=["attention.wq"]) == left_alone


def test_a_run_may_move_to_a_device_where_its_recipe_is_emulated_or_not() -> None:
    settings = {"recipe_by_fqn": ["w1=blockwise"], "emulate": "auto"}
    assert fingerprint(CPU, **settings) == fingerprint(H200, **settings) == fingerprint(B200, **settings)


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        ({"recipe_name": "blockwise", "recipe_by_fqn": ["w1=rowwise"]}, ["exceptions.layers.*.w1", "recipe"]),
        ({"recipe_name": "rowwise", "recipe_by_fqn": ["layers.0.w1=blockwise"]}, ["layers.*.w1", "layers.0.w1"]),
        ({"recipe_name": "rowwise", "recipe_by_fqn": ["attention.wo=blockwise"]}, ["attention.wo", "layers.*.w1"]),
        (
            {"recipe_name": "rowwise", "recipe_by_fqn": ["w1=blockwise"], "round_scales_to_power_of_2": True},
            ["exceptions.layers.*.w1"],
        ),
        ({"recipe_name": "rowwise", "recipe_by_fqn": ["w1=blockwise"], "keep_last_blocks_hp": 1}, ["layers.1.w1"]),
    ],
)
def test_another_mixture_is_another_recipe(other: dict, differing: list[str]) -> None:
    ours = fingerprint(recipe_name="rowwise", recipe_by_fqn=["w1=blockwise"])
    assert differences(ours, ours) == []
    found = [name for name, _, _ in differences(ours, fingerprint(**other))]
    assert all(any(name.endswith(end) for name in found) for end in differing), found
