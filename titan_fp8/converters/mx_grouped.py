"""The converter `quantize.grouped_mm.mx`: experts of a mixture of experts multiply in MXFP8.

All problems are collected and raised at once, with the model unchanged. Experts that no pattern names stay in bf16.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from titan_fp8.converters.config import MXGroupedSection
from titan_fp8.converters.filters import check_patterns, first_match
from titan_fp8.converters.grouped_experts import experts_of, local_shape
from titan_fp8.converters.protocol import ConversionError, Placement
from titan_fp8.converters.report import ConversionReport, ReportRow
from titan_fp8.converters.support import resolve_mx_emulation
from titan_fp8.kernels.float8 import has_triton
from titan_fp8.kernels.moe.functions import Rows
from titan_fp8.kernels.mx import BLOCK
from titan_fp8.models.moe import Experts, MoE
from titan_fp8.quantization.linear import with_state_of
from titan_fp8.quantization.mx_grouped import MXGroupedConfig, mx_grouped_feed_forward
from titan_fp8.quantization.mx_recipes import GROUPED_RECIPE
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

NAME = "quantize.grouped_mm.mx"
WEIGHTS = "cast in each forward and each backward pass"


class MXFP8Experts(Experts):
    """Experts whose products run in MXFP8. The parameters are the same objects, in high precision.

    Attributes:
        config: how they compute.
    """

    config: MXGroupedConfig
    reads_master_weights: ClassVar[bool] = True
    """Codes are those of the weights in full, whatever lower precision FSDP could gather them in."""

    def forward(self, x: Tensor | Rows, ends: Tensor) -> Tensor:
        """As in `Experts`; groups are multiples of 32 rows."""
        rows = x if isinstance(x, Tensor) else x.make()
        y = mx_grouped_feed_forward(rows, self.weights(), ends, self.config)
        return y if isinstance(x, Tensor) else x.bring_back(y)

    def extra_repr(self) -> str:
        """The recipe, and whether it is emulated."""
        return f"{GROUPED_RECIPE.name}{', emulated' if self.config.emulate else ''}"


class MXGroupedConverter:
    """The converter of one `[quantize.grouped_mm.mx]` section for one device and mesh; see `protocol.Converter`."""

    name = NAME

    def __init__(self, section: MXGroupedSection, device: DeviceCapabilities, placement: Placement) -> None:
        self._section, self._device, self._ranks = section, device, placement.expert_tensor

    def convert(self, model: nn.Module) -> ConversionReport:
        """Convert in place; see `convert_mx_grouped`."""
        section = self._section
        return convert_mx_grouped(
            model, section.patterns(), self._device, emulate=section.emulate, ranks=self._ranks, prefix=f"{NAME}."
        )

    def pre_training(self, model_parts: Sequence[nn.Module]) -> None:
        """Nothing: the first forward pass quantizes the weights."""

    def post_optimizer(self, model_parts: Sequence[nn.Module]) -> None:
        """Nothing: each forward pass quantizes the weights."""


def convert_mx_grouped(
    model: nn.Module,
    fqns: Sequence[str],
    device: DeviceCapabilities,
    *,
    emulate: object = False,
    ranks: int = 1,
    prefix: str = "",
) -> ConversionReport:
    """Let the experts of `model` that `fqns` names multiply in MXFP8, in place.

    Args:
        model: has layers with experts (`titan_fp8.models.moe.MoE`); on any device.
        fqns: patterns of names.
        device: what training runs on.
        emulate: see `MXGroupedSection`.
        ranks: over which the hidden features of each expert will be divided.
        prefix: what stands before a setting's name in messages.

    Raises:
        ConversionError: with everything that is wrong; the model is then unchanged.
    """
    experts = experts_of(model)
    problems = _problems(model, experts, fqns, f"{prefix}fqns", ranks)
    emulated, mode = False, "native"
    try:
        emulated, mode = resolve_mx_emulation(emulate, GROUPED_RECIPE, device, setting=f"{prefix}emulate")
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise ConversionError(problems)
    rows = [row for fqn, (_, each) in experts.items() for row in _rows(fqn, each, _is_named(fqns, fqn), experts, ranks)]
    config = MXGroupedConfig(GROUPED_RECIPE.mode, emulated)
    for fqn, (layer, each) in experts.items():
        if _is_named(fqns, fqn):
            layer.experts = _converted(each, config)
            layer.dispatcher.alignment = BLOCK
    kernels = "triton" if device.kind == "cuda" and has_triton() else "torch"
    return ConversionReport(NAME, {GROUPED_RECIPE.name: mode}, kernels, WEIGHTS, rows=rows, what="weights of experts")


def _is_named(fqns: Sequence[str], fqn: str) -> bool:
    return first_match(fqns, fqn) is not None


def _converted(experts: Experts, config: MXGroupedConfig) -> MXFP8Experts:
    converted = with_state_of(experts, MXFP8Experts)
    converted.config = config
    return converted


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
        named = ", ".join(map(repr, without))
        problems.append(f"{setting}: {named} matches no experts of the model; set it to experts")
    for fqn, (_, each) in experts.items():
        if not _is_named(fqns, fqn):
            continue
        if type(each) is not Experts:
            how = getattr(each, "extra_repr", str)()
            problems.append(
                f"{fqn}: its experts are a {type(each).__qualname__} ({how}), and experts have one format; leave it "
                f"out of {setting}, or take the other converter out"
            )
        for name, weight in each.named_parameters():
            _, *dims = local_shape(name, weight, ranks)
            if any(size % BLOCK for size in dims):
                whose = "an expert" if ranks == 1 else f"the part of an expert on one of {ranks} ranks"
                problems.append(
                    f"{fqn}.{name}: {whose} is {' x '.join(map(str, dims))}, and MXFP8 needs multiples of {BLOCK}; "
                    f"leave it out of {setting}"
                )
    return problems


def _rows(
    fqn: str, experts: Experts, is_named: bool, every: dict[str, tuple[MoE, Experts]], ranks: int
) -> list[ReportRow]:
    total = sum(weight.numel() for _, each in every.values() for weight in each.parameters())
    reason = None if is_named else "no pattern of fqns"
    return [
        ReportRow(
            f"{fqn}.{name}",
            tuple(weight.shape),
            local_shape(name, weight, ranks),
            recipe=GROUPED_RECIPE.name if is_named else None,
            reason=reason,
            flop_share=weight.numel() / max(total, 1),
            assigned=GROUPED_RECIPE.name,
        )
        for name, weight in experts.named_parameters()
    ]
