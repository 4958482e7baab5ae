"""Self-attention of a block: grouped-query heads (arXiv 2305.13245) with rotary positions.

Legend: B sequences, S tokens, H query heads, G key and value heads, D head width.
"""

from torch import Tensor, nn

from titan_fp8.models.attention_backends import Backend, Mask, causal_attention
from titan_fp8.models.flavors import ModelDims
from titan_fp8.models.initialization import Distribution, TruncatedNormal
from titan_fp8.models.linear import Linear
from titan_fp8.models.rope import RopeTables, rotate_queries_and_keys


class Attention(nn.Module):
    """Causal self-attention without biases.

    Args:
        dims: the model's dimensions.
        backend: a resolved attention backend (`titan_fp8.models.attention_backends`).
        residual_std: initial standard deviation of `wo`, which writes into the residual stream.
    """

    def __init__(self, dims: ModelDims, backend: Backend, residual_std: float):
        super().__init__()
        self.head_dim = dims.head_dim
        self.backend: Backend = backend
        self.residual_std = residual_std
        self.wq = Linear(dims.dim, dims.n_heads * dims.head_dim, bias=False)
        self.wk = Linear(dims.dim, dims.kv_heads * dims.head_dim, bias=False)
        self.wv = Linear(dims.dim, dims.kv_heads * dims.head_dim, bias=False)
        self.wo = Linear(dims.n_heads * dims.head_dim, dims.dim, bias=False)

    def init_rules(self) -> dict[str, Distribution]:
        """See `titan_fp8.models.initialization`."""
        rules: dict[str, Distribution] = {f"{name}.weight": TruncatedNormal(0.02) for name in ("wq", "wk", "wv")}
        rules["wo.weight"] = TruncatedNormal(self.residual_std)
        return rules

    def forward(self, x: Tensor, rope: RopeTables, mask: Mask = None) -> Tensor:
        """`[B, S, dim]` to `[B, S, dim]`, same dtype."""
        # The heads held here may be fewer than the model's, and the tokens may come as one row of B * S.
        q, k, v = (self._heads(projected, rope) for projected in self.project(x))
        q, k = rotate_queries_and_keys(q, k, rope)  # [B, S, H, D] and [B, S, G, D]
        attended = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.wo(attended.transpose(1, 2).flatten(-2))  # [B, S, H * D]

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries `[..., H * D]`, keys and values `[..., G * D]` of x `[..., dim]`."""
        return self.wq(x), self.wk(x), self.wv(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Causal attention of q `[B, H, S, D]` over k and v `[B, G, S, D]`: `[B, H, S, D]`. A model that is spread
        along S has another function here."""
        return causal_attention(q, k, v, backend=self.backend, mask=mask)

    def _heads(self, projected: Tensor, rope: RopeTables) -> Tensor:
        return projected.view(-1, rope.seq_len, projected.shape[-1] // self.head_dim, self.head_dim)
