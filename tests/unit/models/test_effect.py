"""An override changes the model, or is refused, or is said to have no effect."""

import functools
from typing import Any

import pytest
import torch

from titan_fp8.config.errors import ConfigErrors
from titan_fp8.job_config import load_job_config
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.effect import without_effect
from titan_fp8.models.families import FLAVORS
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.models.initialization import initialize
from titan_fp8.runtime.errors import UserError

SMALL = {"dim": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 97, "ffn_dim": 48, "max_seq_len": 64}
VALUES: dict[str, tuple[Any, ...]] = {
    "n_kv_heads": (1,),
    "head_dim": (16,),
    "ffn_dim": (64,),
    "multiple_of": (32,),
    "ffn_dim_multiplier": (2.0,),
    "norm_eps": (1e-2,),
    "rope_theta": (100.0,),
    "rope_scaling_factor": (4.0,),
    "rope_low_freq_factor": (0.5,),
    "rope_high_freq_factor": (9.0,),
    "rope_original_max_position": (32,),
    "yarn_factor": (4.0, 1.0),
    "yarn_beta_fast": (9.0,),
    "yarn_beta_slow": (20.0,),
    "yarn_mscale": (0.3,),
    "qk_norm": ("head", "none"),
    "nope_interval": (2, 3),
    "attention_chunk": (5,),
    "temperature_floor": (3,),
    "temperature_scale": (0.9,),
    "kv_lora_rank": (16,),
    "q_lora_rank": (16,),
    "qk_nope_head_dim": (24,),
    "qk_rope_head_dim": (8,),
    "v_head_dim": (8,),
    "n_experts": (8,),
    "top_k": (2, 1),
    "moe_ffn_dim": (32,),
    "n_shared_experts": (2,),
    "first_dense_layers": (2,),
    "moe_interval": (2, 1),
    "router_score": ("sigmoid", "softmax"),
    "router_norm": (True, False),
    "router_scale": (3.0,),
    "score_before_experts": (True, False),
    "expert_groups": (2,),
    "expert_groups_per_token": (2, 1),
    "expert_group_score": ("max",),
    "router_bias": (True,),
    "balance_rate": (0.1,),
    "aux_loss_weight": (0.1,),
    "tied_embeddings": (True,),
}
ONLY_IN_TRAINING = {"router_bias", "balance_rate", "aux_loss_weight"}
TOKENS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))


@functools.cache
def outcome(family: str, overrides: tuple[tuple[str, Any], ...]) -> tuple[dict[str, torch.Size], torch.Tensor]:
    """Shapes of the parameters, and logits of a model whose weights are large, so that choices of experts differ."""
    model = Decoder(resolve_dims(family, "debugmodel", dict(overrides)))
    initialize(model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        return {name: p.shape for name, p in model.named_parameters()}, model(TOKENS)


def small(family: str) -> dict[str, Any]:
    flavor = FLAVORS[family]["debugmodel"]
    more = {} if flavor.n_experts is None else {"moe_ffn_dim": 48}
    return SMALL | more | ({} if flavor.temperature_floor is None else {"temperature_floor": 5})


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("family", FLAVORS)
def test_what_changes_nothing_is_said_to(family: str, name: str) -> None:
    base = small(family)
    flavor = resolve_dims(family, "debugmodel", base)
    for value in VALUES[name]:
        overrides = {**base, name: value}
        try:
            dims = resolve_dims(family, "debugmodel", overrides)
        except UserError:
            continue
        if dims == flavor:
            continue
        said = name in dict(without_effect(flavor, dims, {name: value}))
        if name in ONLY_IN_TRAINING:
            assert said == (dims.n_experts is None)
            continue
        shapes, logits = outcome(family, tuple(overrides.items()))
        plain_shapes, plain = outcome(family, tuple(base.items()))
        changes = shapes != plain_shapes or not torch.equal(logits, plain)
        assert said != changes, f"{name} = {value}"


def test_biases_that_are_trained_cannot_be_left_out() -> None:
    flavor = FLAVORS["llama4"]["debugmodel"]
    for rate, said in ((1e-3, True), (0.0, False)):
        dims = resolve_dims("llama4", "debugmodel", {"router_bias": False, "balance_rate": rate})
        assert dims.has_router_bias == said
        assert ("router_bias" in dict(without_effect(flavor, dims, {"router_bias": False}))) == said


def test_loads_that_are_equal_anyway_are_not_balanced() -> None:
    flavor = FLAVORS["mixtral"]["debugmodel"]
    for name in ("balance_rate", "aux_loss_weight"):
        for top_k, value, said in ((flavor.n_experts, 0.5, True), (flavor.n_experts, 0.0, False), (2, 0.5, False)):
            dims = resolve_dims("mixtral", "debugmodel", {"top_k": top_k, name: value})
            assert (name in dict(without_effect(flavor, dims, {name: value}))) == said, (name, top_k, value)


def test_scores_of_groups_that_are_all_allowed_do_not_matter() -> None:
    flavor = FLAVORS["deepseek_v3"]["debugmodel"]
    for groups, said in ((flavor.expert_groups, True), (flavor.expert_groups - 1, False)):
        given = {"expert_groups_per_token": groups, "expert_group_score": "max"}
        dims = resolve_dims("deepseek_v3", "debugmodel", given)
        assert set(dict(without_effect(flavor, dims, given))) == ({"expert_group_score"} if said else set())


def test_what_a_flavor_has_anyway_may_be_given() -> None:
    flavor = FLAVORS["llama3"]["debugmodel"]
    assert not dict(without_effect(flavor, flavor, {"v_head_dim": flavor.v_head_dim, "top_k": flavor.top_k}))


def test_the_configuration_names_each_with_its_remedy() -> None:
    arguments = ["--model.name=llama3", "--model.flavor=debugmodel", "--training.dataset=synthetic"]
    with pytest.raises(ConfigErrors) as error:
        load_job_config([*arguments, "--model.overrides.top_k=2", "--model.overrides.v_head_dim=64"])
    text = error.value.render()
    assert "model.overrides.top_k = 2: has no effect without experts; set n_experts too, or leave top_k out" in text
    assert "model.overrides.v_head_dim = 64: has no effect without latent attention; set kv_lora_rank too" in text
