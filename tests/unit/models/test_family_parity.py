"""Our decoder computes what transformers' models with experts compute: logits and every gradient, in float32."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.tolerances import TRANSFORMERS_RELATIVE_ERROR, relative_error
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum

SEQ_LEN = 49
SMALL: dict[str, Any] = {
    "dim": 64,
    "n_heads": 4,
    "vocab_size": 97,
    "ffn_dim": 112,
    "max_seq_len": 64,
    "rope_theta": 100.0,
}
EXPERTS: dict[str, Any] = {"n_experts": 6, "moe_ffn_dim": 48}
LLAMA4 = ModelDims(
    **SMALL,
    n_layers=4,
    n_kv_heads=2,
    head_dim=24,
    n_experts=6,
    moe_ffn_dim=112,
    top_k=1,
    n_shared_experts=1,
    qk_norm="l2",
    nope_interval=2,
    attention_chunk=16,
    temperature_floor=8,
    router_score="sigmoid",
    score_before_experts=True,
)
LATENT: dict[str, Any] = {
    "rope_original_max_position": 16,
    "yarn_factor": 4.0,
    "yarn_mscale": 0.7,
    "norm_eps": 1e-6,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
YARN: dict[str, Any] = {"rope_original_max_position": 16, "yarn_factor": 4.0}
CASES = {
    "llama4 16e": LLAMA4,
    "llama4 128e": ModelDims(
        **{**vars(LLAMA4), "moe_interval": 2, "qk_norm": "none", "rope_scaling_factor": 4.0,
           "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 1.0, "rope_original_max_position": 32,
           "top_k": 2}
    ),
    "qwen3_moe": ModelDims(
        **SMALL, **EXPERTS, n_layers=2, n_kv_heads=2, head_dim=24, norm_eps=1e-6, qk_norm="head", top_k=3,
        router_norm=True,
    ),
    "qwen3_moe yarn": ModelDims(
        **SMALL, **EXPERTS, **YARN, n_layers=2, n_kv_heads=2, head_dim=24, norm_eps=1e-6, qk_norm="head", top_k=3,
        router_norm=True,
    ),
    "llama4 yarn before norms": ModelDims(**{**vars(LLAMA4), **YARN}),
    "llama4 yarn of another factor": ModelDims(**{**vars(LLAMA4), **YARN, "qk_norm": "none", "yarn_mscale": 3.0}),
    "mixtral": ModelDims(**SMALL, n_layers=2, n_kv_heads=2, n_experts=6, top_k=2, router_norm=True),
    "mixtral yarn of two factors": ModelDims(
        **SMALL, **YARN, n_layers=2, n_kv_heads=2, n_experts=6, top_k=2, router_norm=True, yarn_mscale=2.5,
        yarn_mscale_all_dim=0.5,
    ),
    "deepseek_v3": ModelDims(
        **SMALL, **LATENT, n_layers=3, q_lora_rank=20, n_experts=8, moe_ffn_dim=48, top_k=3, n_shared_experts=1,
        first_dense_layers=1, router_score="sigmoid", router_norm=True, router_scale=2.5, expert_groups=4,
        expert_groups_per_token=2, balance_rate=1e-3,
    ),
    "deepseek_v3 wide values and two factors": ModelDims(
        **SMALL, **{**LATENT, "v_head_dim": 32, "yarn_mscale": 2.5, "yarn_mscale_all_dim": 0.5}, n_layers=2,
        n_experts=4, moe_ffn_dim=48, top_k=2, n_shared_experts=1, first_dense_layers=1, router_score="sigmoid",
        balance_rate=1e-3,
    ),
    "deepseek_v2": ModelDims(
        **SMALL, **LATENT, n_layers=3, n_experts=8, moe_ffn_dim=48, top_k=3, n_shared_experts=2, first_dense_layers=1,
        router_scale=2.0, expert_groups=4, expert_groups_per_token=2, expert_group_score="max",
    ),
    # As the flavor 16B is: the best experts of all, scores as the softmax has them.
    "deepseek_v2 without groups": ModelDims(
        **SMALL, **LATENT, n_layers=3, n_experts=8, moe_ffn_dim=48, top_k=3, n_shared_experts=2, first_dense_layers=1,
    ),
}  # fmt: skip


def _yarn(dims: ModelDims) -> dict[str, Any]:
    rope = {
        "rope_type": "yarn",
        "factor": dims.yarn_factor,
        "beta_fast": dims.yarn_beta_fast,
        "beta_slow": dims.yarn_beta_slow,
        "original_max_position_embeddings": dims.rope_original_max_position,
    }
    if dims.is_latent or dims.yarn_mscale_all_dim is not None:
        return rope | {"mscale": dims.yarn_mscale, "mscale_all_dim": dims.yarn_mscale_all_dim or dims.yarn_mscale}
    if dims.yarn_mscale != 1.0:
        return rope | {"attention_factor": 1.0 + 0.1 * dims.yarn_mscale * math.log(dims.yarn_factor)}
    return rope


def _common(dims: ModelDims, rope: dict[str, Any] | None = None) -> dict[str, Any]:
    rope = _yarn(dims) if dims.yarn_factor != 1.0 else rope
    return {
        "hidden_size": dims.dim,
        "num_hidden_layers": dims.n_layers,
        "num_attention_heads": dims.n_heads,
        "num_key_value_heads": dims.kv_heads,
        "vocab_size": dims.vocab_size,
        "max_position_embeddings": dims.max_seq_len,
        "rms_norm_eps": dims.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": dims.rope_theta} | (rope or {}),
        "num_experts_per_tok": dims.top_k,
        "attn_implementation": "eager",
        "use_cache": False,
        "tie_word_embeddings": False,
    }


def _llama4(dims: ModelDims) -> nn.Module:
    rope = None
    if dims.rope_scaling_factor != 1.0:
        rope = {
            "rope_type": "llama3",
            "factor": dims.rope_scaling_factor,
            "low_freq_factor": dims.rope_low_freq_factor,
            "high_freq_factor": dims.rope_high_freq_factor,
            "original_max_position_embeddings": dims.rope_original_max_position,
        }
    config = Llama4TextConfig(
        **_common(dims, rope),
        intermediate_size=dims.moe_ffn_dim,
        intermediate_size_mlp=dims.ffn_hidden_dim,
        head_dim=dims.head_width,
        num_local_experts=dims.n_experts,
        interleave_moe_layer_step=dims.moe_interval,
        use_qk_norm=dims.qk_norm == "l2",
        no_rope_layers=[int(dims.has_rope(layer)) for layer in range(dims.n_layers)],
        attention_chunk_size=dims.attention_chunk,
        attn_temperature_tuning=True,
        floor_scale=dims.temperature_floor,
        attn_scale=dims.temperature_scale,
        pad_token_id=None,
    )
    return Llama4ForCausalLM(config)


def _qwen3(dims: ModelDims) -> nn.Module:
    config = Qwen3MoeConfig(
        **_common(dims),
        intermediate_size=dims.ffn_hidden_dim,
        moe_intermediate_size=dims.expert_hidden_dim,
        head_dim=dims.head_width,
        num_experts=dims.n_experts,
        norm_topk_prob=dims.router_norm,
    )
    return Qwen3MoeForCausalLM(config)


def _mixtral(dims: ModelDims) -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            **_common(dims),
            intermediate_size=dims.ffn_hidden_dim,
            num_local_experts=dims.n_experts,
            head_dim=dims.head_width,
        )
    )


def _latent(dims: ModelDims) -> dict[str, Any]:
    return {
        **_common(dims),
        "intermediate_size": dims.ffn_hidden_dim,
        "moe_intermediate_size": dims.expert_hidden_dim,
        "kv_lora_rank": dims.kv_lora_rank,
        "q_lora_rank": dims.q_lora_rank,
        "qk_nope_head_dim": dims.qk_nope_head_dim,
        "qk_rope_head_dim": dims.qk_rope_head_dim,
        "v_head_dim": dims.v_head_dim,
        "n_routed_experts": dims.n_experts,
        "n_shared_experts": dims.n_shared_experts,
        "first_k_dense_replace": dims.first_dense_layers,
        "routed_scaling_factor": dims.router_scale,
        "n_group": dims.expert_groups,
        "topk_group": dims.expert_groups_per_token,
    }


def _deepseek_v3(dims: ModelDims) -> nn.Module:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**_latent(dims), norm_topk_prob=dims.router_norm))


def _deepseek_v2(dims: ModelDims) -> nn.Module:
    method = "group_limited_greedy" if dims.expert_groups > 1 else "greedy"
    return DeepseekV2ForCausalLM(DeepseekV2Config(**_latent(dims), topk_method=method))


@dataclass(frozen=True)
class Theirs:
    """How transformers builds a family and calls its parts."""

    build: Callable[[ModelDims], nn.Module]
    moe: str = "mlp"
    dense: str = "mlp"
    router: str = "gate.weight"
    shared: str = "shared_experts"
    stacks_inputs_first: bool = False
    """Experts' weights are [E, in, out]."""
    half_pairs: bool = False
    """Rotated features are paired half a head apart."""


FAMILIES = {
    "llama4": Theirs(
        _llama4, "feed_forward", "feed_forward", "router.weight", "shared_expert", stacks_inputs_first=True
    ),
    "qwen3_moe": Theirs(_qwen3, half_pairs=True),
    "mixtral": Theirs(_mixtral, half_pairs=True),
    "deepseek_v3": Theirs(_deepseek_v3),
    "deepseek_v2": Theirs(_deepseek_v2),
}
ATTENTION = {
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "wq_a": "q_a_proj", "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa", "wkv_b": "kv_b_proj", "kv_norm": "kv_a_layernorm", "k_norm": "k_norm",
}  # fmt: skip
DENSE = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
TABLES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def _theirs(name: str, dims: ModelDims, family: Theirs, read: Callable[[str], Tensor]) -> Tensor:
    """A view of what their model has in the place of our parameter `name`, in our order; `read` gets a tensor by
    name."""
    if name in TABLES:
        return read(TABLES[name])
    _, layer, part, *rest = name.split(".")
    prefix = f"model.layers.{layer}."
    if part in ("attention_norm", "ffn_norm"):
        return read(
            prefix + {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}[part] + ".weight"
        )
    if part == "feed_forward":
        return read(f"{prefix}{family.dense}.{DENSE[rest[0]]}.weight")
    if part == "moe" and rest[0] == "shared_experts":
        return read(f"{prefix}{family.moe}.{family.shared}.{DENSE[rest[1]]}.weight")
    if part == "moe" and rest[0] == "router":
        return read(f"{prefix}{family.moe}.{family.router}")
    if part == "moe":
        stacked = read(f"{prefix}{family.moe}.experts.{'down_proj' if rest[1] == 'w2' else 'gate_up_proj'}")
        stacked = stacked.transpose(1, 2) if family.stacks_inputs_first else stacked
        return stacked if rest[1] == "w2" else stacked.chunk(2, dim=1)[0 if rest[1] == "w1" else 1]
    theirs = "q_a_layernorm" if rest[0] == "q_norm" and dims.is_latent else ATTENTION.get(rest[0], rest[0])
    tensor = read(f"{prefix}self_attn.{theirs}.weight")
    if family.half_pairs and rest[0] in ("wq", "wk", "q_norm", "k_norm"):
        halves = tensor.unflatten(0, (-1, 2, dims.head_width // 2))  # [heads, half, pair, ...]
        return halves.transpose(1, 2)
    return tensor


@pytest.mark.parametrize("case", CASES)
def test_logits_and_all_gradients_equal_transformers(case: str) -> None:
    dims, family = CASES[case], FAMILIES[case.split()[0]]
    ours, theirs = Decoder(dims), family.build(dims)
    initialize(ours, seed=0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.dim() >= 2 and name != "tok_embeddings.weight":
                parameter.mul_(4.0)  # far from the start, so that attention and scores are not nearly uniform
            elif parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()))
            place = _theirs(name, dims, family, theirs.get_parameter)
            place.copy_(parameter.view(place.shape))
        for layer, block in ours.layers.items():
            if block.moe is not None and block.moe.expert_bias is not None:
                block.moe.expert_bias.copy_(torch.linspace(-0.2, 0.2, block.moe.expert_bias.numel()))
                theirs.get_buffer(f"model.layers.{layer}.mlp.gate.e_score_correction_bias").copy_(block.moe.expert_bias)
    tokens = torch.randint(0, dims.vocab_size, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    our_logits, their_logits = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-4, atol=1e-4)
    assert relative_error(our_logits, their_logits) <= TRANSFORMERS_RELATIVE_ERROR
    for logits in (our_logits, their_logits):
        (cross_entropy_sum(logits, tokens.roll(-1, 1)) / tokens.numel()).backward()

    def gradient_of(name: str) -> Tensor:
        gradient = theirs.get_parameter(name).grad
        assert gradient is not None, name
        return gradient

    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        reference = _theirs(name, dims, family, gradient_of)
        gradient = parameter.grad.view(reference.shape)
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert relative_error(gradient, reference) <= TRANSFORMERS_RELATIVE_ERROR, name
        assert reference.abs().max() > 1e-4, name
