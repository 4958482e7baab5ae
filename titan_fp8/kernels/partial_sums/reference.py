"""What the sum of ranks' parts is, in plain PyTorch."""

from torch import Tensor


def sum_parts(own: Tensor, others: Tensor, rank: int, out: Tensor, *, adds: bool = False) -> None:
    """See `partial_sums.sum_parts`."""
    parts = [*others[:rank].unbind(), own, *others[rank:].unbind()]
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    out.copy_(out.float() + total if adds else total)
