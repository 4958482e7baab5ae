"""The feed-forward of a block: SwiGLU (arXiv 2002.05202), `w2(silu(w1 x) * w3 x)`."""

import torch.nn.functional as F
from torch import Tensor, nn

from titan_fp8.models.initialization import Distribution, TruncatedNormal
from titan_fp8.models.linear import Linear


class FeedForward(nn.Module):
    """Gated feed-forward `dim -> hidden_dim -> dim` without biases.

    Args:
        dim: width of input and output.
        hidden_dim: width of the gate and of the product.
        residual_std: initial standard deviation of `w2` and `w3`, whose product goes into the residual stream.
    """

    def __init__(self, dim: int, hidden_dim: int, residual_std: float):
        super().__init__()
        self.w1 = Linear(dim, hidden_dim, bias=False)
        self.w2 = Linear(hidden_dim, dim, bias=False)
        self.w3 = Linear(dim, hidden_dim, bias=False)
        self.residual_std = residual_std

    def init_rules(self) -> dict[str, Distribution]:
        """See `titan_fp8.models.initialization`."""
        return {
            "w1.weight": TruncatedNormal(0.02),
            "w2.weight": TruncatedNormal(self.residual_std),
            "w3.weight": TruncatedNormal(self.residual_std),
        }

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`, same dtype."""
        return self.w2(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """What `w2` reads: `silu(w1 x) * w3 x`, `[..., hidden_dim]`."""
        return F.silu(self.w1(x)) * self.w3(x)
