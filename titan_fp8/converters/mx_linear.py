"""The converter `quantize.linear.mx`: every `nn.Linear` that nothing keeps becomes an `MXFP8Linear`.

As that of float8, it looks at every linear first, raises all that cannot be done at once with the model unchanged, and
only then replaces modules. Weights are always quantized from the parameters in high precision; how often, and what of
them FSDP gathers, is told in `mx_weights.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from titan_fp8.converters.config import MXLinearSection
from titan_fp8.converters.filters import AUTO_FILTER
from titan_fp8.converters.linears import (
    divided_weights,
    nothing_to_convert,
    obstacle_of,
    replace_linears,
    report_rows,
)
from titan_fp8.converters.mx_weights import gather_problem, plan_weights, prepare_weights
from titan_fp8.converters.protocol import ConversionError, Placement, modules_of
from titan_fp8.converters.report import ConversionReport
from titan_fp8.converters.request import Arguments
from titan_fp8.converters.selection import Choice, choose
from titan_fp8.converters.support import resolve_dim1_kernel, resolve_mx_emulation
from titan_fp8.kernels.mx import BLOCK
from titan_fp8.quantization.fsdp_weight import cast_ahead
from titan_fp8.quantization.mx_linear import MXConfig, MXFP8Linear
from titan_fp8.quantization.mx_recipes import MX_RECIPES, MXRecipe, get_mx_recipe
from titan_fp8.quantization.mx_sharded import OPTION, shard_problem
from titan_fp8.quantization.weights import mark_stepped
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

NAME = "quantize.linear.mx"


@dataclass(frozen=True)
class MXRequest:
    """The settings of one conversion; those of `MXLinearSection` under its names.

    Attributes:
        filters_are_default: nobody wrote `filter_fqns`, so a pattern of it may match nothing.
        kernel_is_default: nobody wrote `mxfp8_dim1_cast_kernel_choice`.
        cache_weights: keep the codes of weights from one optimizer step to the next.
        prefix: what stands before a setting's name in messages.
    """

    recipe_name: str | None = "mxfp8_cublas"
    scaling_mode: str | None = None
    filter_fqns: Sequence[str] = ()
    emulate: bool | str = False
    mxfp8_dim1_cast_kernel_choice: str = "triton"
    grad_weight_in_high_precision: bool = False
    enable_fsdp_mxfp8_all_gather: bool = False
    cache_weights: bool = False
    filters_are_default: bool = False
    kernel_is_default: bool = True
    prefix: str = ""
    recipe_by_fqn: Sequence[tuple[str, str]] = ()
    keep_first_blocks_hp: int = 0
    keep_last_blocks_hp: int = 0

    @classmethod
    def from_section(cls, section: MXLinearSection, *, prefix: str) -> "MXRequest":
        """What a section asks for; it has been checked."""
        settings: dict[str, Any] = {name: getattr(section, name) for name in MXLinearSection.model_fields}
        given = section.model_fields_set
        return cls(
            **settings,
            filters_are_default="filter_fqns" not in given,
            kernel_is_default="mxfp8_dim1_cast_kernel_choice" not in given,
            prefix=prefix,
            cache_weights=True,
        )

    def recipe(self, name: str | None) -> MXRecipe:
        """The recipe called `name`, with the scales that were asked for.

        Raises:
            UserError: there is none of that name, or none with such scales.
        """
        return get_mx_recipe(name, self.scaling_mode)


class MXLinearConverter:
    """The converter of one `[quantize.linear.mx]` section for one device and mesh; see `protocol.Converter`."""

    name = NAME

    def __init__(self, section: MXLinearSection, device: DeviceCapabilities, placement: Placement) -> None:
        self._device, self._placement = device, placement
        self._request = MXRequest.from_section(section, prefix=f"{NAME}.")

    def convert(self, model: nn.Module) -> ConversionReport:
        """Convert in place; see `convert_mx_linears`."""
        return convert_mx_linears(model, self._request, self._device, self._placement)

    def pre_training(self, model_parts: Sequence[nn.Module]) -> None:
        """The codes of the first step, where FSDP gathers them: as it gathers, it would make them in the memory of its
        own stream, which would keep that memory when later codes are made elsewhere."""
        for part in model_parts:
            cast_ahead(modules_of(part, MXFP8Linear))

    def post_optimizer(self, model_parts: Sequence[nn.Module]) -> None:
        """The weights have changed, so their codes are stale; those that are gathered are made again at once."""
        for part in model_parts:
            mark_stepped(modules_of(part, MXFP8Linear))
        self.pre_training(model_parts)


def convert_mx_linears(
    model: nn.Module,
    request: MXRequest,
    device: DeviceCapabilities,
    placement: Placement | None = None,
    problems: Sequence[str] = (),
) -> ConversionReport:
    """Replace the linears of `model` in place by `MXFP8Linear`s as `request` says.

    Args:
        model: any model, on any device.
        request: the settings.
        device: what training runs on.
        placement: where the parameters will lie; None if nobody knows.
        problems: what is wrong already, to be raised with all else.

    Raises:
        ConversionError: with every violation; the model is then unchanged.
    """
    whole = Placement() if placement is None else placement
    violations = list(problems)
    try:
        recipe = request.recipe(request.recipe_name)
    except UserError as error:
        raise ConversionError([*violations, f"{request.prefix}{error}"]) from error
    choices, wrong = choose(model, request, whole)
    violations += [*wrong, *_check_model(model, choices, request, whole)]
    emulate, mode, kernel = False, "native", request.mxfp8_dim1_cast_kernel_choice
    try:
        emulate, mode = resolve_mx_emulation(request.emulate, recipe, device, setting=f"{request.prefix}emulate")
    except UserError as error:
        violations.append(str(error))
    try:
        setting = f"{request.prefix}mxfp8_dim1_cast_kernel_choice"
        kernels = resolve_dim1_kernel(kernel, device, is_default=request.kernel_is_default, setting=setting)
    except UserError as error:
        violations.append(str(error))
    if violations:
        raise ConversionError(violations)
    config = MXConfig(recipe, emulate, kernel, request.grad_weight_in_high_precision)
    label = _label(recipe, request)
    rows = report_rows(model, choices, whole, lambda _: label)
    chosen = {fqn: config for fqn, choice in choices.items() if choice.reason is None}
    replace_linears(model, chosen, MXFP8Linear.from_linear)
    weights = plan_weights(
        placement,
        gathers_codes=request.enable_fsdp_mxfp8_all_gather,
        caches=request.cache_weights,
        shards=whole.shards,
        divided=bool(divided_weights(model, choices)),
    )
    converted = {name: module for name, module in model.named_modules() if isinstance(module, MXFP8Linear)}
    prepare_weights(model, converted, ["weight"], config.weight_cast, weights, request.cache_weights)
    return ConversionReport(NAME, {label: mode}, kernels, weights.value, rows=rows)


def _label(recipe: MXRecipe, request: MXRequest) -> str:
    """The recipe's name in a report, with what its numerics differ in from those that the name stands for."""
    scales = f" with scales by {recipe.mode}" if recipe.mode != MX_RECIPES[recipe.name].mode else ""
    return recipe.name + scales + (" and high-precision grad_weight" if request.grad_weight_in_high_precision else "")


def _check_model(
    model: nn.Module, choices: Mapping[str, Choice[MXRecipe]], request: MXRequest, placement: Placement
) -> list[str]:
    """Why the chosen linears cannot be converted, one message each."""
    setting = f"{request.prefix}filter_fqns"
    problems = nothing_to_convert(model, choices, setting, "MXFP8")
    for fqn, choice in choices.items():
        linear = model.get_submodule(fqn)
        assert isinstance(linear, nn.Linear)
        if choice.reason is None and (
            obstacle := obstacle_of(model, fqn, choice.recipe, *placement.local_dims(fqn, linear))
        ):
            problems.append(f"{fqn}: {obstacle}; add it to {setting}")
    return problems + (
        _gather_problems(model, choices, request, placement) if request.enable_fsdp_mxfp8_all_gather else []
    )


def _gather_problems(
    model: nn.Module, choices: Mapping[str, Choice[MXRecipe]], request: MXRequest, placement: Placement
) -> list[str]:
    """Why weights of the chosen linears cannot be gathered as codes, one message each."""
    setting = f"{request.prefix}filter_fqns"
    problems = []
    for fqn, choice in choices.items():
        linear = model.get_submodule(fqn)
        assert isinstance(linear, nn.Linear)
        n, k = placement.local_dims(fqn, linear)
        reason = shard_problem((n, k), 0, placement.shards) if choice.reason is None and n % BLOCK == 0 else None
        if reason:
            weight = f"weight {linear.out_features} x {linear.in_features}"
            part = "" if n == linear.out_features else f", of which a rank of {placement.tensor} has {n} x {k}"
            problems.append(gather_problem(f"{fqn}: {weight}{part}: {reason}", setting, request.prefix))
    for users in divided_weights(model, choices):
        names = ", ".join(f"{name} ({reader})" for name, reader in users)
        problems.append(
            f"{request.prefix}{OPTION} gathers a weight as codes, but {names} are one parameter; leave all of its "
            f"users in high precision with {setting}"
        )
    return problems


def mx_request_from_arguments(**arguments: Any) -> tuple[MXRequest, list[str]]:
    """The request that arguments of the API make, and what is wrong with their types and values, one message each. What
    is wrong has its default in the request, so that the model can be checked against the rest."""
    checked = Arguments(**arguments)
    settings, problems = checked.settings, checked.problems
    checked.names("filter_fqns")
    if AUTO_FILTER in settings.get("filter_fqns", ()):
        checked.reject("filter_fqns", f"names of linears; {AUTO_FILTER!r} is a rule of float8")
    checked.flags("grad_weight_in_high_precision", "cache_weights", OPTION)
    try:
        get_mx_recipe(arguments["recipe_name"], arguments["scaling_mode"])
    except UserError as error:
        problems.append(str(error))
        del settings["recipe_name"], settings["scaling_mode"]
    is_default = arguments["mxfp8_dim1_cast_kernel_choice"] is None
    if is_default:
        del settings["mxfp8_dim1_cast_kernel_choice"]
    return MXRequest(**settings, kernel_is_default=is_default), problems
