"""Random number generators: restored where they fit, seeded anew, repeatably, where they do not."""

import random

import numpy as np
import pytest
import torch

from titan_fp8.checkpoint import host_state
from titan_fp8.checkpoint.folder import CheckpointError


def _draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))


def _packed(count: int) -> list[dict[str, bytes]]:
    return [{"rng": host_state.pack(host_state.capture_rng(), "rng")} for _ in range(count)]


def test_every_generator_goes_on_where_it_stood() -> None:
    _draw()  # leaves a cached gaussian in python's and numpy's generators
    ranks = _packed(1)
    expected = [_draw() for _ in range(5)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    host_state.restore_rng(ranks, rank=0, world_size=1, step=3)
    assert [_draw() for _ in range(5)] == expected


def _drawn_after_resharding(rank: int, step: int, seed: int) -> tuple[float, ...]:
    torch.manual_seed(seed)
    random.seed()
    host_state.restore_rng(_packed(2), rank=rank, world_size=3, step=step)
    return _draw()


def test_another_number_of_ranks_seeds_anew_from_seed_rank_and_step() -> None:
    reference = _drawn_after_resharding(rank=1, step=5, seed=7)
    assert _drawn_after_resharding(rank=1, step=5, seed=7) == reference
    for other in ({"rank": 2}, {"step": 6}, {"seed": 8}):
        drawn = _drawn_after_resharding(**{"rank": 1, "step": 5, "seed": 7, **other})
        assert all(left != right for left, right in zip(drawn, reference, strict=True)), other


def test_data_position_that_all_ranks_share_serves_any_number_of_ranks() -> None:
    ranks = [{"dataloader": host_state.pack({"position": 3}, "dataloader")} for _ in range(4)]
    assert host_state.data_state_for(ranks, rank=6, world_size=8) == {"position": 3}


def test_data_positions_per_rank_need_as_many_ranks() -> None:
    ranks = [{"dataloader": host_state.pack({"position": rank}, "dataloader")} for rank in range(2)]
    assert host_state.data_state_for(ranks, rank=1, world_size=2) == {"position": 1}
    with pytest.raises(CheckpointError, match="saved on 2 ranks, not 4"):
        host_state.data_state_for(ranks, rank=0, world_size=4)
