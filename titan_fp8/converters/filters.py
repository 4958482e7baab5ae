"""Which modules a converter leaves alone: by name, and by size.

A pattern is one or more components, `attention.wk`. It matches a module when its components stand as one contiguous
run anywhere in the module's name, so `output` matches `output` and `head.output.proj`, `layers.1` matches that layer
and all below it but never `layers.10`, and `experts` never `shared_experts`. `*` stands for any characters within one
component: `layers.*.wo`, `w*`.

A pattern that matches nothing is a mistake, and is answered with the names nearest to it.
"""

from collections.abc import Iterable, Sequence

from titan_fp8.runtime.patterns import matches
from titan_fp8.runtime.suggest import did_you_mean

AUTO_FILTER = "auto_filter_small_kn"
"""Stands in a list of patterns for the rule of size below."""


def first_match(patterns: Iterable[str], fqn: str) -> str | None:
    """The first pattern that matches `fqn`."""
    return next((pattern for pattern in patterns if matches(pattern, fqn)), None)


def check_patterns(patterns: Sequence[str], fqns: Sequence[str], *, setting: str, may_match_nothing: bool) -> list[str]:
    """What is wrong with `patterns` for a model whose modules are called `fqns`, one message each.

    Args:
        patterns: the patterns, `auto_filter_small_kn` among them or not.
        fqns: names of all modules.
        setting: name of the setting, for the messages.
        may_match_nothing: the patterns are a default that nobody asked for, so one without a match is no mistake.
    """
    problems = []
    for pattern in patterns:
        if pattern == AUTO_FILTER:
            continue
        if not pattern or not all(pattern.split(".")) or pattern != "".join(pattern.split()):
            problems.append(
                f"{setting}: {pattern!r} is not a module name; write components joined by single dots, without spaces"
            )
        elif not may_match_nothing and not any(matches(pattern, fqn) for fqn in fqns):
            length = pattern.count(".") + 1
            candidates = [AUTO_FILTER, *_runs(fqns, length)]
            problems.append(
                f"{setting}: {pattern!r} matches no module of the model{did_you_mean(pattern, candidates)}; "
                "correct it or take it out"
            )
    return problems


def _runs(fqns: Iterable[str], length: int) -> list[str]:
    """All distinct runs of `length` components, those at the end of a name first."""
    split = [fqn.split(".") for fqn in fqns]
    longest = max((len(parts) for parts in split), default=0)
    runs = dict.fromkeys(
        ".".join(parts[len(parts) - length - back : len(parts) - back])
        for back in range(longest)
        for parts in split
        if len(parts) - length - back >= 0
    )
    return list(runs)


def is_too_small(recipe_name: str, in_features: int, out_features: int) -> bool:
    """The rule `auto_filter_small_kn`: whether a linear of these dimensions is faster left in bf16.

    Thresholds as published by torchao, measured on an H100 with the microbenchmark layer norm -> linear -> sigmoid.
    """
    k, n = in_features, out_features
    if k % 16 or n % 16:
        return True
    if recipe_name == "tensorwise":
        return k <= 4096 and n <= 1024
    if recipe_name == "rowwise":
        return n <= 2048 or k <= 1024 or (n <= 4096 and k <= 2048)
    raise ValueError(f"no size thresholds are known for recipe {recipe_name!r}")
