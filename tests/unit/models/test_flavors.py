"""The table of dimensions: published sizes, derived widths, errors."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from titan_fp8.models.arithmetic import count_active_parameters, count_parameters, flops_per_token
from titan_fp8.models.config import ModelOverrides
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.families import FLAVORS
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.runtime.errors import UserError

PUBLISHED_PARAMETERS = {
    ("llama3", "1B"): 1_235_814_400,
    ("llama3", "3B"): 3_212_749_824,
    ("llama3", "8B"): 8_030_261_248,
    ("llama3", "70B"): 70_553_706_496,
    ("llama3", "405B"): 405_853_388_800,
    ("qwen3_moe", "30B-A3B"): 30_532_122_624,
    ("qwen3_moe", "235B-A22B"): 235_093_634_560,
    ("mixtral", "8x7B"): 46_702_792_704,
    ("deepseek_v3", "16B"): 15_706_484_224,
    ("deepseek_v3", "236B"): 235_741_434_880,
    ("deepseek_v3", "671B"): 671_026_404_352,
}
"""Elements of the published checkpoints' tensors. Of Llama 4 these hold an image encoder besides."""
PUBLISHED_BILLIONS = {
    # (all, active), as their papers and model cards round them
    ("llama4", "17bx16e"): (109, 17),
    ("llama4", "17bx128e"): (400, 17),
    ("qwen3_moe", "30B-A3B"): (30.5, 3.3),
    ("qwen3_moe", "235B-A22B"): (235, 22),
    ("mixtral", "8x7B"): (46.7, 12.9),
    ("deepseek_v3", "236B"): (236, 21),
    ("deepseek_v3", "671B"): (671, 37),
}
TINY = ModelDims(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101)


def build_on_meta(dims: ModelDims) -> Decoder:
    with torch.device("meta"):
        return Decoder(dims)


@pytest.mark.parametrize(("family", "flavor"), PUBLISHED_PARAMETERS)
def test_flavor_has_the_published_number_of_parameters(family: str, flavor: str) -> None:
    dims = resolve_dims(family, flavor)
    assert count_parameters(dims) == PUBLISHED_PARAMETERS[family, flavor]
    assert sum(p.numel() for p in build_on_meta(dims).parameters()) == PUBLISHED_PARAMETERS[family, flavor]


@pytest.mark.parametrize(("family", "flavor"), PUBLISHED_BILLIONS)
def test_a_token_meets_the_published_number_of_parameters(family: str, flavor: str) -> None:
    dims = resolve_dims(family, flavor)
    counts = count_parameters(dims) / 1e9, count_active_parameters(dims) / 1e9
    assert counts == pytest.approx(PUBLISHED_BILLIONS[family, flavor], rel=0.025)


@pytest.mark.parametrize(
    "dims",
    [
        TINY,
        ModelDims(**{**vars(TINY), "ffn_dim": 100}),
        *(flavors["debugmodel"] for flavors in FLAVORS.values()),
        FLAVORS["llama4"]["17bx128e"],
    ],
)
def test_counted_parameters_are_those_of_the_built_model(dims: ModelDims) -> None:
    assert count_parameters(dims) == sum(p.numel() for p in build_on_meta(dims).parameters())


@pytest.mark.parametrize(
    ("flavor", "ffn_hidden_dim", "head_dim", "kv_heads"),
    [("debugmodel", 768, 16, 16), ("1B", 8192, 64, 8), ("8B", 14336, 128, 8), ("405B", 53248, 128, 8)],
)
def test_derived_widths_are_the_published_ones(flavor: str, ffn_hidden_dim: int, head_dim: int, kv_heads: int) -> None:
    dims = resolve_dims("llama3", flavor)
    assert (dims.ffn_hidden_dim, dims.head_width, dims.kv_heads) == (ffn_hidden_dim, head_dim, kv_heads)


def test_flops_count_six_per_weight_and_twelve_per_attended_feature() -> None:
    model = build_on_meta(TINY)
    weights = sum(p.numel() for name, p in model.named_parameters() if name != "tok_embeddings.weight")
    assert flops_per_token(TINY, 128) == 6 * weights + 12 * 2 * 64 * 128


def test_flops_count_a_tied_output_head_like_an_untied_one() -> None:
    tied = ModelDims(**{**vars(TINY), "tied_embeddings": True})
    assert flops_per_token(tied, 128) == flops_per_token(TINY, 128)
    assert count_parameters(TINY) - count_parameters(tied) == 101 * 64


def test_overrides_replace_fields_and_none_keeps_them() -> None:
    dims = resolve_dims("llama3", "8B", {"n_layers": 8, "dim": None})
    assert (dims.n_layers, dims.dim) == (8, 4096)
    assert resolve_dims("llama3", "8B", ModelOverrides().model_dump()) == resolve_dims("llama3", "8B")


def test_every_dimension_has_an_override_key() -> None:
    assert set(ModelOverrides.model_fields) == {field.name for field in fields(ModelDims)}


@pytest.mark.parametrize(
    ("name", "flavor", "overrides", "message"),
    [
        ("lama3", "8B", {}, r'model\.name = "lama3".*did you mean "llama3"'),
        ("llama3", "8b", {}, r'model\.flavor = "8b".*debugmodel, 1B.*did you mean "8B"'),
        ("llama3", "8B", {"n_layer": 2}, r'n_layer: no such key \(did you mean "n_layers"'),
        ("llama3", "8B", {"n_heads": 24}, r"dim 4096 is not a multiple of n_heads 24"),
        ("llama3", "8B", {"n_kv_heads": 5}, r"n_heads 32 is not a multiple of n_kv_heads 5"),
        ("llama3", "8B", {"dim": 32 * 33}, r"head width dim / n_heads = 33 is odd"),
        ("llama3", "8B", {"n_layers": 0}, r"n_layers = 0: must be greater than 0"),
        ("llama3", "8B", {"rope_low_freq_factor": 4.5}, r"rope_high_freq_factor 4.0 must not be less than"),
        ("llama3", "8B", {"head_dim": 33}, r"head_dim = 33 is odd"),
        ("llama3", "8B", {"yarn_factor": 2.0}, r"both stretch the rotary frequencies"),
        ("llama3", "8B", {"kv_lora_rank": 64, "n_kv_heads": 8}, r"n_kv_heads = 8: latent attention has no such thing"),
        ("llama4", "17bx16e", {"top_k": 17}, r"top_k = 17: .* only 16; lower top_k or raise n_experts"),
        ("llama4", "17bx128e", {"n_layers": 1}, r"none of the 1 layers has experts.*moe_interval 2"),
        ("deepseek_v3", "671B", {"n_experts": 9}, r"n_experts 9 is not a multiple of expert_groups 8.*change"),
        ("deepseek_v3", "671B", {"expert_groups_per_token": 9}, r"expert_groups has only 8; lower it"),
        ("deepseek_v3", "671B", {"n_experts": 8}, r"top_k 8 is more than the 4 experts of 4 groups"),
        ("deepseek_v3", "671B", {"n_experts": 8, "top_k": 2}, r'expert_group_score = "top2": groups have one expert'),
        ("llama4", "17bx16e", {"balance_rate": -1.0}, r"balance_rate = -1.0: must be at least 0"),
    ],
)
def test_impossible_dimensions_are_refused_by_name(name: str, flavor: str, overrides: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_dims(name, flavor, overrides)


def test_all_broken_rules_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        resolve_dims("llama3", "8B", {"n_heads": 24, "n_kv_heads": 7})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("family", ["llama4", "mixtral"])
def test_how_loads_are_balanced_is_no_part_of_the_model(family: str) -> None:
    """But whether experts have biases is: they are among the tensors of a checkpoint."""
    flavor = resolve_dims(family, "debugmodel")
    other = resolve_dims(family, "debugmodel", {"balance_rate": 0.5, "aux_loss_weight": 0.5})
    assert {"balance_rate", "aux_loss_weight"}.isdisjoint(other.recorded())
    assert other.recorded() == flavor.recorded() | {"router_bias": True}
    if family == "llama4":
        assert resolve_dims(family, "debugmodel", {"balance_rate": 0.0}).recorded() == flavor.recorded()


def test_flavors_are_read_without_torch() -> None:
    code = "import sys, titan_fp8.models.flavors, titan_fp8.models.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_documented_table_is_the_table() -> None:
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    for name, flavors in FLAVORS.items():
        for flavor, dims in flavors.items():
            heads = f"{dims.n_heads} / {dims.kv_heads}" if dims.kv_lora_rank is None else f"{dims.n_heads}, latent"
            row = f"| {name} | {flavor} | {count_parameters(dims):,} "
            row += f"| {count_active_parameters(dims):,} " if dims.n_experts else ""
            row += f"| {dims.dim:,} | {dims.n_layers} | {heads} | {dims.ffn_hidden_dim:,} "
            if dims.n_experts:
                row += f"| {dims.n_experts} x {dims.expert_hidden_dim:,}, {dims.top_k} + {dims.n_shared_experts} "
            row += f"| {dims.vocab_size:,} |"
            row += f" {'tied' if dims.tied_embeddings else 'separate'} |" if not dims.n_experts else ""
            assert row in text, row


def test_more_choices_than_experts_are_one_mistake() -> None:
    with pytest.raises(UserError) as error:
        resolve_dims("qwen3_moe", "debugmodel", {"top_k": 99})
    assert len(str(error.value).splitlines()) == 1
