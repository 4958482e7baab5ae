"""Multi-head latent attention (arXiv 2405.04434): keys and values of all heads come from one narrow vector a token.

    wkv_a      the token's latent vector, [kv_lora_rank], and one rotated key for all heads, [R]
    kv_norm    RMSNorm of the latent vector
    wkv_b      for each head its key without positions, [P], and its value, [V], from the latent vector
    wq         queries [P + R] of each head; or, with a latent vector of their own, wq_a, q_norm, wq_b
    wo         heads' outputs to the stream

Legend: B sequences, S tokens, H heads, P features without positions, R rotated features, V features of a value.
"""

import math

import torch
from torch import Tensor, nn

from titan_fp8.models.attention_backends import Backend, Mask, causal_attention
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import Distribution, TruncatedNormal
from titan_fp8.models.linear import Linear
from titan_fp8.models.norm import RMSNorm
from titan_fp8.models.rope import RopeTables, rotate_queries_and_keys


class LatentAttention(nn.Module):
    """Causal self-attention through latent vectors, without biases.

    Args:
        dims: the model's dimensions.
        backend: a resolved attention backend (`titan_fp8.models.attention_backends`).
        residual_std: initial standard deviation of `wo`, which writes into the residual stream.
    """

    def __init__(self, dims: ModelDims, backend: Backend, residual_std: float):
        super().__init__()
        assert dims.kv_lora_rank is not None
        self.backend: Backend = backend
        self.chunk = None
        self.residual_std = residual_std
        self.kv_lora_rank = dims.kv_lora_rank
        self.nope_width, self.rope_width, self.value_width = (
            dims.qk_nope_head_dim,
            dims.qk_rope_head_dim,
            dims.v_head_dim,
        )
        self.scale = dims.latent_sharpening / math.sqrt(dims.head_width)
        heads = dims.n_heads * dims.head_width
        if dims.q_lora_rank is None:
            self.wq = Linear(dims.dim, heads, bias=False)
        else:
            self.wq = None
            self.wq_a = Linear(dims.dim, dims.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(dims.q_lora_rank, dims.norm_eps)
            self.wq_b = Linear(dims.q_lora_rank, heads, bias=False)
        self.wkv_a = Linear(dims.dim, dims.kv_lora_rank + dims.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(dims.kv_lora_rank, dims.norm_eps)
        self.wkv_b = Linear(dims.kv_lora_rank, dims.n_heads * (dims.qk_nope_head_dim + dims.v_head_dim), bias=False)
        self.wo = Linear(dims.n_heads * dims.v_head_dim, dims.dim, bias=False)
        self.READERS = ("wq_a" if self.wq is None else "wq", "wkv_a")

    def init_rules(self) -> dict[str, Distribution]:
        """See `titan_fp8.models.initialization`."""
        queries = ("wq",) if self.wq is not None else ("wq_a", "wq_b")
        rules: dict[str, Distribution] = {
            f"{name}.weight": TruncatedNormal(0.02) for name in (*queries, "wkv_a", "wkv_b")
        }
        rules["wo.weight"] = TruncatedNormal(self.residual_std)
        return rules

    def forward(self, x: Tensor, rope: RopeTables, mask: Mask = None) -> Tensor:
        """`[B, S, dim]` to `[B, S, dim]`, same dtype."""
        q, latent, rotated = self.project(x)
        # The heads held here may be fewer than the model's, and the tokens may come as one row of B * S.
        head_width = self.nope_width + self.rope_width
        q = q.view(-1, rope.seq_len, q.shape[-1] // head_width, head_width)
        kv = self.wkv_b(self.kv_norm(latent)).view(*q.shape[:3], self.nope_width + self.value_width)
        q_nope, q_rope = q.split((self.nope_width, self.rope_width), dim=-1)
        k_nope, v = kv.split((self.nope_width, self.value_width), dim=-1)
        q_rope, k_rope = rotate_queries_and_keys(q_rope, rotated.view(*q.shape[:2], 1, self.rope_width), rope)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:-1], -1)], dim=-1)
        attended = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.wo(attended.transpose(1, 2).flatten(-2))  # [B, S, H * V]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of x `[..., dim]`: queries `[..., H * (P + R)]`, latent vectors `[..., kv_lora_rank]` before their norm, and
        keys that are to be rotated, `[..., R]`."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.wq is None else self.wq(x)
        latent, rotated = self.wkv_a(x).split((self.kv_lora_rank, self.rope_width), dim=-1)
        return q, latent, rotated

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Causal attention of q over k, `[B, H, S, P + R]`, and v `[B, H, S, V]`: `[B, H, S, V]`."""
        return causal_attention(q, k, v, backend=self.backend, mask=mask, scale=self.scale)
