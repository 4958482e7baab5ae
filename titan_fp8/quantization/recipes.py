"""The float8 recipes: which formats and scales each of a linear's three matrix products uses.

    output      [T, N] = x @ w.T             x by rows of T,     w by rows of N
    grad_input  [T, K] = grad_output @ w     grad by rows of T,  w by columns of K
    grad_weight [N, K] = grad_output.T @ x   grad and x by columns (their scales run along T)

`tensorwise` has one scale a tensor, exact to fp32. Its gradients travel in e5m2, whose range makes up for the one
scale. `rowwise` has one power-of-two scale for each row of each operand, always along the dimension that is summed
over, and stays in e4m3; an outlier costs precision only in its own row.

T tokens, K in features, N out features.
"""

from dataclasses import dataclass
from enum import Enum

import torch

from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import did_you_mean


class Granularity(Enum):
    """What shares one scale."""

    TENSOR = "tensor"
    ROW = "row"


@dataclass(frozen=True)
class Float8Recipe:
    """One row of the table of recipes.

    Attributes:
        name: `recipe_name` in the configuration.
        granularity: what shares a scale.
        input_dtype: format of the activations.
        weight_dtype: format of the weight.
        grad_output_dtype: format of the output's gradient.
        power_of_two_scales: whether scales are powers of two.
    """

    name: str
    granularity: Granularity
    input_dtype: torch.dtype
    weight_dtype: torch.dtype
    grad_output_dtype: torch.dtype
    power_of_two_scales: bool


RECIPES: dict[str, Float8Recipe] = {
    recipe.name: recipe
    for recipe in (
        Float8Recipe(
            name="tensorwise",
            granularity=Granularity.TENSOR,
            input_dtype=torch.float8_e4m3fn,
            weight_dtype=torch.float8_e4m3fn,
            grad_output_dtype=torch.float8_e5m2,
            power_of_two_scales=False,
        ),
        Float8Recipe(
            name="rowwise",
            granularity=Granularity.ROW,
            input_dtype=torch.float8_e4m3fn,
            weight_dtype=torch.float8_e4m3fn,
            grad_output_dtype=torch.float8_e4m3fn,
            power_of_two_scales=True,
        ),
    )
}

UNSUPPORTED_RECIPES = ("rowwise_with_gw_hp", "blockwise", "delayed")
"""Recipes of other stacks and of this project's design that do not exist here."""


def get_recipe(name: str | None) -> Float8Recipe:
    """The recipe called `name`; None means the default, `tensorwise`.

    Raises:
        UserError: for a name that is unknown or not supported.
    """
    name = "tensorwise" if name is None else name
    if name in RECIPES:
        return RECIPES[name]
    known = ", ".join(RECIPES)
    if name in UNSUPPORTED_RECIPES:
        raise UserError(f'recipe_name = "{name}": not supported yet; use one of {known}')
    raise UserError(f"recipe_name = {name!r}: no such float8 recipe{did_you_mean(str(name), RECIPES)}; known: {known}")
