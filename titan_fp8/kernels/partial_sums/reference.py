"""What the sum of ranks' parts is, in plain PyTorch."""

import torch
from torch import Tensor

BLOCK = 4096
"""Values of the sum that a sum of squares is of."""


def sum_parts(
    own: Tensor, others: Tensor, rank: int, out: Tensor, *, adds: bool = False, squares: Tensor | None = None
) -> None:
    """See `partial_sums.sum_parts`."""
    parts = [*others[:rank].unbind(), own, *others[rank:].unbind()]
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    out.copy_(out.float() + total if adds else total)
    if squares is not None:
        squares.copy_(torch.stack([block.float().square().sum() for block in out.split(BLOCK)]))
