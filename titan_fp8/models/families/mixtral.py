"""Mixtral: eight experts in every layer, of which a token goes to two.

Sources: arXiv 2401.04088 and the published configuration of Mixtral-8x7B; `debugmodel` has its features at the size of
a test. The softmax over a token's two largest logits is that over all, divided by the sum of the two.
The published weight of the auxiliary loss, 0.02, is of one that is k = 2 at balanced loads; ours is 1 then.
"""

from titan_fp8.models.dims import ModelDims

FLAVORS: dict[str, ModelDims] = {
    "debugmodel": ModelDims(
        dim=256,
        n_layers=4,
        n_heads=8,
        n_kv_heads=2,
        vocab_size=2048,
        ffn_dim=512,
        rope_theta=1000000.0,
        n_experts=8,
        top_k=2,
        router_norm=True,
        aux_loss_weight=4e-2,
    ),
    "8x7B": ModelDims(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=32000,
        ffn_dim=14336,
        rope_theta=1000000.0,
        max_seq_len=32768,
        n_experts=8,
        top_k=2,
        router_norm=True,
        aux_loss_weight=4e-2,
    ),
}
