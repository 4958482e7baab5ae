"""The grid of ranks: one named axis per kind of parallelism.

A rank's place on the axis `dp_shard` says which part of the parameters it keeps, its place on `dp_replicate` which
copy of them. Both axes exist at every size, also at length 1, so code asks for an axis by name and need not know
which are in use:

    dp_replicate  dp_shard
         1            8       FSDP: one copy, eight shards
         2            4       HSDP: two copies of four shards each; gradients are also summed between the copies
         8            1       DDP: eight whole copies

Every rank of the two axes sees different data, so for batches, losses and gradients they are one axis of length 8.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_fp8.parallel.degrees import MeshDegrees

DP_REPLICATE = "dp_replicate"
DP_SHARD = "dp_shard"


@dataclass(frozen=True)
class DataParallelMesh:
    """The mesh of a job, seen from this rank.

    Attributes:
        degrees: lengths of the axes.
        device_mesh: the whole grid, axes `dp_replicate` and `dp_shard`.
    """

    degrees: MeshDegrees
    device_mesh: DeviceMesh

    @property
    def rank(self) -> int:
        """This rank's number among those that see different data: the part of the batch it reads."""
        replicate, shard = self.device_mesh[DP_REPLICATE], self.device_mesh[DP_SHARD]
        return replicate.get_local_rank() * shard.size() + shard.get_local_rank()

    @property
    def world_size(self) -> int:
        """Number of ranks that see different data."""
        return self.degrees.data_parallel

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that see different data: over these a loss or a count of tokens is summed."""
        world = dist.group.WORLD
        assert world is not None
        assert self.degrees.data_parallel == dist.get_world_size(), "every axis is a data-parallel one"
        return world

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """What `fully_shard` takes: [dp_shard], or [dp_replicate, dp_shard] where the parameters have copies."""
        if self.degrees.data_parallel_replicate == 1:
            return self.device_mesh[DP_SHARD]
        return self.device_mesh[DP_REPLICATE, DP_SHARD]

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Every process group of the mesh that this rank belongs to, the world's included."""
        return [self.group, self.device_mesh.get_group(DP_REPLICATE), self.device_mesh.get_group(DP_SHARD)]


def build_mesh(degrees: MeshDegrees, device_type: str) -> DataParallelMesh:
    """The mesh of these degrees over all ranks; the process group must be initialized.

    Args:
        degrees: their product is the world size.
        device_type: "cpu" or "cuda".
    """
    device_mesh = init_device_mesh(
        device_type,
        (degrees.data_parallel_replicate, degrees.data_parallel_shard),
        mesh_dim_names=(DP_REPLICATE, DP_SHARD),
    )
    return DataParallelMesh(degrees, device_mesh)
