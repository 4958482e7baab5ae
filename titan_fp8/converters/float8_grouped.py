"""The converter `quantize.grouped_mm.float8`: experts of a mixture of experts multiply in float8, by rows.

All problems are collected and raised at once, with the model unchanged. Experts that no pattern names stay in bf16.
"""

from collections.abc import Sequence
from enum import Enum

from torch import Tensor, nn

from titan_fp8.converters.config import Float8GroupedSection
from titan_fp8.converters.filters import check_patterns, first_match
from titan_fp8.converters.grouped_experts import (
    Float8Experts,
    cache_experts,
    convert_experts,
    experts_of,
    gather_codes_of_experts,
)
from titan_fp8.converters.protocol import ConversionError, Placement, modules_of
from titan_fp8.converters.report import ConversionReport, ReportRow
from titan_fp8.converters.support import resolve_grouped_emulation
from titan_fp8.kernels.grouped import ALIGNMENT
from titan_fp8.models.moe import Experts, MoE
from titan_fp8.quantization.fsdp_weight import cast_ahead
from titan_fp8.quantization.grouped import Float8GroupedConfig
from titan_fp8.quantization.weights import mark_stepped
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

NAME = "quantize.grouped_mm.float8"
RECIPE = "rowwise"


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
    emulate: object = False,
    fast_accum_in_backward: bool = False,
    weights: ExpertWeights = ExpertWeights.CAST,
    ranks: int = 1,
    prefix: str = "",
) -> ConversionReport:
    """Let the experts of `model` that `fqns` names multiply in float8, in place.

    Args:
        model: has layers with experts (`titan_fp8.models.moe.MoE`); on any device.
        fqns: patterns of names.
        device: what training runs on.
        emulate, fast_accum_in_backward: see `Float8GroupedSection`.
        weights: what becomes of their codes.
        ranks: over which the hidden features of each expert will be divided.
        prefix: what stands before a setting's name in messages.

    Raises:
        ConversionError: with everything that is wrong; the model is then unchanged.
    """
    experts = experts_of(model)
    problems = _problems(model, experts, fqns, f"{prefix}fqns", ranks)
    emulated, mode = False, "native"
    try:
        emulated, mode = resolve_grouped_emulation(emulate, device, setting=f"{prefix}emulate")
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise ConversionError(problems)
    rows = [row for fqn, (_, each) in experts.items() for row in _rows(fqn, each, _is_named(fqns, fqn), experts, ranks)]
    config = Float8GroupedConfig(emulated, fast_accum_in_backward)
    for fqn, (layer, _) in experts.items():
        if _is_named(fqns, fqn):
            convert_experts(layer, config, ALIGNMENT)
    if weights is ExpertWeights.CACHED:
        cache_experts(model)
    elif weights is ExpertWeights.GATHERED:
        gather_codes_of_experts(model)
    return ConversionReport(NAME, {RECIPE: mode}, weights=weights.value, rows=rows, what="weights of experts")


def _is_named(fqns: Sequence[str], fqn: str) -> bool:
    return first_match(fqns, fqn) is not None


def _problems(
    model: nn.Module, experts: dict[str, tuple[MoE, Experts]], fqns: Sequence[str], setting: str, ranks: int
) -> list[str]:
    if not experts:
        return ["the model has no experts, so there is nothing to convert; take the converter out of model.converters"]
    if not fqns:
        return [f"{setting} names nothing, so nothing would be converted; set it to experts"]
    names = [name for name, _ in model.named_modules() if name]
    problems = check_patterns(fqns, names, setting=setting, may_match_nothing=False)
    without = [pattern for pattern in fqns if not any(_is_named([pattern], fqn) for fqn in experts)]
    if not problems and without:
        problems.append(
            f"{setting}: {', '.join(map(repr, without))} matches no experts of the model; set it to experts"
        )
    for fqn, (_, each) in experts.items():
        if not _is_named(fqns, fqn):
            continue
        if isinstance(each, Float8Experts):
            problems.append(f"{fqn}: its experts are converted to float8 already; leave it out of {setting}")
        elif type(each) is not Experts:
            problems.append(f"{fqn}: it is a {type(each).__qualname__}, which computes otherwise; leave it out")
        for name, weight in each.named_parameters():
            _, *dims = _local_shape(name, weight, ranks)
            if any(size % ALIGNMENT for size in dims):
                whose = "an expert" if ranks == 1 else f"the part of an expert on one of {ranks} ranks"
                problems.append(
                    f"{fqn}.{name}: {whose} is {' x '.join(map(str, dims))}, and float8 needs multiples of "
                    f"{ALIGNMENT}; leave it out of {setting}"
                )
    return problems


def _local_shape(name: str, weight: Tensor, ranks: int) -> tuple[int, ...]:
    """The shape of a weight of experts of which each rank has some hidden features; how many experts it has is not
    known here."""
    experts, n, k = weight.shape
    return (experts, n, k // ranks) if name == "w2" else (experts, n // ranks, k)


def _rows(
    fqn: str, experts: Experts, is_named: bool, everywhere: dict[str, tuple[MoE, Experts]], ranks: int
) -> list[ReportRow]:
    total = sum(weight.numel() for _, each in everywhere.values() for weight in each.parameters())
    return [
        ReportRow(
            f"{fqn}.{name}",
            tuple(weight.shape),
            _local_shape(name, weight, ranks),
            recipe=RECIPE if is_named else None,
            reason=None if is_named else "no pattern of fqns",
            flop_share=weight.numel() / max(total, 1),
            assigned=RECIPE,
        )
        for name, weight in experts.named_parameters()
    ]
