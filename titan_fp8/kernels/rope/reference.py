"""What the kernel of the rotary embedding computes, in plain PyTorch, which autograd can differentiate."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """`[B, S, H, D]` with every pair of features `2i, 2i + 1` turned by its angle; see `rope.rotate`. Any dtype."""
    cos, sin = cos[:, None, :], sin[:, None, :]  # [S, 1, D / 2]
    if inverse:
        sin = -sin
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
