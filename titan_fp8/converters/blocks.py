"""The repeated blocks of a model, of which the first and the last may stay in high precision.

The blocks are the children of the one list of modules, or dict with numbers for keys, whose children all hold linears:
`layers` of our decoder, `model.layers` of a Hugging Face Llama, `transformer.h` of a GPT. A container inside of a block
(experts, say) is part of that block. A model with several such containers (an encoder and a decoder) has no first block
that we could name for its author, so that is an error, and so is asking for more blocks than there are.
"""

from collections.abc import Iterator

from torch import nn

from titan_fp8.runtime.errors import UserError


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the repeated blocks, in order.

    Raises:
        UserError: if the model has no container of blocks, or several.
    """
    containers = list(_containers(model, ""))
    if not containers:
        raise UserError("the model has no nn.ModuleList, or numbered nn.ModuleDict, of blocks with linears")
    if len(containers) > 1:
        names = ", ".join(fqn or "the model itself" for fqn, _ in containers)
        raise UserError(f"the model has several lists of blocks, {names}, so none is the first")
    ((fqn, container),) = containers
    return [f"{fqn}.{name}" if fqn else name for name, _ in container.named_children()]


def kept_blocks(model: nn.Module, first: int, last: int) -> dict[str, str]:
    """Name of each block that stays in high precision -> the reason, such as "first 2 blocks".

    Args:
        model: the model.
        first, last: how many blocks at its beginning and at its end.

    Raises:
        UserError: see `find_blocks`; or there are fewer blocks.
    """
    if not first and not last:
        return {}
    blocks = find_blocks(model)
    if first + last > len(blocks):
        raise UserError(f"{first} + {last} blocks are more than the {len(blocks)} that the model has")
    reasons = dict.fromkeys(blocks[:first], _words("first", first))
    return reasons | dict.fromkeys(blocks[len(blocks) - last :], _words("last", last))


def _words(which: str, count: int) -> str:
    return f"{which} {count} blocks" if count > 1 else f"{which} block"


def _containers(module: nn.Module, fqn: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost containers of blocks at or below `module`, with their names."""
    if _holds_blocks(module):
        yield fqn, module
        return
    for name, child in module.named_children():
        yield from _containers(child, f"{fqn}.{name}" if fqn else name)


def _holds_blocks(module: nn.Module) -> bool:
    children = list(module.children())
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or not children:
        return False
    # Blocks are numbered; the parts of a model ("encoder", "decoder") stand in a dict by name.
    numbered = all(name.isdecimal() for name, _ in module.named_children())
    return numbered and all(_is_block(child) for child in children)


def _is_block(module: nn.Module) -> bool:
    parts = list(module.modules())
    return not isinstance(module, nn.Linear) and any(isinstance(part, nn.Linear) for part in parts)
