"""What tensor parallelism asks of a model, known before there is a mesh: that each of its weights has a rule."""

from collections.abc import Iterator

from torch import nn

from titan_fp8.models.linear import Linear
from titan_fp8.models.moe import Experts, Gate
from titan_fp8.models.norm import RMSNorm
from titan_fp8.models.splits import division_problem
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.mx_linear import MXFP8Linear
from titan_fp8.runtime.errors import UserError

_LINEARS = (Linear, Float8Linear, MXFP8Linear)


def check_tensor_parallel(model: nn.Module, ranks: int) -> None:
    """What `apply_tensor_parallel` would not know how to divide, all of it at once.

    Args:
        model: a decoder or a part of one, converted, on any device.
        ranks: length of the `tp` axis; 1 divides nothing.

    Raises:
        UserError: one line for each module that cannot be divided: its name, the rule, the remedy.
    """
    if ranks == 1:
        return
    problems = [problem for name, module in model.named_modules() for problem in _problems(name, module, ranks)]
    if problems:
        raise UserError("\n".join(problems))


def _problems(name: str, module: nn.Module, ranks: int) -> Iterator[str]:
    degree, otherwise = f"parallelism.tensor_parallel_degree = {ranks}", "or set the degree to 1"
    parameters = [parameter for parameter, value in module._parameters.items() if value is not None]
    if isinstance(module, Experts):  # whole, or divided by rules of their own (`family_rules.py`)
        return
    known = type(module) in (*_LINEARS, Gate, nn.Embedding, RMSNorm)
    if not known and (parameters or isinstance(module, nn.Linear)):
        what = f"{name or 'the model'}: it is a {type(module).__module__}.{type(module).__qualname__}"
        if isinstance(module, nn.Linear):
            names = ", ".join(kind.__qualname__ for kind in _LINEARS)
            yield f"{what}, and of linears {degree} divides {names} alone, not their subclasses; use one, {otherwise}"
        else:
            yield (
                f"{what} with parameters ({', '.join(parameters)}), and {degree} has rules for linears, embeddings and "
                f"RMSNorm alone; take them out, {otherwise}"
            )
        return
    for parameter in parameters if known else ():
        if parameter != "weight":
            yield f"{name}: {degree} divides weights alone, and it has a {parameter}; make it without, {otherwise}"
    if isinstance(module, nn.Linear):
        problem = division_problem(name, module.out_features, module.in_features, ranks)
        if problem is not None:
            yield problem
    elif isinstance(module, nn.Embedding):
        yield from _embedding_problems(name, module, ranks, degree, otherwise)


def _embedding_problems(name: str, module: nn.Embedding, ranks: int, degree: str, otherwise: str) -> Iterator[str]:
    if module.num_embeddings % ranks:
        yield f"{name}: num_embeddings={module.num_embeddings} is not a multiple of {degree}; change one of them"
    options = {
        "padding_idx": module.padding_idx is not None,
        "max_norm": module.max_norm is not None,
        "scale_grad_by_freq": module.scale_grad_by_freq,
        "sparse": module.sparse,
    }
    given = [option for option, is_given in options.items() if is_given]
    if given:
        what = f"{name}: it is an embedding with {', '.join(given)}"
        yield f"{what}, which {degree} has no rule for; leave that out, {otherwise}"
