"""From a checked configuration to a trainer: the outer build order, once.

    plan on the meta device  ->  process group, mesh  ->  data  ->  parallelize (inner order, parallel/apply.py)
      ->  materialize and initialize, sharded  ->  optimizer, schedule  ->  load a checkpoint  ->  metrics

The plan comes first because all that can be wrong with a model shows without storage and without other processes.
Weights are made after sharding, so the whole model never exists in one place. The optimizer needs the final, sharded
parameters, and the metrics need to know the step that a checkpoint resumes from.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from titan_fp8.checkpoint.checkpointer import Checkpointer
from titan_fp8.data.loader import TrainLoader, build_train_loader
from titan_fp8.data.validation import ValidationLoader, build_validation_loader
from titan_fp8.job_config import JobConfig, to_toml
from titan_fp8.model_plan import DTYPES, ModelPlan, plan_model, run_fingerprint
from titan_fp8.models.arithmetic import count_parameters
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.observability.files import disk_errors
from titan_fp8.observability.metrics import MetricsLogger
from titan_fp8.observability.run_folder import RunFolderLock, atomic_write, create_run_folder, write_run_record
from titan_fp8.optim.optimizers import build_optimizer
from titan_fp8.optim.schedule import build_lr_scheduler
from titan_fp8.parallel.apply import materialize, parallelize
from titan_fp8.parallel.compile import compile_loss
from titan_fp8.parallel.context import context_parallel
from titan_fp8.parallel.degrees import resolve_degrees
from titan_fp8.parallel.distributed import destroy, init_distributed, local_device
from titan_fp8.parallel.expert_load import expert_load
from titan_fp8.parallel.mesh import PP, ParallelMesh, build_mesh
from titan_fp8.parallel.pipeline import Pipeline, split_model
from titan_fp8.parallel.tensor import vocab_parallel_loss
from titan_fp8.runtime.determinism import set_seed, use_deterministic_algorithms
from titan_fp8.runtime.device import DeviceCapabilities, detect_device
from titan_fp8.runtime.logging import info_once
from titan_fp8.train_state import TrainState
from titan_fp8.trainer import Trainer


def run(job: JobConfig) -> None:
    """Plan, build, train and close one job.

    Raises:
        ConfigErrors: the model, its converters, the tokenizer, the data, the run's folder or the checkpoint to load
            break a rule; no process group was made, and nothing was written.
        UserError: anything else that the user can mend.
    """
    device = local_device(detect_device().kind)
    capabilities = detect_device(device.index or 0)
    use_deterministic_algorithms(job.debug)
    plan = plan_model(job, capabilities)
    folder = create_run_folder(job.job.dump_folder)
    init_distributed(job.comm, device, folder)
    try:
        trainer = build_trainer(job, plan, device, capabilities, folder)
        if trainer is not None:
            with contextlib.closing(trainer):
                trainer.train()
    finally:
        destroy()


def build_trainer(
    job: JobConfig, plan: ModelPlan, device: torch.device, capabilities: DeviceCapabilities, folder: Path
) -> Trainer | None:
    """Build every part of a run, in the order of the module's docstring; the process group must be initialized.

    Args:
        job: the checked configuration.
        plan: the converted model on the meta device and what belongs to it.
        device: this process's device; `capabilities` describe it.
        folder: the run's folder.

    Returns:
        The trainer, or None when nothing is left to train: the run is finished, or was to make a seed checkpoint.
    """
    degrees = resolve_degrees(job.parallelism, dist.get_world_size())
    mesh = build_mesh(degrees.without_experts() if plan.dims.n_experts is None else degrees, device.type)
    seed = set_seed(job.debug, device)
    with contextlib.ExitStack() as undo:
        lock = RunFolderLock(folder) if mesh.is_main else None
        if lock is not None:
            undo.callback(lock.release)
        loaders = _build_loaders(job, plan, mesh, seed)
        for loader in loaders:
            if loader is not None:
                undo.callback(loader.close)
        parts = _build_parts(job, plan, mesh, device, folder, seed)
        optimizers = build_optimizer(parts, job.optimizer, mesh.stages)
        lr_scheduler = build_lr_scheduler(optimizers, job.lr_scheduler, job.training.steps)
        state = TrainState()
        checkpointer = Checkpointer(
            job.checkpoint,
            folder,
            model_parts=parts,
            optimizers=optimizers,
            lr_schedulers=lr_scheduler,
            train_state=state,
            data_loader=loaders[0],
            fingerprint=run_fingerprint(job, plan.dims, plan.reports),
            total_steps=job.training.steps,
        )
        undo.callback(checkpointer.close)
        if not _start(job, checkpointer):
            return None
        # A resumed run goes on under its checkpoint's seed, so that is the one to write down.
        metrics = _start_record(job, plan, capabilities, folder, mesh, device, state.step, loaders[0].seed, lock)
        undo.pop_all()
    loss_fn = compile_loss(_loss(job, mesh), job.compile)
    return Trainer(
        job=job,
        folder=folder,
        device=device,
        mesh=mesh,
        context=context_parallel(mesh, job.parallelism),
        parts=parts,
        expert_load=expert_load(parts, plan.dims, mesh),
        pipeline=_build_pipeline(job, plan, mesh, device, parts, loss_fn),
        converters=plan.converters,
        loss_fn=loss_fn,
        optimizers=optimizers,
        lr_scheduler=lr_scheduler,
        loader=loaders[0],
        validation=loaders[1],
        checkpointer=checkpointer,
        state=state,
        metrics=metrics,
        runs_ahead=_gradients_stay(job, mesh),
    )


def _gradients_stay(job: JobConfig, mesh: ParallelMesh) -> bool:
    """Whether gradients are what the backward pass has summed, until the optimizer's step: nobody casts, sums or drops
    them before. See `apply_fsdp`."""
    training = job.training
    is_summed_once = mesh.degrees.data_parallel_replicate == 1 and training.mixed_precision_reduce == training.dtype
    return is_summed_once and not job.optimizer.early_step_in_backward


def _loss(job: JobConfig, mesh: ParallelMesh) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of the logits as the model leaves them."""
    divided = mesh.degrees.tensor > 1 and not job.parallelism.disable_loss_parallel
    return vocab_parallel_loss(mesh) if divided else cross_entropy_sum


def _start(job: JobConfig, checkpointer: Checkpointer) -> bool:
    """Load what there is to load; False if there is nothing to train."""
    if job.checkpoint.create_seed_checkpoint:
        checkpointer.save(0, last_step=True)
        info_once(f"the seed checkpoint is in {checkpointer.folder}; a run with checkpoint.enable starts from it")
        return False
    finished = checkpointer.finished_step()
    if finished is not None:
        info_once(
            f"finished already: {checkpointer.folder} holds the checkpoint of step {finished} and training.steps is "
            f"{job.training.steps}. Raise training.steps to go on, or set another job.dump_folder to start anew"
        )
        return False
    step = checkpointer.load()
    if step >= job.training.steps:
        info_once(f"nothing to train: that was after step {step}, and training.steps is {job.training.steps}; raise it")
    return step < job.training.steps


def _build_loaders(
    job: JobConfig, plan: ModelPlan, mesh: ParallelMesh, seed: int
) -> tuple[TrainLoader, ValidationLoader | None]:
    training, validation = job.training, job.validation
    local = training.local_batch_size
    total = training.global_batch_size if training.global_batch_size > 0 else local * mesh.data_ranks
    train_loader = build_train_loader(
        training,
        plan.tokenizer,
        seed=seed,
        global_batch_sequences=total,
        local_batch_sequences=local,
        dp_rank=mesh.data_rank,
        dp_world_size=mesh.data_ranks,
    )
    if not validation.enable:
        return train_loader, None
    validation_loader = build_validation_loader(
        validation,
        training,
        plan.tokenizer,
        seq_len=validation.seq_len,
        local_batch_sequences=validation.local_batch_size,
        dp_rank=mesh.data_rank,
        dp_world_size=mesh.data_ranks,
    )
    return train_loader, validation_loader


def _build_parts(
    job: JobConfig, plan: ModelPlan, mesh: ParallelMesh, device: torch.device, folder: Path, seed: int
) -> list[Decoder]:
    """The planned model, or the stages of it that this rank runs: parallelized, with memory and initial weights."""
    parts = [plan.model]
    if plan.pipeline is not None:
        parts = split_model(plan.model, plan.pipeline.stages, plan.pipeline.stages_of(mesh.place(PP)))
    for part in parts:
        _build_part(job, part, mesh, device, folder, seed)
    return parts


def _build_part(
    job: JobConfig, part: Decoder, mesh: ParallelMesh, device: torch.device, folder: Path, seed: int
) -> None:
    training = job.training
    parallelize(
        part,
        mesh=mesh,
        parallelism=job.parallelism,
        activation_checkpoint=job.activation_checkpoint,
        compile_config=job.compile,
        param_dtype=DTYPES[training.mixed_precision_param],
        reduce_dtype=DTYPES[training.mixed_precision_reduce],
        cpu_offload=training.enable_cpu_offload,
        dump_folder=folder,
        batch_tokens=training.local_batch_size * training.seq_len // mesh.degrees.context,
        microbatches=max(1, training.global_batch_size // (training.local_batch_size * mesh.data_ranks)),
        gradients_stay=_gradients_stay(job, mesh),
    )
    materialize(part, device, cpu_offload=training.enable_cpu_offload)
    initialize(part, seed, device=device)


def _build_pipeline(
    job: JobConfig,
    plan: ModelPlan,
    mesh: ParallelMesh,
    device: torch.device,
    parts: list[Decoder],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> Pipeline | None:
    if plan.pipeline is None:
        return None
    tensor, dim, vocab = mesh.degrees.tensor, plan.dims.dim, plan.dims.vocab_size
    local_vocab = vocab if job.parallelism.disable_loss_parallel else vocab // tensor
    return Pipeline(
        parts,
        plan.pipeline,
        group=mesh.device_mesh.get_group(PP),
        device=device,
        batch_sequences=job.training.local_batch_size,
        seq_len=job.training.seq_len // mesh.degrees.context,
        loss_fn=loss_fn,
        # Under tensor parallelism the tokens of all sequences come in one row (`parallel/tensor.py`).
        stream_shape=None if tensor == 1 else lambda b, s: (1, b * s // tensor, dim),
        logits_shape=None if tensor == 1 else lambda b, s: (1, b * s, local_vocab),
    )


def _start_record(
    job: JobConfig,
    plan: ModelPlan,
    capabilities: DeviceCapabilities,
    folder: Path,
    mesh: ParallelMesh,
    device: torch.device,
    resume_step: int,
    seed: int,
    lock: RunFolderLock | None,
) -> MetricsLogger:
    """Say what is about to run, write it into the run's folder, and start the clock of the metrics."""
    for report in plan.reports:
        info_once(report.summary())
    if job.model.print_after_conversion:
        info_once(str(plan.model))
    # With the seed that was drawn: the same run again, and not another one.
    config_toml = to_toml(job.model_copy(update={"debug": job.debug.model_copy(update={"seed": seed})}))
    if job.job.print_config:
        info_once(f"configuration:\n{config_toml}")
    info_once(
        f"{job.job.description}: {job.model.name} {job.model.flavor}, {count_parameters(plan.dims):,} parameters, "
        f"{capabilities.name} x {mesh.world_size}, attention by {plan.model.attention_backend}, seed {seed}, "
        f"run folder {folder}"
    )
    if mesh.is_main:
        reports = {"converters": [report.to_json() for report in plan.reports]}
        write_run_record(folder, config_toml=config_toml, conversion_report=reports)
        if job.job.save_config_file is not None:
            copy = folder / job.job.save_config_file
            with disk_errors(copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(copy, config_toml)
    return MetricsLogger(
        job.metrics,
        folder,
        device=device,
        rank=mesh.rank,
        world_size=mesh.world_size,
        flops_per_token=plan.flops_per_token,
        peak_flops=capabilities.peak_bf16_flops,
        total_steps=job.training.steps,
        resume_step=resume_step,
        lock=lock,
    )
