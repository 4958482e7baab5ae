"""Next-token cross-entropy as a sum.

A sum, because the mean over a *global* batch needs the number of labels on all ranks and in all microbatches: each rank
divides its sum by that number, and gradients that are summed over ranks and microbatches are then those of the mean.
"""

import torch.nn.functional as F
from torch import Tensor

from titan_fp8.kernels.cross_entropy.reference import IGNORE_INDEX


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over all positions of `-log softmax(logits)[label]`, positions labelled -100 left out.

    Args:
        logits: `[B, S, V]`, any floating dtype; the softmax is computed in float32.
        labels: `[B, S]`, int64, each in `0 .. V-1` or -100.

    Returns:
        A float32 scalar; 0 (with zero gradients) if every label is -100.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(0, 1), reduction="sum", ignore_index=IGNORE_INDEX
    )
