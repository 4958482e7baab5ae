"""The product of rows that are sorted by expert with the experts' weights, in high precision.

M rows, K in features, N out features, E experts.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x[rows of e] @ weight[e].T` for each expert e, weights cast to x's dtype.

    Args:
        x: `[M, K]`, sorted by expert.
        weight: `[E, N, K]`, any floating dtype.
        ends: int32 `[E]`, the row behind each expert's rows, ascending.

    Returns:
        `[M, N]` in x's dtype; rows behind the last group may be anything, and so may their gradients.
    """
    weight_t = weight.to(x.dtype).transpose(-2, -1)
    if x.dtype == torch.bfloat16 or not x.is_cuda:
        return F.grouped_mm(x, weight_t, offs=ends)
    # On GPUs PyTorch multiplies groups in bf16 alone. Their sizes must be known here: this waits for the device.
    bounds = [0, *ends.tolist()]
    sizes = [end - begin for begin, end in pairwise(bounds)]
    parts = x.split([*sizes, x.shape[0] - bounds[-1]])
    products = [part @ weight_t[expert] for expert, part in enumerate(parts[:-1])]
    return torch.cat([*products, x.new_zeros(parts[-1].shape[0], weight.shape[1])])
