"""The converter of experts: what it converts, what it never does, and that it refuses the rest with every reason."""

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import titan_fp8
from tests.tolerances import sqnr_db
from tests.unit.converters.models import B200, CPU, H200
from tests.unit.quantization.test_ops import CountCalls
from titan_fp8.converters import ConversionError, ConversionReport, build_converters
from titan_fp8.converters.config import Float8GroupedSection, Float8LinearSection, QuantizeSection
from titan_fp8.converters.grouped_experts import Float8Experts
from titan_fp8.converters.protocol import ONE_PROCESS, Placement
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.dispatch import BF16_ALIGNMENT
from titan_fp8.models.initialization import initialize
from titan_fp8.models.moe import Experts, Gate, MoE
from titan_fp8.quantization import grouped_ops as ops
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.sharded_weight import ShardableFloat8Weight
from titan_fp8.quantization.weights import mark_stale
from titan_fp8.runtime.device import DeviceCapabilities

GROUPED, LINEAR = "quantize.grouped_mm.float8", "quantize.linear.float8"
SIZES: dict[str, Any] = {
    "dim": 32, "n_layers": 3, "n_heads": 2, "vocab_size": 64, "max_seq_len": 32, "ffn_dim": 64, "n_experts": 4,
    "top_k": 2, "moe_ffn_dim": 48, "n_shared_experts": 1, "first_dense_layers": 1,
}  # fmt: skip
GATHERED = "cast shard by shard, gathered as float8 codes"
ALL = {"layers.1.moe.experts", "layers.2.moe.experts"}


def build(**options: Any) -> Decoder:
    """One dense layer, and two with experts beside a shared one, whose part of the result is not small."""
    model = Decoder(ModelDims(**SIZES | options))
    initialize(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(15.0 if "experts" in name else 1.0)
    return model


def quantize(linear: dict[str, Any] | None = None, **grouped: Any) -> QuantizeSection:
    section = QuantizeSection()
    linear_section = Float8LinearSection(**{"emulate": "auto"} | (linear or {}))
    grouped_section = Float8GroupedSection(**{"fqns": "experts", "emulate": "auto"} | grouped)
    return section.model_copy(
        update={
            "linear": section.linear.model_copy(update={"float8": linear_section}),
            "grouped_mm": section.grouped_mm.model_copy(update={"float8": grouped_section}),
        }
    )


def convert(
    model: nn.Module, device: DeviceCapabilities = CPU, placement: Placement = ONE_PROCESS, **settings: Any
) -> ConversionReport:
    (converter,) = build_converters([GROUPED], quantize(**settings), device, placement)
    return converter.convert(model)


def converted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Float8Experts)}


def violations(model: nn.Module, device: DeviceCapabilities = CPU, **settings: Any) -> list[str]:
    """What a conversion answers that is refused; it has left the model as it was."""
    modules = dict(model.named_modules())
    alignments = {name: m.dispatcher.alignment for name, m in modules.items() if isinstance(m, MoE)}
    with pytest.raises(ConversionError) as error:
        convert(model, device, **settings)
    assert dict(model.named_modules()) == modules
    assert {name: m.dispatcher.alignment for name, m in modules.items() if isinstance(m, MoE)} == alignments
    return error.value.violations


@pytest.mark.parametrize(
    ("fqns", "expected"),
    [
        ("experts", ALL),
        (["experts"], ALL),
        ("moe.experts", ALL),
        ("layers", ALL),
        ("layers.1", {"layers.1.moe.experts"}),
        (["layers.2.moe"], {"layers.2.moe.experts"}),
        ("layers.1, layers.2", ALL),
        (["layers.1", "layers.2"], ALL),
        ("layers.*.moe.exp*", ALL),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_exactly_the_experts_that_patterns_name_are_converted(fqns: str | list[str], expected: set[str]) -> None:
    model = build()
    report = convert(model, fqns=fqns)
    assert converted_names(model) == expected
    assert {row.fqn.rpartition(".")[0] for row in report.converted} == expected
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            is_converted = f"{name}.experts" in expected
            assert module.dispatcher.alignment == (16 if is_converted else BF16_ALIGNMENT), name
            assert not any(isinstance(linear, Float8Linear) for linear in module.shared_experts.modules())


def test_parameters_stay_the_same_objects_under_the_same_names() -> None:
    model = build()
    parameters, state = dict(model.named_parameters()), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert list(model.state_dict()) == state
    before = model.layers["1"].moe.experts.w2.detach().clone()
    model(torch.arange(16).view(2, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.layers["1"].moe.experts.w2, before)


def test_what_is_set_on_one_of_the_experts_stays_and_they_keep_their_mode() -> None:
    model = build().eval()
    calls: list[str] = []
    model.layers["1"].moe.experts.register_forward_hook(lambda *_: calls.append("hook"))
    original = model.layers["1"].moe.experts
    convert(model)
    experts = model.layers["1"].moe.experts
    assert not experts.training
    assert "rowwise, emulated" in repr(experts)
    model(torch.arange(8).view(1, 8))
    assert calls == ["hook"]
    experts.w1 = None
    assert original.w1 is not None


def test_conversion_works_on_the_meta_device_and_gives_the_same_report() -> None:
    with torch.device("meta"):
        model = Decoder(ModelDims(**SIZES))
    report = convert(model, fqns="layers.1")
    assert report == convert(build(), fqns="layers.1")
    assert all(parameter.is_meta for parameter in model.parameters())


def run(model: Decoder) -> dict[str, Tensor]:
    """Logits and every gradient."""
    model.zero_grad()
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))
    logits = model(tokens)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)))
    return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def test_converted_experts_compute_in_float8_and_the_others_as_before() -> None:
    high = run(build())
    model = build()
    convert(model, fqns="layers.2")
    low = run(model)
    assert 25 < sqnr_db(high["logits"], low["logits"]) < 60
    for name in ("w1", "w2", "w3"):
        error = sqnr_db(high[f"layers.2.moe.experts.{name}"], low[f"layers.2.moe.experts.{name}"])
        assert 15 < error < 35, f"{name}: {error:.1f} dB"
    # Before that layer there is nothing in float8, and its own input is the same.
    first = build()
    captured: list[Tensor] = []
    for each in (first, model):
        each.layers["1"].register_forward_hook(lambda module, inputs, output: captured.append(output))
        each(torch.arange(32).view(1, 32))
    assert torch.equal(*captured)


def test_the_report_has_a_row_for_every_weight_of_experts_and_survives_json() -> None:
    report = convert(build(), fqns="layers.1")
    shapes = {"w1": (4, 48, 32), "w2": (4, 32, 48), "w3": (4, 48, 32)}
    assert [(row.fqn, row.global_shape, row.local_shape) for row in report.rows] == [
        (f"layers.{i}.moe.experts.{name}", shape, shape) for i in (1, 2) for name, shape in shapes.items()
    ]
    assert [row.recipe for row in report.rows] == ["rowwise"] * 3 + [None] * 3
    assert {row.reason for row in report.rows[3:]} == {"no pattern of fqns"}
    assert sum(row.flop_share for row in report.rows) == pytest.approx(1)
    assert report.flop_share == pytest.approx(0.5)
    assert report.summary() == (
        "quantize.grouped_mm.float8: rowwise (emulated: CPU has no FP8 tensor cores) in 3 of 6 weights of experts, "
        "50.0 % of their FLOPs; 3 left alone (no pattern of fqns); weights cast once an optimizer step"
    )
    told = json.loads(json.dumps(report.to_json()))
    assert (told["converter"], told["recipe"], told["converted"]) == (GROUPED, "rowwise", 3)
    table = str(report).splitlines()
    assert len(table) == 8
    assert "layers.1.moe.experts.w2" in table[2]
    assert "4 x 32 x 48" in table[2]
    assert "high precision: no pattern of fqns" in table[5]


def test_the_fingerprint_tells_which_experts_are_in_float8_and_not_where_they_run() -> None:
    report = convert(build())
    assert report.fingerprint() == {"recipe": "rowwise", "exceptions": {}}
    assert convert(build(), H200).fingerprint() == report.fingerprint()
    some = convert(build(), fqns="layers.1").fingerprint()
    assert some["recipe"] == "rowwise"
    assert some["exceptions"] == {f"layers.2.moe.experts.w{i}": "high precision" for i in (1, 2, 3)}


def test_a_section_reaches_the_experts() -> None:
    for fast in (False, True):
        model = build()
        convert(model, H200, emulate=False, fast_accum_in_backward=fast)
        config = model.layers["2"].moe.experts.config
        assert (config.emulate, config.fast_accum_in_backward) == (False, fast)


@pytest.mark.parametrize(
    ("device", "emulate", "emulated", "mode"),
    [
        (CPU, "auto", True, "emulated: CPU has no FP8 tensor cores"),
        (CPU, True, True, "emulated"),
        (H200, "auto", False, "native"),
        (H200, True, True, "emulated"),
        (H200, False, False, "native"),
        (B200, "auto", True, "emulated: NVIDIA B200 has no grouped product with scales by rows"),
        (B200, True, True, "emulated"),
    ],
)
def test_emulation_is_used_exactly_where_asked(
    device: DeviceCapabilities, emulate: bool | str, emulated: bool, mode: str
) -> None:
    model = build()
    report = convert(model, device, emulate=emulate)
    assert model.layers["1"].moe.experts.config.emulate == emulated
    assert report.mode.startswith(mode)


@pytest.mark.parametrize(("device", "why"), [(CPU, "no FP8 tensor cores"), (B200, "compute capability 9.0")])
def test_no_emulation_where_there_is_no_such_product_is_an_error_that_names_both_remedies(
    device: DeviceCapabilities, why: str
) -> None:
    (problem,) = violations(build(), device, emulate=False)
    assert problem.startswith(f"{GROUPED}.emulate = false, but {device.name} has no")
    assert why in problem
    assert 'true (emulate) or "auto"' in problem


@pytest.mark.parametrize(
    ("fqns", "message"),
    [
        ([], f"{GROUPED}.fqns names nothing, so nothing would be converted; set it to experts"),
        ("", f"{GROUPED}.fqns: '' is not a module name"),
        ("experts,", f"{GROUPED}.fqns: '' is not a module name"),
        ("moe..experts", "'moe..experts' is not a module name"),
        ("expert", f"{GROUPED}.fqns: 'expert' matches no module of the model (did you mean \"experts\"?)"),
        ("moe.expertz", "'moe.expertz' matches no module of the model (did you mean \"moe.experts\"?)"),
        ("layers.7", "'layers.7' matches no module of the model"),
        ("experts.w1", "'experts.w1' matches no module of the model"),
        ("shared_experts", f"{GROUPED}.fqns: 'shared_experts' matches no experts of the model; set it to experts"),
        ("attention,router", "'attention', 'router' matches no experts of the model"),
        ("layers.0", "'layers.0' matches no experts of the model"),
    ],
)
def test_patterns_that_name_no_experts_are_refused(fqns: str | list[str], message: str) -> None:
    (problem,) = violations(build(), fqns=fqns)
    assert message in problem


def test_a_dense_model_is_refused() -> None:
    dense = Decoder(ModelDims(dim=32, n_layers=2, n_heads=2, vocab_size=64, max_seq_len=32))
    (problem,) = violations(dense)
    assert problem.startswith("the model has no experts, so there is nothing to convert")


@pytest.mark.parametrize(("options", "shape"), [({"moe_ffn_dim": 40}, "40 x 32"), ({"dim": 40}, "48 x 40")])
def test_dimensions_that_are_no_multiples_of_16_are_refused_by_name(options: dict[str, int], shape: str) -> None:
    problems = violations(build(**options), fqns="layers.1")
    assert [problem.partition(":")[0] for problem in problems] == [
        f"layers.1.moe.experts.{w}" for w in ("w1", "w2", "w3")
    ]
    assert problems[0].endswith(
        f"an expert is {shape}, and float8 needs multiples of 16; name layers.1.moe.experts in {GROUPED}.filter_fqns, "
        f"or leave it out of {GROUPED}.fqns"
    )


def test_of_divided_experts_the_parts_count() -> None:
    placement = Placement(ranks=2, tensor=2, expert_tensor=2)
    problems = violations(build(), placement=placement, fqns="layers.1")
    part = "the part of an expert on one of 2 ranks is"
    assert [problem.split("; ")[0] for problem in problems] == [
        f"layers.1.moe.experts.w1: {part} 24 x 32, and float8 needs multiples of 16",
        f"layers.1.moe.experts.w2: {part} 32 x 24, and float8 needs multiples of 16",
        f"layers.1.moe.experts.w3: {part} 24 x 32, and float8 needs multiples of 16",
    ]
    report = convert(build(moe_ffn_dim=64), placement=placement, fqns="layers.1")
    shapes = {row.fqn.rpartition(".")[2]: row.local_shape for row in report.rows}
    assert shapes == {"w1": (4, 32, 32), "w2": (4, 32, 32), "w3": (4, 32, 32)}


class Scaled(Experts):
    """They compute otherwise."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return 2 * super().forward(x, ends)


def test_experts_that_compute_otherwise_are_refused_unless_left_out() -> None:
    model = build()
    model.layers["1"].moe.experts = Scaled(4, 32, 48, 0.02)
    (problem,) = violations(model)
    assert problem == (
        "layers.1.moe.experts: its experts are a Scaled, which computes otherwise than experts that can be converted; "
        "leave it out of quantize.grouped_mm.float8.fqns"
    )
    convert(model, fqns="layers.2")
    assert converted_names(model) == {"layers.2.moe.experts"}


def test_converting_twice_is_refused() -> None:
    model = build()
    convert(model, fqns="layers.1")
    (problem,) = violations(model)
    assert problem.startswith("layers.1.moe.experts: its experts are converted to float8 already")
    convert(model, fqns="layers.2")
    assert converted_names(model) == ALL


def test_everything_that_is_wrong_comes_at_once() -> None:
    model = build(moe_ffn_dim=40)
    model.layers["1"].moe.experts = Scaled(4, 32, 48, 0.02)
    problems = violations(model, fqns=["experts", "expertz", "layers..1"], emulate=False)
    for words in (
        "'expertz' matches no module",
        "'layers..1' is not a module name",
        "its experts are a Scaled",
        "emulate = false",
    ):
        assert len([problem for problem in problems if words in problem]) == 1, words
    assert len([problem for problem in problems if "multiples of 16" in problem]) == 3
    assert len(problems) == 7


def test_accumulating_fast_what_is_emulated_has_no_effect_and_is_a_problem_of_the_section() -> None:
    def problems(**settings: Any) -> list[str]:
        return [problem.key for problem in Float8GroupedSection(**settings).problems()]

    assert problems(fqns="experts", fast_accum_in_backward=True, emulate=True) == ["fast_accum_in_backward"]
    assert problems(fqns="experts", fast_accum_in_backward=True, emulate="auto") == []
    assert problems(fqns="experts,") == problems(fqns=["a b"]) == ["fqns"]


@pytest.mark.parametrize("order", [[LINEAR, GROUPED], [GROUPED, LINEAR]], ids=["linears first", "experts first"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_linears_and_experts_are_converted_side_by_side_in_any_order(order: list[str], recipe: str) -> None:
    model = build()
    names = list(model.state_dict())
    sections = quantize({"recipe_name": recipe, "filter_fqns": ["output"]})
    reports = {c.name: c.convert(model) for c in build_converters(order, sections, CPU)}
    assert converted_names(model) == ALL
    assert list(model.state_dict()) == names
    for layer in ("1", "2"):
        moe = model.layers[layer].moe
        assert all(type(getattr(moe.shared_experts, w)) is Float8Linear for w in ("w1", "w2", "w3"))
        assert type(moe.router.gate) is Gate
        assert moe.dispatcher.alignment == 16
    assert {row.fqn for row in reports[LINEAR].rows if "experts" in row.fqn} == {
        f"layers.{i}.moe.shared_experts.w{w}" for i in (1, 2) for w in (1, 2, 3)
    }
    assert {row.fqn for row in reports[GROUPED].rows} == {f"{fqn}.w{w}" for fqn in ALL for w in (1, 2, 3)}

    other = build()
    for converter in build_converters(order[::-1], sections, CPU):
        converter.convert(other)
    expected = run(other)
    for name, value in run(model).items():
        assert torch.equal(value, expected[name]), name


def test_a_layer_of_experts_that_is_the_whole_model_is_converted() -> None:
    """Its experts are called `experts`, as in a model of somebody else's."""
    layer = MoE(ModelDims(**SIZES), residual_std=0.02)
    initialize(layer, seed=0)
    report = convert(layer)
    assert converted_names(layer) == {"experts"}
    assert [row.fqn for row in report.converted] == ["experts.w1", "experts.w2", "experts.w3"]
    layer(torch.randn(1, 5, 32, requires_grad=True)).sum().backward()
    assert layer.experts.w1.grad.any()


# ---- what becomes of the weights


@pytest.mark.parametrize(
    ("placement", "weights"),
    [
        (ONE_PROCESS, "cast once an optimizer step"),
        (Placement(ranks=2, shards=2, experts_stay=True), "cast once an optimizer step"),
        (Placement(ranks=2, shards=2), GATHERED),
        (Placement(ranks=2), GATHERED),
        (Placement(offloaded=True), GATHERED),
    ],
    ids=["one process", "a part for each rank", "shards", "copies", "host memory"],
)
def test_what_becomes_of_the_codes_follows_from_who_holds_the_experts(placement: Placement, weights: str) -> None:
    model = build()
    of_experts = {name for name, _ in model.named_parameters() if ".experts.w" in name}
    report = convert(model, placement=placement)
    assert report.weights == weights
    assert f"; weights {weights}" in report.summary()
    wrapped = {name for name, each in model.named_parameters() if isinstance(each, ShardableFloat8Weight)}
    assert wrapped == (of_experts if weights == GATHERED else set())
    model(torch.arange(8).view(1, 8))
    with CountCalls() as counter:
        model(torch.arange(8).view(1, 8))
    # Where FSDP is to gather them and nobody has sharded them, each forward pass casts.
    assert counter.calls[ops.cast_experts] == (2 * 3 if weights == GATHERED else 0)


def test_a_step_is_told_to_the_experts_by_the_trainer_too() -> None:
    """Also one of an optimizer that is none of `torch.optim`."""
    model = build()
    (converter,) = build_converters([GROUPED], quantize(), CPU)
    converter.convert(model)
    expected = run(model)
    for parameter in model.layers["2"].moe.experts.parameters():
        parameter.data.mul_(2)
    converter.post_optimizer([model])
    assert not torch.equal(run(model)["logits"], expected["logits"])


def _step(**options: Any) -> Callable[[nn.Module], Any]:
    def change(layer: nn.Module) -> None:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return change


def _through_data(layer: nn.Module) -> None:
    layer.experts.w3.data.mul_(2)
    mark_stale(layer)


def _in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.experts.w2.mul_(2)


def _load(layer: nn.Module) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def _new_parameter(layer: nn.Module) -> None:
    layer.experts.w1 = nn.Parameter(2 * layer.experts.w1.detach())


CHANGES = {
    "for-loop": _step(foreach=False),
    "foreach": _step(foreach=True),
    "fused": _step(fused=True),
    ".data and mark_stale": _through_data,
    "in place": _in_place,
    "load_state_dict": _load,
    "new parameter": _new_parameter,
}
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "the model": lambda model: model,
    "a copy": copy.deepcopy,
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def layer_of_experts() -> MoE:
    torch.manual_seed(0)
    layer = MoE(ModelDims(**SIZES), residual_std=0.02)
    initialize(layer, seed=0)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.mul_(15)
    return layer


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("compiled", [False, True])
def test_changed_weights_are_never_used_stale(change: str, compiled: bool) -> None:
    torch._dynamo.reset()
    layer = layer_of_experts()
    convert(layer)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    if compiled:
        layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    before = layer(x)
    CHANGES[change](layer)
    after = layer(x)
    fresh = layer_of_experts()
    fresh.load_state_dict(layer.state_dict())
    convert(fresh, placement=Placement(offloaded=True))
    assert torch.equal(after, fresh(x))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_a_model_has_codes_of_its_own_weights(kind: str) -> None:
    layer = layer_of_experts()
    convert(layer)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    before = layer(x)
    other = COPIES[kind](layer)
    assert torch.equal(other(x), before)
    CHANGES["fused"](other)
    assert not torch.equal(other(x), before)
    assert torch.equal(layer(x), before) == (other is not layer)


def test_new_codes_do_not_recompile() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = layer_of_experts()
    convert(layer)
    layer.forward = torch.compile(layer.forward, backend=counter, fullgraph=True)
    for _ in range(4):
        layer(torch.randn(2, 9, 32, requires_grad=True)).sum().backward()
        _step(foreach=True)(layer)
    assert counter.frame_count == 1


# ---- without the trainer


@pytest.mark.parametrize("fqns", ["experts", ["experts"], ("layers.1", "layers.2")], ids=str)
def test_the_library_converts_as_the_converter_does(fqns: Any) -> None:
    model, other = build(), build()
    report = titan_fp8.convert_to_float8_grouped_training(model, fqns=fqns, emulate=True)
    convert(other, emulate=True)
    assert converted_names(model) == ALL
    assert (report.recipe, report.mode, report.weights) == ("rowwise", "emulated", "cast in each forward pass")
    expected = run(other)
    for name, value in run(model).items():
        assert torch.equal(value, expected[name]), name


def test_the_library_refuses_with_the_same_words_and_as_a_value_error() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"^fqns: 'expert' matches no module .*experts"):
        titan_fp8.convert_to_float8_grouped_training(model, fqns=["expert"], emulate=True)
    with pytest.raises(ConversionError, match=r"^fqns names nothing"):
        titan_fp8.convert_to_float8_grouped_training(model, fqns=[], emulate=True)
    assert converted_names(model) == set()


def test_the_library_keeps_codes_only_if_asked_to() -> None:
    for cache_weights in (False, True):
        model = build()
        titan_fp8.convert_to_float8_grouped_training(model, emulate="auto", cache_weights=cache_weights)
        model(torch.arange(8).view(1, 8))
        with CountCalls() as counter:
            model(torch.arange(8).view(1, 8))
        assert counter.calls[ops.cast_experts] == (0 if cache_weights else 6)
