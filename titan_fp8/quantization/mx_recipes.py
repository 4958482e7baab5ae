"""The MXFP8 recipes: how the scales of a linear's operands are rounded, and what multiplies.

    output      [T, N] = x @ w.T             x and w in blocks of 32 along K
    grad_input  [T, K] = grad_output @ w     grad_output and w along N
    grad_weight [N, K] = grad_output.T @ x   grad_output and x along T

Blocks lie along the dimension that a product sums over, so each of the three tensors is quantized twice, in two
orientations, both times from high precision: unlike a float8 scale of a row, that of a block cannot be derived from
codes of the other orientation. `mxfp8_cublas` takes the scale that the OCP specification suggests, whose largest values
saturate; `mxfp8_cublas_rceil` the smallest that saturates nothing (arXiv 2506.08027). `mxfp8_emulated` is for devices
without products of blocks.

T tokens, K in features, N out features.
"""

from dataclasses import dataclass, replace

from titan_fp8.kernels.mx import BLOCK, MODES
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import did_you_mean


@dataclass(frozen=True)
class MXRecipe:
    """One row of the table of recipes.

    Attributes:
        name: `recipe_name` in the configuration.
        mode: how scales are rounded, one of `titan_fp8.kernels.mx.MODES`.
        is_emulated: the products are emulated on every device.
    """

    name: str
    mode: str
    is_emulated: bool = False

    @property
    def dim_multiple(self) -> int:
        """What K and N must be multiples of."""
        return BLOCK


MX_RECIPES: dict[str, MXRecipe] = {
    recipe.name: recipe
    for recipe in (
        MXRecipe("mxfp8_cublas", "floor"),
        MXRecipe("mxfp8_cublas_rceil", "rceil"),
        MXRecipe("mxfp8_emulated", "floor", is_emulated=True),
    )
}

GROUPED_RECIPE = MXRecipe("mxfp8", "rceil")
"""That of experts."""


def get_mx_recipe(name: object, scaling_mode: object = None) -> MXRecipe:
    """The recipe called `name`.

    Args:
        name: as in the configuration.
        scaling_mode: of `mxfp8_emulated`: how scales are rounded; None: as in the table.

    Raises:
        UserError: for a name or a mode that is unknown, and for a mode that a recipe cannot have.
    """
    if not isinstance(name, str) or name not in MX_RECIPES:
        known, near = ", ".join(MX_RECIPES), did_you_mean(str(name), MX_RECIPES)
        raise UserError(f"recipe_name = {name!r}: no such MX recipe{near}; known: {known}")
    recipe = MX_RECIPES[name]
    if scaling_mode is None:
        return recipe
    if scaling_mode not in MODES:
        raise UserError(f"scaling_mode = {scaling_mode!r}: expected one of {', '.join(MODES)}")
    if not recipe.is_emulated:
        raise UserError(
            f'scaling_mode = "{scaling_mode}": "{name}" has scales of its own ({recipe.mode}); leave scaling_mode out, '
            'or take recipe_name = "mxfp8_emulated"'
        )
    return replace(recipe, mode=str(scaling_mode))
