"""The grid of ranks: one named axis per kind of parallelism.

    pp             layers: which pipeline stages a rank runs
    dp_replicate   copies of the parameters; their gradients are summed
    dp_shard       shards of the parameters; every rank of both sees different data
    cp             parts of each sequence; parameters are sharded over these ranks too
    tp             parts of each matrix product, innermost: its ranks exchange most and should share a host

A rank's place on an axis is its number there. All five axes exist at every size, also at length 1, so code asks for an
axis by name and need not know which are in use:

    dp_replicate  dp_shard
         1            8       FSDP: one copy, eight shards
         2            4       HSDP: two copies of four shards each; gradients are also summed between the copies
         8            1       DDP: eight whole copies

Ranks of one tp or pp axis see the same data. Over what is left, batches, losses and gradients are divided:

    data     dp_replicate x dp_shard            which sequences a rank reads
    tokens   dp_replicate x dp_shard x cp       which tokens a rank computes the loss of
    shards   dp_shard x cp                      which shard of the parameters FSDP gives it

Experts of a mixture of experts lie otherwise. For their parameters the same ranks form another grid, with three axes in
the place of dp_shard, cp and tp:

    expert_shards  shards of a rank's experts
    ep             experts: which of them a rank has, neighbours first
    expert_tp      parts of each expert: the ranks of tp, or of length 1. Then the ranks of tp, which have different
                   tokens between products, are ranks for the two axes above
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_fp8.parallel.degrees import MeshDegrees

PP, DP_REPLICATE, DP_SHARD, CP, TP = AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_SHARDS, EP, EXPERT_TP = "expert_shards", "ep", "expert_tp"
EXPERT_AXES = (PP, DP_REPLICATE, EXPERT_SHARDS, EP, EXPERT_TP)
SHARDS = "dp_shard_cp"
TOKENS = "dp_cp"


@dataclass(frozen=True)
class ParallelMesh:
    """The mesh of a job, seen from this rank.

    Attributes:
        degrees: lengths of the axes.
        device_mesh: the whole grid.
        shards: its axes `dp_shard` and `cp` as one, of the name `dp_shard_cp`.
        tokens: its axes `dp_replicate`, `dp_shard` and `cp` as one.
        expert_mesh: the same ranks, by the axes of experts; where these lie as all other parameters do it is
            `device_mesh`.
    """

    degrees: MeshDegrees
    device_mesh: DeviceMesh
    shards: DeviceMesh
    tokens: DeviceMesh
    expert_mesh: DeviceMesh

    def place(self, axis: str) -> int:
        """This rank's number on an axis."""
        return self.device_mesh[axis].get_local_rank()

    @property
    def data_rank(self) -> int:
        """This rank's number among those that read different data: the part of the batch it reads."""
        return self.place(DP_REPLICATE) * self.degrees.data_parallel_shard + self.place(DP_SHARD)

    @property
    def data_ranks(self) -> int:
        """Number of ranks that read different data."""
        return self.degrees.data_parallel

    @property
    def rank(self) -> int:
        """This rank's number among all."""
        return dist.get_rank()

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    @property
    def world_size(self) -> int:
        """Number of all ranks."""
        return self.degrees.world_size

    def sum_over_tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over the ranks that have different tokens, as a new tensor: of a count that each has a
        part of."""
        total = tensor.detach().clone()
        dist.all_reduce(total, dist.ReduceOp.SUM, self.tokens.get_group())
        return total

    def sum_of_losses(self, tensor: torch.Tensor) -> torch.Tensor:
        """`sum_over_tokens` of what the last pipeline stage has and the others have as zero, on every rank."""
        total = self.sum_over_tokens(tensor)
        if self.stages is not None:
            dist.all_reduce(total, dist.ReduceOp.SUM, self.stages)
        return total

    @property
    def stages(self) -> dist.ProcessGroup | None:
        """The ranks that run the other stages of the same pipeline, and this one; None without a pipeline."""
        return self.device_mesh.get_group(PP) if self.degrees.pipeline > 1 else None

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """What `fully_shard` takes: the shards, or [dp_replicate, shards] where the parameters have copies."""
        has_copies = self.degrees.data_parallel_replicate > 1
        if self.degrees.context == 1:
            return self.device_mesh[DP_REPLICATE, DP_SHARD] if has_copies else self.device_mesh[DP_SHARD]
        # Slicing would take an axis that was flattened by name, too, but PyTorch is giving that up.
        return DeviceMesh._concatenate([self.device_mesh[DP_REPLICATE], self.shards]) if has_copies else self.shards

    @property
    def expert_fsdp_mesh(self) -> DeviceMesh:
        """`fsdp_mesh` of experts that lie otherwise than all else."""
        has_copies = self.degrees.data_parallel_replicate > 1
        return self.expert_mesh[DP_REPLICATE, EXPERT_SHARDS] if has_copies else self.expert_mesh[EXPERT_SHARDS]

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Every process group of the mesh that this rank belongs to, the world's included."""
        world = dist.group.WORLD
        assert world is not None
        axes = [self.device_mesh.get_group(axis) for axis in AXES]
        of_experts = (EXPERT_SHARDS, EP, EXPERT_TP) if self.degrees.experts_are_apart else ()
        experts = [self.expert_mesh.get_group(axis) for axis in of_experts]
        return [world, *axes, self.shards.get_group(), self.tokens.get_group(), *experts]


def build_mesh(degrees: MeshDegrees, device_type: str) -> ParallelMesh:
    """The mesh of these degrees over all ranks; the process group must be initialized.

    Args:
        degrees: their product is the world size.
        device_type: "cpu" or "cuda".
    """
    lengths = (
        degrees.pipeline,
        degrees.data_parallel_replicate,
        degrees.data_parallel_shard,
        degrees.context,
        degrees.tensor,
    )
    device_mesh = init_device_mesh(device_type, lengths, mesh_dim_names=AXES)
    shards = device_mesh[DP_SHARD, CP]._flatten(SHARDS)
    tokens = device_mesh[DP_REPLICATE, DP_SHARD, CP]._flatten(TOKENS)
    expert_mesh = device_mesh
    if degrees.experts_are_apart:
        expert_lengths = (*lengths[:2], degrees.expert_shards, degrees.expert, degrees.expert_tensor)
        expert_mesh = init_device_mesh(device_type, expert_lengths, mesh_dim_names=EXPERT_AXES)
    return ParallelMesh(degrees, device_mesh, shards, tokens, expert_mesh)
