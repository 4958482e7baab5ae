"""Which experts of a model `fqns` names, for both converters of experts: what is wrong with it, and a report's rows."""

from collections.abc import Mapping, Sequence

from torch import nn

from titan_fp8.converters.filters import check_patterns, first_match
from titan_fp8.converters.grouped_experts import local_shape
from titan_fp8.converters.other_experts import holder_problems, holders_of, weight_problems, weights_of
from titan_fp8.converters.report import ReportRow
from titan_fp8.models.moe import Experts, MoE
from titan_fp8.quantization.grouped_product import GroupedFormat


def is_named(fqns: Sequence[str], fqn: str) -> bool:
    """Whether one of the patterns matches a name."""
    return first_match(fqns, fqn) is not None


def name_problems(
    model: nn.Module,
    experts: Mapping[str, tuple[MoE, Experts]],
    others: Mapping[str, nn.Module],
    fqns: Sequence[str],
    products: GroupedFormat,
    prefix: str,
) -> list[str]:
    """What is wrong with the patterns, one message each, given all experts of the model, ours and others."""
    setting = f"{prefix}fqns"
    modules = {name: module for name, module in model.named_modules() if name}
    if not experts and not others and not any(is_named(fqns, name) for name in modules):
        remedy = (
            "; take the converter out of model.converters"
            if prefix
            else ": no titan_fp8.models.moe.MoE, and no module with parameters [E, ...] of three dimensions"
        )
        return [f"the model has no experts, so there is nothing to convert{remedy}"]
    if not fqns:
        return [f"{setting} names nothing, so nothing would be converted; set it to experts"]
    problems = check_patterns(fqns, list(modules), setting=setting, may_match_nothing=False)
    known = [*experts, *others, *holders_of(model)]
    without = [pattern for pattern in fqns if not any(is_named([pattern], fqn) for fqn in known)]
    if not problems and without:
        named = ", ".join(map(repr, without))
        unfit = [module for name, module in modules.items() if is_named(without, name)]
        missing = "experts of the model; set it to experts" if experts else _what_is_missing(unfit, products)
        problems.append(f"{setting}: {named} matches no {missing}")
    return problems


def _what_is_missing(unfit: Sequence[nn.Module], products: GroupedFormat) -> str:
    linears = any(isinstance(module, nn.Linear) for module in unfit)
    by = f"linears are converted by convert_to_{products.name.lower()}_training"
    return "module that has weights of experts, parameters of three dimensions [E, ...]; " + (
        by if linears else "correct it or take it out"
    )


def problems_of_others(
    model: nn.Module,
    others: Mapping[str, nn.Module],
    fqns: Sequence[str],
    products: GroupedFormat,
    prefix: str,
    *,
    kept: bool,
    aligned: bool,
) -> list[str]:
    """What is wrong with experts that are not ours, one message each.

    Args:
        model: what they are in.
        others: those that are named.
        fqns: the patterns.
        products: how they are to compute.
        prefix: what stands before a setting's name in messages.
        kept: codes of weights are to be kept or gathered.
        aligned: groups are said to be multiples of what the format needs.
    """
    setting = f"{prefix}fqns"
    problems = [*holder_problems(holders_of(model), lambda fqn: is_named(fqns, fqn), products, setting)]
    for fqn, module in others.items():
        problems += weight_problems(fqn, module, products, setting)
    if others and kept:
        gather = f"enable_fsdp_{products.name.lower()}_all_gather"
        problems.append(
            f"{', '.join(others)}: weights of experts that are not this package's are cast in each pass; turn "
            f"cache_weights and {gather} off, or convert them by themselves"
        )
    if aligned and not others:
        problems.append(
            "aligned_groups = True has no effect: it is for experts that are not this package's, and none are named; "
            "leave it out"
        )
    return problems


def expert_rows(
    experts: Mapping[str, tuple[MoE, Experts]],
    others: Mapping[str, nn.Module],
    fqns: Sequence[str],
    ranks: int,
    recipe: str,
) -> list[ReportRow]:
    """A row for each weight of all experts of ours, and of others that are converted. What of the latter a grouped
    product multiplies is known once they run; that runs in 8 bits."""
    weights = [
        (fqn, name, weight, True) for fqn, (_, each) in experts.items() for name, weight in each.named_parameters()
    ]
    weights += [(fqn, *item, False) for fqn, module in others.items() for item in weights_of(module).items()]
    total = sum(weight.numel() for _, _, weight, _ in weights)
    return [
        ReportRow(
            f"{fqn}.{name}",
            tuple(weight.shape),
            local_shape(name, weight, ranks) if is_ours else tuple(weight.shape),
            recipe=recipe if is_named(fqns, fqn) else None,
            reason=None if is_named(fqns, fqn) else "no pattern of fqns",
            flop_share=weight.numel() / max(total, 1),
            assigned=recipe,
        )
        for fqn, name, weight, is_ours in weights
    ]
