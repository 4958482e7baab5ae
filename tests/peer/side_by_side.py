"""One linear layer of ours and one of torchao's with the same parameters, run on the same numbers.

torchao is imported where it is used, so that the tests can be collected without it. A scale of torchao multiplies on
the way to float8; it is our `inv_scale`.

T tokens, K in features, N out features.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import get_recipe

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
"""What both have."""


@dataclass(frozen=True)
class Step:
    """What forward and backward of a layer gave: `[T, N]`, `[T, K]`, `[N, K]`, `[N]`; None where not asked for."""

    output: Tensor
    grad_input: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def peer_codes(x: Tensor, dtype: torch.dtype, *, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """torchao's cast of x: codes in x's layout, and the scale that it multiplied with.

    Args:
        x: any 2-D tensor.
        dtype: the format.
        dim: None for one scale; -1 for one a row, 0 for one a column, rounded to powers of two as in its recipes.
    """
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig

    cast: Any = hp_tensor_to_float8_dynamic(
        x,
        dtype,
        LinearMMConfig(),
        scaling_granularity=ScalingGranularity.TENSORWISE if dim is None else ScalingGranularity.AXISWISE,
        axiswise_dim=dim,
        round_scales_to_power_of_2=dim is not None,
    )
    return cast._data, cast._scale


def our_layer(linear: nn.Linear, recipe: str, **config: Any) -> nn.Module:
    """Our float8 layer with a copy of `linear`'s parameters; emulated unless said otherwise."""
    config = {"emulate": True, **config}
    return Float8Linear.from_linear(copy.deepcopy(linear), Float8Config(get_recipe(recipe), **config))


def peer_layer(linear: nn.Linear, recipe: str, *, emulate: bool = True) -> nn.Module:
    """torchao's float8 layer with a copy of `linear`'s parameters."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    return convert_to_float8_training(nn.Sequential(copy.deepcopy(linear)), config=config)[0]


def step(layer: nn.Module, x: Tensor, grad_output: Tensor, *, needs_grad_input: bool = True) -> Step:
    """Forward and backward; gradients of whatever requires one."""
    x = x.clone().requires_grad_(needs_grad_input)
    output = layer(x)
    output.backward(grad_output)
    bias = getattr(layer, "bias", None)
    return Step(output.detach(), x.grad, layer.weight.grad, None if bias is None else bias.grad)


def random_case(
    tokens: int, k: int, n: int, *, dtype: torch.dtype = torch.bfloat16, bias: bool = False, device: str = "cpu"
) -> tuple[nn.Linear, Tensor, Tensor]:
    """A linear with fp32 standard normal weights, an input `[T, K]` and a gradient `[T, N]`."""
    generator = torch.Generator(device).manual_seed(1)
    linear = nn.Linear(k, n, bias=bias, device=device)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
    x, grad_output = (torch.randn(tokens, size, generator=generator, device=device).to(dtype) for size in (k, n))
    return linear, x, grad_output


def exact_case(tokens: int, k: int, n: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """Integers in -7 ... 7 with a 7 in each row and column: every scale is a power of two, every code exact, and every
    sum exact in fp32 in whatever order, so that two implementations have to agree in each bit."""
    generator = torch.Generator().manual_seed(2)

    def integers(rows: int, columns: int) -> Tensor:
        result = torch.randint(-7, 8, (rows, columns), generator=generator).float()
        result[torch.arange(rows), torch.arange(rows) % columns] = 7.0
        result[torch.arange(columns) % rows, torch.arange(columns)] = 7.0
        return result

    linear = nn.Linear(k, n, bias=False)
    with torch.no_grad():
        linear.weight.copy_(integers(n, k))
    return linear, integers(tokens, k).bfloat16(), integers(tokens, n).bfloat16()
