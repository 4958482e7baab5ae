"""Llama 3: the dense decoder.

Sources: the Llama 3 paper (arXiv 2407.21783, table 3) and the published configurations of Llama 3.1 (8B, 70B, 405B) and
Llama 3.2 (1B, 3B); `debugmodel` has the dimensions of torchtitan's flavor of that name.
"""

from titan_fp8.models.dims import ModelDims

FLAVORS: dict[str, ModelDims] = {
    "debugmodel": ModelDims(dim=256, n_layers=6, n_heads=16, vocab_size=2048, rope_scaling_factor=8.0),
    "1B": ModelDims(
        dim=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim_multiplier=1.5,
        rope_scaling_factor=32.0,
        tied_embeddings=True,
    ),
    "3B": ModelDims(
        dim=3072,
        n_layers=28,
        n_heads=24,
        n_kv_heads=8,
        ffn_dim_multiplier=1.0,
        rope_scaling_factor=32.0,
        tied_embeddings=True,
    ),
    "8B": ModelDims(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim_multiplier=1.3,
        multiple_of=1024,
        rope_scaling_factor=8.0,
    ),
    "70B": ModelDims(
        dim=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        ffn_dim_multiplier=1.3,
        multiple_of=4096,
        rope_scaling_factor=8.0,
    ),
    "405B": ModelDims(
        dim=16384,
        n_layers=126,
        n_heads=128,
        n_kv_heads=8,
        ffn_dim_multiplier=1.2,
        multiple_of=4096,
        rope_scaling_factor=8.0,
    ),
}
