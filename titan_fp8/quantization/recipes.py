"""The float8 recipes: which formats and scales each of a linear's three matrix products uses.

    output      [T, N] = x @ w.T             x by rows of T,     w by rows of N
    grad_input  [T, K] = grad_output @ w     grad by rows of T,  w by columns of K
    grad_weight [N, K] = grad_output.T @ x   grad and x by columns (their scales run along T)

`tensorwise` has one scale a tensor, exact to fp32. Its gradients travel in e5m2, whose range makes up for the one
scale. `rowwise` has one power-of-two scale for each row of each operand, always along the dimension that is summed
over, and stays in e4m3; an outlier costs precision only in its own row. `rowwise_with_gw_hp` is rowwise but for the
weight's gradient, the one product whose errors the optimizer accumulates, which multiplies the unquantized tensors;
its `grad_input` takes the weight with one scale. `blockwise` has a scale for every 128 values along the summed
dimension of activations and gradients, and for every 128 x 128 tile of the weight (arXiv 2412.19437, section 3.3);
e4m3 throughout.

A weight is quantized once, by rows; its columns are always derived from those codes, so that whoever holds the weight
and whoever gathered its codes compute the same.

T tokens, K in features, N out features.
"""

from dataclasses import dataclass, replace
from enum import Enum

import torch

from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import did_you_mean


class Granularity(Enum):
    """What shares one scale."""

    TENSOR = "tensor"
    ROW = "row"
    BLOCK = "block"
    """128 values along the summed dimension; of a weight, tiles of 128 x 128."""


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
        one_scale_for_weight_columns: `grad_input` takes the weight with one scale for the tensor.
        grad_weight_in_float8: whether `grad_weight` is a float8 product; otherwise it multiplies in the activations'
            dtype, and the activation itself is saved for it.
    """

    name: str
    granularity: Granularity
    input_dtype: torch.dtype
    weight_dtype: torch.dtype
    grad_output_dtype: torch.dtype
    power_of_two_scales: bool
    one_scale_for_weight_columns: bool = False
    grad_weight_in_float8: bool = True

    @property
    def dim_multiple(self) -> int:
        """What K and N must be multiples of: 16, or the 128 of a block."""
        return 128 if self.granularity is Granularity.BLOCK else 16


_ROWWISE = Float8Recipe(
    name="rowwise",
    granularity=Granularity.ROW,
    input_dtype=torch.float8_e4m3fn,
    weight_dtype=torch.float8_e4m3fn,
    grad_output_dtype=torch.float8_e4m3fn,
    power_of_two_scales=True,
)

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
        _ROWWISE,
        replace(_ROWWISE, name="rowwise_with_gw_hp", one_scale_for_weight_columns=True, grad_weight_in_float8=False),
        replace(_ROWWISE, name="blockwise", granularity=Granularity.BLOCK, power_of_two_scales=False),
    )
}

UNSUPPORTED_RECIPES = ("delayed",)
"""Recipes of other stacks that do not exist here."""


def get_recipe(name: str | None, power_of_two_scales: bool | None = None) -> Float8Recipe:
    """The recipe called `name`; None means the default, `tensorwise`.

    Args:
        name: as in the configuration.
        power_of_two_scales: of a blockwise recipe: round its scales down to powers of two, or not. None: as in the
            table.

    Raises:
        UserError: for a name that is unknown or not supported, and for scales that a recipe cannot have.
    """
    name = "tensorwise" if name is None else name
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        if name in UNSUPPORTED_RECIPES:
            raise UserError(f'recipe_name = "{name}": not supported yet; use one of {known}')
        raise UserError(
            f"recipe_name = {name!r}: no such float8 recipe{did_you_mean(str(name), RECIPES)}; known: {known}"
        )
    recipe = RECIPES[name]
    if power_of_two_scales is None or power_of_two_scales == recipe.power_of_two_scales:
        return recipe
    if recipe.granularity is not Granularity.BLOCK:
        always = "always" if recipe.power_of_two_scales else "never"
        raise UserError(
            f'recipe_name = "{name}" {always} has power-of-two scales; the choice exists for "blockwise" alone'
        )
    return replace(recipe, power_of_two_scales=power_of_two_scales)
