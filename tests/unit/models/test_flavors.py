"""The table of dimensions: published sizes, derived widths, errors."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from titan_fp8.models.config import ModelOverrides
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.flavors import FLAVORS, ModelDims, count_parameters, flops_per_token, resolve_dims
from titan_fp8.runtime.errors import UserError

PUBLISHED_PARAMETERS = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
}
TINY = ModelDims(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101)


def build_on_meta(dims: ModelDims) -> Decoder:
    with torch.device("meta"):
        return Decoder(dims)


@pytest.mark.parametrize("flavor", PUBLISHED_PARAMETERS)
def test_flavor_has_the_published_number_of_parameters(flavor: str) -> None:
    dims = resolve_dims("llama3", flavor)
    assert count_parameters(dims) == PUBLISHED_PARAMETERS[flavor]
    assert sum(p.numel() for p in build_on_meta(dims).parameters()) == PUBLISHED_PARAMETERS[flavor]


@pytest.mark.parametrize("dims", [FLAVORS["llama3"]["debugmodel"], TINY, ModelDims(**{**vars(TINY), "ffn_dim": 100})])
def test_counted_parameters_are_those_of_the_built_model(dims: ModelDims) -> None:
    assert count_parameters(dims) == sum(p.numel() for p in build_on_meta(dims).parameters())


@pytest.mark.parametrize(
    ("flavor", "ffn_hidden_dim", "head_dim", "kv_heads"),
    [("debugmodel", 768, 16, 16), ("1B", 8192, 64, 8), ("8B", 14336, 128, 8), ("405B", 53248, 128, 8)],
)
def test_derived_widths_are_the_published_ones(flavor: str, ffn_hidden_dim: int, head_dim: int, kv_heads: int) -> None:
    dims = resolve_dims("llama3", flavor)
    assert (dims.ffn_hidden_dim, dims.head_dim, dims.kv_heads) == (ffn_hidden_dim, head_dim, kv_heads)


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
        ("llama3", "8B", {"rope_low_freq_factor": 4.0}, r"rope_high_freq_factor 4.0 must be greater than"),
    ],
)
def test_impossible_dimensions_are_refused_by_name(name: str, flavor: str, overrides: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_dims(name, flavor, overrides)


def test_all_broken_rules_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        resolve_dims("llama3", "8B", {"n_heads": 24, "n_kv_heads": 7})
    assert len(str(caught.value).splitlines()) == 2


def test_flavors_are_read_without_torch() -> None:
    code = "import sys, titan_fp8.models.flavors, titan_fp8.models.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_documented_table_is_the_table() -> None:
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    for name, flavors in FLAVORS.items():
        for flavor, dims in flavors.items():
            row = (
                f"| {name} | {flavor} | {count_parameters(dims):,} | {dims.dim:,} | {dims.n_layers} "
                f"| {dims.n_heads} / {dims.kv_heads} | {dims.ffn_hidden_dim:,} | {dims.vocab_size:,} "
                f"| {'tied' if dims.tied_embeddings else 'separate'} |"
            )
            assert row in text, row
