"""The converter `quantize.grouped_mm.float8`: experts of a mixture of experts multiply in float8, by rows.

Ours are replaced (`grouped_experts.py`), other people's stay what they are (`other_experts.py`). All problems are
collected and raised at once, with the model unchanged. Experts that no pattern names, or that a filter leaves alone,
stay in bf16.
"""

from collections.abc import Mapping, Sequence
from enum import Enum

from torch import nn

from titan_fp8.converters.config import Float8GroupedSection
from titan_fp8.converters.expert_names import (
    expert_rows,
    filter_problems,
    format_problems,
    is_named,
    name_problems,
    problems_of_others,
    reasons_to_stay,
    remedy_by_name,
)
from titan_fp8.converters.filters import AUTO_FILTER
from titan_fp8.converters.grouped_experts import (
    Float8Experts,
    cache_experts,
    convert_experts,
    experts_of,
    gather_codes_of_experts,
    local_shape,
)
from titan_fp8.converters.other_experts import convert_other_experts, other_experts_of
from titan_fp8.converters.protocol import ConversionError, Placement, modules_of
from titan_fp8.converters.report import ConversionReport
from titan_fp8.converters.size_rule import EXPERTS_RULE
from titan_fp8.converters.support import resolve_grouped_emulation
from titan_fp8.kernels.grouped import ALIGNMENT
from titan_fp8.models.moe import Experts
from titan_fp8.quantization.fsdp_weight import cast_ahead
from titan_fp8.quantization.grouped import Float8GroupedConfig
from titan_fp8.quantization.grouped_product import Float8Products
from titan_fp8.quantization.weights import mark_stepped
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

NAME = "quantize.grouped_mm.float8"
RECIPE = "rowwise"
PRODUCTS = Float8Products(Float8GroupedConfig())
"""What products of other people's experts need, however they compute."""


class ExpertWeights(Enum):
    """What becomes of the weights of converted experts, in the words of the report."""

    GATHERED = "cast shard by shard, gathered as float8 codes"
    CACHED = "cast once an optimizer step"
    CAST = "cast in each forward pass"


class Float8GroupedConverter:
    """The converter of one `[quantize.grouped_mm.float8]` section for one device and mesh; see `protocol.Converter`."""

    name = NAME

    def __init__(self, section: Float8GroupedSection, device: DeviceCapabilities, placement: Placement) -> None:
        self._section, self._device = section, device
        stay = placement.experts_stay or not placement.is_managed
        self._weights = ExpertWeights.CACHED if stay else ExpertWeights.GATHERED
        self._ranks = placement.expert_tensor

    def convert(self, model: nn.Module) -> ConversionReport:
        """Convert in place; see `convert_grouped`."""
        section = self._section
        return convert_grouped(
            model,
            section.patterns(),
            self._device,
            filter_fqns=section.filter_fqns,
            emulate=section.emulate,
            fast_accum_in_backward=section.fast_accum_in_backward,
            weights=self._weights,
            ranks=self._ranks,
            prefix=f"{NAME}.",
        )

    def pre_training(self, model_parts: Sequence[nn.Module]) -> None:
        """The codes of the first step, where they are gathered; elsewhere the first forward pass begins with them."""
        for part in model_parts:
            cast_ahead(modules_of(part, Float8Experts))

    def post_optimizer(self, model_parts: Sequence[nn.Module]) -> None:
        """The weights have changed, so their codes are stale; those that are gathered are made again at once, all with
        one all-reduce."""
        for part in model_parts:
            mark_stepped(modules_of(part, Float8Experts))
        self.pre_training(model_parts)


def convert_grouped(
    model: nn.Module,
    fqns: Sequence[str],
    device: DeviceCapabilities,
    *,
    filter_fqns: Sequence[str] = (),
    emulate: object = False,
    fast_accum_in_backward: bool = False,
    weights: ExpertWeights = ExpertWeights.CAST,
    ranks: int = 1,
    aligned_groups: bool = False,
    prefix: str = "",
    problems: Sequence[str] = (),
) -> ConversionReport:
    """Let the experts of `model` that `fqns` names and `filter_fqns` does not leave alone multiply in float8, in place.

    Args:
        model: has layers with experts (`titan_fp8.models.moe.MoE`), or modules as in `other_experts.py`; on any device.
        fqns: patterns of names.
        device: what training runs on.
        filter_fqns: patterns of names, and `auto_filter_small_kn`.
        emulate, fast_accum_in_backward: see `Float8GroupedSection`.
        weights: what becomes of their codes.
        ranks: over which the hidden features of each expert will be divided.
        aligned_groups: groups of other people's experts are multiples of 16 rows.
        prefix: what stands before a setting's name in messages.
        problems: what is wrong already, to be raised with all else.

    Raises:
        ConversionError: with everything that is wrong; the model is then unchanged.
    """
    experts, others = experts_of(model), other_experts_of(model)
    problems = [*problems, *name_problems(model, experts, others, fqns, PRODUCTS, prefix)]
    others = {fqn: module for fqn, module in others.items() if is_named(fqns, fqn)}
    named = {fqn: each for fqn, (_, each) in experts.items() if is_named(fqns, fqn)}
    reasons = reasons_to_stay(named, others, filter_fqns, ranks)
    problems += filter_problems(model, named, others, filter_fqns, reasons, prefix)
    rows = expert_rows(experts, others, fqns, ranks, RECIPE, reasons)
    named = {fqn: each for fqn, each in named.items() if fqn not in reasons}
    others = {fqn: module for fqn, module in others.items() if fqn not in reasons}
    problems += _problems(named, prefix, ranks)
    kept = weights is not ExpertWeights.CAST
    problems += problems_of_others(
        model, others, fqns, PRODUCTS, prefix, kept=kept, aligned=aligned_groups, filtered=True
    )
    emulated, mode = False, "native"
    try:
        emulated, mode = resolve_grouped_emulation(emulate, device, setting=f"{prefix}emulate")
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise ConversionError(problems)
    config = Float8GroupedConfig(emulated, fast_accum_in_backward)
    for fqn in named:
        convert_experts(experts[fqn][0], config, ALIGNMENT)
    for fqn, module in others.items():
        convert_other_experts(fqn, module, Float8Products(config), aligned=aligned_groups)
    if weights is ExpertWeights.CACHED:
        cache_experts(model)
    elif weights is ExpertWeights.GATHERED:
        gather_codes_of_experts(model)
    return ConversionReport(
        NAME,
        {RECIPE: mode},
        weights=weights.value,
        size_rule={RECIPE: EXPERTS_RULE.in_words()} if AUTO_FILTER in filter_fqns else {},
        rows=rows,
        what="weights of experts",
    )


def _problems(named: Mapping[str, Experts], prefix: str, ranks: int) -> list[str]:
    """What is wrong with experts of ours that are named, one message each."""
    setting = f"{prefix}fqns"
    problems = []
    for fqn, each in named.items():
        if isinstance(each, Float8Experts):
            problems.append(f"{fqn}: its experts are converted to float8 already; leave it out of {setting}")
        else:
            problems += format_problems(fqn, each, setting)
        for name, weight in each.named_parameters():
            _, *dims = local_shape(name, weight, ranks)
            if any(size % ALIGNMENT for size in dims):
                whose = "an expert" if ranks == 1 else f"the part of an expert on one of {ranks} ranks"
                problems.append(
                    f"{fqn}.{name}: {whose} is {' x '.join(map(str, dims))}, and float8 needs multiples of "
                    f"{ALIGNMENT}; {remedy_by_name(fqn, prefix, filtered=True)}"
                )
    return problems
