"""`quantize.grouped_mm.mx` and `convert_to_mxfp8_grouped_training`: what is converted, what is refused, the report."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import titan_fp8
from tests.tolerances import MX_EXPERTS_IN_A_MODEL_SQNR_DB, sqnr_db
from titan_fp8.converters.config import Float8GroupedSection, MXGroupedSection
from titan_fp8.converters.float8_grouped import Float8GroupedConverter
from titan_fp8.converters.mx_grouped import MXFP8Experts, MXGroupedConverter
from titan_fp8.converters.protocol import ConversionError, Placement
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.moe import Experts, MoE
from titan_fp8.runtime.device import DeviceCapabilities, detect_device

CPU = detect_device()
BLACKWELL = DeviceCapabilities("cuda", "NVIDIA B200", (10, 0), True, 2250e12, 4500e12, 178.0, (13, 0))
HOPPER = replace(BLACKWELL, name="NVIDIA H200", compute_capability=(9, 0))

FLOAT8, MX = "quantize.grouped_mm.float8", "quantize.grouped_mm.mx"


def decoder(family: str = "qwen3_moe", **overrides: int) -> Decoder:
    dims = resolve_dims(family, "debugmodel", {"n_layers": 2, **overrides})
    model = Decoder(dims, seq_len=64, compute_dtype=torch.float32)
    initialize(model, seed=0)
    return model


def layers_of(model: Decoder) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def convert(model: Decoder, device: DeviceCapabilities = CPU, placement: Placement | None = None, **settings: Any):
    return MXGroupedConverter(MXGroupedSection(**settings), device, placement or Placement()).convert(model)


def test_experts_become_mx_and_groups_whole_blocks() -> None:
    model = decoder()
    parameters = dict(model.named_parameters())
    report = convert(model, fqns=["experts"], emulate="auto")
    assert all(type(layer.experts) is MXFP8Experts for layer in layers_of(model))
    assert all(layer.dispatcher.alignment == 32 for layer in layers_of(model))
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert report.recipe == "mxfp8"
    assert "emulated: CPU has no products of MX blocks" in report.summary()
    assert len(report.converted) == 3 * len(layers_of(model))
    assert "mxfp8, emulated" in repr(model)


@pytest.mark.parametrize("family", ["llama4", "qwen3_moe", "deepseek_v3", "mixtral"])
def test_models_of_every_family_compute_nearly_as_in_high_precision(family: str) -> None:
    tokens = torch.randint(2048, (2, 64), generator=torch.Generator().manual_seed(0))
    plain, converted = decoder(family), decoder(family)
    convert(converted, fqns="experts", emulate=True)
    results = []
    for model in (plain, converted):
        logits = model(tokens)
        logits.square().mean().backward()
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (logits, grads), (mx_logits, mx_grads) = results
    assert sqnr_db(logits, mx_logits) > MX_EXPERTS_IN_A_MODEL_SQNR_DB["logits"]
    for name, grad in grads.items():
        if "experts.w" in name:
            assert sqnr_db(grad, mx_grads[name]) > MX_EXPERTS_IN_A_MODEL_SQNR_DB["experts"], name


def test_one_layer_may_be_named() -> None:
    model = decoder()
    report = convert(model, fqns=["layers.1.moe.experts"], emulate=True)
    first, second = layers_of(model)
    assert (type(first.experts), type(second.experts)) == (Experts, MXFP8Experts)
    assert first.dispatcher.alignment != 32
    assert "no pattern of fqns" in str(report)


@pytest.mark.parametrize(
    ("fqns", "message"),
    [
        ([], "names nothing, so nothing would be converted; set it to experts"),
        (["expert"], "'expert' matches no module of the model"),
        (["attention"], "'attention' matches no experts of the model"),
        (["shared_experts"], "matches no module"),
    ],
)
def test_patterns_that_convert_nothing_are_refused(fqns: list[str], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(decoder(), fqns=fqns, emulate=True)


def test_products_that_a_device_lacks_are_emulated_only_if_asked_for() -> None:
    for device in (CPU, HOPPER):
        match = r"grouped_mm\.mx\.emulate = false, but .* has no products of MX"
        with pytest.raises(ConversionError, match=match) as error:
            convert(decoder(), device, fqns=["experts"])
        assert str(error.value).endswith('to true (emulate) or "auto" (emulate where needed)')
    model = decoder()
    assert convert(model, BLACKWELL, fqns=["experts"]).mode == "native"
    assert not layers_of(model)[0].experts.config.emulate  # pyright: ignore[reportAttributeAccessIssue]


def test_dimensions_are_whole_blocks_on_each_rank() -> None:
    with pytest.raises(ConversionError, match=r"experts.w1: an expert is 48 x 256, and MXFP8 needs multiples of 32"):
        convert(decoder(moe_ffn_dim=48), fqns=["experts"], emulate=True)
    with pytest.raises(ConversionError, match=r"experts.w2: the part of an expert on one of 8 ranks is 256 x 16"):
        convert(decoder(), placement=Placement(ranks=8, tensor=8, expert_tensor=8), fqns=["experts"], emulate=True)


def test_experts_have_one_format() -> None:
    model = decoder()
    titan_fp8.convert_to_float8_grouped_training(model, fqns=["layers.0"], emulate=True)
    convert(model, fqns=["layers.1"], emulate=True)

    def problems(converter: Any, **options: Any) -> str:
        with pytest.raises(ConversionError) as error:
            converter(model, emulate=True, **options)
        return str(error.value)

    message = (
        "{fqn}: its experts are a {what}, emulated), and experts have one format; leave it out of {setting}fqns, or "
        "take the other converter out"
    )
    float8, mx = titan_fp8.convert_to_float8_grouped_training, titan_fp8.convert_to_mxfp8_grouped_training
    for fqn, what, converters in (
        ("layers.0.moe.experts", "Float8Experts (rowwise", {"": mx, "quantize.grouped_mm.mx.": convert}),
        ("layers.1.moe.experts", "MXFP8Experts (mxfp8", {"": float8}),
    ):
        for setting, converter in converters.items():
            told = problems(converter, fqns=[fqn])
            assert message.format(fqn=fqn, what=what, setting=setting) in told
    assert "MXFP8Experts (mxfp8, emulated), and experts have one format" in problems(convert, fqns=["layers.1"])


@pytest.mark.parametrize("names", [(FLOAT8, MX), (MX, FLOAT8)], ids=["float8 first", "MXFP8 first"])
def test_both_converters_on_one_layer_are_refused_whichever_is_first(names: tuple[str, str]) -> None:
    sections = {MX: MXGroupedSection(fqns="experts", emulate=True)}
    sections |= {FLOAT8: Float8GroupedSection(fqns="experts", emulate=True)}
    kinds = {MX: MXGroupedConverter, FLOAT8: Float8GroupedConverter}
    model = decoder()
    first, second = (kinds[name](sections[name], CPU, Placement()) for name in names)
    first.convert(model)
    with pytest.raises(ConversionError, match=rf"experts have one format; leave it out of {names[1]}\.fqns, or take"):
        second.convert(model)


def test_the_api_converts_a_model_and_refuses_one_without_experts() -> None:
    model = decoder()
    report = titan_fp8.convert_to_mxfp8_grouped_training(model, emulate=True)
    assert len(report.converted) == 6
    with pytest.raises(ValueError, match="has no experts, so there is nothing to convert"):
        titan_fp8.convert_to_mxfp8_grouped_training(torch.nn.Sequential(torch.nn.Linear(32, 32)), emulate=True)


@pytest.mark.parametrize("fqns", [None, [1]])
def test_wrong_types_of_patterns_are_refused(fqns: Any) -> None:
    with pytest.raises(ConversionError, match="expected a list of names"):
        titan_fp8.convert_to_mxfp8_grouped_training(decoder(), fqns=fqns, emulate=True)


def test_a_build_without_grouped_products_of_blocks_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_fp8.converters.support.missing_grouped_product", lambda: "requires USE_MSLK")
    with pytest.raises(ConversionError, match=r"has no grouped products of MX blocks \(requires USE_MSLK\)"):
        convert(decoder(), BLACKWELL, fqns=["experts"])
    assert "emulated: PyTorch as it is built" in convert(decoder(), BLACKWELL, fqns=["experts"], emulate="auto").mode


def test_both_mx_converters_on_one_model() -> None:
    model = decoder()
    titan_fp8.convert_to_mxfp8_training(model, filter_fqns=["output"], emulate=True)
    titan_fp8.convert_to_mxfp8_grouped_training(model, emulate=True)
    tokens = torch.randint(2048, (1, 64), generator=torch.Generator().manual_seed(0))
    model(tokens).square().mean().backward()
    gates = [name for name, module in model.named_modules() if "router" in name and type(module).__name__ == "Gate"]
    assert len(gates) == 2, "routers stay in high precision"
    assert all(p.grad is not None for name, p in model.named_parameters() if "experts.w" in name)
