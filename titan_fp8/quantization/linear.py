"""`Float8Linear`: an `nn.Linear` whose matrix products run in float8.

It is made from an existing linear and keeps that one's parameters, the very same objects, so that an optimizer built
before, tied weights, hooks and checkpoints go on working. Parameters stay in high precision; a state dict looks as if
nothing had been converted.

Where its weight's codes come from, in this order:

    a gathered weight   FSDP has gathered codes in place of numbers (`fsdp_weight.py`)
    a cache             one cast an optimizer step (`weights.py`)
    the parameter       cast in every forward pass
"""

from collections.abc import Iterable
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from titan_fp8.quantization import later_columns
from titan_fp8.quantization.activation import QuantizedActivation, quantize_activation
from titan_fp8.quantization.casts import Codes, cast_weight
from titan_fp8.quantization.fsdp_weight import check_gathered
from titan_fp8.quantization.function import Float8Config, Float8LinearFunction, WeightOperand, both_layouts
from titan_fp8.quantization.gathered_weight import GatheredFloat8Weight
from titan_fp8.quantization.later_columns import LaterColumns
from titan_fp8.quantization.recipes import Float8Recipe
from titan_fp8.quantization.tensor_parallel import gathers_codes, local_weight
from titan_fp8.quantization.weight_state import Float8WeightState
from titan_fp8.quantization.weights import WeightCache
from titan_fp8.runtime.deferred import WeightSink
from titan_fp8.runtime.errors import UserError

_Kind = TypeVar("_Kind", bound=nn.Module)


class Sizes(Protocol):
    """What dimensions are checked against: a recipe, of whatever format."""

    @property
    def name(self) -> str:
        """As in the configuration."""
        ...

    @property
    def dim_multiple(self) -> int:
        """What in_features and out_features must be multiples of."""
        ...


def with_state_of(module: nn.Module, kind: type[_Kind]) -> _Kind:
    """A `kind` with the parameters, buffers, hooks and mode of `module`: the same objects, in tables of its own."""
    converted = kind.__new__(kind)
    converted.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        converted.__dict__[table] = dict(module.__dict__[table])
    return converted


def check_dims(in_features: int, out_features: int, recipe: Sizes) -> str | None:
    """What is wrong with a linear of these dimensions for a recipe, or None."""
    multiple = recipe.dim_multiple
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % multiple or size == 0:
            return f"{name}={size} is not a multiple of {multiple}, which {recipe.name} needs"
    return None


def shared_codes_recipe(linears: Iterable[nn.Module]) -> Float8Recipe | None:
    """The recipe of linears that read one tensor, if all are float8 and what they read can travel between ranks as
    codes; None where numbers must."""
    recipes = {linear.config.recipe if isinstance(linear, Float8Linear) else None for linear in linears}
    recipe = recipes.pop() if len(recipes) == 1 else None
    return recipe if recipe is not None and gathers_codes(recipe) else None


class Float8Linear(nn.Linear):
    """Linear layer in float8. Weight `[N, K]` and bias `[N]` stay in high precision; the output has the input's dtype.

    Under autocast the input is cast to autocast's dtype first; the weight is always quantized from the parameter as
    it is stored. Make one with `from_linear`.

    Attributes:
        config: recipe, emulation and precision of the products.
        weight_cache: the weight's codes, kept from one optimizer step to the next; or None. See `cache_weights`.
        fsdp_weight_state: set if the weight is made to be gathered as codes; see `wrap_weights_for_fsdp`.
        weight_sink: where the product for the weight's gradient goes, if it is to be computed later.
    """

    config: Float8Config
    weight_cache: WeightCache | None
    fsdp_weight_state: Float8WeightState | None
    weight_sink: WeightSink | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Float8Config) -> Self:
        """A float8 linear with the parameters, buffers, hooks and mode of `linear`.

        Raises:
            UserError: if in_features or out_features is not a multiple of what the recipe needs.
        """
        problem = check_dims(linear.in_features, linear.out_features, config.recipe)
        if problem:
            raise UserError(f"float8 linear: {problem}")
        converted = with_state_of(linear, cls)
        converted.config = config
        converted.weight_cache = None
        converted.fsdp_weight_state = None
        return converted

    def forward(self, input: Tensor | QuantizedActivation) -> Tensor:
        """`[..., K]` -> `[..., N]`."""
        value, rows, columns = self.quantize_input(input)
        operand = self.weight_operand()
        weight, config, grad = self.local_weight(), self.config, torch.is_grad_enabled()
        return Float8LinearFunction.apply(
            value,
            weight,
            self.bias,
            *both_layouts(rows, columns),
            *both_layouts(operand.rows, operand.columns),
            config,
            operand.is_transient and config.recompute_weight_in_backward,
            grad and value.requires_grad,
            grad and weight.requires_grad,
            self.weight_sink,
        )

    def quantize_input(
        self, input: Tensor | QuantizedActivation, *, columns: bool | None = None
    ) -> tuple[Tensor, Codes, Codes | None]:
        """The input as autograd sees it `[..., K]`, its codes by rows, and by columns if asked; None: if the weight's
        gradient needs them."""
        value = input if isinstance(input, Tensor) else input.value
        axis, of_features = self.config.input_axis, self.config.sums_over_ranks
        in_features = self.in_features if of_features is None else self.in_features // of_features.size
        if not value.dim() or value.shape[-1] != in_features:
            raise ValueError(
                f"float8 linear with in_features={in_features} got input {list(value.shape)}; expected one or more "
                f"dimensions, [..., {in_features}]"
            )
        recipe = self.config.recipe
        if columns is None:
            columns = torch.is_grad_enabled() and self.weight.requires_grad and self.config.saves_columns
        if isinstance(input, QuantizedActivation):
            if input.recipe != recipe or (columns and input.columns is None):
                raise ValueError(f"float8 linear with recipe {recipe.name} got an input quantized for something else")
            made = input.columns if columns else None
            if isinstance(made, LaterColumns):
                made = later_columns.made(made.tensors, made.cast, made.x)
            return value, input.rows, made
        if torch.is_autocast_enabled(value.device.type):
            value = value.to(torch.get_autocast_dtype(value.device.type))
        shared = not self.config.keeps_input
        return value, *quantize_activation(value, input, recipe, columns=columns, axis=axis, shared=shared)

    def local_weight(self) -> Tensor:
        """What this rank multiplies: the weight `[N, K]`, or under tensor parallelism its part of it."""
        return local_weight(self)

    def weight_operand(self) -> WeightOperand:
        """The weight's codes for this forward pass."""
        weight = self.local_weight()
        if isinstance(weight, GatheredFloat8Weight):
            return WeightOperand(Codes(weight.codes, weight.scale), is_transient=False)
        if self.fsdp_weight_state is not None:
            check_gathered(weight)
        cache = self.weight_cache
        if cache is None:
            return WeightOperand(cast_weight(weight.detach(), self.config.recipe, self.config.weight_axis))
        cache.use(self.weight)
        assert cache.rows is not None
        return WeightOperand(cache.rows, cache.columns, is_transient=False)

    def extra_repr(self) -> str:
        """Dimensions, recipe and whether it is emulated."""
        emulated = ", emulated" if self.config.emulate else ""
        return f"{super().extra_repr()}, {self.config.recipe.name}{emulated}"
