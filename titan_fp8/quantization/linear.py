"""`Float8Linear`: an `nn.Linear` whose three matrix products run in float8.

It is made from an existing linear and keeps that one's parameters, the very same objects, so that an optimizer built
before, tied weights, hooks and checkpoints go on working. Parameters stay in high precision; a state dict looks as if
nothing had been converted.
"""

from typing import Self

import torch
from torch import Tensor, nn

from titan_fp8.kernels.float8.reference import T_MULTIPLE
from titan_fp8.quantization.function import Float8Config, Float8LinearFunction
from titan_fp8.runtime.errors import UserError

DIM_MULTIPLE = T_MULTIPLE
"""FP8 tensor cores take matrices whose dimensions are multiples of 16."""


def check_dims(in_features: int, out_features: int) -> str | None:
    """What is wrong with a linear of these dimensions for float8, or None."""
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % DIM_MULTIPLE or size == 0:
            return f"{name}={size} is not a multiple of {DIM_MULTIPLE}"
    return None


class Float8Linear(nn.Linear):
    """Linear layer in float8. Weight `[N, K]` and bias `[N]` stay in high precision; the output has the input's dtype.

    Under autocast the input is cast to autocast's dtype first; the weight is always quantized from the parameter as
    it is stored. Make one with `from_linear`.

    Attributes:
        config: recipe, emulation and precision of the products.
    """

    config: Float8Config

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Float8Config) -> Self:
        """A float8 linear with the parameters, buffers, hooks and mode of `linear`.

        Raises:
            UserError: if in_features or out_features is not a multiple of 16.
        """
        problem = check_dims(linear.in_features, linear.out_features)
        if problem:
            raise UserError(f"float8 linear: {problem}")
        converted = cls.__new__(cls)
        converted.__dict__.update(linear.__dict__)
        for table in ("_parameters", "_buffers", "_modules"):
            converted.__dict__[table] = dict(linear.__dict__[table])
        converted.config = config
        return converted

    def forward(self, input: Tensor) -> Tensor:
        """`[..., K]` -> `[..., N]`."""
        if input.shape[-1] != self.in_features:
            raise ValueError(f"float8 linear with in_features={self.in_features} got input {list(input.shape)}")
        x = input
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        grad = torch.is_grad_enabled()
        output = Float8LinearFunction.apply(
            x.reshape(-1, self.in_features),
            self.weight,
            self.bias,
            self.config,
            grad and x.requires_grad,
            grad and self.weight.requires_grad,
        )
        # Not a view for autograd: FSDP hooks the outputs of the modules it wraps, and a view would lose the hook when
        # it is changed in place.
        return torch.ops.aten._unsafe_view.default(output, [*x.shape[:-1], self.out_features])

    def extra_repr(self) -> str:
        """Dimensions, recipe and whether it is emulated."""
        emulated = ", emulated" if self.config.emulate else ""
        return f"{super().extra_repr()}, {self.config.recipe.name}{emulated}"
