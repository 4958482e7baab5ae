"""How activations and gradients travel between the ranks of tensor parallelism, for the report of a conversion."""

from torch import nn

from titan_fp8.models.decoder import TransformerBlock
from titan_fp8.models.splits import readers_of
from titan_fp8.quantization.linear import Float8Linear, shared_codes_recipe
from titan_fp8.quantization.tensor_parallel import gathers_codes

CODES = "float8 codes"


def exchanges(model: nn.Module, *, experts_divided: bool = False) -> dict[str, str]:
    """Name -> how it travels, for the gathered input of each group of linears of a converted model, and for each
    gradient that is gathered. What is summed over ranks always travels in high precision."""
    found: dict[str, str] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, TransformerBlock):
            for name, readers in readers_of(module).items():
                part = module.get_submodule(name)
                if name == "moe.shared_experts" and experts_divided:
                    found[f"{fqn}.{name} input"] = "high precision (with that of the experts)"
                else:
                    found[f"{fqn}.{name} input"] = _way([part.get_submodule(reader) for reader in readers] or [part])
                if "w1" in readers:
                    found[f"{fqn}.{name}.w2 gradient"] = _way([part.get_submodule("w2")])
            found[f"{fqn}.attention.wo gradient"] = _way([module.attention.wo])
    output = getattr(model, "output", None)
    if isinstance(output, nn.Linear):
        found["output input"] = _way([output])
    return found


def _way(linears: list[nn.Module]) -> str:
    if shared_codes_recipe(linears) is not None:
        return CODES
    recipes = {linear.config.recipe if isinstance(linear, Float8Linear) else None for linear in linears}
    if None in recipes:
        reason = "a reader is not float8"
    elif all(recipe is not None and gathers_codes(recipe) for recipe in recipes):
        reason = "readers of several recipes"
    else:
        reason = " and ".join(sorted(r.name for r in recipes if r is not None and not gathers_codes(r)))
    return f"high precision ({reason})"
