"""Families with experts, trained: several ranks equal one process, loads are told, runs resume, mistakes are refused.

Runs are whole runs of the trainer, in the processes of the distributed harness, which have torch imported. A step has
four sequences, each a microbatch of its own, so that the auxiliary loss, which is that of a microbatch, is the same on
every mesh.
"""

import json
import math
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.distributed.meshes import mesh_of
from tests.end_to_end.conftest import FLOAT8
from titan_fp8 import building
from titan_fp8.config.errors import ConfigErrors
from titan_fp8.job_config import load_job_config
from titan_fp8.model_plan import plan_model
from titan_fp8.models.moe import MoE
from titan_fp8.observability.run_folder import create_run_folder
from titan_fp8.runtime.device import detect_device

STEPS = 6
COMMON = {
    "model.flavor": "debugmodel",
    "training.seq_len": "32",
    "training.steps": str(STEPS),
    "training.global_batch_size": "4",
    "training.local_batch_size": "1",
    "training.mixed_precision_param": "float32",
    "optimizer.lr": "1e-2",
    "lr_scheduler.warmup_steps": "1",
    "lr_scheduler.total_steps": "40",
    "metrics.log_freq": "1",
    "activation_checkpoint.mode": "none",
    "debug.seed": "0",
}
SMALL = "dim=64 n_layers=3 n_heads=4 vocab_size=320 ffn_dim=96 n_experts=8 moe_ffn_dim=32 max_seq_len=64"
# Biases that move far enough in a step to change what is chosen in the next one.
OVERRIDES = {
    "llama4": "ffn_dim=None nope_interval=2 attention_chunk=32 temperature_floor=8 balance_rate=0.02",
    "qwen3_moe": "ffn_dim=None n_kv_heads=2 head_dim=16 aux_loss_weight=0.05",
    "deepseek_v3": "kv_lora_rank=32 q_lora_rank=32 qk_nope_head_dim=16 qk_rope_head_dim=16 v_head_dim=16 "
    "balance_rate=0.02 aux_loss_weight=0.05",
    "mixtral": "n_kv_heads=2 moe_ffn_dim=None",
}
FAMILIES = pytest.mark.parametrize("family", OVERRIDES)
WITH_BIASES = ("llama4", "deepseek_v3")
ONE_RANK = {"parallelism.data_parallel_shard_degree": "1"}
FSDP = {"parallelism.data_parallel_shard_degree": "2"}
PIPELINE = ONE_RANK | {"parallelism.pipeline_parallel_degree": "2", "training.local_batch_size": "4"}
CONTEXT = ONE_RANK | {"parallelism.context_parallel_degree": "2"}
CONVERTED = {"model.converters": "quantize.linear.float8", "quantize.linear.float8.emulate": "true"}
Options = dict[str, str]


@dataclass
class Run:
    """What a run left: its metrics, one dict a logged step; the experts' biases by name; its folder."""

    lines: list[dict[str, Any]]
    biases: dict[str, Tensor]
    folder: Path

    def of(self, key: str) -> list[float]:
        """One number a step."""
        return [line[key] for line in self.lines]


def arguments_of(family: str, options: Options) -> list[str]:
    sizes = dict(each.split("=") for each in f"{SMALL} {OVERRIDES[family]}".split())
    overrides = {f"model.overrides.{key}": value for key, value in sizes.items() if value != "None"}
    return [f"--{key}={value}" for key, value in {"model.name": family, **COMMON, **overrides, **options}.items()]


def _train(rank: int, world_size: int, arguments: list[str], folder: str) -> dict[str, Tensor]:
    """A whole run in a process group that is there; returns the biases of the experts that this rank has."""
    torch._dynamo.reset()
    job, _ = load_job_config([*arguments, f"--job.dump_folder={folder}"])
    building.build_mesh = mesh_of
    device = detect_device()
    plan = plan_model(job, device)
    trainer = building.build_trainer(job, plan, torch.device("cpu"), device, create_run_folder(folder))
    assert trainer is not None
    with closing(trainer):
        trainer.train()
    layers = {
        name: module for part in trainer.parts for name, module in part.named_modules() if isinstance(module, MoE)
    }
    return {name: layer.expert_bias.clone() for name, layer in layers.items() if layer.expert_bias is not None}


def train(folder: Path, family: str, ranks: int, options: Options) -> Run:
    biases: dict[str, Tensor] = {}
    for theirs in run_distributed(_train, ranks, arguments_of(family, options), str(folder)):
        assert all(torch.equal(bias, biases.get(name, bias)) for name, bias in theirs.items()), "equal on all ranks"
        biases |= theirs
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(lines, biases, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`alone("llama4")` -> the run of that family in one process; once for all tests."""

    @cache
    def run(family: str) -> Run:
        return train(tmp_path_factory.mktemp(family), family, 1, ONE_RANK)

    return run


MOE_KEYS = ("moe/max_load", "moe/mean_max_load", "moe/entropy", "moe/aux_loss")


def assert_same(actual: Run, expected: Run, tolerance: float = 1e-5, *, keys: tuple[str, ...] = MOE_KEYS) -> None:
    """The same losses, norms, loads, to the last step."""
    assert actual.of("step") == expected.of("step")
    assert actual.of("loss") == pytest.approx(expected.of("loss"), rel=tolerance)
    assert actual.of("grad_norm") == pytest.approx(expected.of("grad_norm"), rel=20 * tolerance)
    for key in keys:
        assert actual.of(key) == pytest.approx(expected.of(key), rel=20 * tolerance), key
    assert actual.biases.keys() == expected.biases.keys()
    for name, bias in expected.biases.items():
        torch.testing.assert_close(actual.biases[name], bias, rtol=1e-4, atol=1e-7, msg=name)


@FAMILIES
def test_loss_falls_from_that_of_a_uniform_guess_and_loads_are_told(alone: Any, family: str) -> None:
    run = alone(family)
    losses = run.of("loss")
    assert losses[0] == pytest.approx(math.log(320), rel=0.1)
    assert losses[-1] < losses[0] - 0.3
    for line in run.lines:
        assert 1.0 < line["moe/mean_max_load"] <= line["moe/max_load"] <= 8.0
        assert 0.3 < line["moe/entropy"] < 1.0
        assert line["moe/dropped_tokens"] == 0
        assert 0.9 < line["moe/aux_loss"] < 8.0
    has_biases = family in WITH_BIASES
    assert bool(run.biases) == has_biases
    for bias in run.biases.values():
        assert bias.abs().max() > 0.02
        assert bias.mean().abs() < 1e-6


@FAMILIES
def test_two_ranks_of_fsdp_equal_one_process(alone: Any, family: str, tmp_path: Path) -> None:
    assert_same(train(tmp_path, family, 2, FSDP), alone(family))


@pytest.mark.parametrize("family", WITH_BIASES)
def test_a_pipeline_of_two_stages_equals_one_process(alone: Any, family: str, tmp_path: Path) -> None:
    assert_same(train(tmp_path, family, 2, PIPELINE), alone(family))


def test_sequences_spread_over_ranks_equal_one_process(alone: Any, tmp_path: Path) -> None:
    """Within a chunk, with layers without positions and a temperature. What is told of the auxiliary loss, which has
    no weight here, is that of the tokens of a rank."""
    keys = tuple(key for key in MOE_KEYS if key != "moe/aux_loss")
    assert_same(train(tmp_path, "llama4", 2, CONTEXT), alone("llama4"), keys=keys)


def test_the_auxiliary_loss_is_no_part_of_the_loss_and_draws_loads_together(tmp_path: Path) -> None:
    """In the first step the models are the same: the losses too, but not the gradients."""
    runs = [
        train(tmp_path / weight, "mixtral", 1, ONE_RANK | {"model.overrides.aux_loss_weight": weight})
        for weight in ("0.0", "2.0")
    ]
    assert runs[0].lines[0]["loss"] == runs[1].lines[0]["loss"]
    assert runs[0].lines[0]["moe/aux_loss"] == runs[1].lines[0]["moe/aux_loss"]
    assert runs[0].lines[0]["grad_norm"] != pytest.approx(runs[1].lines[0]["grad_norm"], rel=1e-3)
    assert runs[1].lines[-1]["moe/aux_loss"] < runs[0].lines[-1]["moe/aux_loss"] - 0.05


def test_biases_draw_loads_together(tmp_path: Path) -> None:
    """Of weights that stay as they are; in small steps, so that they do not overshoot."""
    options = {"model.overrides.n_layers": "2", "training.steps": "20", "training.seq_len": "64"}
    options |= ONE_RANK | {"optimizer.lr": "1e-9"}
    runs = [
        train(tmp_path / rate, "deepseek_v3", 1, options | {"model.overrides.balance_rate": rate})
        for rate in ("0.0", "0.002")
    ]
    assert runs[0].lines[0]["moe/entropy"] == runs[1].lines[0]["moe/entropy"]
    left_alone, balanced = (sum(1 - entropy for entropy in run.of("moe/entropy")[-5:]) for run in runs)
    assert balanced < 0.6 * left_alone


@pytest.mark.parametrize("family", ["llama4", "deepseek_v3"])
def test_balancing_may_end_in_a_resumed_run(family: str, tmp_path: Path) -> None:
    """The biases are kept then; so may the auxiliary loss begin."""
    half = train(tmp_path, family, 1, ONE_RANK | CHECKPOINTS | {"training.steps": "3"})
    weights = {"model.overrides.balance_rate": "0", "model.overrides.aux_loss_weight": "0.5"}
    resumed = train(tmp_path, family, 1, ONE_RANK | CHECKPOINTS | weights)
    assert resumed.of("step")[-1] > 3
    assert half.biases
    assert any(bias.any() for bias in half.biases.values())
    assert all(torch.equal(bias, resumed.biases[name]) for name, bias in half.biases.items())


CHECKPOINTS = {
    "checkpoint.enable": "true",
    "checkpoint.interval": "3",
    "checkpoint.last_save_model_only": "false",
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_resumed_halfway_equals_the_uninterrupted_one(alone: Any, ranks: int, tmp_path: Path) -> None:
    """With its biases, also where the first half was another mesh's."""
    half = train(tmp_path, "llama4", ranks, (FSDP if ranks == 2 else ONE_RANK) | CHECKPOINTS | {"training.steps": "3"})
    resumed = train(tmp_path, "llama4", 1, ONE_RANK | CHECKPOINTS)
    assert half.of("step") == [1, 2, 3]
    assert_same(resumed, alone("llama4"))
    assert any(not torch.equal(bias, half.biases[name]) for name, bias in resumed.biases.items())
    if ranks == 1:
        whole = alone("llama4")
        assert resumed.of("loss") == whole.of("loss")
        assert all(torch.equal(bias, whole.biases[name]) for name, bias in resumed.biases.items())


def test_validation_counts_no_tokens_and_leaves_training_alone(alone: Any, tmp_path: Path) -> None:
    validation = {"enable": "true", "freq": "2", "steps": "2", "seq_len": "48", "local_batch_size": "2"}
    options = {f"validation.{key}": value for key, value in validation.items()}
    run, whole = train(tmp_path, "llama4", 1, ONE_RANK | options), alone("llama4")
    assert len((tmp_path / "validation.jsonl").read_text().splitlines()) == 3
    for key in ("loss", "grad_norm", *MOE_KEYS):
        assert run.of(key) == whole.of(key), key


@FAMILIES
def test_forced_balance_gives_every_expert_as_many_tokens(family: str, tmp_path: Path) -> None:
    options = {"debug.moe_force_load_balance": "true", "training.steps": "2", "metrics.enable_tensorboard": "true"}
    run = train(tmp_path, family, 1, ONE_RANK | options)
    (event_file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(event_file.parent))
    events.Reload()
    for key in MOE_KEYS:
        assert run.of(key) == pytest.approx([1.0, 1.0], rel=1e-5), key
        assert [event.value for event in events.Scalars(key)] == pytest.approx([1.0, 1.0], rel=1e-5), key
    assert [event.value for event in events.Scalars("moe/dropped_tokens")] == [0.0, 0.0]
    assert not any(bias.any() for bias in run.biases.values())


@FAMILIES
def test_float8_linears_train_beside_routers_in_high_precision(alone: Any, family: str, tmp_path: Path) -> None:
    half = {"training.mixed_precision_param": "bfloat16"}
    run = train(tmp_path, family, 1, ONE_RANK | CONVERTED | half)
    assert run.of("loss") == pytest.approx(alone(family).of("loss"), rel=0.05)
    assert run.of("loss") != alone(family).of("loss")
    (report,) = json.loads((tmp_path / "conversion_report.json").read_text())["converters"]
    rows = {row["fqn"]: row for row in report["rows"]}
    gates = [row for fqn, row in rows.items() if "router" in fqn]
    assert len(gates) == (2 if family == "deepseek_v3" else 3)
    for row in gates:
        assert row["fqn"].endswith("moe.router.gate")
        assert row["recipe"] is None
        assert row["reason"] == "router of a mixture of experts"
    others = [row for fqn, row in rows.items() if "router" not in fqn and fqn != "output"]
    assert {row["recipe"] for row in others} == {"tensorwise"}
    shared = [fqn for fqn in rows if "shared_experts" in fqn]
    assert len(shared) == (3 * len(gates) if family in WITH_BIASES else 0)


def test_float8_on_two_ranks_that_gather_codes_equals_one_process(tmp_path: Path) -> None:
    float8 = CONVERTED | {"optimizer.lr": "1e-3"}  # a code moves now and then, and is not to move much
    gather = {"quantize.linear.float8.enable_fsdp_float8_all_gather": "true"}
    single = train(tmp_path / "one", "deepseek_v3", 1, ONE_RANK | float8)
    assert_same(train(tmp_path / "two", "deepseek_v3", 2, FSDP | float8 | gather), single, 2e-4)


@pytest.mark.slow
@FAMILIES
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_a_compiled_run_follows_the_eager_one(family: str, checkpointing: str, tmp_path: Path) -> None:
    options = ONE_RANK | {"training.mixed_precision_param": "bfloat16"}
    compiled = {"compile.enable": "true", "compile.backend": "aot_eager", "activation_checkpoint.mode": checkpointing}
    eager = train(tmp_path / "eager", family, 1, options)
    run = train(tmp_path / "compiled", family, 1, options | compiled)
    assert run.of("loss") == pytest.approx(eager.of("loss"), rel=5e-3)
    assert run.of("moe/entropy") == pytest.approx(eager.of("moe/entropy"), rel=5e-2)


@pytest.mark.slow
@FAMILIES
@pytest.mark.parametrize(
    "schedule",
    [
        {"parallelism.pipeline_parallel_schedule": "InterleavedZeroBubble"},
        {"parallelism.pipeline_parallel_schedule": "GPipe", "activation_checkpoint.mode": "full"},
    ],
    ids=["zero bubble", "recomputed"],
)
def test_other_schedules_equal_one_process(family: str, schedule: Options, tmp_path: Path) -> None:
    layers = {"model.overrides.n_layers": "4"}
    expected = train(tmp_path / "one", family, 1, ONE_RANK | layers)
    assert_same(train(tmp_path / "two", family, 2, PIPELINE | schedule | layers), expected)


@pytest.mark.slow
@FAMILIES
def test_four_ranks_of_pipeline_and_fsdp_equal_one_process(alone: Any, family: str, tmp_path: Path) -> None:
    assert_same(train(tmp_path, family, 4, PIPELINE | FSDP | {"training.local_batch_size": "2"}), alone(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama4", "mixtral"])
def test_float8_recipes_train_beside_experts(alone: Any, family: str, tmp_path: Path) -> None:
    for recipe in ("rowwise", "rowwise_with_gw_hp"):
        run = train(tmp_path / recipe, family, 1, ONE_RANK | CONVERTED | {"quantize.linear.float8.recipe_name": recipe})
        assert run.of("loss") == pytest.approx(alone(family).of("loss"), rel=0.05)


def test_two_ranks_started_as_a_user_does_tell_of_loads(run_shell: Any) -> None:
    result = run_shell(
        *FLOAT8,
        *("--model.name", "deepseek_v3", "--training.steps", "2", "--checkpoint.enable"),
        *("--model.overrides.n_layers", "2", "--model.overrides.n_experts", "8"),
        *("--model.overrides.moe_ffn_dim", "32", "--model.overrides.kv_lora_rank", "32"),
        NGPU="2",
    )
    assert result.code == 0, result.output
    assert [line["step"] for line in result.lines] == [1, 2]
    assert all(1.0 <= line["moe/max_load"] <= 8.0 for line in result.lines)


TURNS = {
    "model.name": "llama4",
    "training.local_batch_size": "2",
    "parallelism.expert_parallel_overlap_batches": "2",
}
DEALT_OUT = {"parallelism.expert_parallel_degree": "2"}
REFUSALS = {
    "balance without experts": (
        1,
        {"model.name": "llama3", "debug.moe_force_load_balance": "true"},
        "debug.moe_force_load_balance = true: llama3 has no experts to balance",
    ),
    "a router that nothing trains": (
        1,
        {"model.name": "mixtral", "model.overrides.top_k": "1", "model.overrides.aux_loss_weight": "0"},
        "router_norm = true with top_k = 1 divides every score by itself",
    ),
    "parts of a batch without an exchange": (2, TURNS, "exchanges no tokens to overlap with; set it to 1"),
    "codes without an exchange": (
        2,
        {"model.name": "llama4", "parallelism.expert_parallel_payload": "float8"},
        'exchanges no tokens; set it to "activations"',
    ),
    "values of a token that are no whole blocks": (
        2,
        {
            "model.name": "llama4",
            **DEALT_OUT,
            "parallelism.expert_parallel_payload": "mxfp8",
            "model.overrides.dim": "272",
            "model.overrides.head_dim": "32",
        },
        "cuts a token's 272 values into blocks of 32",
    ),
    "parts that do not divide the batch": (
        2,
        TURNS | DEALT_OUT | {"training.local_batch_size": "3"},
        "2 parts do not divide training.local_batch_size = 3",
    ),
    "parts under tensor parallelism": (
        2,
        TURNS | DEALT_OUT | {"parallelism.tensor_parallel_degree": "2"},
        "parallelism.tensor_parallel_degree = 2 cuts a batch along all its tokens",
    ),
    "parts of masked documents": (
        2,
        TURNS | DEALT_OUT | {"training.document_masking": "true"},
        "training.document_masking makes one mask for a whole batch",
    ),
    "parts and checkpointing by operation": (
        2,
        TURNS
        | DEALT_OUT
        | {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"},
        'which activation_checkpoint.selective_ac_option = "op" cannot take apart',
    ),
}
"""Ranks, options, words."""


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_family_cannot_do_is_refused_in_one_line(name: str) -> None:
    ranks, options, words = REFUSALS[name]
    arguments = [f"--{key}={value}" for key, value in (COMMON | options).items()]
    with pytest.raises(ConfigErrors) as caught:
        load_job_config(arguments, {"WORLD_SIZE": str(ranks)})
    lines = [str(violation) for violation in caught.value.violations]
    assert any(words in line for line in lines), lines
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama4", CONTEXT),
        ("mixtral", CONTEXT | {"training.seq_len": "64"}),
        ("deepseek_v3", FSDP),
        ("deepseek_v3", CONTEXT),
        ("deepseek_v3", CONTEXT | {"parallelism.context_parallel_rotate_method": "alltoall"}),
        ("llama4", CONTEXT | {"model.overrides.attention_chunk": "12"}),
        ("llama4", PIPELINE | {"debug.moe_force_load_balance": "true"}),
    ],
)
def test_what_a_family_can_do_is_not_refused(family: str, options: Options) -> None:
    load_job_config(arguments_of(family, options), {"WORLD_SIZE": "2"})


def test_a_refusal_leaves_nothing_behind(run_here: Any) -> None:
    result = run_here("--debug.moe_force_load_balance")
    assert result.code == 2
    assert "llama3 has no experts to balance; leave it at false" in result.output
    assert not result.folder.exists()
