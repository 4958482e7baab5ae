"""RMSNorm (arXiv 1910.07467): divide by the root mean square over the features, then scale each feature."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_fp8.models.initialization import Constant, Distribution


class RMSNorm(nn.RMSNorm):
    """`y = x / sqrt(mean(x^2) + eps) * weight.to(x.dtype)`, the mean taken in float32 over the last dim.

    Like `models.linear.Linear` it casts its parameter to the input's dtype and returns that dtype.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps=eps)

    def init_rules(self) -> dict[str, Distribution]:
        """The scale starts at one."""
        return {"weight": Constant(1.0)}

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`, same dtype."""
        return F.rms_norm(x, self.normalized_shape, self.scale(x.dtype), self.eps)

    def scale(self, dtype: torch.dtype) -> Tensor:
        """What normed features are multiplied by, `[dim]`. Norms of a sequence that is spread have another one."""
        return self.weight.to(dtype)

    def add_and_norm(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """`(x + branch, norm of it)`, all `[..., dim]` of one dtype."""
        total = x + branch
        return total, self(total)
