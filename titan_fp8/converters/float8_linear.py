"""The converter `quantize.linear.float8`: every `nn.Linear` that nothing keeps becomes a `Float8Linear`.

It first looks at every linear of the model and decides (`selection.py`); what cannot be done as asked is collected, and
all of it is raised at once with the model unchanged. Only then are modules replaced. A linear in doubt is never
quietly left in high precision: the user either names it in a filter or changes it.

What then becomes of the weights depends on where they will lie:

    one process           cast once an optimizer step, the codes are kept (`quantization/weights.py`)
    FSDP, FP8 all-gather  shards are cast once an optimizer step, and codes are gathered (`quantization/fsdp_weight.py`)
                          unless their scales alone are kept, and codes made for each gather
    copies, no shards     the same, with nothing to gather: the whole weight is the shard
    FSDP otherwise        gathered in high precision, and cast in the forward and again in the backward pass
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum

from torch import nn

from titan_fp8.converters.config import Float8LinearSection
from titan_fp8.converters.exchanges import exchanges
from titan_fp8.converters.filters import AUTO_FILTER
from titan_fp8.converters.fusion import can_gate_any, fuse_producers
from titan_fp8.converters.linears import (
    divided_weights,
    nothing_to_convert,
    obstacle_of,
    replace_linears,
    report_rows,
)
from titan_fp8.converters.protocol import ConversionError, Placement, modules_of
from titan_fp8.converters.report import ConversionReport
from titan_fp8.converters.request import Float8Request
from titan_fp8.converters.selection import Choice, choose
from titan_fp8.converters.size_rule import SIZE_RULES
from titan_fp8.converters.support import resolve_emulation, resolve_kernels
from titan_fp8.quantization.fsdp_weight import cast_ahead, wrap_weights_for_fsdp
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear, check_dims
from titan_fp8.quantization.recipes import RECIPES, Float8Recipe, Granularity
from titan_fp8.quantization.weights import cache_weights, mark_stepped
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

NAME = "quantize.linear.float8"


class _Weights(Enum):
    """What becomes of the weights of a converted model, in the words of its report."""

    GATHERED_CODES = "cast shard by shard, gathered as float8 codes"
    PASSING_CODES = "cast shard by shard for each gather, gathered as float8 codes"
    SHARD_CODES = "cast once an optimizer step on each rank"
    GATHERED = "gathered in high precision, cast in the forward and in the backward pass"
    CACHED = "cast once an optimizer step"
    CAST = "cast in each forward pass"


class Float8LinearConverter:
    """The converter of one `[quantize.linear.float8]` section for one device and mesh; see `protocol.Converter`."""

    name = NAME

    def __init__(self, section: Float8LinearSection, device: DeviceCapabilities, placement: Placement) -> None:
        self._device = device
        self._placement = placement
        self._precomputes = section.precompute_float8_dynamic_scale_for_fsdp
        self._request = Float8Request.from_section(section, prefix=f"{NAME}.", cache_weights=True)

    def convert(self, model: nn.Module) -> ConversionReport:
        """Convert in place; see `convert_linears`."""
        report = convert_linears(model, self._request, self._device, self._placement)
        # Each rank has its weights whole, so that casting them together costs nothing but saves collectives.
        self._precomputes |= report.weights == _Weights.SHARD_CODES.value
        return report

    def pre_training(self, model_parts: Sequence[nn.Module]) -> None:
        """With precomputed scales, the first step's codes, or scales alone. FSDP would make them as it gathers, in the
        memory of its own stream, which would keep that memory when later ones are made elsewhere."""
        for part in model_parts if self._precomputes else ():
            cast_ahead(modules_of(part, Float8Linear))

    def post_optimizer(self, model_parts: Sequence[nn.Module]) -> None:
        """The weights have changed, so their codes are stale; with precomputed scales these are made again at once."""
        for part in model_parts:
            mark_stepped(modules_of(part, Float8Linear))
            if self._precomputes:
                cast_ahead(modules_of(part, Float8Linear))


def convert_linears(
    model: nn.Module,
    request: Float8Request,
    device: DeviceCapabilities,
    placement: Placement | None = None,
    problems: Sequence[str] = (),
) -> ConversionReport:
    """Replace the linears of `model` in place by `Float8Linear`s as `request` says.

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
    choices, wrong = choose(model, request, whole)
    modes, kernels, cannot = _check_device(request, choices, device)
    violations = [*problems, *wrong, *_check_model(model, choices, request, whole), *cannot]
    if violations:
        raise ConversionError(violations)
    weights = _plan_weights(model, choices, request, placement)
    recompute = request.force_recompute_fp8_weight_in_bwd or weights is _Weights.GATHERED
    configs = {
        recipe: Float8Config(
            recipe=recipe,
            emulate=emulate,
            fast_accum_in_backward=request.fast_accum_in_backward,
            grad_weight_dtype=request.grad_weight_dtype,
            recompute_weight_in_backward=recompute,
            keeps_gate_up_in_float8=request.keep_gate_up_in_float8,
        )
        for recipe, (emulate, _) in modes.items()
    }
    rows = report_rows(model, choices, whole, _label)
    chosen = {fqn: configs[choice.recipe] for fqn, choice in choices.items() if choice.reason is None}
    replace_linears(model, chosen, Float8Linear.from_linear)
    _prepare_weights(model, weights, cache=request.cache_weights)
    spread = whole.tensor > 1
    fused = fuse_producers(model, tensor_parallel=spread)
    return ConversionReport(
        converter=NAME,
        modes={_label(recipe): mode for recipe, (_, mode) in modes.items()},
        kernels=kernels,
        weights=weights.value,
        fused=fused,
        exchanges=exchanges(model, experts_divided=whole.expert_tensor > 1) if spread else {},
        size_rule=_size_rule(choices) if AUTO_FILTER in request.filter_fqns else {},
        rows=rows,
    )


def _check_device(
    request: Float8Request, choices: Mapping[str, Choice], device: DeviceCapabilities
) -> tuple[dict[Float8Recipe, tuple[bool, str]], str, list[str]]:
    """For each recipe in use, the most used first, whether it is emulated and the words for it; what casts; and what
    the device cannot do, one message each."""
    used = Counter(choice.recipe for choice in choices.values() if choice.reason is None)
    # What the device cannot do is an error also where no linear is left that it would have to do.
    recipes = [recipe for recipe, _ in used.most_common()] or [request.recipe(request.recipe_name)]
    modes: dict[Float8Recipe, tuple[bool, str]] = {}
    kernels = ""
    problems: list[str] = []
    try:
        modes = resolve_emulation(request.emulate, recipes, device, setting=f"{request.prefix}emulate")
    except UserError as error:
        problems += str(error).split("\n")
    try:
        kernels = resolve_kernels(request.kernels, device, setting=f"{request.prefix}kernels")
    except UserError as error:
        problems.append(str(error))
    return modes, kernels, problems


def _label(recipe: Float8Recipe) -> str:
    """The recipe's name in a report; with its scales where they are not those that the name stands for."""
    rounded = recipe.granularity is Granularity.BLOCK and recipe.power_of_two_scales
    return f"{recipe.name} with power-of-two scales" if rounded else recipe.name


def _size_rule(choices: Mapping[str, Choice]) -> dict[str, str]:
    """Each recipe of `choices` -> what is too small for it, in words."""
    return {_label(choice.recipe): SIZE_RULES[choice.recipe.name].in_words() for choice in choices.values()}


def _check_model(
    model: nn.Module, choices: Mapping[str, Choice], request: Float8Request, placement: Placement
) -> list[str]:
    """Why the chosen linears cannot be converted, one message each."""
    setting = f"{request.prefix}filter_fqns"
    problems = nothing_to_convert(model, choices, setting, "float8")
    if choices and AUTO_FILTER in request.filter_fqns and not isinstance(model, nn.Linear):
        # The rule of size may leave all alone: commands of torchtitan's documents have it, whatever the model's size.
        problems = []
    for fqn, choice in choices.items():
        linear = model.get_submodule(fqn)
        assert isinstance(linear, nn.Linear)
        obstacle = (
            obstacle_of(model, fqn, choice.recipe, *placement.local_dims(fqn, linear))
            if choice.reason is None
            else None
        )
        if obstacle:
            problems.append(f"{fqn}: {obstacle}; add it to {setting}{_other_remedy(linear, choice.recipe, request)}")
    if request.keep_gate_up_in_float8:
        recipes = {fqn: choice.recipe for fqn, choice in choices.items() if choice.reason is None}
        if not can_gate_any(model, recipes, tensor_parallel=placement.tensor > 1):
            problems.append(
                f"{request.prefix}keep_gate_up_in_float8 = true is for feed-forwards whose w1, w2 and w3 are converted "
                "with one recipe that is float8 in all three products, under tensor parallelism not tensorwise, and "
                f"there is none; convert them ({setting}), or leave the option out"
            )
    for users in divided_weights(model, choices) if request.enable_fsdp_float8_all_gather else []:
        names = ", ".join(f"{name} ({reader})" for name, reader in users)
        problems.append(
            f"{request.prefix}enable_fsdp_float8_all_gather gathers a weight as the codes of one recipe, but {names} "
            f"are one parameter; give all of its users one recipe, or leave all in high precision with {setting}"
        )
    return problems


def _other_remedy(linear: nn.Linear, recipe: Float8Recipe, request: Float8Request) -> str:
    """What else would help a linear that has an obstacle."""
    dims = linear.in_features, linear.out_features
    others_fit = any(check_dims(*dims, other) is None for other in RECIPES.values())
    is_size = check_dims(*dims, recipe) is not None and others_fit
    return f", or give it another recipe in {request.prefix}recipe_by_fqn" if is_size else ""


def _plan_weights(
    model: nn.Module, choices: Mapping[str, Choice], request: Float8Request, placement: Placement | None
) -> _Weights:
    if request.enable_fsdp_float8_all_gather:
        return _Weights.GATHERED_CODES if request.keep_fp8_weight_shards else _Weights.PASSING_CODES
    if placement is not None and placement.is_managed:
        whole = placement.shards == 1 and not placement.offloaded and not divided_weights(model, choices)
        return _Weights.SHARD_CODES if whole else _Weights.GATHERED
    return _Weights.CACHED if request.cache_weights else _Weights.CAST


def _prepare_weights(model: nn.Module, weights: _Weights, *, cache: bool) -> None:
    """Set up what casts the weights of a converted model."""
    linears = [module for module in model.modules() if isinstance(module, Float8Linear)]
    if weights in (_Weights.GATHERED_CODES, _Weights.PASSING_CODES, _Weights.SHARD_CODES):
        wrap_weights_for_fsdp(linears, cache=cache, keep_codes=weights is not _Weights.PASSING_CODES)
    elif weights is _Weights.CACHED:
        cache_weights(model, linears)
