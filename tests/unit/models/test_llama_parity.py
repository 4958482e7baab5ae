"""Our decoder computes what transformers' Llama computes: logits and every gradient, in float32."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tolerances import TRANSFORMERS_RELATIVE_ERROR, relative_error
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims, YarnScaling
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum

CONTEXT = 32  # shorter than the sequences below, and long against the fastest rotations: all three cases of the scaling
HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _hf_name(name: str) -> str:
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{HF_NAMES[rest.removesuffix('.weight')]}.weight"
    return {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }[name]


def _to_hf(name: str, tensor: torch.Tensor, dims: ModelDims) -> torch.Tensor:
    """Rows of wq and wk from neighbouring pairs to pairs half a head apart."""
    if name.split(".")[-2] not in ("wq", "wk"):
        return tensor
    pairs = tensor.unflatten(0, (-1, dims.head_width // 2, 2))  # [heads, pair, real or imaginary, dim]
    return pairs.transpose(1, 2).flatten(0, 2)


def _hf_model(dims: ModelDims) -> LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": dims.rope_theta}
    if isinstance(dims.rope_scaling, YarnScaling):
        rope |= {
            "rope_type": "yarn",
            "factor": dims.yarn_factor,
            "original_max_position_embeddings": dims.rope_original_max_position,
        }
    elif dims.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": dims.rope_scaling.factor,
            "low_freq_factor": dims.rope_scaling.low_freq_factor,
            "high_freq_factor": dims.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": dims.rope_scaling.original_max_position,
        }
    config = LlamaConfig(
        hidden_size=dims.dim,
        intermediate_size=dims.ffn_hidden_dim,
        num_hidden_layers=dims.n_layers,
        num_attention_heads=dims.n_heads,
        num_key_value_heads=dims.kv_heads,
        vocab_size=dims.vocab_size,
        max_position_embeddings=dims.max_seq_len,
        rms_norm_eps=dims.norm_eps,
        tie_word_embeddings=dims.tied_embeddings,
        rope_parameters=rope,
        attn_implementation="eager",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [{}, {"rope_scaling_factor": 8.0}, {"yarn_factor": 4.0}], ids=str)
def test_logits_and_all_gradients_equal_transformers(tied: bool, scaling: dict[str, float]) -> None:
    dims = ModelDims(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=97,
        ffn_dim=112,
        norm_eps=1e-5,
        rope_theta=100.0,
        rope_original_max_position=CONTEXT,
        max_seq_len=64,
        tied_embeddings=tied,
        **scaling,  # pyright: ignore[reportArgumentType]
    )
    ours, theirs = Decoder(dims), _hf_model(dims)
    initialize(ours, seed=0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 2 and name != "tok_embeddings.weight":
                parameter.mul_(4.0)  # far from the start, so that attention is not nearly uniform
            theirs.get_parameter(_hf_name(name)).copy_(_to_hf(name, parameter, dims))
    tokens = torch.randint(0, dims.vocab_size, (2, 49), generator=torch.Generator().manual_seed(0))
    our_logits, their_logits = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-4, atol=1e-4)
    assert relative_error(our_logits, their_logits) <= TRANSFORMERS_RELATIVE_ERROR
    for logits in (our_logits, their_logits):
        (cross_entropy_sum(logits, tokens.roll(-1, 1)) / tokens.numel()).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        gradient = _to_hf(name, parameter.grad, dims)
        reference = theirs.get_parameter(_hf_name(name)).grad
        assert reference is not None, name
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert relative_error(gradient, reference) <= TRANSFORMERS_RELATIVE_ERROR, name
