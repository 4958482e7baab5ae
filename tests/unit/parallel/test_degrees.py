"""Degrees of the mesh: inference of -1, and what does not fit."""

import subprocess
import sys

import pytest

from titan_fp8.parallel.config import ParallelismSection
from titan_fp8.parallel.degrees import MeshDegrees, resolve_degrees
from titan_fp8.runtime.errors import UserError


def _resolve(replicate: int, shard: int, world_size: int) -> MeshDegrees:
    # model_construct: values that the section itself refuses must not get through here either
    section = ParallelismSection.model_construct(
        data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard
    )
    return resolve_degrees(section, world_size)


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size", "expected"),
    [
        (1, -1, 1, (1, 1)),
        (1, -1, 8, (1, 8)),
        (2, -1, 8, (2, 4)),
        (-1, 2, 8, (4, 2)),
        (8, 1, 8, (8, 1)),
        (2, 4, 8, (2, 4)),
    ],
)
def test_minus_one_takes_what_the_others_leave(
    replicate: int, shard: int, world_size: int, expected: tuple[int, int]
) -> None:
    degrees = _resolve(replicate, shard, world_size)
    assert (degrees.data_parallel_replicate, degrees.data_parallel_shard) == expected
    assert degrees.data_parallel == degrees.world_size == world_size


def test_the_defaults_shard_over_all_ranks() -> None:
    assert resolve_degrees(ParallelismSection(), 4) == MeshDegrees(data_parallel_shard=4)


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size", "message"),
    [
        (
            2,
            8,
            8,
            "data_parallel_replicate_degree 2 x data_parallel_shard_degree 8 = 16, but WORLD_SIZE is 8; "
            "set one of them to -1",
        ),
        (1, 4, 8, "data_parallel_shard_degree 4, but WORLD_SIZE is 8; set it to -1"),
        (2, 1, 1, "data_parallel_replicate_degree 2, but WORLD_SIZE is 1; set it to -1"),
        (1, 1, 2, "data_parallel_shard_degree 1, but WORLD_SIZE is 2; set it to -1"),
        (
            3,
            -1,
            8,
            "data_parallel_replicate_degree 3 does not divide WORLD_SIZE 8, so data_parallel_shard_degree = -1 has no "
            "value; choose a divisor of 8",
        ),
        (
            -1,
            -1,
            8,
            "data_parallel_replicate_degree and data_parallel_shard_degree are both -1, but only one degree can be "
            "inferred; give the others a number",
        ),
        (0, 8, 8, "data_parallel_replicate_degree = 0: expected a number of ranks of at least 1, or -1"),
        (1, -2, 8, "data_parallel_shard_degree = -2: expected a number of ranks of at least 1, or -1"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_with_the_remedy(
    replicate: int, shard: int, world_size: int, message: str
) -> None:
    with pytest.raises(UserError) as error:
        _resolve(replicate, shard, world_size)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("keys", "world_size", "expert", "expert_shards"),
    [
        ({}, 8, 1, 8),
        ({}, 8, 2, 4),
        ({}, 8, 8, 1),
        ({"data_parallel_replicate_degree": 2}, 8, 4, 1),
        ({"context_parallel_degree": 4}, 8, 8, 1),
        ({"context_parallel_degree": 4, "data_parallel_shard_degree": 1}, 4, 2, 2),
        ({"pipeline_parallel_degree": 2, "context_parallel_degree": 2}, 8, 2, 2),
        ({"tensor_parallel_degree": 2}, 8, 1, 8),
        ({"tensor_parallel_degree": 2}, 8, 8, 1),
        ({"tensor_parallel_degree": 2}, 2, 2, 1),
        ({"tensor_parallel_degree": 2, "context_parallel_degree": 2}, 8, 4, 2),
        ({"tensor_parallel_degree": 2, "data_parallel_replicate_degree": 2}, 8, 4, 1),
        ({"tensor_parallel_degree": 2, "expert_tensor_parallel_degree": 2}, 8, 2, 2),
        ({"tensor_parallel_degree": 2, "expert_tensor_parallel_degree": 2}, 8, 4, 1),
    ],
)
def test_experts_take_their_ranks_from_other_axes_and_make_none(
    keys: dict[str, int], world_size: int, expert: int, expert_shards: int
) -> None:
    degrees = resolve_degrees(ParallelismSection(**keys, expert_parallel_degree=expert), world_size)
    assert (degrees.expert, degrees.expert_shards, degrees.world_size) == (expert, expert_shards, world_size)
    without = resolve_degrees(ParallelismSection(**keys), world_size)
    assert (degrees.shards, degrees.data_parallel) == (without.shards, without.data_parallel)


@pytest.mark.parametrize(
    ("keys", "world_size", "expert", "message"),
    [
        (
            {},
            8,
            3,
            "expert_parallel_degree = 3 takes its ranks from data_parallel_shard_degree 8 x context_parallel_degree 1 "
            "= 8, which is no multiple of it; choose a divisor of 8, or raise data_parallel_shard_degree",
        ),
        (
            {"data_parallel_replicate_degree": 4, "context_parallel_degree": 2},
            8,
            4,
            "expert_parallel_degree = 4 takes its ranks from data_parallel_shard_degree 1 x context_parallel_degree 2 "
            "= 2, which is no multiple of it; choose a divisor of 2, or raise data_parallel_shard_degree",
        ),
        (
            {},
            1,
            2,
            "expert_parallel_degree = 2 takes its ranks from data_parallel_shard_degree 1 x context_parallel_degree 1 "
            "= 1, which is no multiple of it; set it to 1, or raise data_parallel_shard_degree",
        ),
        (
            {"data_parallel_shard_degree": 4},
            8,
            2,
            "data_parallel_shard_degree 4, but WORLD_SIZE is 8; set it to -1",
        ),
        (
            {"tensor_parallel_degree": 2},
            4,
            3,
            "expert_parallel_degree = 3 takes its ranks from data_parallel_shard_degree 2 x context_parallel_degree 1 "
            "x tensor_parallel_degree 2 = 4, which is no multiple of it; choose a divisor of 4, or raise "
            "data_parallel_shard_degree",
        ),
        (
            {"tensor_parallel_degree": 2, "expert_tensor_parallel_degree": 2},
            4,
            4,
            "expert_parallel_degree = 4 takes its ranks from data_parallel_shard_degree 2 x context_parallel_degree 1 "
            "= 2, which is no multiple of it; choose a divisor of 2, or raise data_parallel_shard_degree",
        ),
        (
            {"tensor_parallel_degree": 4, "expert_tensor_parallel_degree": 2},
            8,
            1,
            "expert_tensor_parallel_degree = 2: each expert is either whole or divided over all ranks of "
            "tensor_parallel_degree = 4; set it to 1 or 4",
        ),
        (
            {"expert_tensor_parallel_degree": 2},
            8,
            1,
            "expert_tensor_parallel_degree = 2: each expert is either whole or divided over all ranks of "
            "tensor_parallel_degree = 1; set it to 1, or raise tensor_parallel_degree with it",
        ),
    ],
)
def test_a_degree_of_experts_that_shards_are_no_multiple_of_is_refused(
    keys: dict[str, int], world_size: int, expert: int, message: str
) -> None:
    with pytest.raises(UserError) as error:
        resolve_degrees(ParallelismSection(**keys, expert_parallel_degree=expert), world_size)
    assert str(error.value) == message


def test_resolving_degrees_imports_no_torch() -> None:
    program = "import sys, titan_fp8.parallel.degrees; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
