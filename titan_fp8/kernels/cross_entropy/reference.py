"""What the kernel of the cross-entropy computes, in plain PyTorch."""

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""A label of this value takes no part in the loss."""


def cross_entropy(logits: Tensor, labels: Tensor, *, grad: bool) -> Tensor:
    """See `cross_entropy.cross_entropy_`."""
    values = logits.float()
    vocabulary = values.shape[1]
    counts = labels != IGNORE_INDEX
    is_known = (labels >= 0) & (labels < vocabulary)
    index = labels.masked_fill(~is_known, 0).unsqueeze(1)
    normalizer = values.logsumexp(1, keepdim=True)
    losses = (normalizer - values.gather(1, index)).squeeze(1)
    losses = losses.masked_fill(counts & ~is_known, torch.nan).masked_fill(~counts, 0.0)
    if grad:
        probabilities = (values - normalizer).exp_()
        probabilities.scatter_add_(1, index, -is_known.unsqueeze(1).float())
        logits.copy_(probabilities.masked_fill_(~counts.unsqueeze(1), 0.0))
    return losses
