"""Every kind of parallelism and their products, through the trainer: ten steps equal one process, by loss and gradient.

A step has four sequences, each a microbatch of its own, so that dynamic scales belong to the same values on every
mesh: one process accumulates over four, two data-parallel ranks over two each, a pipeline cuts its batch into them.
Weights, data and order are the trainer's own. fp32 activations; float8 emulated.
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
from titan_fp8.runtime.device import detect_device

STEPS, SEQUENCES = 10, 4
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
FLOAT8, MX = "quantize.linear.float8", "quantize.linear.mx"
KEYS = {
    "pp": "parallelism.pipeline_parallel_degree",
    "rep": "parallelism.data_parallel_replicate_degree",
    "fsdp": "parallelism.data_parallel_shard_degree",
    "cp": "parallelism.context_parallel_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "ep": "parallelism.expert_parallel_degree",
    "etp": "parallelism.expert_tensor_parallel_degree",
}


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
        return [f"--{key}={value}" for key, value in {**COMMON, **keys, **dict(self.options)}.items()]


def converted(recipe: str | None) -> dict[str, str]:
    """The options of a recipe; None converts nothing."""
    if recipe is None:
        return {}
    if recipe.startswith("mxfp8"):
        return {"model.converters": MX, f"{MX}.recipe_name": recipe, f"{MX}.emulate": "true"}
    name = f"{FLOAT8}.recipe_name"
    return {"model.converters": FLOAT8, name: recipe, f"{FLOAT8}.filter_fqns": "output", f"{FLOAT8}.emulate": "true"}


@dataclass
class Run:
    """Ten steps: the losses, the gradients of the last by name, whole, and the losses of validations."""

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
            result = trainer._train_step()
            trainer.state.step = step
            run.losses.append(result.loss.item())
            run.norms.append(result.grad_norm.item())
            trainer._validate(step)
            if trainer.checkpointer.is_due(step):
                trainer.checkpointer.save(step)
    finally:
        trainer.close()
    return run


def _record_gradients(trainer: Any, run: Run) -> None:
    clip = trainer.optimizers.clip_grad_norm

    def recording(max_norm: float) -> Tensor:
        for part in trainer.parts:
            run.grads |= {name: _whole(p.grad) for name, p in part.named_parameters() if p.grad is not None}
        return clip(max_norm)

    trainer.optimizers.clip_grad_norm = recording


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run_on(mesh: Mesh, folder: Path, *, steps: int = STEPS, how: Callable[..., Run] = train) -> Run:
    """All ranks' gradients together; losses and norms are the same on all. `how` is called as `train` is."""
    runs = run_distributed(how, mesh.ranks, mesh.arguments(), str(folder), steps, timeout_s=100.0)
    assert all(run.losses == runs[0].losses and run.norms == runs[0].norms for run in runs)
    whole = runs[0]
    for run in runs:
        whole.grads |= run.grads
    return whole


@cache
def alone(recipe: str | None) -> Run:
    folder = Path(tempfile.mkdtemp(prefix="titan_fp8_alone_"))
    try:
        return run_on(Mesh("fsdp1", tuple(converted(recipe).items())), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def assert_same(actual: Run, expected: Run, loss_tolerance: float, grad_tolerance: float) -> None:
    """Within relative tolerances, step by step and name by name."""
    assert actual.losses == pytest.approx(expected.losses, rel=loss_tolerance)
    assert actual.norms == pytest.approx(expected.norms, rel=10 * loss_tolerance + grad_tolerance)
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        error = (actual.grads[name] - grad).norm() / grad.norm()
        assert error <= grad_tolerance, f"{name}: relative error {error:.2e}"


HIGH_PRECISION = (2e-6, 1e-4)
FLOAT8_CODES = (2e-4, 5e-2)
"""After ten steps weights differ in their last bits, and so does a code now and then."""
LOCAL_SCALES = (2e-3, 0.2)
"""Context parallelism: the tokens of each rank have scales of their own."""

ZERO_BUBBLE = (
    ("parallelism.pipeline_parallel_schedule", "InterleavedZeroBubble"),
    (
        "parallelism.module_fqns_per_model_part",
        '[["tok_embeddings"], ["layers.0"], ["layers.1"], ["norm", "output"]]',
    ),
)
PLAIN = [
    Mesh("fsdp2", (("training.loss_chunk_tokens", "20"),)),
    Mesh("tp2"),
    Mesh("cp2"),
    Mesh("pp2"),
    Mesh("rep2 fsdp2"),
    Mesh("fsdp2 tp2"),
    Mesh("cp2 tp2", (("parallelism.context_parallel_rotate_method", "alltoall"),)),
    Mesh("pp2 tp2", ZERO_BUBBLE),
    Mesh("pp2 fsdp2", (("optimizer.implementation", "one_pass"),)),
    Mesh("pp2 cp2"),
    Mesh("fsdp2 cp2", (("activation_checkpoint.mode", "full"), ("training.loss_chunk_tokens", "7"))),
    Mesh("rep2 cp2"),
]
CODES = [
    Mesh("tp2"),
    Mesh("pp2", ZERO_BUBBLE),
    Mesh("fsdp2 tp2", ((f"{FLOAT8}.enable_fsdp_float8_all_gather", "true"),)),
    Mesh("pp2 tp2"),
    Mesh("rep2 fsdp2", ((f"{FLOAT8}.enable_fsdp_float8_all_gather", "true"),)),
]
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise")
WIDE = [
    Mesh("pp2 fsdp2 tp2"),
    Mesh("rep2 fsdp2 tp2"),
    Mesh("fsdp2 cp2 tp2"),
    Mesh("rep2 cp2 tp2"),
    Mesh("pp2 cp2 tp2"),
    Mesh("pp2 rep2 tp2"),
    Mesh("fsdp4 tp2"),
    Mesh("tp4 fsdp2"),
]


@pytest.mark.parametrize("mesh", PLAIN, ids=lambda mesh: mesh.axes.replace(" ", "_"))
def test_high_precision(mesh: Mesh, tmp_path: Path) -> None:
    assert_same(run_on(mesh, tmp_path), alone(None), *HIGH_PRECISION)


VALIDATION = {
    "validation.enable": "true",
    "validation.dataset": "synthetic",
    "validation.freq": str(STEPS // 2),
    "validation.steps": "1",
    "validation.seq_len": "48",
}
"""Of other lengths than the training's, and in a pipeline of an odd number of microbatches."""


@cache
def validated_alone() -> Run:
    folder = Path(tempfile.mkdtemp(prefix="titan_fp8_validated_"))
    try:
        return run_on(Mesh("fsdp1", tuple({**VALIDATION, "validation.local_batch_size": "6"}.items())), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(("axes", "sequences"), [("tp2", 6), ("fsdp2 cp2", 3), ("pp2 tp2", 6), ("pp2 fsdp2", 3)])
def test_validation(axes: str, sequences: int, tmp_path: Path) -> None:
    options = {**VALIDATION, "validation.local_batch_size": str(sequences)}
    if "cp" in axes:
        options["training.loss_chunk_tokens"] = "100"
    run, expected = run_on(Mesh(axes, tuple(options.items())), tmp_path), validated_alone()
    assert_same(run, expected, *HIGH_PRECISION)
    assert len(run.validated) == 2
    assert run.validated == pytest.approx(expected.validated, rel=2e-6)
    assert expected.losses == alone(None).losses, "training goes on as if nothing had been validated"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mesh", CODES, ids=lambda mesh: mesh.axes.replace(" ", "_"))
def test_float8(mesh: Mesh, recipe: str, tmp_path: Path) -> None:
    mesh = Mesh(mesh.axes, (*converted(recipe).items(), *mesh.options))
    assert_same(run_on(mesh, tmp_path), alone(recipe), *FLOAT8_CODES)


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh("tp2"),
        Mesh("pp2", ZERO_BUBBLE),
        Mesh("fsdp2 tp2", (("compile.enable", "true"),)),
        Mesh("rep2 fsdp2", (("activation_checkpoint.mode", "selective"),)),
        Mesh("cp2 tp2"),
    ],
    ids=lambda mesh: mesh.axes.replace(" ", "_"),
)
def test_mxfp8(mesh: Mesh, tmp_path: Path) -> None:
    mesh = Mesh(mesh.axes, (*converted("mxfp8_cublas_rceil").items(), *mesh.options))
    tolerances = LOCAL_SCALES if "cp" in mesh.axes else FLOAT8_CODES
    assert_same(run_on(mesh, tmp_path), alone("mxfp8_cublas_rceil"), *tolerances)


OF_SPREAD_SEQUENCES = ("rowwise", "blockwise")
"""Recipes whose scales are local to a rank's tokens, of rows and of blocks; the others are run by hand."""


@pytest.mark.parametrize(
    "recipe",
    [recipe if recipe in OF_SPREAD_SEQUENCES else pytest.param(recipe, marks=pytest.mark.slow) for recipe in RECIPES],
)
def test_float8_of_spread_sequences(recipe: str, tmp_path: Path) -> None:
    mesh = Mesh("cp2 tp2", tuple(converted(recipe).items()))
    assert_same(run_on(mesh, tmp_path), alone(recipe), *LOCAL_SCALES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_float8_head_that_computes_the_loss_some_tokens_at_a_time(recipe: str, tmp_path: Path) -> None:
    """Bit for bit: each rank has one microbatch, two addends have one sum, and nothing is clipped."""
    options = converted(recipe) | {
        f"{FLOAT8}.filter_fqns": "layers.0",
        "model.overrides.vocab_size": "384",  # whole blocks
        "training.seq_len": "384",  # as many tokens as rows: the table is gathered, sums are in one order
        "training.global_batch_size": "2",
        "training.max_norm": "0",
        "training.mixed_precision_param": "bfloat16",
        "training.loss_chunk_tokens": "100",
    }
    wanted = run_on(Mesh("fsdp1", tuple(options.items())), tmp_path)
    for all_gather in ("false", "true"):
        mesh = Mesh("fsdp2", (*options.items(), (f"{FLOAT8}.enable_fsdp_float8_all_gather", all_gather)))
        assert_same(run_on(mesh, tmp_path), wanted, loss_tolerance=1e-6, grad_tolerance=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "recipe"),
    [
        pytest.param(mesh, recipe, id=f"{mesh.axes.replace(' ', '_')}-{recipe}")
        for mesh in WIDE
        for recipe in (None, "tensorwise", "rowwise", "blockwise")
        if not (recipe == "blockwise" and "tp4" in mesh.axes)  # a part would be narrower than a block, which is refused
    ],
)
def test_eight_ranks(mesh: Mesh, recipe: str | None, tmp_path: Path) -> None:
    mesh = Mesh(mesh.axes, tuple(converted(recipe).items()))
    tolerances = HIGH_PRECISION if recipe is None else LOCAL_SCALES if "cp" in mesh.axes else FLOAT8_CODES
    assert_same(run_on(mesh, tmp_path), alone(recipe), *tolerances)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Mesh("fsdp4"), Mesh("pp2 tp2")),
        (Mesh("pp2 tp2"), Mesh("fsdp2 cp2")),
        (Mesh("fsdp2 tp2"), Mesh("fsdp1")),
    ],
    ids=lambda mesh: mesh.axes.replace(" ", "_"),
)
def test_a_checkpoint_is_resumed_on_another_mesh(before: Mesh, after: Mesh, tmp_path: Path) -> None:
    half = STEPS // 2
    options = {**converted("rowwise"), "checkpoint.enable": "true", "checkpoint.interval": str(half)}
    first, second = (Mesh(mesh.axes, tuple(options.items())) for mesh in (before, after))
    run_distributed(train, first.ranks, first.arguments(), str(tmp_path), half)
    resumed = run_on(second, tmp_path)
    expected = alone("rowwise")
    assert len(resumed.losses) == STEPS - half
    tolerances = LOCAL_SCALES if "cp" in after.axes + before.axes else FLOAT8_CODES
    wanted = Run(expected.losses[half:], expected.norms[half:], expected.grads)
    assert_same(resumed, wanted, *tolerances)
