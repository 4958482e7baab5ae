"""A weight that FSDP has gathered as codes: what its layers find in place of the parameter.

To autograd it is a tensor of the dtype that its gradient has; what it holds is codes and their scale, in float8 here
and in MXFP8 in `mx_sharded.py`. Only a linear, or experts, of that format can use it. Any other operation on it is an
error, since the numbers that it stands for exist on no rank.

E experts, N out features, K in features.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from titan_fp8.kernels.float8.reference import to_float
from titan_fp8.quantization.recipes import Float8Recipe, Granularity

_aten = torch.ops.aten
_SAME = frozenset({_aten.detach.default, _aten.alias.default})
_PLAIN = frozenset(
    {_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.new_zeros.default}
    | {_aten.new_empty.default, _aten.full_like.default}
)


class GatheredWeight(torch.Tensor):
    """A weight `[N, K]`, or the weights of experts `[E, N, K]`, of which there are codes alone, in some format.

    Attributes:
        codes: one of its tensors.
    """

    codes: Tensor

    user: ClassVar[str]
    """What can compute with it, and what to do where something else must, in words."""

    def same(self) -> "GatheredWeight":
        """Another tensor of the same codes."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = args[0]
        same_shape = func is _aten.view.default and list(args[1]) == list(weight.shape)
        if func in _SAME or same_shape or (func is _aten.as_strided.default and _is_same_geometry(weight, *args[1:])):
            return weight.same()
        if func in _PLAIN:
            stand_in = weight.codes.new_empty((), dtype=weight.dtype).expand(weight.shape)
            return func(stand_in, *args[1:], **kwargs)
        raise NotImplementedError(f"{func} on a weight that was gathered as {cls.user}, or call dequantize()")


class GatheredFloat8Weight(GatheredWeight):
    """A weight `[N, K]`, or the weights of experts `[E, N, K]`, as float8 codes.

    Args:
        codes: float8, of its shape.
        scale: fp32, as the recipe's `cast_weight` gives it; of experts `[E, N]`.
        recipe: what made them.
        dtype: the dtype that autograd sees.
    """

    scale: Tensor
    recipe: Float8Recipe

    user = (
        "float8 codes, which only a Float8Linear can use, or experts in float8; leave the layer out of the conversion "
        "(filter_fqns; of experts: fqns), turn enable_fsdp_float8_all_gather off"
    )

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, recipe: Float8Recipe, dtype: torch.dtype) -> "GatheredFloat8Weight":
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device
        )

    def __init__(self, codes: Tensor, scale: Tensor, recipe: Float8Recipe, dtype: torch.dtype) -> None:
        self.codes, self.scale, self.recipe = codes, scale, recipe

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], (self.recipe, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "GatheredFloat8Weight":
        return GatheredFloat8Weight(inner["codes"], inner["scale"], *meta)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GatheredFloat8Weight({list(self.shape)}, {self.recipe.name}, dtype={self.dtype})"

    def same(self) -> "GatheredFloat8Weight":
        """See `GatheredWeight`."""
        return GatheredFloat8Weight(self.codes, self.scale, self.recipe, self.dtype)

    def dequantize(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The numbers that the codes stand for, fp32, of its shape."""
        values = to_float(self.codes)
        if self.recipe.granularity is Granularity.BLOCK:
            scale = self.scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            return values * scale[: values.shape[0], : values.shape[1]]
        return values * (self.scale if values.dim() == 2 else self.scale.unsqueeze(-1))


def _is_same_geometry(weight: Tensor, size: Any, stride: Any, offset: int | None = None) -> bool:
    return tuple(size) == tuple(weight.shape) and tuple(stride) == tuple(weight.stride()) and not offset
