"""What follows from a model's dimensions alone: its numbers of parameters, and the arithmetic of a training step, which
is what MFU is measured against. Without torch."""

from titan_fp8.models.dims import ModelDims


def attention_parameters(dims: ModelDims) -> int:
    """Parameters of one layer's attention, its norms of queries and keys included."""
    heads = dims.n_heads
    output = heads * dims.value_width * dims.dim
    if dims.kv_lora_rank is None:
        products = dims.dim * (heads + 2 * dims.kv_heads) * dims.head_width
        return products + output + (2 * dims.head_width if dims.qk_norm == "head" else 0)
    if dims.q_lora_rank is None:
        queries = dims.dim * heads * dims.head_width
    else:
        queries = dims.q_lora_rank * (dims.dim + 1 + heads * dims.head_width)
    latent = dims.dim * (dims.kv_lora_rank + dims.qk_rope_head_dim) + dims.kv_lora_rank
    return queries + latent + dims.kv_lora_rank * heads * (dims.qk_nope_head_dim + dims.v_head_dim) + output


def feed_forward_parameters(dims: ModelDims, layer: int, *, active: bool = False) -> int:
    """Parameters of a layer's feed-forward or of its experts and router; with `active` those that one token meets."""
    if not dims.has_experts(layer):
        return 3 * dims.dim * dims.ffn_hidden_dim
    assert dims.n_experts is not None
    experts = (dims.top_k if active else dims.n_experts) + dims.n_shared_experts
    return 3 * dims.dim * dims.expert_hidden_dim * experts + dims.dim * dims.n_experts


def count_parameters(dims: ModelDims) -> int:
    """Number of parameters of the model; a tied output head is counted once."""
    tables = 1 if dims.tied_embeddings else 2
    return _layers(dims, active=False) + dims.dim + tables * dims.vocab_size * dims.dim


def count_active_parameters(dims: ModelDims) -> int:
    """Parameters that one token meets: of the experts, those that it goes to."""
    tables = 1 if dims.tied_embeddings else 2
    return _layers(dims, active=True) + dims.dim + tables * dims.vocab_size * dims.dim


def _layers(dims: ModelDims, *, active: bool) -> int:
    feed_forwards = sum(feed_forward_parameters(dims, layer, active=active) for layer in range(dims.n_layers))
    return dims.n_layers * (attention_parameters(dims) + 2 * dims.dim) + feed_forwards


def flops_per_token(dims: ModelDims, seq_len: int) -> float:
    """Floating-point operations of forward and backward for one token of a sequence of `seq_len` tokens.

    `6 * P + 6 * n_heads * (query width + value width) * tokens seen`, the latter for each layer, where P counts the
    parameters that a token meets, apart from the embedding table (a look-up) but with the output head, tied or not.
    6: each weight takes part in one multiply and one add in the forward and in each of the two gradient products, and
    so does each product of attention. As in the PaLM paper (arXiv 2204.02311, appendix B) and torchtitan, a causal mask
    counts as if it were full and recomputation is not counted, so that figures compare across projects.
    """
    weights = _layers(dims, active=True) + dims.dim + dims.vocab_size * dims.dim
    width = dims.n_heads * (dims.head_width + dims.value_width)
    chunk = min(seq_len, dims.attention_chunk or seq_len)
    seen = sum(chunk if dims.has_rope(layer) else seq_len for layer in range(dims.n_layers))
    return 6.0 * weights + 6.0 * width * seen
