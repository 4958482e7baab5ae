"""Patterns of module names: which modules a converter leaves alone, and which recipe a module gets.

A pattern is one or more components, `attention.wk`. It matches a module when its components stand as one contiguous
run anywhere in the module's name, so `output` matches `output` and `head.output.proj`, `layers.1` matches that layer
and all below it but never `layers.10`, and `experts` never `shared_experts`. `*` stands for any characters within one
component: `layers.*.wo`, `w*`.

A pattern that matches nothing is a mistake, and is answered with the names nearest to it. Nothing here imports torch.
"""

from collections.abc import Iterable, Sequence

from titan_fp8.runtime.patterns import matches
from titan_fp8.runtime.suggest import did_you_mean

AUTO_FILTER = "auto_filter_small_kn"
"""Stands in a list of patterns for the rule of `size_rule.py`."""


def first_match(patterns: Iterable[str], fqn: str) -> str | None:
    """The first pattern that matches `fqn`."""
    return next((pattern for pattern in patterns if matches(pattern, fqn)), None)


def malformed(patterns: Iterable[str]) -> list[str]:
    """What is wrong with patterns that can match nothing in any model, one message each."""
    return [
        f"{pattern!r} is not a module name; write components joined by single dots, without spaces"
        for pattern in patterns
        if not all(pattern.split(".")) or pattern != "".join(pattern.split())
    ]


def check_patterns(
    patterns: Sequence[str],
    fqns: Sequence[str],
    *,
    setting: str,
    may_match_nothing: bool,
    linears: Sequence[str] | None = None,
) -> list[str]:
    """What is wrong with `patterns` for a model whose modules are called `fqns`, one message each.

    Args:
        patterns: the patterns, `auto_filter_small_kn` among them or not.
        fqns: names of all modules.
        linears: names of those of them of which each pattern is to match one; None: any module will do.
        setting: name of the setting, for the messages.
        may_match_nothing: the patterns are a default that nobody asked for, so one without a match is no mistake.
    """
    problems = []
    for pattern in patterns:
        if pattern == AUTO_FILTER:
            continue
        if wrong := malformed([pattern]):
            problems.append(f"{setting}: {wrong[0]}")
        elif not may_match_nothing and not any(matches(pattern, fqn) for fqn in fqns):
            hint = _nearest_run(pattern, fqns, AUTO_FILTER)
            problems.append(f"{setting}: {pattern!r} matches no module of the model{hint}; correct it or take it out")
        elif not may_match_nothing and linears is not None and not any(matches(pattern, fqn) for fqn in linears):
            problems.append(f"{setting}: {pattern!r} matches no linear of the model; correct it or take it out")
    return problems


def parse_recipe_table(entries: Iterable[str], known: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """`recipe_by_fqn` as (pattern, recipe) pairs, and what is wrong with its entries, one message each.

    Args:
        entries: `"pattern=recipe"` each.
        known: names of the recipes.
    """
    table: list[tuple[str, str]] = []
    problems: list[str] = []
    for entry in entries:
        pattern, equals, recipe = entry.partition("=")
        if not equals:
            problems.append(f'{entry!r} is no entry; write "pattern=recipe"')
            continue
        problems += malformed([pattern])
        if recipe not in known:
            problems.append(
                f"{entry!r}: no such recipe{did_you_mean(recipe, known)}; known: {', '.join(known)}; a module that is "
                "to stay in high precision belongs in filter_fqns"
            )
        if pattern in [earlier for earlier, _ in table]:
            problems.append(f"{pattern!r} is there twice, and the first entry that matches counts; take one out")
        table.append((pattern, recipe))
    return table, problems


def check_recipe_patterns(
    table: Sequence[tuple[str, str]], modules: Sequence[str], linears: Sequence[str], *, setting: str
) -> list[str]:
    """What is wrong with the patterns of `recipe_by_fqn` for a model, one message each.

    Args:
        table: well-formed (pattern, recipe) pairs; the first that matches a linear counts.
        modules: names of all modules.
        linears: names of the linears.
        setting: name of the setting, for the messages.
    """
    problems = []
    for number, (pattern, recipe) in enumerate(table):
        entry = f"{pattern}={recipe}"
        matched = [fqn for fqn in linears if matches(pattern, fqn)]
        earlier = [before for before, _ in table[:number]]
        taken = {first_match(earlier, fqn) for fqn in matched}
        if not matched:
            hint = "" if any(matches(pattern, fqn) for fqn in modules) else _nearest_run(pattern, modules)
            problems.append(f"{setting}: {entry!r} matches no linear of the model{hint}; correct it or take it out")
        elif None not in taken:
            names = ", ".join(repr(name) for name in earlier if name in taken)
            problems.append(
                f"{setting}: {entry!r} has no effect: all linears that it matches are matched by {names} before it; "
                "put it first or take it out"
            )
    return problems


def _nearest_run(pattern: str, fqns: Sequence[str], *others: str) -> str:
    return did_you_mean(pattern, [*others, *_runs(fqns, pattern.count(".") + 1)])


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
