"""An activation in float8: cast once, used by every linear that reads it.

Three linears read a block's normed input (wq, wk, wv) and two its feed-forward's (w1, w3). Each needs the same codes,
so the first that comes casts and the others find the codes on the tensor itself, as long as it lives and is not
written to. (In compiled code the compiler finds the equal casts.) A producer that writes float8 itself hands over a
`QuantizedActivation` instead.

The codes by columns exist for the weight's gradient alone. Under activation checkpointing the first forward pass
throws away everything that backward needs, so there they are not made: the pass saves placeholders of the same shapes
in their place, and the recomputation makes the real ones.

T tokens, K in features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_fp8.quantization.casts import Codes, as_matrix, cast_activation
from titan_fp8.quantization.later_columns import LaterColumns
from titan_fp8.quantization.recipes import Float8Recipe, Granularity
from titan_fp8.runtime.collectives import Axis

_ATTRIBUTE = "_titan_fp8_codes"
"""Where a tensor carries its codes."""


class QuantizedActivation(NamedTuple):
    """What a producer that writes float8 hands to the linears that read it.

    Attributes:
        value: `[..., K]`, the tensor that autograd knows. Where nobody reads it in high precision it is one NaN
            element expanded to that shape: it takes no memory, and whoever reads it after all sees NaN.
        rows: codes `[T, K]`, T the product of value's leading dimensions.
        columns: codes `[K, padded(T)]`, or what they are made of later; None where no linear needs them.
        recipe: what they were made for.
        more_values: like value, for further readers, so that the producer gets a gradient from each.
    """

    value: Tensor
    rows: Codes
    columns: Codes | LaterColumns | None
    recipe: Float8Recipe
    more_values: tuple[Tensor, ...] = ()

    @property
    def values(self) -> tuple[Tensor, ...]:
        """One, or one for each reader."""
        return self.value, *self.more_values


class _Kept(NamedTuple):
    key: tuple[Any, ...]
    version: int
    rows: Codes
    columns: Codes | None


def quantize_activation(
    x: Tensor,
    owner: Tensor,
    recipe: Float8Recipe,
    *,
    columns: bool,
    axis: Axis | None = None,
    shared: bool = True,
) -> tuple[Codes, Codes | None]:
    """The codes of x `[..., K]` by rows and, if asked, by columns; cast only if no other linear has.

    Args:
        x: what is multiplied.
        owner: the tensor that x was made from and that the linears share; it carries the codes.
        recipe: decides formats and scales.
        columns: whether the weight's gradient will be asked for.
        axis: ranks that hold other features, or other tokens, of the same tensor.
        shared: other linears may read the tensor. If none does, and the tensor is kept for backward, codes that it
            carried would be kept with it.
    """
    if torch.compiler.is_compiling():
        return _cast(x, recipe, columns, axis)
    later = columns and is_recomputed_later()
    needs_columns = columns and not later
    # A leaf belongs to somebody outside, who may write to it behind autograd's back (`.data`).
    if not shared or owner.is_leaf or owner.is_inference():
        rows, made = _cast(x, recipe, needs_columns, axis)
    else:
        key = (recipe.granularity, recipe.input_dtype, recipe.power_of_two_scales, x.dtype, axis)
        kept: _Kept | None = getattr(owner, _ATTRIBUTE, None)
        usable = kept is not None and kept.key == key and kept.version == owner._version
        if kept is None or not usable or (needs_columns and kept.columns is None):
            kept = _Kept(key, owner._version, *_cast(x, recipe, needs_columns, axis))
            setattr(owner, _ATTRIBUTE, kept)
        rows, made = kept.rows, kept.columns
    return rows, columns_placeholder(as_matrix(x), recipe) if later else made if columns else None


def _cast(x: Tensor, recipe: Float8Recipe, columns: bool, axis: Axis | None) -> tuple[Codes, Codes | None]:
    rows, made = cast_activation(
        as_matrix(x.detach()), recipe, recipe.input_dtype, rows=True, columns=columns, axis=axis
    )
    assert rows is not None
    return rows, made


def columns_placeholder(x: Tensor, recipe: Float8Recipe) -> Codes:
    """What has the shapes and dtypes of x's codes by columns `[K, padded(T)]` and no contents; takes no memory."""
    tokens, features = x.shape
    multiple = recipe.dim_multiple  # also of the tokens, which the gradient of the weight sums over
    length = -(-tokens // multiple) * multiple
    scale_shape = {
        Granularity.TENSOR: (),
        Granularity.ROW: (features, 1),
        Granularity.BLOCK: (features, length // multiple),
    }[recipe.granularity]
    codes = x.new_empty((), dtype=recipe.input_dtype).expand(features, length)
    return Codes(codes, x.new_empty((), dtype=torch.float32).expand(scale_shape))


def is_recomputed_later() -> bool:
    """Whether this forward pass runs inside `torch.utils.checkpoint`, which keeps none of the tensors saved for
    backward and will run the pass again to get them.

    False where that is not certain: then what is saved is real, which is always right. False too where a dispatch mode
    watches, as PyTorch's of selective checkpointing does: it wants the same operators in both passes.
    """
    if not torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    if hooks is None:
        return False
    # checkpoint() sees the tensors that its first pass saves through this function, and those of the second through
    # another one.
    name, module = getattr(hooks[0], "__qualname__", ""), getattr(hooks[0], "__module__", "")
    return module == "torch.utils.checkpoint" and name == "_checkpoint_hook.__init__.<locals>.pack_hook"
