"""Which dimensions mean nothing to a model that lacks what they belong to. Without torch, like `dims.py`."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from titan_fp8.models.dims import ModelDims

_LATENT = ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_EXPERTS = (
    *("top_k", "moe_ffn_dim", "n_shared_experts", "first_dense_layers", "moe_interval", "router_score", "router_norm"),
    *("router_scale", "score_before_experts", "expert_groups", "expert_groups_per_token", "expert_group_score"),
    *("router_bias", "balance_rate", "aux_loss_weight"),
)
_OF_WIDTH = ("multiple_of", "ffn_dim_multiplier")
_ALL_CHOSEN = "where every token goes to every expert; lower top_k"


def _all_have_experts(dims: ModelDims) -> bool:
    return all(dims.has_experts(layer) for layer in range(dims.n_layers))


_RULES: tuple[tuple[tuple[str, ...], Callable[[ModelDims], bool], str], ...] = (
    (_LATENT, lambda dims: dims.is_latent, "without latent attention; set kv_lora_rank too"),
    (_EXPERTS, lambda dims: dims.n_experts is not None, "without experts; set n_experts too"),
    (
        ("expert_groups_per_token", "expert_group_score"),
        lambda dims: dims.expert_groups > 1,
        "where all experts are one group; set expert_groups too",
    ),
    (
        ("expert_group_score",),
        lambda dims: dims.expert_groups_per_token < dims.expert_groups,
        "where a token may go to every group; lower expert_groups_per_token",
    ),
    (("balance_rate",), lambda dims: dims.balance_rate == 0 or dims.top_k != dims.n_experts, _ALL_CHOSEN),
    (("aux_loss_weight",), lambda dims: dims.aux_loss_weight == 0 or dims.top_k != dims.n_experts, _ALL_CHOSEN),
    (
        ("router_bias",),
        lambda dims: dims.router_bias or dims.balance_rate == 0,
        "while balance_rate is above 0; set that to 0 too",
    ),
    (
        ("temperature_floor",),
        lambda dims: not all(dims.has_rope(layer) for layer in range(dims.n_layers)),
        "where every layer has rotary positions; set nope_interval too",
    ),
    (("temperature_scale",), lambda dims: dims.temperature_floor is not None, "without temperature_floor; set it too"),
    (
        ("attention_chunk",),
        lambda dims: any(dims.has_rope(layer) for layer in range(dims.n_layers)),
        "where no layer has rotary positions; raise nope_interval",
    ),
    (
        ("rope_low_freq_factor", "rope_high_freq_factor"),
        lambda dims: dims.rope_scaling_factor != 1.0,
        "while rope_scaling_factor is 1; set it too",
    ),
    (
        ("yarn_beta_fast", "yarn_beta_slow", "yarn_mscale"),
        lambda dims: dims.yarn_factor != 1.0,
        "while yarn_factor is 1; set it too",
    ),
    (
        ("rope_original_max_position",),
        lambda dims: dims.rope_scaling is not None,
        "while frequencies are not scaled; set rope_scaling_factor or yarn_factor too",
    ),
    (
        ("ffn_dim", *_OF_WIDTH),
        lambda dims: dims.moe_ffn_dim is None or not _all_have_experts(dims),
        "where every layer has experts and moe_ffn_dim is their width; set that",
    ),
    (
        _OF_WIDTH,
        lambda dims: dims.ffn_dim is None,
        "where the flavor says the width itself; set ffn_dim",
    ),
)
"""(dimensions, when they have an effect, when they have none and what to do)."""


def without_effect(flavor: ModelDims, dims: ModelDims, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What of `given` changes a flavor's dimensions and not its model: each dimension, and why.

    Args:
        flavor: its own dimensions.
        dims: with those of `given` in their place.
    """
    for name, value in given.items():
        beside_width = name in _OF_WIDTH and "ffn_dim" in given  # which the section refuses (`ModelOverrides`)
        if value == getattr(flavor, name) or beside_width:
            continue
        for names, has_effect, when in _RULES:
            if name in names and not has_effect(dims):
                yield name, f"has no effect {when}, or leave {name} out"
                break
