"""Rotary embedding: rotations, frequency scaling, tables that survive moves and casts."""

import math

import pytest
import torch

from titan_fp8.models.flavors import RopeScaling
from titan_fp8.models.rope import RotaryEmbedding, apply_rope, rope_frequencies

CPU = torch.device("cpu")
LLAMA31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)


def test_rotation_is_multiplication_by_a_unit_complex_number_of_neighbouring_features() -> None:
    x = torch.randn(2, 7, 3, 8, generator=torch.Generator().manual_seed(0))
    tables = RotaryEmbedding(8, 7, theta=100.0)(7, CPU)
    angles = torch.outer(torch.arange(7.0), rope_frequencies(8, 100.0).float())
    expected = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(7, 4), angles)[:, None, :]
    torch.testing.assert_close(apply_rope(x, tables), torch.view_as_real(expected).flatten(-2))


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 40, 1, 16)
    tables = RotaryEmbedding(16, 40, theta=10000.0)(40, CPU)
    scores = apply_rope(q, tables)[0, :, 0] @ apply_rope(k, tables)[0, :, 0].T
    torch.testing.assert_close(scores[10, 3], scores[37, 30], rtol=1e-4, atol=1e-4)
    assert not math.isclose(scores[10, 3], scores[10, 4], rel_tol=1e-3)


def test_scaling_stretches_long_wavelengths_and_keeps_short_ones() -> None:
    plain, scaled = rope_frequencies(128, 500000.0), rope_frequencies(128, 500000.0, LLAMA31)
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_result_has_the_dtype_of_the_input_and_is_rounded_once() -> None:
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = RotaryEmbedding(8, 5, theta=100.0)(5, CPU)
    assert torch.equal(apply_rope(x, tables), apply_rope(x.float(), tables).bfloat16())


def test_tables_are_right_after_materialization_and_stay_float32_under_a_cast() -> None:
    expected = RotaryEmbedding(8, 6, theta=100.0)
    with torch.device("meta"):
        rope = RotaryEmbedding(8, 6, theta=100.0)
    assert rope.cos.is_meta
    rope.to_empty(device="cpu").to(torch.bfloat16)
    assert rope.cos.dtype == torch.float32
    assert torch.equal(rope.cos, expected.cos)
    assert torch.equal(rope.sin, expected.sin)
    assert not rope.state_dict()


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens is longer than the model's 8 positions"):
        RotaryEmbedding(8, 8, theta=100.0)(9, CPU)
