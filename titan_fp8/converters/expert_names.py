"""Which experts of a model `fqns` names, for both converters of experts: what is wrong with it, and a report's rows.

Of those, `filter_fqns` of `quantize.grouped_mm.float8` leaves some alone, by their names or as too small to gain.
"""

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from titan_fp8.converters.filters import AUTO_FILTER, check_patterns, first_match
from titan_fp8.converters.grouped_experts import local_shape
from titan_fp8.converters.other_experts import holder_problems, holders_of, weight_problems, weights_of
from titan_fp8.converters.report import ReportRow
from titan_fp8.converters.size_rule import EXPERTS_RULE, experts_are_too_small
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


def format_problems(fqn: str, experts: Experts, setting: str) -> list[str]:
    """Why experts of ours that `setting` names cannot be replaced, if they are not as a model has them at first: they
    have a format already, or somebody's own way to compute."""
    if type(experts) is Experts:
        return []
    what = f"{fqn}: its experts are a {type(experts).__qualname__}"
    if not hasattr(experts, "config"):
        return [f"{what}, which computes otherwise than experts that can be converted; leave it out of {setting}"]
    return [
        f"{what} ({experts.extra_repr()}), and experts have one format; leave it out of {setting}, or take the other "
        "converter out"
    ]


def problems_of_others(
    model: nn.Module,
    others: Mapping[str, nn.Module],
    fqns: Sequence[str],
    products: GroupedFormat,
    prefix: str,
    *,
    kept: bool,
    aligned: bool,
    filtered: bool = False,
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
        filtered: the converter has `filter_fqns`.
    """
    setting = f"{prefix}fqns"
    problems = [*holder_problems(holders_of(model), lambda fqn: is_named(fqns, fqn), products, setting)]
    for fqn, module in others.items():
        problems += weight_problems(fqn, module, products, setting, remedy_by_name(fqn, prefix, filtered=filtered))
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


def remedy_by_name(fqn: str, prefix: str, *, filtered: bool) -> str:
    """How experts are left alone that cannot be converted. filtered: also by `filter_fqns`."""
    return (f"name {fqn} in {prefix}filter_fqns, or " if filtered else "") + f"leave it out of {prefix}fqns"


def reasons_to_stay(
    ours: Mapping[str, Experts], others: Collection[str], filter_fqns: Sequence[str], ranks: int
) -> dict[str, str]:
    """Name -> why experts stay in bf16 that `fqns` names, for those that do.

    Args:
        ours, others: what is named; of the latter the names.
        filter_fqns: patterns, and the rule of size, which counts for ours.
        ranks: over which the hidden features of each expert will be divided.
    """
    patterns = [pattern for pattern in filter_fqns if pattern != AUTO_FILTER]
    matched = {fqn: first_match(patterns, fqn) for fqn in (*ours, *others)}
    reasons = {fqn: f'filter "{pattern}"' for fqn, pattern in matched.items() if pattern is not None}
    for fqn, each in ours.items() if AUTO_FILTER in filter_fqns else ():
        _, hidden, features = local_shape("w1", each.w1, ranks)
        if experts_are_too_small(features, hidden):
            reasons.setdefault(fqn, AUTO_FILTER)
    return reasons


def filter_problems(
    model: nn.Module,
    ours: Collection[str],
    others: Collection[str],
    filter_fqns: Sequence[str],
    reasons: Mapping[str, str],
    prefix: str,
) -> list[str]:
    """What is wrong with `filter_fqns`, one message each, given the names of experts that `fqns` names and what
    `reasons_to_stay` says of them."""
    setting, named = f"{prefix}filter_fqns", (*ours, *others)
    modules = [name for name, _ in model.named_modules() if name]
    problems = check_patterns(filter_fqns, modules, setting=setting, may_match_nothing=False)
    patterns = [pattern for pattern in filter_fqns if pattern != AUTO_FILTER]
    idle = [pattern for pattern in patterns if not any(is_named([pattern], fqn) for fqn in named)]
    if named and idle and not problems:
        problems.append(
            f"{setting}: {', '.join(map(repr, idle))} matches no experts that {prefix}fqns names, and has no effect; "
            "correct it or take it out"
        )
    by_size = AUTO_FILTER in filter_fqns
    if named and all(fqn in reasons for fqn in named):
        problems.append(_nothing_left(setting, reasons, prefix))
    unknown = [fqn for fqn in others if fqn not in reasons]
    if by_size and unknown:
        problems.append(
            f"{setting}: {AUTO_FILTER!r} goes by features and hidden features, and weights of experts that are not "
            f"this package's do not say which is which ({', '.join(unknown)}); name those that are too small instead"
        )
    return problems


def _nothing_left(setting: str, reasons: Mapping[str, str], prefix: str) -> str:
    problem = f"{setting} leaves all experts alone that {prefix}fqns names"
    small = list(reasons.values()).count(AUTO_FILTER)
    if not small:
        return f"{problem}, so nothing would run in float8"
    other = "take the converter out of model.converters" if prefix else "do not convert the model"
    return (
        f"{problem}, {small} of {len(reasons)} by {AUTO_FILTER} as too small to gain (features K and hidden features H "
        f"on a rank: {EXPERTS_RULE.in_words()}, or 16 does not divide both), so nothing would run in float8; "
        f"take {AUTO_FILTER} out of it, or {other}"
    )


def expert_rows(
    experts: Mapping[str, tuple[MoE, Experts]],
    others: Mapping[str, nn.Module],
    fqns: Sequence[str],
    ranks: int,
    recipe: str,
    reasons: Mapping[str, str] | None = None,
) -> list[ReportRow]:
    """A row for each weight of all experts of ours, and of others that are named. What of the latter a grouped product
    multiplies is known once they run; that runs in 8 bits. reasons: see `reasons_to_stay`."""
    unnamed = {fqn: "no pattern of fqns" for fqn in experts if not is_named(fqns, fqn)}
    stay = unnamed | dict(reasons or {})
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
            recipe=None if fqn in stay else recipe,
            reason=stay.get(fqn),
            flop_share=weight.numel() / max(total, 1),
            assigned=recipe,
        )
        for fqn, name, weight, is_ours in weights
    ]
