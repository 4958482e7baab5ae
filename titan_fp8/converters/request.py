"""What somebody asks of a conversion, through a section of the configuration or through the API."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from titan_fp8.converters.config import (
    RECIPE_NAMES,
    Float8LinearSection,
    emulation_problems,
    recipe_option_problems,
    shard_problems,
)
from titan_fp8.converters.filters import parse_recipe_table
from titan_fp8.converters.protocol import ConversionError
from titan_fp8.quantization.recipes import Float8Recipe, Granularity, get_recipe
from titan_fp8.runtime.errors import UserError

_FLAGS = (
    "round_scales_to_power_of_2",
    "fast_accum_in_backward",
    "enable_fsdp_float8_all_gather",
    "keep_fp8_weight_shards",
    "force_recompute_fp8_weight_in_bwd",
    "keep_gate_up_in_float8",
    "cache_weights",
)
_COUNTS = ("keep_first_blocks_hp", "keep_last_blocks_hp")


@dataclass(frozen=True)
class Float8Request:
    """The settings of one conversion; those of `Float8LinearSection` under its names.

    Attributes:
        recipe_by_fqn: (pattern, recipe name) pairs; the first that matches a linear counts.
        cache_weights: keep the codes of the weights from one optimizer step to the next.
        filters_are_default: nobody wrote `filter_fqns`, so a pattern of it may match nothing.
        prefix: what stands before a setting's name in messages.
    """

    recipe_name: str | None = None
    filter_fqns: Sequence[str] = ()
    recipe_by_fqn: Sequence[tuple[str, str]] = ()
    keep_first_blocks_hp: int = 0
    keep_last_blocks_hp: int = 0
    emulate: bool | str = False
    kernels: str = "auto"
    round_scales_to_power_of_2: bool = False
    fast_accum_in_backward: bool = False
    grad_weight_dtype: torch.dtype = torch.bfloat16
    enable_fsdp_float8_all_gather: bool = False
    keep_fp8_weight_shards: bool = True
    force_recompute_fp8_weight_in_bwd: bool = False
    keep_gate_up_in_float8: bool = False
    cache_weights: bool = False
    filters_are_default: bool = False
    prefix: str = ""

    @classmethod
    def from_section(cls, section: Float8LinearSection, *, prefix: str, cache_weights: bool) -> "Float8Request":
        """What a section asks for; it has been checked."""
        names = {field.name for field in fields(cls)} & set(Float8LinearSection.model_fields)
        settings: dict[str, Any] = {name: getattr(section, name) for name in names}
        table, _ = parse_recipe_table(section.recipe_by_fqn, RECIPE_NAMES)
        settings |= {"recipe_by_fqn": table, "grad_weight_dtype": getattr(torch, section.grad_weight_dtype)}
        is_default = "filter_fqns" not in section.model_fields_set
        return cls(**settings, cache_weights=cache_weights, filters_are_default=is_default, prefix=prefix)

    def recipe(self, name: str | None) -> Float8Recipe:
        """The recipe called `name`, with the scales that were asked for.

        Raises:
            UserError: there is none of that name.
        """
        recipe = get_recipe(name)
        rounds = self.round_scales_to_power_of_2 and recipe.granularity is Granularity.BLOCK
        return get_recipe(recipe.name, power_of_two_scales=True) if rounds else recipe


class Arguments:
    """Arguments of the API while their types and values are checked.

    Attributes:
        settings: those that are right; what is wrong has its default.
        problems: what is wrong, one message each.
    """

    def __init__(self, **given: Any) -> None:
        self._given = given
        self.settings: dict[str, Any] = dict(given)
        self.problems: list[str] = []

    def reject(self, name: str, expected: str) -> None:
        """An argument is not what is expected."""
        self.problems.append(f"{name} = {self._given[name]!r}: expected {expected}")
        del self.settings[name]

    def flags(self, *names: str) -> None:
        """These, as far as they are given, are True or False, and no other values that count as such."""
        for name in names:
            if name in self.settings and not isinstance(self.settings[name], bool):
                self.reject(name, "True or False")

    def names(self, name: str, *, or_one: bool = False) -> None:
        """This is a list of strings. or_one: or a string, which is then a list of one."""
        value = self.settings[name]
        if or_one and isinstance(value, str):
            self.settings[name] = [value]
        elif isinstance(value, str):
            self.reject(name, f"a list of names; write {[part.strip() for part in value.split(',')]!r}")
        elif not _is_list(value, str):
            self.reject(name, "a list of names")


def check_model(model: object) -> None:
    """A conversion is of a module.

    Raises:
        ConversionError: it is something else, of which nothing more can be checked.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError([f"model = {model!r}: expected a torch.nn.Module, an instance of its class"])


def request_from_arguments(**arguments: Any) -> tuple[Float8Request, list[str]]:
    """The request that arguments of the API make, and what is wrong with their types and values, one message each.

    What is wrong has its default in the request, so that the model can be checked against the rest.
    """
    checked = Arguments(**arguments)
    settings, problems = checked.settings, checked.problems
    checked.names("filter_fqns")
    checked.flags(*_FLAGS)
    for name in _COUNTS:
        count = settings[name]
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            checked.reject(name, "a number of blocks, 0 or more")
    if settings["grad_weight_dtype"] not in (torch.bfloat16, torch.float32):
        checked.reject("grad_weight_dtype", "torch.bfloat16 or torch.float32")
    if not isinstance(arguments["recipe_name"], str):
        default = get_recipe(None).name
        checked.reject("recipe_name", f"the name of a recipe, {', '.join(RECIPE_NAMES)}; leave it out for {default}")
    try:
        get_recipe(settings.get("recipe_name"))
    except UserError as error:
        problems.append(str(error))
        del settings["recipe_name"]
    entries = _recipe_entries(arguments["recipe_by_fqn"])
    if entries is None:
        checked.reject("recipe_by_fqn", 'a dict {"pattern": "recipe"} or a list of "pattern=recipe"')
    else:
        table, wrong = parse_recipe_table(entries, RECIPE_NAMES)
        problems += [f"recipe_by_fqn: {problem}" for problem in wrong]
        settings["recipe_by_fqn"] = [] if wrong else table
    request = Float8Request(**settings)
    problems += [
        f"{name}: {problem}" for name, problem in emulation_problems(request.fast_accum_in_backward, request.emulate)
    ]
    shards = shard_problems(request.keep_fp8_weight_shards, request.enable_fsdp_float8_all_gather)
    problems += [f"{name}: {problem}" for name, problem in shards]
    names = {get_recipe(request.recipe_name).name, *(recipe for _, recipe in request.recipe_by_fqn)}
    if not problems:
        options = recipe_option_problems(names, request.round_scales_to_power_of_2, request.fast_accum_in_backward)
        problems += [f"{name}: {problem}" for name, problem in options]
    return request, problems


def _is_list(value: Any, kind: type) -> bool:
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    return is_sequence and all(isinstance(item, kind) for item in value)


def _recipe_entries(value: Any) -> Sequence[str] | None:
    """The entries as `"pattern=recipe"`, or None if that is not what they are."""
    if isinstance(value, Mapping):
        are_names = _is_list([*value.keys(), *value.values()], str)
        return [f"{pattern}={recipe}" for pattern, recipe in value.items()] if are_names else None
    return value if _is_list(value, str) else None
