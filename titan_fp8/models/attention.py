"""Self-attention of a block: grouped-query heads (arXiv 2305.13245) with rotary positions.

Families vary it: queries and keys may be normed by head, some layers may have no positions, and those that have them
may see their own chunk of the sequence alone (`ModelDims`).

Legend: B sequences, S tokens, H query heads, G key and value heads, D head width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_fp8.models.attention_backends import Backend, Mask, causal_attention
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import Distribution, TruncatedNormal
from titan_fp8.models.linear import Linear
from titan_fp8.models.norm import RMSNorm
from titan_fp8.models.rope import RopeTables, rotate_queries_and_keys


class Attention(nn.Module):
    """Causal self-attention without biases.

    Args:
        dims: the model's dimensions.
        layer: the layer's number from 0.
        backend: a resolved attention backend (`titan_fp8.models.attention_backends`).
        residual_std: initial standard deviation of `wo`, which writes into the residual stream.
    """

    READERS: ClassVar[tuple[str, ...]] = ("wq", "wk", "wv")
    """The linears that read its input."""

    def __init__(self, dims: ModelDims, layer: int, backend: Backend, residual_std: float):
        super().__init__()
        self.head_dim = dims.head_width
        self.has_rope = dims.has_rope(layer)
        self.chunk = dims.attention_chunk if self.has_rope else None
        self.scale: float | None = None  # 1 / sqrt(head_dim)
        self.temperature = (dims.temperature_floor, dims.temperature_scale)
        self.l2_eps = dims.norm_eps if dims.qk_norm == "l2" and self.has_rope else None
        self.backend: Backend = backend
        self.residual_std = residual_std
        self.wq = Linear(dims.dim, dims.n_heads * dims.head_width, bias=False)
        self.wk = Linear(dims.dim, dims.kv_heads * dims.head_width, bias=False)
        self.wv = Linear(dims.dim, dims.kv_heads * dims.head_width, bias=False)
        self.wo = Linear(dims.n_heads * dims.head_width, dims.dim, bias=False)
        by_head = dims.qk_norm == "head"
        self.q_norm = RMSNorm(dims.head_width, dims.norm_eps) if by_head else None
        self.k_norm = RMSNorm(dims.head_width, dims.norm_eps) if by_head else None

    def init_rules(self) -> dict[str, Distribution]:
        """See `titan_fp8.models.initialization`."""
        rules: dict[str, Distribution] = {f"{name}.weight": TruncatedNormal(0.02) for name in ("wq", "wk", "wv")}
        rules["wo.weight"] = TruncatedNormal(self.residual_std)
        return rules

    def forward(self, x: Tensor, rope: RopeTables, mask: Mask = None) -> Tensor:
        """`[B, S, dim]` to `[B, S, dim]`, same dtype."""
        # The heads held here may be fewer than the model's, and the tokens may come as one row of B * S.
        q, k, v = (self._heads(projected, rope) for projected in self.project(x))
        q, k = self.place(q, k, rope)  # [B, S, H, D] and [B, S, G, D]
        attended = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.wo(attended.transpose(1, 2).flatten(-2))  # [B, S, H * D]

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries `[..., H * D]`, keys and values `[..., G * D]` of x `[..., dim]`."""
        return self.wq(x), self.wk(x), self.wv(x)

    def place(self, q: Tensor, k: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor]:
        """Norm queries `[B, S, H, D]` and keys `[B, S, G, D]`, and give them their positions, as the layer has it."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if not self.has_rope:
            return self._sharpen(q, rope), k
        q, k = rotate_queries_and_keys(q, k, rope)
        if self.l2_eps is not None:
            q, k = (F.rms_norm(heads, (self.head_dim,), eps=self.l2_eps) for heads in (q, k))
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Causal attention of q `[B, H, S, D]` over k and v `[B, G, S, D]`: `[B, H, S, D]`. A model that is spread
        along S has another function here."""
        if self.chunk is None or q.shape[2] <= self.chunk or mask is not None:  # which knows the chunks
            return causal_attention(q, k, v, backend=self.backend, mask=mask)
        chunks = zip(*(each.split(self.chunk, dim=2) for each in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*chunk, backend=self.backend) for chunk in chunks], dim=2)

    def _sharpen(self, q: Tensor, rope: RopeTables) -> Tensor:
        """Queries `[B, S, H, D]` of late positions, multiplied: attention over many tokens without positions would be
        spread thin (arXiv 2501.19399)."""
        floor, scale = self.temperature
        if floor is None or rope.longest < floor:
            return q
        factor = 1.0 + scale * torch.log1p(torch.floor((rope.positions.float() + 1.0) / floor))
        return (q * factor.view(1, -1, 1, 1)).to(q.dtype)

    def _heads(self, projected: Tensor, rope: RopeTables) -> Tensor:
        return projected.view(-1, rope.seq_len, projected.shape[-1] // self.head_dim, self.head_dim)
