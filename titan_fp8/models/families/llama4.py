"""Llama 4: experts behind a sigmoid router, beside a shared expert, and some layers without positions.

Sources: the published configurations of Llama-4-Scout-17B-16E and Llama-4-Maverick-17B-128E; `debugmodel` has their
features at the size of a test. In every fourth layer queries and keys are not rotated and see the whole sequence; in
the others they see a chunk of 8192 tokens. Maverick has experts in every second layer and does not norm queries and
keys.
"""

from titan_fp8.models.dims import ModelDims

FLAVORS: dict[str, ModelDims] = {
    "debugmodel": ModelDims(
        dim=256,
        n_layers=6,
        n_heads=16,
        vocab_size=2048,
        ffn_dim=1024,
        qk_norm="l2",
        nope_interval=4,
        attention_chunk=8192,
        temperature_floor=8192,
        n_experts=8,
        top_k=1,
        moe_ffn_dim=256,
        n_shared_experts=1,
        router_score="sigmoid",
        score_before_experts=True,
        router_bias=True,
        balance_rate=1e-3,
    ),
    "17bx16e": ModelDims(
        dim=5120,
        n_layers=48,
        n_heads=40,
        n_kv_heads=8,
        head_dim=128,
        vocab_size=202048,
        ffn_dim=16384,
        rope_scaling_factor=16.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=1.0,
        max_seq_len=10485760,
        qk_norm="l2",
        nope_interval=4,
        attention_chunk=8192,
        temperature_floor=8192,
        n_experts=16,
        top_k=1,
        moe_ffn_dim=8192,
        n_shared_experts=1,
        router_score="sigmoid",
        score_before_experts=True,
        router_bias=True,
        balance_rate=1e-3,
    ),
    "17bx128e": ModelDims(
        dim=5120,
        n_layers=48,
        n_heads=40,
        n_kv_heads=8,
        head_dim=128,
        vocab_size=202048,
        ffn_dim=16384,
        max_seq_len=1048576,
        nope_interval=4,
        attention_chunk=8192,
        temperature_floor=8192,
        n_experts=128,
        top_k=1,
        moe_ffn_dim=8192,
        n_shared_experts=1,
        moe_interval=2,
        router_score="sigmoid",
        score_before_experts=True,
        router_bias=True,
        balance_rate=1e-3,
    ),
}
