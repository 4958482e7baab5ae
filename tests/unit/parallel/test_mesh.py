"""The grid of ranks as one of them sees it, without the others."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.mesh import build_mesh


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
