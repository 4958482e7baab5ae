"""What the fused update computes, in plain PyTorch.

Adam (arXiv 1412.6980) and AdamW (arXiv 1711.05101) as `torch.optim` defines them. With the step count k, counted from
1, and the gradient g, which is multiplied by the clip factor first:

    AdamW: w <- w (1 - lr * weight_decay)          Adam: g <- g + weight_decay * w
    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^k) * m / (sqrt(v) / sqrt(1 - beta2^k) + eps)

Everything is computed in fp32 and rounded once to the dtype in which a tensor is kept. What depends on k alone is
computed in fp64 once a step for all parameters (`step_factors`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Constants(NamedTuple):
    """What stays the same during a training.

    Attributes:
        beta1, beta2: decay of the means, a step.
        eps: added to the root.
        weight_decay: as above.
        decoupled: AdamW, not Adam.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool


def step_factors(steps: Sequence[Tensor], lr: float | Tensor, constants: Constants) -> Tensor:
    """What of the update depends on the step count, for each of P parameters.

    Args:
        steps: P tensors `[]`, all on one device: each parameter's count, this update included.
        lr: the learning rate.

    Returns:
        fp32 `[P, 4]`: factor of the weight, step size, divisor of the root, and a zero that makes a row 16 bytes.
    """
    count = torch.stack(list(steps)).double()
    rate = torch.ones_like(count) * lr
    first = 1 - torch.pow(torch.full_like(count, constants.beta1), count)
    second = 1 - torch.pow(torch.full_like(count, constants.beta2), count)
    decay = 1 - rate * constants.weight_decay if constants.decoupled else torch.ones_like(count)
    columns = (decay, rate / first, second.sqrt(), torch.zeros_like(count))
    return torch.stack(columns, dim=1).float()


def update(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    factors: Tensor,
    clip: Tensor | None,
    skip: Tensor | None,
    constants: Constants,
) -> None:
    """Update weight, mean (m) and square (v) in place; see `adam.update`."""
    w, g, m, v = (tensor.float() for tensor in (weight, grad, mean, square))
    decay, step_size, root_divisor, _ = factors.unbind()
    if clip is not None:
        g = g * clip
    if not constants.decoupled and constants.weight_decay:
        g = g + constants.weight_decay * w
    new_m = constants.beta1 * m + (1 - constants.beta1) * g
    new_v = constants.beta2 * v + (1 - constants.beta2) * (g * g)
    new_w = w * decay - step_size * (new_m / (new_v.sqrt() / root_divisor + constants.eps))
    for tensor, old, new in ((weight, w, new_w), (mean, m, new_m), (square, v, new_v)):
        tensor.copy_(new if skip is None else torch.where(skip != 0, old, new))


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements of all tensors, in fp32: `[]`."""
    return torch.stack([tensor.float().square().sum() for tensor in tensors]).sum()
