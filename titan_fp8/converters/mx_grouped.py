"""The converter `quantize.grouped_mm.mx`: experts of a mixture of experts multiply in MXFP8.

Ours are replaced; other people's stay what they are (`other_experts.py`). What becomes of weights is told in
`mx_weights.py`. All problems are collected and raised at once, with the model
unchanged. Experts that no pattern names stay in bf16.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from titan_fp8.converters.config import MXGroupedSection
from titan_fp8.converters.expert_names import (
    expert_rows,
    format_problems,
    is_named,
    name_problems,
    problems_of_others,
)
from titan_fp8.converters.grouped_experts import ORDER, experts_of, local_shape
from titan_fp8.converters.mx_weights import MXWeights, gather_problem, plan_weights, prepare_weights
from titan_fp8.converters.other_experts import convert_other_experts, other_experts_of
from titan_fp8.converters.protocol import ConversionError, Placement, modules_of
from titan_fp8.converters.report import ConversionReport
from titan_fp8.converters.support import resolve_mx_emulation
from titan_fp8.kernels.float8 import has_triton
from titan_fp8.kernels.moe.functions import Rows
from titan_fp8.kernels.mx import BLOCK
from titan_fp8.models.moe import Experts
from titan_fp8.quantization.fsdp_weight import cast_ahead
from titan_fp8.quantization.linear import with_state_of
from titan_fp8.quantization.mx_grouped import MXGroupedConfig, mx_grouped_feed_forward
from titan_fp8.quantization.mx_grouped_product import MXProducts
from titan_fp8.quantization.mx_recipes import GROUPED_RECIPE
from titan_fp8.quantization.mx_sharded import OPTION, MXWeightState, shard_problem
from titan_fp8.quantization.mx_weight import MXWeightCache, made_of
from titan_fp8.quantization.weights import mark_stepped
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

NAME = "quantize.grouped_mm.mx"
PRODUCTS = MXProducts(MXGroupedConfig(GROUPED_RECIPE.mode))
"""What products of other people's experts need, however they compute."""


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
    aligned_groups: bool = False,
    prefix: str = "",
    problems: Sequence[str] = (),
) -> ConversionReport:
    """Let the experts of `model` that `fqns` names multiply in MXFP8, in place.

    Args:
        model: has layers with experts (`titan_fp8.models.moe.MoE`), or modules as in `other_experts.py`; on any device.
        fqns: patterns of names.
        device: what training runs on.
        emulate: see `MXGroupedSection`.
        placement: where the parameters will lie; None if nobody knows.
        gathers_codes: FSDP gathers codes.
        cache_weights: keep the codes of weights from one optimizer step to the next.
        aligned_groups: groups of other people's experts are multiples of 32 rows.
        prefix: what stands before a setting's name in messages.
        problems: what is wrong already, to be raised with all else.

    Raises:
        ConversionError: with everything that is wrong; the model is then unchanged.
    """
    experts, others, whole = experts_of(model), other_experts_of(model), placement or Placement()
    ranks, kept = whole.expert_tensor, gathers_codes or cache_weights
    problems = [*problems, *name_problems(model, experts, others, fqns, PRODUCTS, prefix)]
    others = {fqn: module for fqn, module in others.items() if is_named(fqns, fqn)}
    named = {fqn: each for fqn, (_, each) in experts.items() if is_named(fqns, fqn)}
    problems += _problems(named, f"{prefix}fqns", ranks)
    problems += problems_of_others(model, others, fqns, PRODUCTS, prefix, kept=kept, aligned=aligned_groups)
    if gathers_codes and not problems:
        problems = _gather_problems(named, whole, prefix)
    emulated, mode = False, "native"
    try:
        emulated, mode = resolve_mx_emulation(emulate, GROUPED_RECIPE, device, setting=f"{prefix}emulate")
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise ConversionError(problems)
    rows = expert_rows(experts, others, fqns, ranks, GROUPED_RECIPE.name)
    config = MXGroupedConfig(GROUPED_RECIPE.mode, emulated)
    converted: dict[str, nn.Module] = {}
    for fqn, each in named.items():
        layer, _ = experts[fqn]
        layer.experts = converted[fqn] = _converted(each, config)
        layer.dispatcher.alignment = BLOCK
    for fqn, module in others.items():
        convert_other_experts(fqn, module, MXProducts(config), aligned=aligned_groups)
    weights = _plan(placement, gathers_codes=gathers_codes, caches=cache_weights)
    prepare_weights(model, converted, ORDER, config.weight_cast, weights, cache_weights)
    kernels = "triton" if device.kind == "cuda" and has_triton() else "torch"
    return ConversionReport(
        NAME, {GROUPED_RECIPE.name: mode}, kernels, weights.value, rows=rows, what="weights of experts"
    )


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


def _problems(named: Mapping[str, Experts], setting: str, ranks: int) -> list[str]:
    """What is wrong with experts of ours that are named, one message each."""
    problems = []
    for fqn, each in named.items():
        problems += format_problems(fqn, each, setting)
        for name, weight in each.named_parameters():
            _, *dims = local_shape(name, weight, ranks)
            if any(size % BLOCK for size in dims):
                whose = "an expert" if ranks == 1 else f"the part of an expert on one of {ranks} ranks"
                problems.append(
                    f"{fqn}.{name}: {whose} is {' x '.join(map(str, dims))}, and MXFP8 needs multiples of {BLOCK}; "
                    f"leave it out of {setting}"
                )
    return problems
