"""`quantize.linear.mx` and `convert_to_mxfp8_training`: what is converted and refused, and what the report says."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import titan_fp8
from titan_fp8.converters.config import MXLinearSection
from titan_fp8.converters.mx_linear import MXLinearConverter
from titan_fp8.converters.protocol import ConversionError, Placement
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.mx_linear import MXFP8Linear
from titan_fp8.runtime.device import DeviceCapabilities, detect_device

CPU = detect_device()
HOPPER = DeviceCapabilities("cuda", "NVIDIA H200", (9, 0), True, 989e12, 1979e12, 139.0, (13, 0))
BLACKWELL = replace(HOPPER, name="NVIDIA B200", compute_capability=(10, 0))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(64, 64, bias=name == "wq") for name in ("wq", "wk")})
        self.router = nn.ModuleDict({"gate": nn.Linear(64, 32)})
        self.output = nn.Linear(64, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.attention["wk"](self.attention["wq"](x)))


def convert(model: nn.Module, device: DeviceCapabilities = CPU, **settings: Any):
    return MXLinearConverter(MXLinearSection(**settings), device, Placement()).convert(model)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_linears_become_mx_but_for_the_head_by_default_and_routers_always() -> None:
    model = Model()
    parameters = dict(model.named_parameters())
    report = convert(model, emulate="auto")
    assert kinds(model) == {
        "attention.wq": MXFP8Linear,
        "attention.wk": MXFP8Linear,
        "router.gate": nn.Linear,
        "output": nn.Linear,
    }
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert len(report.converted) == 2
    text = str(report)
    assert "mxfp8_cublas" in text
    assert "emulated: CPU has no products of MX blocks" in text
    assert 'filter "output"' in text
    assert report.kernels == "torch"
    model(torch.randn(3, 64)).sum().backward()
    assert all(parameters[f"attention.{name}.weight"].grad is not None for name in ("wq", "wk"))


def test_names_of_filters_are_exact_and_a_default_that_matches_nothing_is_no_mistake() -> None:
    model = Model()
    model.output = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    convert(model, emulate=True)
    with pytest.raises(ConversionError, match=r"filter_fqns: 'outputs' matches no module of the model"):
        convert(Model(), emulate=True, filter_fqns=["outputs"])


@pytest.mark.parametrize(
    ("device", "reason"),
    [(CPU, "CPU has no products"), (HOPPER, r"H200 of compute capability 9\.0 has no products")],
)
def test_products_that_a_device_lacks_are_emulated_only_if_asked_for(device: DeviceCapabilities, reason: str) -> None:
    with pytest.raises(ConversionError, match=rf"quantize.linear.mx.emulate = false, but .*{reason}.*Blackwell"):
        convert(Model(), device)
    for settings in ({"emulate": True}, {"emulate": "auto"}, {"recipe_name": "mxfp8_emulated"}):
        model = Model()
        convert(model, device, **settings)
        assert model.attention["wq"].config.emulate


def test_a_blackwell_gpu_multiplies_blocks_itself() -> None:
    for emulate in (False, "auto"):
        model = Model()
        report = convert(model, BLACKWELL, emulate=emulate, recipe_name="mxfp8_cublas_rceil")
        assert (model.attention["wq"].config.emulate, report.mode) == (False, "native")
        assert model.attention["wq"].config.recipe.mode == "rceil"


def test_kernels_that_cannot_run_are_refused_where_they_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConversionError, match=r'choice = "cuda": .* missing here: .*a CUDA build of PyTorch'):
        convert(Model(), BLACKWELL, mxfp8_dim1_cast_kernel_choice="cuda")
    monkeypatch.setattr("titan_fp8.converters.support.cuda_kernel_problem", lambda: None)
    for choice in ("triton", "cuda"):
        with pytest.raises(
            ConversionError, match=f'kernel_choice = "{choice}", but CPU is no CUDA device; leave it out'
        ):
            convert(Model(), emulate=True, mxfp8_dim1_cast_kernel_choice=choice)
    for choice in ("triton", "cuda", "torch"):
        model = Model()
        report = convert(model, BLACKWELL, mxfp8_dim1_cast_kernel_choice=choice)
        assert (model.attention["wq"].config.dim1_kernel, report.kernels) == (choice, choice)


def test_all_that_is_wrong_is_raised_at_once_and_nothing_is_changed() -> None:
    model = Model()
    model.attention["wq"] = nn.Linear(64, 40)
    model.attention["wk"] = nn.Linear(48, 64)
    with pytest.raises(ConversionError) as caught:
        convert(model)
    text = str(caught.value)
    assert "attention.wq: out_features=40 is not a multiple of 32, which mxfp8_cublas needs; add it to " in text
    assert "attention.wk: in_features=48" in text
    assert "emulate = false" in text
    assert set(kinds(model).values()) == {nn.Linear}


def test_parts_of_ranks_are_whole_blocks_too() -> None:
    placement = Placement(ranks=4, tensor=4)
    with pytest.raises(ConversionError, match=r"attention.wq: out_features=16 is not a multiple of 32"):
        MXLinearConverter(MXLinearSection(emulate=True), CPU, placement).convert(Model())


def test_a_linear_has_one_format() -> None:
    model = Model()
    titan_fp8.convert_to_float8_training(model, filter_fqns=["wk", "output"], emulate=True)
    with pytest.raises(ConversionError, match=r"attention.wq: it is converted to float8 already \(tensorwise\)"):
        convert(model, emulate=True)
    convert(model, emulate=True, filter_fqns=["wq", "output"])
    assert kinds(model)["attention.wq"] is Float8Linear
    assert kinds(model)["attention.wk"] is MXFP8Linear
    with pytest.raises(ConversionError, match=r"attention.wk: it is converted to MXFP8 already \(mxfp8_cublas\)"):
        convert(model, emulate=True, filter_fqns=["wq", "output"])


def test_every_linear_filtered_or_none_there_is_an_error() -> None:
    with pytest.raises(ConversionError, match="leaves every linear of the model alone, so nothing would run in MXFP8"):
        convert(Model(), emulate=True, filter_fqns=["attention", "output"])
    with pytest.raises(ConversionError, match=r"no nn\.Linear"):
        convert(nn.Sequential(nn.ReLU()), emulate=True, filter_fqns=[])
    with pytest.raises(ConversionError, match="cannot be replaced in place"):
        convert(nn.Linear(64, 64), emulate=True)


def test_the_api_converts_anybodys_model() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    report = titan_fp8.convert_to_mxfp8_training(
        model, recipe_name="mxfp8_emulated", scaling_mode="even", filter_fqns=["2"]
    )
    assert [type(module) for module in model] == [MXFP8Linear, nn.ReLU, nn.Linear]
    assert isinstance(model[0], titan_fp8.MXFP8Linear)
    assert model[0].config.recipe.mode == "even"
    assert "even" in report.summary()
    assert "mxfp8_emulated, emulated" in repr(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe_name": "mxfp9"}, "no such MX recipe"),
        ({"emulate": "yes"}, 'expected true, false or "auto"'),
        ({"filter_fqns": "output"}, "expected a list of names"),
        ({"filter_fqns": None}, "expected a list of names"),
        ({"emulate": True, "mxfp8_dim1_cast_kernel_choice": "triton"}, "is no CUDA device; leave it out"),
        ({"filter_fqns": ["auto_filter_small_kn"]}, "is a rule of float8"),
        ({"mxfp8_dim1_cast_kernel_choice": "cutlass", "emulate": True}, "expected one of triton, cuda, torch"),
        ({"scaling_mode": "rceil", "emulate": True}, "leave scaling_mode out"),
        ({"grad_weight_in_high_precision": 1, "emulate": True}, "expected True or False"),
    ],
)
def test_wrong_arguments_of_the_api_are_refused(arguments: dict[str, Any], message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        titan_fp8.convert_to_mxfp8_training(model, **arguments)
    assert set(kinds(model).values()) == {nn.Linear}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling_mode": "rceil"}, "mxfp8_cublas has scales of its own"),
        ({"filter_fqns": ["auto_filter_small_kn"]}, "is a rule of quantize.linear.float8"),
        ({"filter_fqns": ["a..b"]}, "is not a module name"),
    ],
)
def test_a_section_that_asks_for_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    assert any(message in str(problem) for problem in MXLinearSection(**settings).problems())


def test_a_run_goes_on_with_the_numerics_that_it_began_with() -> None:
    """What a checkpoint must agree with tells settings apart that give other numbers."""
    settings = [
        {"recipe_name": "mxfp8_cublas", "emulate": True},
        {"recipe_name": "mxfp8_cublas_rceil", "emulate": True},
        {"recipe_name": "mxfp8_emulated", "scaling_mode": "even"},
        {"recipe_name": "mxfp8_emulated", "scaling_mode": "ceil"},
        {"recipe_name": "mxfp8_cublas", "emulate": True, "grad_weight_in_high_precision": True},
    ]
    fingerprints = [str(convert(Model(), **each).fingerprint()) for each in settings]
    assert len(set(fingerprints)) == len(settings)
    floor = [{"recipe_name": "mxfp8_emulated"}, {"recipe_name": "mxfp8_emulated", "scaling_mode": "floor"}]
    assert len({str(convert(Model(), **each).fingerprint()) for each in floor}) == 1
    assert "high-precision grad_weight" in convert(Model(), **settings[-1]).summary()


def test_an_old_cuda_has_no_products_of_blocks() -> None:
    with pytest.raises(ConversionError, match=r"need CUDA 12.8 or later, and PyTorch is built for CUDA 12.6"):
        convert(Model(), replace(BLACKWELL, cuda_version=(12, 6)))
