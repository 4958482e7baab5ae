"""The converter `quantize.linear.float8`: every `nn.Linear` that no filter names becomes a `Float8Linear`.

It first looks at every linear of the model and decides; what cannot be done as asked is collected, and all of it is
raised at once with the model unchanged. Only then are modules replaced. A linear in doubt is never
quietly left in high precision: the user either names it in a filter or changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from titan_fp8.converters.config import Float8LinearSection
from titan_fp8.converters.filters import AUTO_FILTER, check_patterns, first_match, is_too_small
from titan_fp8.converters.protocol import ConversionError
from titan_fp8.converters.report import ConversionReport, ReportRow
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear, check_dims
from titan_fp8.quantization.recipes import get_recipe
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

NAME = "quantize.linear.float8"
ROUTER = "router.gate"
"""Routers of mixtures of experts choose by small differences, so they stay in high precision."""
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Float8Request:
    """What somebody asked for, in the configuration or through the API.

    Attributes:
        recipe_name: name of the recipe, None for the default.
        filter_fqns: patterns of modules to leave alone.
        filters_are_default: nobody wrote `filter_fqns`, so a pattern of it may match nothing.
        emulate: True, False, or "auto": exactly where the device has no FP8 tensor cores.
        fast_accum_in_backward: fast accumulation in the gradient products.
        grad_weight_dtype: type in which the weight's gradient leaves its product.
        setting_prefix: what stands before a setting's name in messages.
    """

    recipe_name: str | None
    filter_fqns: Sequence[str]
    emulate: bool | str
    fast_accum_in_backward: bool = False
    grad_weight_dtype: torch.dtype = torch.bfloat16
    filters_are_default: bool = False
    setting_prefix: str = ""


class Float8LinearConverter:
    """The converter of one `[quantize.linear.float8]` section for one device; see `protocol.Converter`."""

    name = NAME

    def __init__(self, section: Float8LinearSection, device: DeviceCapabilities) -> None:
        self._device = device
        self._request = Float8Request(
            recipe_name=section.recipe_name,
            filter_fqns=section.filter_fqns,
            filters_are_default="filter_fqns" not in section.model_fields_set,
            emulate=section.emulate,
            fast_accum_in_backward=section.fast_accum_in_backward,
            grad_weight_dtype=getattr(torch, section.grad_weight_dtype),
            setting_prefix=f"{NAME}.",
        )

    def convert(self, model: nn.Module) -> ConversionReport:
        """Convert in place; see `convert_linears`."""
        return convert_linears(model, self._request, self._device)

    def post_optimizer(self, model_parts: Sequence[nn.Module]) -> None:
        """Nothing: scales are computed from the weight each time it is cast."""


def convert_linears(model: nn.Module, request: Float8Request, device: DeviceCapabilities) -> ConversionReport:
    """Replace the linears of `model` in place by `Float8Linear`s as `request` says.

    Raises:
        ConversionError: with every violation; the model is then unchanged.
    """
    prefix = request.setting_prefix
    problems: list[str] = []
    config = mode = None
    try:
        recipe = get_recipe(request.recipe_name)
        emulate, mode = resolve_emulation(request.emulate, device, setting=f"{prefix}emulate")
        config = Float8Config(recipe, emulate, request.fast_accum_in_backward, request.grad_weight_dtype)
    except UserError as error:
        problems.append(str(error))
    if isinstance(model, nn.Linear):
        problems.append(
            f"the model itself is one {type(model).__name__}, which cannot be replaced in place; "
            "convert a module that contains it, for example nn.Sequential(model)"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {fqn: module for fqn, module in modules.items() if isinstance(module, nn.Linear) and fqn}
    if not linears and not isinstance(model, nn.Linear):
        problems.append("the model has no nn.Linear, so there is nothing to convert")
    setting = f"{prefix}filter_fqns"
    problems += check_patterns(
        request.filter_fqns, list(modules)[1:], setting=setting, may_match_nothing=request.filters_are_default
    )
    recipe_name = config.recipe.name if config else None
    reasons = {fqn: _reason_to_leave(fqn, linear, request.filter_fqns, recipe_name) for fqn, linear in linears.items()}
    for fqn, linear in linears.items():
        obstacle = _obstacle(linear) if reasons[fqn] is None else None
        if obstacle:
            problems.append(f"{fqn}: {obstacle}; add it to {setting}")
    if linears and not problems and all(reasons.values()) and AUTO_FILTER not in request.filter_fqns:
        problems.append(f"{setting} leaves every linear of the model alone, so nothing would run in float8")
    if problems:
        raise ConversionError(problems)
    assert config is not None
    assert mode is not None
    rows = _rows(linears, reasons, config.recipe.name)
    _replace(model, {fqn: linear for fqn, linear in linears.items() if reasons[fqn] is None}, config)
    return ConversionReport(converter=NAME, recipe=config.recipe.name, mode=mode, rows=rows)


def resolve_emulation(emulate: bool | str, device: DeviceCapabilities, *, setting: str) -> tuple[bool, str]:
    """Whether to emulate on `device`, and the words for it in a report.

    Raises:
        UserError: if `emulate` is false on a device without FP8 tensor cores, or is neither a bool nor "auto".
    """
    if emulate not in (True, False, "auto"):
        raise UserError(f'{setting} = {emulate!r}: expected true, false or "auto"')
    if emulate == "auto":
        native = device.has_fp8_tensor_cores
        return (False, "native") if native else (True, f"emulated: {device.name} has no FP8 tensor cores")
    if not emulate and not device.has_fp8_tensor_cores:
        raise UserError(
            f"{setting} = false, but {device.name} has no FP8 tensor cores; "
            f'set {setting} to true (emulate) or "auto" (emulate where needed)'
        )
    return bool(emulate), "emulated" if emulate else "native"


def _reason_to_leave(fqn: str, linear: nn.Linear, patterns: Sequence[str], recipe_name: str | None) -> str | None:
    pattern = first_match((p for p in patterns if p != AUTO_FILTER), fqn)
    if pattern is not None:
        return f'filter "{pattern}"'
    if first_match([ROUTER], fqn):
        return "router of a mixture of experts"
    small = recipe_name is not None and is_too_small(recipe_name, linear.in_features, linear.out_features)
    return AUTO_FILTER if AUTO_FILTER in patterns and small else None


def _obstacle(linear: nn.Linear) -> str | None:
    """Why this linear cannot be converted, or None."""
    kind = type(linear)
    if isinstance(linear, Float8Linear):
        return f"it is converted to float8 already ({linear.config.recipe.name})"
    if parametrize.is_parametrized(linear) or linear._parameters.get("weight") is None:
        return "its weight is computed by a parametrization, which conversion would bypass"
    if kind is not nn.Linear and not vars(kind).get("casts_weight_to_input_dtype", False):
        return (
            f"it is a {kind.__module__}.{kind.__qualname__}, a subclass of nn.Linear whose forward may differ; "
            "declare the class attribute casts_weight_to_input_dtype = True on it if it does not, or"
        ).removesuffix(", or")
    if hasattr(linear.weight, "device_mesh"):
        return "its weight is sharded already, and what shards it would go on with the module as it was; convert before"
    if "forward" in vars(linear):
        return "its forward was replaced on the instance, which conversion would not change; convert before wrapping it"
    if linear.weight.dtype not in _WEIGHT_DTYPES:
        return f"its weight is {linear.weight.dtype}, and float8 casts take float32, bfloat16 or float16"
    return check_dims(linear.in_features, linear.out_features)


def _rows(linears: dict[str, nn.Linear], reasons: dict[str, str | None], recipe_name: str) -> list[ReportRow]:
    total = sum(linear.in_features * linear.out_features for linear in linears.values())
    rows = []
    for fqn, linear in linears.items():
        shape = (linear.out_features, linear.in_features)
        reason = reasons[fqn]
        recipe = recipe_name if reason is None else None
        rows.append(ReportRow(fqn, shape, shape, recipe, reason, shape[0] * shape[1] / max(total, 1)))
    return rows


def _replace(model: nn.Module, linears: dict[str, nn.Linear], config: Float8Config) -> None:
    """Put a `Float8Linear` wherever each of `linears` stands; a module with two names stays one module."""
    converted: dict[int, Float8Linear] = {}
    for fqn, linear in linears.items():
        new = converted.setdefault(id(linear), Float8Linear.from_linear(linear, config))
        parent, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
