"""What the converters of linears have in common: why one cannot be converted, how it is replaced, and its row in the
report."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from titan_fp8.converters.protocol import Placement
from titan_fp8.converters.report import HIGH_PRECISION, ReportRow
from titan_fp8.converters.selection import Choice
from titan_fp8.quantization.linear import Float8Linear, Sizes, check_dims
from titan_fp8.quantization.mx_linear import MXFP8Linear

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Recipe = TypeVar("_Recipe", bound=Sizes)
_Config = TypeVar("_Config")


def obstacle_of(model: nn.Module, fqn: str, recipe: Sizes, n: int, k: int) -> str | None:
    """Why the linear of this name, of which a rank multiplies `[n, k]`, cannot be converted, or None."""
    linear = model.get_submodule(fqn)
    assert isinstance(linear, nn.Linear)
    kind = type(linear)
    if isinstance(linear, Float8Linear | MXFP8Linear):
        to = "float8" if isinstance(linear, Float8Linear) else "MXFP8"
        return f"it is converted to {to} already ({linear.config.recipe.name})"
    if parametrize.is_parametrized(linear) or linear._parameters.get("weight") is None:
        return "its weight is computed by a parametrization, which conversion would bypass"
    if _reads_weight(model, fqn):
        return "the nn.MultiheadAttention around it multiplies by its weight itself and never calls it"
    if kind is not nn.Linear and not vars(kind).get("casts_weight_to_input_dtype", False):
        return (
            f"it is a {kind.__module__}.{kind.__qualname__}, a subclass of nn.Linear whose forward may differ; "
            "declare the class attribute casts_weight_to_input_dtype = True on it if it does not, or"
        ).removesuffix(", or")
    if hasattr(linear.weight, "device_mesh"):
        return "its weight is sharded already, and what shards it would go on with the module as it was; convert before"
    if "forward" in vars(linear):
        return "its forward was replaced on the instance, which conversion would not change; convert before wrapping it"
    if linear.weight.dtype not in _WEIGHT_DTYPES:
        return f"its weight is {linear.weight.dtype}, and casts take float32, bfloat16 or float16"
    return check_dims(k, n, recipe)


def _reads_weight(model: nn.Module, fqn: str) -> bool:
    """Whether this is the linear of PyTorch's attention, whose forward pass is a function of weights."""
    parent, _, name = fqn.rpartition(".")
    around = model.get_submodule(parent)
    forward = getattr(around.forward, "__func__", None)
    return name == "out_proj" and forward is nn.MultiheadAttention.forward


def nothing_to_convert(model: nn.Module, choices: Mapping[str, Choice], setting: str, into: str) -> list[str]:
    """Why no linear of a model would be converted, if so, in a message: `setting` keeps them from `into`."""
    if isinstance(model, nn.Linear):
        return [
            f"the model itself is one {type(model).__name__}, which cannot be replaced in place; "
            "convert a module that contains it, for example nn.Sequential(model)"
        ]
    if not choices:
        return ["the model has no nn.Linear, so there is nothing to convert"]
    if all(choice.reason for choice in choices.values()):
        return [f"{setting} leaves every linear of the model alone, so nothing would run in {into}"]
    return []


def divided_weights(model: nn.Module, choices: Mapping[str, Choice]) -> list[list[tuple[str, str]]]:
    """Parameters that cannot be held as codes, since not all of their users read codes of one recipe: for each, the
    names under which it is used and what reads it there."""
    users: dict[int, list[tuple[str, str]]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        choice = choices.get(fqn)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                converted = choice is not None and choice.reason is None and name == "weight"
                reader = choice.recipe.name if choice and converted else HIGH_PRECISION
                users.setdefault(id(parameter), []).append((f"{fqn}.{name}" if fqn else name, reader))
    return [theirs for theirs in users.values() if len({reader for _, reader in theirs}) > 1]


def replace_linears(
    model: nn.Module, configs: Mapping[str, _Config], make: Callable[[nn.Linear, _Config], nn.Linear]
) -> None:
    """Put what `make` gives of a linear and its config at each of the names; a module with two names stays one
    module. PyTorch's encoder layers around them call them in eval mode too."""
    converted: dict[int, nn.Linear] = {}
    for fqn, config in configs.items():
        linear = model.get_submodule(fqn)
        assert isinstance(linear, nn.Linear)
        if isinstance(linear, Float8Linear | MXFP8Linear):
            continue  # one of several names of a parent, whose other name came first
        if id(linear) not in converted:
            converted[id(linear)] = make(linear, config)
        parent, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(parent), name, converted[id(linear)])
    _leave_fast_paths(model)


def _leave_fast_paths(model: nn.Module) -> None:
    """In eval mode without gradients, `nn.TransformerEncoderLayer` hands the weights of its linears to one fused
    function and calls none of them. It does not with an activation that this function lacks, and nor is it given nested
    tensors then, which that function alone multiplies."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and any(
            isinstance(inner, Float8Linear | MXFP8Linear) for inner in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            else:
                module.use_nested_tensor = False


def report_rows(
    model: nn.Module, choices: Mapping[str, Choice[_Recipe]], placement: Placement, label: Callable[[_Recipe], str]
) -> list[ReportRow]:
    """A row for each linear that was chosen or not. label: a recipe in words."""
    shapes, local = {}, {}
    for fqn in choices:
        linear = model.get_submodule(fqn)
        assert isinstance(linear, nn.Linear)
        shapes[fqn] = linear.out_features, linear.in_features
        local[fqn] = placement.local_dims(fqn, linear)
    total = sum(n * k for n, k in shapes.values())
    return [
        ReportRow(
            fqn,
            (n, k),
            local[fqn],
            recipe=label(choices[fqn].recipe) if choices[fqn].reason is None else None,
            reason=choices[fqn].reason,
            flop_share=n * k / max(total, 1),
            assigned=label(choices[fqn].recipe),
        )
        for fqn, (n, k) in shapes.items()
    ]
