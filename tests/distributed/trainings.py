"""Trainings of small models on any mesh, through the trainer, and what they are compared with: one process.

Each test module has a model and options of its own; what is here is what they share.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed.harness import run_distributed
from tests.distributed.meshes import mesh_of
from titan_fp8 import building
from titan_fp8.job_config import load_job_config
from titan_fp8.model_plan import plan_model
from titan_fp8.models.effect import without_effect
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.runtime.device import detect_device

Options = dict[str, str]

STEPS, SEQUENCES = 6, 4
MODEL = "dim=256 n_layers=2 n_heads=4 n_kv_heads=4 ffn_dim=256 vocab_size=320"
COMMON = {
    "model.flavor": "debugmodel",
    "training.dataset": "synthetic",
    "training.seq_len": "32",
    "training.steps": str(2 * STEPS),
    "training.global_batch_size": str(SEQUENCES),
    "training.mixed_precision_param": "float32",
    "optimizer.lr": "1e-3",
    "lr_scheduler.warmup_steps": "2",
    "activation_checkpoint.mode": "none",
    "debug.seed": "0",
    **{f"model.overrides.{key}": value for key, value in (each.split("=") for each in MODEL.split())},
}
FLOAT8 = "quantize.linear.float8"
KEYS = {
    "pp": "parallelism.pipeline_parallel_degree",
    "rep": "parallelism.data_parallel_replicate_degree",
    "fsdp": "parallelism.data_parallel_shard_degree",
    "cp": "parallelism.context_parallel_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "ep": "parallelism.expert_parallel_degree",
    "etp": "parallelism.expert_tensor_parallel_degree",
}


FULL = {"activation_checkpoint.mode": "full"}
PER_OP = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
COMPILED = {"compile.enable": "true", "compile.backend": "aot_eager", "compile.components": "model"}
GATHERED_CODES = {f"{FLOAT8}.enable_fsdp_float8_all_gather": "true"}


@dataclass(frozen=True)
class Mesh:
    """A line of the matrix: `pp2 tp2` and further options."""

    axes: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def degrees(self) -> dict[str, int]:
        return {axis.rstrip("0123456789"): int(axis.lstrip("abcdefghijklmnopqrstuvwxyz")) for axis in self.axes.split()}

    @property
    def ranks(self) -> int:
        """What experts are dealt out to and divided over are ranks of other axes."""
        return prod(degree for axis, degree in self.degrees.items() if axis not in ("ep", "etp"))

    def arguments(self) -> list[str]:
        degrees = self.degrees
        data = degrees.get("rep", 1) * degrees.get("fsdp", 1)
        keys = {KEYS[axis]: str(degree) for axis, degree in degrees.items()}
        keys.setdefault(KEYS["fsdp"], "1")
        keys["training.local_batch_size"] = str(SEQUENCES // data if "pp" in degrees else 1)
        options = {**COMMON, **keys, **dict(self.options)}
        if _has_no_dense_layer(options):
            options.pop("model.overrides.ffn_dim", None)  # which all models are given, and would be refused
        return [f"--{key}={value}" for key, value in options.items()]


def _has_no_dense_layer(options: Options) -> bool:
    family, flavor, prefix = options.get("model.name", "llama3"), options["model.flavor"], "model.overrides."
    given = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
    numbers = {name: int(value) for name, value in given.items() if value.isdecimal()}
    dims = resolve_dims(family, flavor, numbers)
    return "ffn_dim" in dict(without_effect(resolve_dims(family, flavor), dims, numbers))


@dataclass
class Run:
    """Some steps: the losses, the gradients of the last by name, whole, and the losses of validations."""

    losses: list[float]
    norms: list[float]
    grads: dict[str, Tensor]
    validated: list[float] = field(default_factory=list)


def train(
    rank: int,
    world_size: int,
    arguments: list[str],
    folder: str,
    steps: int = STEPS,
    place: torch.device = torch.device("cpu"),  # noqa: B008 - a device is immutable
) -> Run:
    """What the trainer does in this process, in a process group that is there."""
    os.environ.setdefault("WORLD_SIZE", str(world_size))
    job, _ = load_job_config([*arguments, f"--job.dump_folder={folder}"])
    building.build_mesh = mesh_of
    device = detect_device()
    trainer = building.build_trainer(job, plan_model(job, device), place, device, Path(folder))
    assert trainer is not None
    run = Run([], [], {})
    trainer.metrics.log_validation = lambda step, loss, tokens: run.validated.append(loss)
    try:
        trainer._set_training(True)
        for step in range(trainer.state.step + 1, steps + 1):
            if step == steps:
                _record_gradients(trainer, run)
            trainer._train_step()
            trainer.state.step = step
            result = trainer._read_result()
            run.losses.append(result.loss)
            run.norms.append(result.grad_norm)
            trainer._validate(step)
            if trainer.checkpointer.is_due(step):
                trainer.checkpointer.save(step)
    finally:
        trainer.close()
    return run


def _record_gradients(trainer: Any, run: Run) -> None:
    clip = trainer.optimizers.clip_grad_norm

    def recording(max_norm: float, **told: bool) -> Tensor:
        for part in trainer.parts:
            run.grads |= {name: whole(p.grad) for name, p in part.named_parameters() if p.grad is not None}
        return clip(max_norm, **told)

    trainer.optimizers.clip_grad_norm = recording


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, or a copy of a plain tensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train_afresh(rank: int, world_size: int, arguments: list[str], folder: str, steps: int) -> Run:
    """`train`, with nothing compiled before: what earlier cases compiled counts against the limit of recompilations."""
    torch._dynamo.reset()
    return train(rank, world_size, arguments, folder, steps)


def run_on(mesh: Mesh, folder: Path, *, steps: int = STEPS, how: Callable[..., Run] = train) -> Run:
    """All ranks' gradients together; losses and norms are the same on all. `how` is called as `train` is."""
    runs = run_distributed(how, mesh.ranks, mesh.arguments(), str(folder), steps, timeout_s=100.0)
    assert all(run.losses == runs[0].losses and run.norms == runs[0].norms for run in runs)
    whole = runs[0]
    for run in runs:
        whole.grads |= run.grads
    return whole


def run_alone(options: Options, how: Callable[..., Run] = train, steps: int = STEPS) -> Run:
    """One process, once for all that is compared with it; without what only matters to several processes, or to memory
    and speed."""
    left_out = {*FULL, *PER_OP, *COMPILED, *GATHERED_CODES, "optimizer.implementation"}
    kept = {key: value for key, value in options.items() if key not in left_out and "parallelism." not in key}
    return _run_alone(tuple(sorted(kept.items())), how, steps)


@cache
def _run_alone(options: tuple[tuple[str, str], ...], how: Callable[..., Run], steps: int) -> Run:
    folder = Path(tempfile.mkdtemp(prefix="titan_fp8_alone_"))
    try:
        return run_on(Mesh("fsdp1", options), folder, steps=steps, how=how)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def assert_same(
    actual: Run, expected: Run, loss_tolerance: float, grad_tolerance: float, *, from_start: bool = True
) -> None:
    """Within relative tolerances, step by step and name by name; in the first step of a training, before weights have
    changed, a tenth of that."""
    if from_start:
        assert actual.losses[0] == pytest.approx(expected.losses[0], rel=max(loss_tolerance / 10, 1e-6))
    assert actual.losses == pytest.approx(expected.losses, rel=loss_tolerance)
    assert actual.norms == pytest.approx(expected.norms, rel=10 * loss_tolerance + grad_tolerance)
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        error = (actual.grads[name] - grad).norm() / grad.norm()
        assert error <= grad_tolerance, f"{name}: relative error {error:.2e}"


HIGH_PRECISION = (2e-6, 1e-4)
FLOAT8_CODES = (5e-4, 5e-2)
"""After some steps weights differ in their last bits, and so does a code now and then. One process whose initial
weights are changed in their last bits differs by up to 4.2e-4 and 4.1e-2 from itself in ten steps (ten such changes
each of tensorwise, rowwise and blockwise)."""
LOCAL_SCALES = (2e-3, 0.2)
"""Context parallelism: the tokens of each rank have scales of their own."""
