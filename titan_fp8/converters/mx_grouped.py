"""The converter `quantize.grouped_mm.mx`: experts of a mixture of experts multiply in MXFP8.

What becomes of their weights is told in `mx_weights.py`. All problems are collected and raised at once, with the model
unchanged. Experts that no pattern names stay in bf16.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from titan_fp8.converters.config import MXGroupedSection
from titan_fp8.converters.filters import check_patterns, first_match
from titan_fp8.converters.grouped_experts import ORDER, experts_of, local_shape
from titan_fp8.converters.mx_weights import MXWeights, gather_problem, plan_weights, prepare_weights
from titan_fp8.converters.protocol import ConversionError, Placement, modules_of
from titan_fp8.converters.report import ConversionReport, ReportRow
from titan_fp8.converters.support import resolve_mx_emulation
from titan_fp8.kernels.float8 import has_triton
from titan_fp8.kernels.moe.functions import Rows
from titan_fp8.kernels.mx import BLOCK
from titan_fp8.models.moe import Experts, MoE
from titan_fp8.quantization.fsdp_weight import cast_ahead
from titan_fp8.quantization.linear import with_state_of
from titan_fp8.quantization.mx_grouped import MXGroupedConfig, mx_grouped_feed_forward
from titan_fp8.quantization.mx_recipes import GROUPED_RECIPE
from titan_fp8.quantization.mx_sharded import OPTION, MXWeightState, shard_problem
from titan_fp8.quantization.mx_weight import MXWeightCache, made_of
from titan_fp8.quantization.weights import mark_stepped
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

NAME = "quantize.grouped_mm.mx"


class MXFP8Experts(Experts):
    """Experts whose products run in MXFP8. The parameters are the same objects, in high precision.

    Attributes:
        config: how they compute.
        weight_caches: parameter -> its operands, kept from one optimizer step to the next; None: they are not.
        fsdp_weight_states: parameter -> what is known of it, if it is made to be gathered as codes.
    """

    config: MXGroupedConfig
    weight_caches: dict[str, MXWeightCache] | None = None
    fsdp_weight_states: dict[str, MXWeightState] | None = None

    @property
    def reads_master_weights(self) -> bool:
        """Whether codes are computed from the bits of the gathered parameters, which nobody may round before."""
        return self.fsdp_weight_states is None

    def forward(self, x: Tensor | Rows, ends: Tensor) -> Tensor:
        """As in `Experts`; groups are multiples of 32 rows."""
        rows = x if isinstance(x, Tensor) else x.make()
        weights, caches = self.weights(), self.weight_caches or {}
        made = [made_of(self, name, weight, caches.get(name)) for name, weight in zip(ORDER, weights, strict=True)]
        y = mx_grouped_feed_forward(rows, weights, ends, self.config, made)
        return y if isinstance(x, Tensor) else x.bring_back(y)

    def extra_repr(self) -> str:
        """The recipe, and whether it is emulated."""
        return f"{GROUPED_RECIPE.name}{', emulated' if self.config.emulate else ''}"


class MXGroupedConverter:
    """The converter of one `[quantize.grouped_mm.mx]` section for one device and mesh; see `protocol.Converter`."""

    name = NAME

    def __init__(self, section: MXGroupedSection, device: DeviceCapabilities, placement: Placement) -> None:
        self._section, self._device, self._placement = section, device, placement

    def convert(self, model: nn.Module) -> ConversionReport:
        """Convert in place; see `convert_mx_grouped`."""
        section = self._section
        return convert_mx_grouped(
            model,
            section.patterns(),
            self._device,
            emulate=section.emulate,
            placement=self._placement,
            gathers_codes=section.enable_fsdp_mxfp8_all_gather,
            cache_weights=True,
            prefix=f"{NAME}.",
        )

    def pre_training(self, model_parts: Sequence[nn.Module]) -> None:
        """The codes of the first step, where they are gathered; elsewhere the first forward pass begins with them."""
        for part in model_parts:
            cast_ahead(modules_of(part, MXFP8Experts))

    def post_optimizer(self, model_parts: Sequence[nn.Module]) -> None:
        """The weights have changed, so their codes are stale; those that are gathered are made again at once."""
        for part in model_parts:
            mark_stepped(modules_of(part, MXFP8Experts))
        self.pre_training(model_parts)


def convert_mx_grouped(
    model: nn.Module,
    fqns: Sequence[str],
    device: DeviceCapabilities,
    *,
    emulate: object = False,
    placement: Placement | None = None,
    gathers_codes: bool = False,
    cache_weights: bool = False,
    prefix: str = "",
    problems: Sequence[str] = (),
) -> ConversionReport:
    """Let the experts of `model` that `fqns` names multiply in MXFP8, in place.

    Args:
        model: has layers with experts (`titan_fp8.models.moe.MoE`); on any device.
        fqns: patterns of names.
        device: what training runs on.
        emulate: see `MXGroupedSection`.
        placement: where the parameters will lie; None if nobody knows.
        gathers_codes: FSDP gathers codes.
        cache_weights: keep the codes of weights from one optimizer step to the next.
        prefix: what stands before a setting's name in messages.
        problems: what is wrong already, to be raised with all else.

    Raises:
        ConversionError: with everything that is wrong; the model is then unchanged.
    """
    experts, whole = experts_of(model), placement or Placement()
    ranks = whole.expert_tensor
    problems = [*problems, *_problems(model, experts, fqns, f"{prefix}fqns", ranks)]
    if gathers_codes and not problems:
        problems = _gather_problems(
            {fqn: each for fqn, (_, each) in experts.items() if _is_named(fqns, fqn)}, whole, prefix
        )
    emulated, mode = False, "native"
    try:
        emulated, mode = resolve_mx_emulation(emulate, GROUPED_RECIPE, device, setting=f"{prefix}emulate")
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise ConversionError(problems)
    rows = [row for fqn, (_, each) in experts.items() for row in _rows(fqn, each, _is_named(fqns, fqn), experts, ranks)]
    config = MXGroupedConfig(GROUPED_RECIPE.mode, emulated)
    converted: dict[str, nn.Module] = {}
    for fqn, (layer, each) in experts.items():
        if _is_named(fqns, fqn):
            layer.experts = converted[fqn] = _converted(each, config)
            layer.dispatcher.alignment = BLOCK
    weights = _plan(placement, gathers_codes=gathers_codes, caches=cache_weights)
    prepare_weights(model, converted, ORDER, config.weight_cast, weights, cache_weights)
    kernels = "triton" if device.kind == "cuda" and has_triton() else "torch"
    return ConversionReport(
        NAME, {GROUPED_RECIPE.name: mode}, kernels, weights.value, rows=rows, what="weights of experts"
    )


def _is_named(fqns: Sequence[str], fqn: str) -> bool:
    return first_match(fqns, fqn) is not None


def _converted(experts: Experts, config: MXGroupedConfig) -> MXFP8Experts:
    converted = with_state_of(experts, MXFP8Experts)
    converted.config = config
    return converted


def _plan(placement: Placement | None, *, gathers_codes: bool, caches: bool) -> MXWeights:
    if placement is not None and placement.experts_stay:
        placement = None  # as on one process
    shards = 1 if placement is None else placement.expert_shards
    return plan_weights(placement, gathers_codes=gathers_codes, caches=caches, shards=shards)


def _gather_problems(experts: dict[str, Experts], placement: Placement, prefix: str) -> list[str]:
    """Why weights of experts cannot be gathered as codes, one message each."""
    if placement.experts_stay:
        return [f"{prefix}{OPTION}: each rank has its experts for good, so nothing is gathered; leave it out"]
    problems, shards = [], placement.expert_shards
    for fqn, each in experts.items():
        for name, weight in each.named_parameters():
            shape = local_shape(name, weight, placement.expert_tensor)
            shape = shape[0] // placement.expert, *shape[1:]
            # As FSDP cuts them (`parallel/fsdp.py`).
            dim = 0 if shape[0] % shards == 0 or shape[1] % shards else 1
            reason = shard_problem(shape, dim, shards)
            if reason:
                part = " x ".join(map(str, shape))
                problems.append(gather_problem(f"{fqn}.{name}: {part} on a rank: {reason}", f"{prefix}fqns", prefix))
    return problems


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
