"""Qwen3 with experts: a softmax router over many small ones, and norms of queries and keys.

Sources: arXiv 2505.09388 and the published configurations of Qwen3-30B-A3B and Qwen3-235B-A22B; `debugmodel` has their
features at the size of a test. The published weight of the auxiliary loss, 0.001, is of one that is k at balanced
loads; ours is 1 then.
"""

from titan_fp8.models.dims import ModelDims

FLAVORS: dict[str, ModelDims] = {
    "debugmodel": ModelDims(
        dim=256,
        n_layers=4,
        n_heads=8,
        n_kv_heads=2,
        head_dim=64,
        vocab_size=2048,
        ffn_dim=768,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm="head",
        n_experts=16,
        top_k=4,
        moe_ffn_dim=128,
        router_norm=True,
        aux_loss_weight=4e-3,
    ),
    "30B-A3B": ModelDims(
        dim=2048,
        n_layers=48,
        n_heads=32,
        n_kv_heads=4,
        head_dim=128,
        vocab_size=151936,
        ffn_dim=6144,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        max_seq_len=40960,
        qk_norm="head",
        n_experts=128,
        top_k=8,
        moe_ffn_dim=768,
        router_norm=True,
        aux_loss_weight=8e-3,
    ),
    "235B-A22B": ModelDims(
        dim=4096,
        n_layers=94,
        n_heads=64,
        n_kv_heads=4,
        head_dim=128,
        vocab_size=151936,
        ffn_dim=12288,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        max_seq_len=40960,
        qk_norm="head",
        n_experts=128,
        top_k=8,
        moe_ffn_dim=1536,
        router_norm=True,
        aux_loss_weight=8e-3,
    ),
}
