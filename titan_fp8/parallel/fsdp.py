"""Data parallelism: FSDP2, HSDP and DDP, all three by `fully_shard`.

Every rank computes on its own part of the batch with the whole model, one *unit* at a time. A unit's parameters are
gathered from the ranks' shards just before it runs and freed after; in the backward pass its gradients are summed
over ranks while being scattered back to the shards. Units, in the order in which they run:

    tok_embeddings | layers.0 | ... | layers.N-1 | norm + output

With tied embeddings one parameter belongs to the first and the last unit; then both join the root, which stays gathered
from the start of the forward pass to the end of the backward pass.

Seven decisions:

- **Gradients are sums.** The loss of a rank is already divided by the token count of the global batch, so nothing is
  divided here. Collectives are told to sum, which NCCL and gloo both do.
- **What is gathered.** Layers cast their weights to the dtype of the activations themselves, so gathering in that
  dtype gives the same values and moves half the bytes. Two kinds of unit are gathered in the master dtype: one with a
  linear in float8 or MXFP8, because scales and codes are computed from master weights, with or without FSDP; and the
  one with the embedding, whose gradient adds up a row for every occurrence of a token, which a process alone does in
  the master dtype. So every mesh computes what one process computes. `fully_shard` casts no activations: they have the
  right dtype.
- **Rows in place of the table.** Where the rows of a batch's tokens are fewer bytes than the table, the embedding is no
  unit. Its table has the same shards as every parameter, but they stay where they are, and the rows of the tokens are
  exchanged (`sharded_embedding.py`). Its gradient is one sum over the tokens of all ranks, in the master dtype at
  least. Not with tied embeddings, nor where parameters have copies, are divided over `tp` or are offloaded to host
  memory.
- **Float8 all-gather.** A Float8Linear whose weight is gathered as codes reads the master weight in its shard
  (`quantization/fsdp_weight.py`), so its unit is gathered in the dtype of the activations, codes aside. The weight's
  gradient is rounded to that dtype, too, before it is summed in the reduce dtype. Where it leaves its product in a
  wider one, or a bias is added, which happens in the master dtype, the unit stays in the master dtype.
- **MXFP8 all-gather** is the same with the four tensors of `quantization/mx_sharded.py`. The gradient leaves its
  product in the dtype of the activations, so that nothing is rounded that would not be.
- **How it travels.** Weights and gradients of the blocks and of the output layer move between GPUs of one host by
  copies from memory to memory, which leave all multiprocessors to the computation (`fsdp_exchange.py`); everything
  else, and on CPUs all, by the collectives of the process group.
- **Copies without shards are HSDP with shards of length 1.** Nothing is gathered then, only cast; gradients are
  all-reduced unit by unit while the backward pass goes on. One mechanism, and names, checkpoints, CPU offload and
  accumulation are the same everywhere.
"""

import os
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from titan_fp8.models.decoder import Decoder, TransformerBlock
from titan_fp8.models.moe import MoE
from titan_fp8.parallel.config import ParallelismSection
from titan_fp8.parallel.distributed import any_rank
from titan_fp8.parallel.fsdp_exchange import PeerAllGather, PeerReduceScatter, Places
from titan_fp8.parallel.gathered_codes import CodeBuffer, codes_of
from titan_fp8.parallel.gradient_sums import GradientSums, create_before_forward
from titan_fp8.parallel.mesh import ParallelMesh
from titan_fp8.parallel.sharded_embedding import ShardedEmbedding, exchanges_rows, is_tied, shard_embedding
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.runtime.collectives import Axis
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.logging import info_once
from titan_fp8.runtime.peer_memory import check_peer_memory, has_peer_access


def apply_fsdp(
    model: Decoder,
    *,
    mesh: ParallelMesh,
    parallelism: ParallelismSection,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    cpu_offload: bool,
    batch_tokens: int | None = None,
    microbatches: int = 1,
    gradients_stay: bool = False,
) -> None:
    """Shard the parameters of `model` over `mesh`, in place; they become DTensors under the same names.

    Args:
        model: on the meta device or a real one; every parameter of one dtype.
        mesh: from `build_mesh`.
        parallelism: for `fsdp_reshard_after_forward` and `fsdp_exchange`.
        param_dtype: dtype in which units that do not need master weights are gathered: that of the activations.
        reduce_dtype: dtype in which gradients are summed over ranks.
        cpu_offload: keep shards, gradients and so the optimizer's state in host memory.
        batch_tokens: tokens of a local batch on this rank, as many on every rank; None: not known, or not the same.
        microbatches: whose gradients are added up in a step.
        gradients_stay: nobody drops or replaces a gradient before the backward pass in which it came has ended, nor
            begins one while there are gradients of another, but for those `microbatches`. The memory of gradients then
            serves the next forward pass while the host is ahead of the device.

    Raises:
        UserError: `cpu_offload` on a CPU, or an exchange that the GPUs cannot do.
    """
    check_cpu_offload(cpu_offload, mesh.device_mesh.device_type)
    by_peers = _exchanges_by_peers(mesh, parallelism)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    in_place: set[nn.Parameter] = set()
    if exchanges_rows(model, mesh, batch_tokens=batch_tokens, cpu_offload=cpu_offload):
        assert model.tok_embeddings is not None
        axis = Axis.of(mesh.shards.get_group())
        in_place.add(shard_embedding(model.tok_embeddings, mesh.fsdp_mesh, axis, model.compute_dtype))
    units = _units(model)
    in_place |= _shard_experts(model, mesh, parallelism, param_dtype, reduce_dtype, offload)
    root: list[nn.Module] = [model]
    all_units, last = [*units, root], len(units) - 1
    freed = [_reshards(parallelism, mesh.degrees.pipeline > 1, is_last=i >= last) for i, _ in enumerate(all_units)]
    for modules, is_freed in zip(all_units, freed, strict=True):
        travels_by_peers = by_peers and (_is_block(modules) or _is_output(modules, model))
        fully_shard(
            modules,
            mesh=mesh.fsdp_mesh,
            reshard_after_forward=is_freed,
            shard_placement_fn=partial(_shard_dim, mesh.shards.size()),
            mp_policy=_precision(modules, param_dtype, reduce_dtype, travels_by_peers=travels_by_peers),
            offload_policy=offload,
            ignored_params=in_place or None,
        )
    if by_peers:
        # The stages of a pipeline and copies of the model add up microbatches before there are gradients of shards.
        is_summed_here = mesh.degrees.pipeline == 1 and mesh.degrees.data_parallel_replicate == 1
        keeps = microbatches > 1 and not cpu_offload and is_summed_here
        # Else FSDP itself lets go of sums: it casts, copies or adds them, which takes other memory.
        are_gradients = microbatches == 1 and not cpu_offload and mesh.degrees.data_parallel_replicate == 1
        stay = gradients_stay and are_gradients and mesh.degrees.pipeline == 1
        _exchange_units(model, units, freed[:-1], mesh, reduce_dtype, in_place, keeps_sums=keeps, sums_stay=stay)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if isinstance(model.tok_embeddings, FSDPModule):
        model.tok_embeddings.set_unshard_in_backward(False)  # the gradient of a table needs no table
    _prefetch(model, units)


def _shard_experts(
    model: Decoder,
    mesh: ParallelMesh,
    parallelism: ParallelismSection,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    offload: OffloadPolicy,
) -> set[nn.Parameter]:
    """Shard experts that lie on other ranks than all else as units of their own, over the ranks that have the same
    ones; where each rank is the only one, its experts stay as they are, and are returned."""
    if not mesh.degrees.experts_are_apart:
        return set()
    experts = [module.experts for module in model.modules() if isinstance(module, MoE)]
    expert_mesh = mesh.expert_fsdp_mesh
    if expert_mesh.size() == 1 and not isinstance(offload, CPUOffloadPolicy):
        return {parameter for each in experts for parameter in each.parameters()}
    for each in experts:
        fully_shard(
            each,
            mesh=expert_mesh,
            reshard_after_forward=_reshards(parallelism, mesh.degrees.pipeline > 1, is_last=False),
            shard_placement_fn=partial(_shard_dim, mesh.degrees.expert_shards),
            mp_policy=_precision([each], param_dtype, reduce_dtype, travels_by_peers=False),
            offload_policy=offload,
        )
        register_fsdp_forward_method(each, "in_turn")
    return set()


def _shard_dim(shards: int, parameter: nn.Parameter) -> Shard | None:
    """Along which dimension a parameter is cut; None: the first. Of experts there may be fewer than shards, and some
    ranks would have none: each expert is cut then."""
    here = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape
    return None if len(here) < 3 or here[0] % shards == 0 or here[1] % shards else Shard(1)


def _precision(
    modules: list[nn.Module], param_dtype: torch.dtype, reduce_dtype: torch.dtype, *, travels_by_peers: bool
) -> MixedPrecisionPolicy:
    """In which dtypes a unit's weights and gradients travel."""
    reads_master = any(_reads_master(part, param_dtype) for module in modules for part in _own_modules(module))
    # Between peers gradients travel in their own dtype; what adds them up knows the dtype of the sums.
    of_gradients = param_dtype if travels_by_peers and not reads_master else reduce_dtype
    return MixedPrecisionPolicy(
        param_dtype=None if reads_master else param_dtype, reduce_dtype=of_gradients, cast_forward_inputs=False
    )


def check_cpu_offload(cpu_offload: bool, device_type: str) -> None:
    """Raise a `UserError` if parameters are to be offloaded to where they already are."""
    if cpu_offload and device_type == "cpu":
        raise UserError(
            "training.enable_cpu_offload moves parameters from GPU memory to host memory, but this job runs on a CPU, "
            "where they already are; turn it off"
        )


def check_exchange(choice: str, device_type: str) -> None:
    """Raise a `UserError` if weights are to travel between GPUs that there are not."""
    if choice == "peer_memory" and device_type != "cuda":
        raise UserError(
            'parallelism.fsdp_exchange = "peer_memory" copies between the memories of GPUs, but this job runs on a '
            f"{device_type.upper()}; leave it out"
        )


def set_gradient_sync(model: nn.Module, mesh: ParallelMesh, *, is_last_microbatch: bool) -> None:
    """Call before each microbatch, but for those of a pipeline, which does this by itself: copies of the model sum
    their gradients once a step, after the last microbatch.

    Sums over shards happen in every microbatch, since a rank has no room for gradients of what it does not keep. Until
    the last microbatch has been through `backward`, `.grad` of a model with copies is incomplete or None.
    """
    if isinstance(model, FSDPModule) and mesh.degrees.data_parallel_replicate > 1:
        model.set_requires_all_reduce(is_last_microbatch)


def _exchanges_by_peers(mesh: ParallelMesh, parallelism: ParallelismSection) -> bool:
    """Whether units travel through peer memory: `parallelism.fsdp_exchange`, or what it finds possible. Every
    rank finds the same.

    Raises:
        UserError: it was asked for by name, and cannot be.
    """
    choice = parallelism.fsdp_exchange
    group = mesh.shards.get_group()
    check_exchange(choice, mesh.device_mesh.device_type)
    if choice == "peer_memory" and mesh.degrees.pipeline > 1:
        raise UserError(
            "parallelism.fsdp_exchange = peer_memory: a pipeline gathers more blocks at a time than there are buffers; "
            "leave it out"
        )
    if choice == "collectives" or group.size() == 1 or mesh.device_mesh.device_type != "cuda":
        return False
    if choice == "auto":
        ranks_per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        out_of_reach = not has_peer_access(dist.get_process_group_ranks(group), ranks_per_host)
        if mesh.degrees.pipeline > 1 or any_rank(out_of_reach):
            return False
    problem = None
    try:
        check_peer_memory(group, torch.device("cuda", torch.cuda.current_device()), "parallelism.fsdp_exchange")
    except UserError as error:
        problem = error
    if not any_rank(problem is not None):
        info_once("FSDP exchanges blocks and output layer through peer memory")
        return True
    problem = problem or UserError("parallelism.fsdp_exchange: other GPUs of the job cannot read each other's memory")
    if choice == "peer_memory":
        raise problem
    info_once(f"FSDP exchanges blocks and output layer by collectives: {problem}")
    return False


def _exchange_units(
    model: Decoder,
    units: list[list[nn.Module]],
    freed: list[bool],
    mesh: ParallelMesh,
    reduce_dtype: torch.dtype,
    in_place: set[nn.Parameter],
    *,
    keeps_sums: bool,
    sums_stay: bool,
) -> None:
    """Have blocks and the output layer exchanged through peer memory.

    Args:
        freed: whether each unit is freed after its forward pass.
        in_place: parameters that FSDP has nothing to do with.
        keeps_sums: the sums of gradients over microbatches are to lie in memory of their own.
        sums_stay: those of the parameters' dtype are the gradients, and stay until the backward pass has ended.
    """
    group = mesh.shards.get_group()
    kept: list[GradientSums] = []
    of_blocks = Places(group), Places(group, turns=1)
    alternating = CodeBuffer(group), CodeBuffer(group)
    blocks = 0
    for unit, is_freed in zip(units, freed, strict=True):
        first = unit[0]
        if not (_is_block(unit) or _is_output(unit, model)):
            continue
        assert isinstance(first, FSDPModule)
        parts = [part for module in unit for part in _own_modules(module)]
        parts = [part for part in parts if in_place.isdisjoint(part.parameters(recurse=False))]
        (gathers, reductions), codes = of_blocks, None
        if _is_block(unit):
            codes = codes_of(parts, alternating[blocks % 2] if is_freed else CodeBuffer(group))
            blocks += 1
        else:
            # If it is freed after its forward pass, it is gathered twice in a row. Else its exchanges take turns.
            reductions = Places(group, turns=1)
            gathers = Places(group) if is_freed else reductions
        sums = GradientSums(parts, reduce_dtype) if keeps_sums else None
        kept += [] if sums is None else [sums]
        first.set_custom_all_gather(PeerAllGather(gathers, codes))
        are_gradients = all(each.dtype == reduce_dtype for part in parts for each in part.parameters(recurse=False))
        reduction = PeerReduceScatter(
            reductions,
            reduce_dtype,
            sums,
            squares=mesh.degrees.data_parallel_replicate == 1,
            sums_stay=sums_stay and are_gradients,
        )
        first.set_custom_reduce_scatter(reduction)
    create_before_forward(model, kept)


def _is_block(unit: list[nn.Module]) -> bool:
    return isinstance(unit[0], TransformerBlock)


def _is_output(unit: list[nn.Module], model: Decoder) -> bool:
    return model.output is not None and model.output in unit


def _units(model: Decoder) -> list[list[nn.Module]]:
    """The modules gathered together, in the order in which they run; what is in no unit belongs to the root."""
    layers: list[list[nn.Module]] = [[layer] for layer in model.layers.values()]
    embedding, output = model.tok_embeddings, model.output
    if is_tied(model):
        return layers
    first: list[list[nn.Module]] = [] if embedding is None or isinstance(embedding, ShardedEmbedding) else [[embedding]]
    return first + layers + ([] if output is None else [[model.norm, output]])


def _own_modules(module: nn.Module) -> list[nn.Module]:
    """The modules below `module`, and itself, that belong to no unit made before."""
    below = [part for child in module.children() if not isinstance(child, FSDPModule) for part in _own_modules(child)]
    return [module, *below]


def _reads_master(module: nn.Module, param_dtype: torch.dtype) -> bool:
    """Whether a module's result or gradient depends on bits of a gathered master weight that `param_dtype` drops."""
    if not isinstance(module, Float8Linear):
        return isinstance(module, nn.Embedding) or getattr(module, "reads_master_weights", False)
    wide_gradient = torch.promote_types(module.config.grad_weight_dtype, param_dtype) != param_dtype
    return module.fsdp_weight_state is None or module.bias is not None or wide_gradient


def _reshards(parallelism: ParallelismSection, in_pipeline: bool, *, is_last: bool) -> bool:
    """Whether a unit is freed after its forward pass.

    By default all but the last are: the backward pass begins with the last unit, which would be gathered again at once.
    In a pipeline none is, since the next microbatch needs it.
    """
    if parallelism.fsdp_reshard_after_forward == "default":
        return not is_last and not in_pipeline
    return parallelism.fsdp_reshard_after_forward == "always"


def _prefetch(model: Decoder, units: list[list[nn.Module]]) -> None:
    """Gather the next unit of the forward pass while this one computes.

    By default a gather is issued when its unit is reached, which overlaps only as long as the CPU is ahead of the GPU.
    The backward pass prefetches by itself.
    """
    root: list[nn.Module] = [model]
    for current, following in pairwise([root, *units]):
        ahead, target = current[0], following[0]
        assert isinstance(ahead, FSDPModule)
        assert isinstance(target, FSDPModule)
        ahead.set_modules_to_forward_prefetch([target])
