"""The inner order: what is done to a converted model before it gets its weights.

    experts -> tensor and sequence parallelism, routing over it -> context parallelism
        -> activation checkpointing (per block) -> compile (per block) -> FSDP2, HSDP or DDP (per unit)

Why in this order. Converters have already run: they see plain `nn.Linear`, and all that follows sees what they made
of it. Recomputation sits inside the compiled region, so that the compiler sees it and may keep or fuse what it likes.
FSDP sits outside of it, because its hooks would break the graph. Weights come last (`materialize`), when each rank
knows its shards, so that the whole model never exists in one place; and the optimizer after that, since it needs the
final parameters.
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from titan_fp8.models.decoder import Decoder
from titan_fp8.parallel.activation_checkpoint import (
    apply_activation_checkpointing,
    check_activation_checkpointing,
    is_per_op,
)
from titan_fp8.parallel.compile import apply_compile, check_backend
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection, ParallelismSection
from titan_fp8.parallel.context import apply_context_parallel, context_parallel
from titan_fp8.parallel.expert import apply_expert_parallel
from titan_fp8.parallel.expert_overlap import overlap_batches
from titan_fp8.parallel.expert_tensor import apply_expert_tensor_parallel
from titan_fp8.parallel.fsdp import apply_fsdp, check_cpu_offload, check_exchange
from titan_fp8.parallel.mesh import TP, ParallelMesh
from titan_fp8.parallel.tensor import apply_tensor_parallel
from titan_fp8.parallel.tensor_rules import check_tensor_parallel
from titan_fp8.quantization.overlap_ops import check_direct_access
from titan_fp8.runtime.collectives import Axis
from titan_fp8.runtime.errors import UserError


def parallelize(
    model: Decoder,
    *,
    mesh: ParallelMesh,
    parallelism: ParallelismSection,
    activation_checkpoint: ActivationCheckpointSection,
    compile_config: CompileSection,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype = torch.float32,
    cpu_offload: bool = False,
    dump_folder: Path | None = None,
    batch_tokens: int | None = None,
    microbatches: int = 1,
    gradients_stay: bool = False,
) -> Decoder:
    """Apply the inner order to `model`, in place, and return it. A model on the meta device stays there.

    One rank without CPU offload is not wrapped at all: its parameters stay plain tensors.

    Args:
        model: converted, not yet materialized.
        mesh: from `build_mesh`.
        parallelism, activation_checkpoint, compile_config: the sections.
        param_dtype: dtype of the activations (training.mixed_precision_param).
        reduce_dtype: dtype in which gradients are summed over ranks (training.mixed_precision_reduce).
        cpu_offload: keep parameters and optimizer state in host memory (training.enable_cpu_offload).
        dump_folder: the run's folder, for pictures that were asked for.
        batch_tokens: tokens of a local batch on this rank, as many on every rank, by which to choose what FSDP moves
            for the embedding (`sharded_embedding.py`); None: not known.
        microbatches: whose gradients are added up in an optimizer step.
        gradients_stay: as for `apply_fsdp`.

    Raises:
        UserError: something asked for cannot be done; the message names the key, the rule and the remedy.
    """
    apply_expert_parallel(model, mesh, payload=parallelism.expert_parallel_payload)
    apply_tensor_parallel(model, mesh, loss_parallel=not parallelism.disable_loss_parallel)
    apply_expert_tensor_parallel(model, mesh)
    around_experts = mesh.degrees.expert > 1 or mesh.degrees.tensor > 1
    context = context_parallel(mesh, parallelism)
    if context is not None:
        apply_context_parallel(model, context)
    overlap_batches(model, parallelism.expert_parallel_overlap_batches)
    apply_activation_checkpointing(
        model,
        activation_checkpoint,
        compile_config=compile_config,
        dump_folder=dump_folder,
        around_experts=around_experts,
        is_local=mesh.degrees.tensor == mesh.degrees.context == mesh.degrees.expert == 1,
    )
    apply_compile(
        model,
        compile_config,
        overlapped=_overlapped_axis(mesh, parallelism),
        around_experts=around_experts,
        routes=not is_per_op(activation_checkpoint),
    )
    if mesh.world_size > 1 or cpu_offload:
        apply_fsdp(
            model,
            mesh=mesh,
            parallelism=parallelism,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            cpu_offload=cpu_offload,
            batch_tokens=batch_tokens,
            microbatches=microbatches,
            gradients_stay=gradients_stay,
        )
    return model


def check_parallelization(
    model: nn.Module,
    *,
    device_type: str,
    activation_checkpoint: ActivationCheckpointSection,
    compile_config: CompileSection,
    cpu_offload: bool,
    tensor_ranks: int = 1,
    async_tensor_parallel: bool = False,
    fsdp_exchange: str = "auto",
) -> None:
    """What `parallelize` would refuse, all of it at once, before there is a process group or a mesh.

    Args:
        model: converted, on the meta device.
        device_type: "cpu" or "cuda".
        activation_checkpoint, compile_config, cpu_offload: as for `parallelize`.
        tensor_ranks: length of the mesh's axis `tp`.
        async_tensor_parallel: parallelism.enable_async_tensor_parallel.
        fsdp_exchange: parallelism.fsdp_exchange.

    Raises:
        UserError: one line for each thing that cannot be done.
    """
    problems: list[str] = []
    for check in (
        partial(check_tensor_parallel, model, tensor_ranks),
        partial(check_activation_checkpointing, model, activation_checkpoint, compile_config),
        partial(check_backend, compile_config),
        partial(check_cpu_offload, cpu_offload, device_type),
        partial(_check_overlap, async_tensor_parallel, device_type),
        partial(check_exchange, fsdp_exchange, device_type),
    ):
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _overlapped_axis(mesh: ParallelMesh, parallelism: ParallelismSection) -> Axis | None:
    """The axis whose exchanges overlap with products, if asked for."""
    if not parallelism.enable_async_tensor_parallel:
        return None
    tp_mesh = mesh.device_mesh[TP]
    axis = Axis.of(tp_mesh.get_group())
    if tp_mesh.device_type == "cuda":
        check_direct_access(axis)
    return axis


def _check_overlap(wanted: bool, device_type: str) -> None:
    if wanted and device_type == "cpu":
        raise UserError(
            "parallelism.enable_async_tensor_parallel overlaps exchanges through GPUs that read each other's memory, "
            "but this job runs on CPUs; leave it out"
        )


def materialize(model: nn.Module, device: torch.device, *, cpu_offload: bool = False) -> None:
    """Give every tensor of `model` that is on the meta device uninitialized memory, and move the others.

    Parameters that two modules share stay shared.

    Args:
        model: the result of `parallelize`.
        device: where parameters and buffers go.
        cpu_offload: parameters go to host memory instead; buffers go to `device` all the same.
    """
    shared = _shared_parameters(model)
    target = torch.device("cpu") if cpu_offload else device
    model._apply(lambda tensor: _to(tensor, target))
    for names in shared:
        parameter = model.get_parameter(names[0])
        for name in names[1:]:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, parameter)
    if target == device:
        return
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, buffer.to(device), persistent)


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def _shared_parameters(model: nn.Module) -> list[list[str]]:
    """Names of each parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]
