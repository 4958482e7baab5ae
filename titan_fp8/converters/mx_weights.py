"""What becomes of the weights of a model that is converted to MXFP8, linears and experts, by where they will lie:

one process            quantized once an optimizer step, and kept as they are multiplied
FSDP, FP8 all-gather   shards are quantized once an optimizer step, and codes are gathered
copies, no shards      the same, with nothing to gather: the whole weight is the shard
FSDP otherwise         gathered in high precision, and quantized in each forward and each backward pass
"""

from collections.abc import Mapping, Sequence
from enum import Enum

from torch import nn

from titan_fp8.converters.protocol import Placement
from titan_fp8.quantization.fsdp_weight import wrap_mx_weights_for_fsdp
from titan_fp8.quantization.mx_sharded import OPTION
from titan_fp8.quantization.mx_weight import Cast, MXWeightCache
from titan_fp8.quantization.weights import StepWatch, refresh_before_forward, watch_module


class MXWeights(Enum):
    """What becomes of the weights, in the words of a report."""

    GATHERED_CODES = "cast shard by shard, gathered as MXFP8 codes"
    SHARD_CODES = "cast once an optimizer step on each rank"
    GATHERED = "gathered in high precision, cast in each forward and each backward pass"
    CACHED = "cast once an optimizer step"
    CAST = "cast in each forward and each backward pass"


def plan_weights(
    placement: Placement | None, *, gathers_codes: bool, caches: bool, shards: int, divided: bool = False
) -> MXWeights:
    """What becomes of the weights.

    Args:
        placement: where the parameters will lie; None if nobody knows.
        gathers_codes: the option for it is on.
        caches: codes may be kept from one optimizer step to the next.
        shards: of a weight.
        divided: something else reads one of the weights.
    """
    if gathers_codes:
        return MXWeights.GATHERED_CODES
    if placement is not None and placement.is_managed:
        whole = shards == 1 and not placement.offloaded and not divided
        return MXWeights.SHARD_CODES if whole else MXWeights.GATHERED
    return MXWeights.CACHED if caches else MXWeights.CAST


def prepare_weights(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    names: Sequence[str],
    cast: Cast,
    weights: MXWeights,
    caches: bool,
) -> None:
    """Set up what casts the weights of converted modules of `model`.

    Args:
        model: what they are in.
        modules: name -> linear or experts, all converted.
        names: of their parameters.
        cast: how the weights are cast.
        weights: what becomes of them.
        caches: codes of shards serve until the weight changes.
    """
    if weights in (MXWeights.GATHERED_CODES, MXWeights.SHARD_CODES):
        wrap_mx_weights_for_fsdp(modules, cast.mode, names=names, kernel=cast.kernel, cache=caches)
    elif weights is MXWeights.CACHED:
        _cache_weights(model, modules, names, cast)


def gather_problem(what: str, setting: str, prefix: str) -> str:
    """What cannot be gathered as codes, in a message with the remedies."""
    return (
        f"{what}, so {prefix}{OPTION} cannot gather it as codes; take another number of shards, leave it out with "
        f"{setting}, or turn the option off"
    )


def _cache_weights(model: nn.Module, modules: Mapping[str, nn.Module], names: Sequence[str], cast: Cast) -> None:
    """Let modules of `model` keep the operands of their weights from one optimizer step to the next; those that share a
    parameter share them."""
    watch = StepWatch()
    caches: dict[int, MXWeightCache] = {}
    for module in modules.values():
        of_module: dict[str, MXWeightCache] = {}
        for name in names:
            weight = getattr(module, name)
            if id(weight) not in caches:
                caches[id(weight)] = MXWeightCache(cast, watch=watch)
            of_module[name] = caches[id(weight)]
        if list(names) == ["weight"]:
            module.__dict__["weight_cache"] = of_module["weight"]
        else:
            module.__dict__["weight_caches"] = of_module
        watch_module(module)
    refresh_before_forward(model)
