"""The grid of ranks as one of them sees it, without the others."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.mesh import CP, DP_SHARD, EP, EXPERT_SHARDS, PP, build_mesh


@pytest.fixture
def rank_5_of_8() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("degrees", "names", "shape", "ranks"),
    [
        ({"data_parallel_shard": 8}, ("dp_shard",), (8,), [list(range(8))]),
        ({"data_parallel_shard": 4, "context": 2}, ("dp_shard_cp",), (8,), [list(range(8))]),
        (
            {"data_parallel_replicate": 2, "data_parallel_shard": 4},
            ("dp_replicate", "dp_shard"),
            (2, 4),
            [[1, 5], [4, 5, 6, 7]],
        ),
        (
            {"data_parallel_replicate": 2, "data_parallel_shard": 2, "context": 2},
            ("dp_replicate", "dp_shard_cp"),
            (2, 4),
            [[1, 5], [4, 5, 6, 7]],
        ),
        (
            {"data_parallel_replicate": 2, "context": 2, "tensor": 2},
            ("dp_replicate", "dp_shard_cp"),
            (2, 2),
            [[1, 5], [5, 7]],
        ),
    ],
)
@pytest.mark.usefixtures("rank_5_of_8")
@pytest.mark.filterwarnings("error")
def test_the_mesh_of_fsdp_has_the_copies_and_all_that_parameters_are_sharded_over(
    degrees: dict, names: tuple[str, ...], shape: tuple[int, ...], ranks: list[list[int]]
) -> None:
    mesh = build_mesh(MeshDegrees(**degrees), "cpu").fsdp_mesh
    assert (mesh.mesh_dim_names, mesh.shape) == (names, shape)
    assert [dist.get_process_group_ranks(group) for group in mesh.get_all_groups()] == ranks


@pytest.mark.parametrize(
    ("degrees", "ep", "names", "shape", "shards"),
    [
        ({"data_parallel_shard": 8, "expert": 2}, [4, 5], ("expert_shards",), (4,), [[1, 3, 5, 7]]),
        ({"data_parallel_shard": 8, "expert": 4}, [4, 5, 6, 7], ("expert_shards",), (2,), [[1, 5]]),
        ({"data_parallel_shard": 8, "expert": 8}, list(range(8)), ("expert_shards",), (1,), [[5]]),
        (
            {"data_parallel_replicate": 2, "data_parallel_shard": 4, "expert": 2},
            [4, 5],
            ("dp_replicate", "expert_shards"),
            (2, 2),
            [[1, 5], [5, 7]],
        ),
        (
            {"data_parallel_replicate": 2, "data_parallel_shard": 4, "expert": 4},
            [4, 5, 6, 7],
            ("dp_replicate", "expert_shards"),
            (2, 1),
            [[1, 5], [5]],
        ),
        ({"data_parallel_shard": 4, "context": 2, "expert": 4}, [4, 5, 6, 7], ("expert_shards",), (2,), [[1, 5]]),
        ({"context": 8, "expert": 2}, [4, 5], ("expert_shards",), (4,), [[1, 3, 5, 7]]),
        ({"data_parallel_shard": 4, "tensor": 2}, [5], ("expert_shards",), (8,), [list(range(8))]),
        ({"data_parallel_shard": 4, "tensor": 2, "expert": 2}, [4, 5], ("expert_shards",), (4,), [[1, 3, 5, 7]]),
        (
            {"data_parallel_replicate": 2, "context": 2, "tensor": 2, "expert": 4},
            [4, 5, 6, 7],
            ("dp_replicate", "expert_shards"),
            (2, 1),
            [[1, 5], [5]],
        ),
        (
            {"data_parallel_shard": 4, "tensor": 2, "expert": 2, "expert_tensor": 2},
            [5, 7],
            ("expert_shards",),
            (2,),
            [[1, 5]],
        ),
        ({"pipeline": 2, "data_parallel_shard": 4, "expert": 2}, [4, 5], ("expert_shards",), (2,), [[5, 7]]),
        (
            {"pipeline": 2, "data_parallel_replicate": 2, "data_parallel_shard": 2, "expert": 2},
            [4, 5],
            ("dp_replicate", "expert_shards"),
            (2, 1),
            [[5, 7], [5]],
        ),
    ],
)
@pytest.mark.usefixtures("rank_5_of_8")
@pytest.mark.filterwarnings("error")
def test_experts_are_dealt_out_to_neighbours_and_sharded_over_those_that_have_the_same(
    degrees: dict, ep: list[int], names: tuple[str, ...], shape: tuple[int, ...], shards: list[list[int]]
) -> None:
    mesh = build_mesh(MeshDegrees(**degrees), "cpu")
    assert dist.get_process_group_ranks(mesh.expert_mesh[EP].get_group()) == ep
    sharded = mesh.expert_fsdp_mesh
    assert (sharded.mesh_dim_names, sharded.shape) == (names, shape)
    assert [dist.get_process_group_ranks(group) for group in sharded.get_all_groups()] == shards
    ours = {tuple(dist.get_process_group_ranks(group)) for group in mesh.groups}
    assert {tuple(ep), tuple(shards[-1])} <= ours, "groups that a timeout or an end of the run must know of"


@pytest.mark.usefixtures("rank_5_of_8")
def test_what_is_not_of_experts_lies_as_it_does_without_them() -> None:
    lengths = {"data_parallel_shard": 2, "context": 2, "pipeline": 2}
    plain, dealt = (build_mesh(MeshDegrees(**lengths, expert=expert), "cpu") for expert in (1, 4))
    for axis in (PP, DP_SHARD, CP):
        assert plain.place(axis) == dealt.place(axis)
    assert plain.fsdp_mesh.mesh.tolist() == dealt.fsdp_mesh.mesh.tolist() == [4, 5, 6, 7]
    assert (plain.data_rank, plain.data_ranks) == (dealt.data_rank, dealt.data_ranks)
    assert plain.expert_mesh is plain.device_mesh
    assert dealt.expert_mesh[EP].get_local_rank() == 1
    assert dealt.expert_mesh[EXPERT_SHARDS].size() == 1
