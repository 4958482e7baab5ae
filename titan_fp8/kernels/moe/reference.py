"""What the kernels of the dispatch compute, in plain PyTorch; nothing waits for the device.

T tokens, k choices of each, E experts, D features, M rows of the groups.
"""

import torch
from torch import Tensor


def plan(experts: Tensor, n_experts: int, alignment: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `titan_fp8.kernels.moe.plan`."""
    chosen = experts.flatten().long()
    order = chosen.argsort(stable=True)  # an expert's tokens in their order
    counts = torch.zeros(n_experts, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    padded = (counts + alignment - 1).div(alignment, rounding_mode="floor") * alignment
    ends = padded.cumsum(0)
    shift = ends - padded - (counts.cumsum(0) - counts)  # of a group's first row against its first place in the order
    place = torch.arange(chosen.numel(), device=experts.device) + shift[chosen[order]]
    position = torch.empty_like(chosen).scatter_(0, order, place)
    source = torch.full((rows,), -1, dtype=torch.int64, device=experts.device).scatter_(0, place, order)
    return counts.int(), ends.int(), position.view(experts.shape).int(), source.int()


def permute(x: Tensor, source: Tensor, scores: Tensor | None, top_k: int) -> Tensor:
    """See `titan_fp8.kernels.moe.permute`."""
    choice = source.clamp(min=0).long()
    rows = x[choice.div(top_k, rounding_mode="floor")]
    if scores is not None:
        rows = (rows.float() * scores.flatten()[choice].unsqueeze(-1)).to(x.dtype)
    return torch.where((source >= 0).unsqueeze(-1), rows, 0.0)


def unpermute(y: Tensor, position: Tensor, scores: Tensor | None) -> Tensor:
    """See `titan_fp8.kernels.moe.unpermute`."""
    total: Tensor | None = None
    for choice in range(position.shape[1]):  # in the kernel's order
        rows = y[position[:, choice].long()].float()  # [T, D]
        if scores is not None:
            rows = rows * scores[:, choice].unsqueeze(-1)
        total = rows if total is None else total + rows
    assert total is not None
    return total.to(y.dtype)


def row_products(x: Tensor, y: Tensor, position: Tensor) -> Tensor:
    """See `titan_fp8.kernels.moe.row_products`."""
    return (x.float().unsqueeze(1) * y[position.long()].float()).sum(-1)
