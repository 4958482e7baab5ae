"""What becomes of each linear of a model: the recipe that it gets, or the reason why it stays as it is.

The reasons, in the order in which they count:

    filter              a pattern of `filter_fqns` names it; that also comes before `recipe_by_fqn`
    blocks              it is in one of the first or last blocks, which are kept
    router              a mixture of experts chooses by small differences; only `recipe_by_fqn` can ask for it, by name
    size                `auto_filter_small_kn` is in `filter_fqns`, and the linear is too small to gain by its recipe

Nothing is changed here: what is wrong is collected, and the caller raises it with all else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import nn

from titan_fp8.converters.blocks import kept_blocks
from titan_fp8.converters.filters import AUTO_FILTER, check_patterns, check_recipe_patterns, first_match
from titan_fp8.converters.protocol import ONE_PROCESS, Placement
from titan_fp8.converters.size_rule import is_too_small
from titan_fp8.quantization.linear import Sizes
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.patterns import matches

ROUTER = "router.gate"
"""Where the routers of mixtures of experts stand in a model."""


_Recipe = TypeVar("_Recipe", bound=Sizes)
_Recipe_co = TypeVar("_Recipe_co", bound=Sizes, covariant=True)


class Request(Protocol[_Recipe_co]):
    """The settings that decide about linears, under the names of `Float8Request`."""

    @property
    def recipe_name(self) -> str | None: ...
    @property
    def filter_fqns(self) -> Sequence[str]: ...
    @property
    def recipe_by_fqn(self) -> Sequence[tuple[str, str]]: ...
    @property
    def keep_first_blocks_hp(self) -> int: ...
    @property
    def keep_last_blocks_hp(self) -> int: ...
    @property
    def filters_are_default(self) -> bool: ...
    @property
    def prefix(self) -> str: ...

    def recipe(self, name: str | None) -> _Recipe_co:
        """The recipe called `name`."""
        ...


@dataclass(frozen=True)
class Choice(Generic[_Recipe]):
    """What becomes of one linear.

    Attributes:
        recipe: what it is converted with, if it is.
        reason: why it stays in high precision, or None: it is converted.
    """

    recipe: _Recipe
    reason: str | None


def choose(
    model: nn.Module, request: Request[_Recipe], placement: Placement = ONE_PROCESS
) -> tuple[dict[str, Choice[_Recipe]], list[str]]:
    """The choice for each linear of `model` by name, a module with two names twice; and what is wrong with the request
    or with the ranks that are to divide the linears.

    Args:
        model: any model.
        request: its types and recipe names are right.
        placement: what a rank multiplies of each linear counts for the rule of size.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {fqn: module for fqn, module in modules.items() if isinstance(module, nn.Linear) and fqn}
    names = list(modules)[1:]
    setting = f"{request.prefix}filter_fqns"
    default = request.filters_are_default
    problems = check_patterns(
        request.filter_fqns, names, setting=setting, may_match_nothing=default, linears=list(linears)
    )
    table = list(request.recipe_by_fqn)
    table_setting = f"{request.prefix}recipe_by_fqn"
    problems += check_recipe_patterns(table, names, list(linears), setting=table_setting)
    kept: Mapping[str, str] = {}
    try:
        kept = kept_blocks(model, request.keep_first_blocks_hp, request.keep_last_blocks_hp)
    except UserError as error:
        problems.append(f"{_blocks_setting(request)}: {error}; name what is to stay as it is in {setting}")
    choices = {fqn: _choose(fqn, linear, request, kept, placement) for fqn, linear in linears.items()}
    problems += _ineffective_entries(choices, table, setting=table_setting)
    problems += _divided_modules(linears, choices)
    problems += filter(None, (placement.division_problem(fqn, linear) for fqn, linear in linears.items()))
    return choices, problems


def _choose(
    fqn: str, linear: nn.Linear, request: Request[_Recipe], kept: Mapping[str, str], placement: Placement
) -> Choice[_Recipe]:
    table = dict(request.recipe_by_fqn)
    entry = first_match(table, fqn)
    recipe = request.recipe(request.recipe_name if entry is None else table[entry])
    pattern = first_match((p for p in request.filter_fqns if p != AUTO_FILTER), fqn)
    block = next((block for block in kept if fqn.startswith(f"{block}.")), None)
    reason = None
    if pattern is not None:
        reason = f'filter "{pattern}"'
    elif block is not None:
        reason = kept[block]
    elif matches(ROUTER, fqn) and not (entry and matches(ROUTER, entry)):
        reason = "router of a mixture of experts"
    elif AUTO_FILTER in request.filter_fqns:
        n, k = placement.local_dims(fqn, linear)
        reason = AUTO_FILTER if is_too_small(recipe.name, k, n, recipe.dim_multiple) else None
    return Choice(recipe, reason)


def _blocks_setting(request: Request) -> str:
    counts = {name: getattr(request, name) for name in ("keep_first_blocks_hp", "keep_last_blocks_hp")}
    return " and ".join(f"{request.prefix}{name} = {count}" for name, count in counts.items() if count)


def _ineffective_entries(choices: Mapping[str, Choice], table: list[tuple[str, str]], *, setting: str) -> list[str]:
    """Entries of `recipe_by_fqn` whose linears all stay in high precision, but for the rule of size."""
    problems = []
    patterns = [pattern for pattern, _ in table]
    for pattern, recipe in table:
        theirs = {fqn: choice for fqn, choice in choices.items() if first_match(patterns, fqn) == pattern}
        reasons = dict.fromkeys(choice.reason for choice in theirs.values())
        if theirs and None not in reasons and AUTO_FILTER not in reasons:
            problems.append(
                f"{setting}: '{pattern}={recipe}' has no effect: every linear that it gives a recipe stays in high "
                f"precision ({', '.join(map(str, reasons))}); take it out, or what keeps them"
            )
    return problems


def _divided_modules(linears: Mapping[str, nn.Linear], choices: Mapping[str, Choice]) -> list[str]:
    """Modules with several names that are to become several things."""
    first: dict[int, str] = {}
    problems = []
    for fqn, linear in linears.items():
        other = first.setdefault(id(linear), fqn)
        if _outcome(choices[fqn]) != _outcome(choices[other]):
            problems.append(
                f"{other} and {fqn} are one module, but {other} is to be {_outcome(choices[other])} and {fqn} "
                f"{_outcome(choices[fqn])}; write patterns that match both names"
            )
    return problems


def _outcome(choice: Choice) -> str:
    return choice.recipe.name if choice.reason is None else "in high precision"
