"""Tensor parallelism of the families with experts and with latent attention: on every mesh what one process computes.

The models have what their families have, at the size of a test. A step has four sequences, each a microbatch of its
own, in one process and on every mesh. Ranks of `tp` have the same sequences and other tokens of them, so that loads,
the auxiliary loss and the scales of float8 experts are those of the same tokens too.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.harness import run_distributed
from tests.distributed.meshes import mesh_of
from tests.distributed.test_expert_parallel import ALL_IN_FLOAT8, BF16, GROUPED, NO_AUX_LOSS
from tests.distributed.trainings import (
    COMPILED,
    FLOAT8,
    FLOAT8_CODES,
    FULL,
    GATHERED_CODES,
    HIGH_PRECISION,
    PER_OP,
    Mesh,
    Options,
    Run,
    assert_same,
    run_alone,
    run_on,
    train_afresh,
    whole,
)
from titan_fp8 import building
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.moe import MoE
from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.expert import apply_expert_parallel
from titan_fp8.parallel.expert_load import ExpertLoad, expert_load
from titan_fp8.parallel.mesh import ParallelMesh

STEPS = 3
AUX_LOSS = "moe/aux_loss"
SIZES = "dim=64 n_heads=4 vocab_size=320 ffn_dim=96 moe_ffn_dim=32 n_experts=4 top_k=2"
GROUPED_QUERIES = "n_kv_heads=2 head_dim=16"
LATENT = (
    "n_kv_heads=None kv_lora_rank=32 q_lora_rank=48 qk_nope_head_dim=16 qk_rope_head_dim=16 v_head_dim=16 "
    "expert_groups=2 expert_groups_per_token=1"
)
FAMILIES = {
    "llama4": f"{SIZES} {GROUPED_QUERIES} top_k=1 nope_interval=2",
    "qwen3_moe": f"{SIZES} {GROUPED_QUERIES}",
    "mixtral": f"{SIZES} {GROUPED_QUERIES} moe_ffn_dim=None",
    "deepseek_v3": f"{SIZES} {LATENT}",
    "queries from the stream": f"{SIZES} {LATENT} q_lora_rank=None n_shared_experts=2",
}
EXPERTS_IN_FLOAT8 = {"model.converters": GROUPED, f"{GROUPED}.fqns": "experts", f"{GROUPED}.emulate": "true"}
FLOAT8_LINEARS = {key: value for key, value in ALL_IN_FLOAT8.items() if key not in NO_AUX_LOSS}
BF16_PARTS = (1e-3, 3e-2)
"""Gradients of whole weights, and of experts on several ranks, leave their products in bf16 once a part."""


def recipe(name: str) -> Options:
    return FLOAT8_LINEARS | {f"{FLOAT8}.recipe_name": name}


def model(family: str) -> Options:
    overrides = dict(each.split("=") for each in FAMILIES[family].split())
    name = family if "_" in family or family in ("llama4", "mixtral") else "deepseek_v3"
    return {"model.name": name} | {f"model.overrides.{key}": value for key, value in overrides.items()}


def _train_and_watch(rank: int, world_size: int, arguments: list[str], folder: str, steps: int) -> Run:
    """Beside gradients, what the metrics tell of the last step's loads, and the biases that it left."""
    watched: list[tuple[Sequence[nn.Module], ExpertLoad]] = []

    def watch(parts: Sequence[nn.Module], dims: ModelDims, mesh: ParallelMesh) -> ExpertLoad:
        load = expert_load(parts, dims, mesh)
        assert load is not None
        watched.append((parts, load))
        return load

    with mock.patch.object(building, "expert_load", watch):
        run = train_afresh(rank, world_size, arguments, folder, steps)
    ((parts, load),) = watched
    metrics = load.metrics()
    assert metrics.pop("moe/dropped_tokens") == 0
    run.grads |= {key: torch.tensor(value) for key, value in metrics.items()}
    for part in parts:
        for name, module in part.named_modules():
            if isinstance(module, MoE) and module.expert_bias is not None:
                run.grads[f"{name}.expert_bias"] = module.expert_bias.clone()
    return run


def on(axes: str, options: Options, folder: Path, steps: int = STEPS) -> Run:
    return run_on(Mesh(axes, tuple(options.items())), folder, steps=steps, how=_train_and_watch)


def alone(options: Options) -> Run:
    """`run_alone`, watched."""
    return run_alone(options, _train_and_watch, STEPS)


def same_as_alone(family: str, axes: str, options: Options, tolerance: tuple[float, float], folder: Path) -> None:
    options = model(family) | options
    run, expected = on(axes, options, folder), alone(options)
    if "cp" in axes:  # each of these ranks has an auxiliary loss of its own tokens
        expected = replace(expected, grads={**expected.grads, AUX_LOSS: run.grads[AUX_LOSS]})
    assert_same(run, expected, *tolerance)


CASES: list[tuple[str, str, Options]] = [
    ("llama4", "tp2", {}),
    ("llama4", "tp2 ep2", {}),
    ("llama4", "tp2 etp2", {}),
    ("qwen3_moe", "fsdp2 tp2 ep2", {}),
    ("qwen3_moe", "tp2 etp2", FULL),
    ("mixtral", "tp2", {"optimizer.implementation": "one_pass"}),
    ("mixtral", "pp2 tp2 ep2", {}),
    ("deepseek_v3", "tp2", FULL),
    ("deepseek_v3", "fsdp2 tp2", {}),
    ("deepseek_v3", "fsdp2 tp2 ep4", {}),
    ("deepseek_v3", "fsdp2 tp2 ep2 etp2", {}),
    ("queries from the stream", "tp2 etp2", {}),
]
ZERO_BUBBLE = {
    "parallelism.pipeline_parallel_schedule": "InterleavedZeroBubble",
    "parallelism.module_fqns_per_model_part": ('[["tok_embeddings"], ["layers.0"], ["layers.1"], ["norm", "output"]]'),
}
MESHES = ["tp2", "tp2 ep2", "fsdp2 tp2", "fsdp2 tp2 ep2", "fsdp2 tp2 ep4", "tp2 etp2", "pp2 tp2", "pp2 tp2 ep2"]
SLOW_CASES: list[tuple[str, str, Options]] = [
    *((family, axes, {}) for family in FAMILIES for axes in MESHES if (family, axes, {}) not in CASES),
    ("deepseek_v3", "fsdp2 tp2 etp2", {}),
    ("deepseek_v3", "pp2 tp2 etp2", {}),
    ("deepseek_v3", "rep2 tp2 ep2", {}),
    ("deepseek_v3", "rep2 tp2 etp2", FULL),
    ("deepseek_v3", "pp2 tp2", ZERO_BUBBLE),
    ("deepseek_v3", "tp2 ep2", PER_OP | COMPILED),
    ("deepseek_v3", "fsdp2 tp2 ep2", FULL | COMPILED),
    ("deepseek_v3", "fsdp2 tp2 ep2 etp2", PER_OP | COMPILED),
    ("deepseek_v3", "tp4 ep4", {}),
    ("qwen3_moe", "cp2 tp2 ep4", NO_AUX_LOSS),
    ("qwen3_moe", "cp2 tp2 ep2 etp2", NO_AUX_LOSS),
    ("llama4", "tp2 etp2", {"parallelism.disable_loss_parallel": "true"}),
]


def named(cases: list[Any]) -> dict[str, Any]:
    extras = {id(FULL): "full", id(NO_AUX_LOSS): "no aux loss", id(GATHERED_CODES): "codes"}
    names: dict[str, Any] = {}
    for number, case in enumerate(cases):
        family, axes, options, *_ = case
        what = extras.get(id(options), f"options {number}" if options else "")
        names[" ".join(filter(None, (family, axes, what))).replace(" ", "_")] = case
    return names


@pytest.mark.parametrize("case", named(CASES).values(), ids=named(CASES).keys())
def test_training_equals_one_process(case: tuple[str, str, Options], tmp_path: Path) -> None:
    same_as_alone(*case, HIGH_PRECISION, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", named(SLOW_CASES).values(), ids=named(SLOW_CASES).keys())
def test_training_equals_one_process_on_more_meshes(case: tuple[str, str, Options], tmp_path: Path) -> None:
    same_as_alone(*case, HIGH_PRECISION, tmp_path)


WIDE = {"model.overrides.dim": "256", "model.overrides.ffn_dim": "256", "model.overrides.moe_ffn_dim": "256"} | {
    f"model.overrides.{key}": "128" for key in ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim")
}
"""For blocks of 128. wkv_a has 256 output features, and a head of queries 256."""
WIDE |= {"model.overrides.qk_nope_head_dim": "128", "training.seq_len": "256"}
FLOAT8_CASES: list[tuple[str, str, Options, tuple[float, float]]] = [
    ("deepseek_v3", "tp2 ep2", EXPERTS_IN_FLOAT8, FLOAT8_CODES),
    ("deepseek_v3", "fsdp2 tp2", recipe("rowwise") | GATHERED_CODES, FLOAT8_CODES),
    ("deepseek_v3", "tp2 ep2", recipe("tensorwise"), FLOAT8_CODES),
    ("llama4", "tp2 etp2", recipe("rowwise"), FLOAT8_CODES),
    ("qwen3_moe", "tp2", recipe("rowwise_with_gw_hp"), FLOAT8_CODES),
]
FLOAT8_GATE = {f"{FLOAT8}.recipe_by_fqn": "router.gate=rowwise", "model.overrides.n_experts": "16"}
SLOW_FLOAT8_CASES: list[tuple[str, str, Options, tuple[float, float]]] = [
    ("deepseek_v3", "tp2 ep2", recipe("blockwise") | WIDE, FLOAT8_CODES),
    ("deepseek_v3", "tp2 etp2", recipe("rowwise"), FLOAT8_CODES),
    ("deepseek_v3", "tp2 etp2", recipe("tensorwise"), FLOAT8_CODES),
    ("deepseek_v3", "tp2", recipe("rowwise_with_gw_hp"), FLOAT8_CODES),
    ("deepseek_v3", "fsdp2 tp2 ep4", recipe("tensorwise") | GATHERED_CODES, FLOAT8_CODES),
    ("deepseek_v3", "fsdp2 tp2 ep2 etp2", recipe("rowwise") | GATHERED_CODES | FULL, FLOAT8_CODES),
    ("deepseek_v3", "pp2 tp2 ep2", recipe("rowwise"), FLOAT8_CODES),
    ("deepseek_v3", "pp2 tp2", recipe("rowwise") | ZERO_BUBBLE, FLOAT8_CODES),
    ("deepseek_v3", "tp2 ep2", recipe("rowwise") | PER_OP | COMPILED, FLOAT8_CODES),
    ("queries from the stream", "tp2 ep2", recipe("rowwise"), FLOAT8_CODES),
    ("mixtral", "fsdp2 tp2 ep2", recipe("rowwise"), FLOAT8_CODES),
    ("qwen3_moe", "tp2", recipe("rowwise") | FLOAT8_GATE, FLOAT8_CODES),
    ("qwen3_moe", "tp2 etp2", recipe("rowwise") | FLOAT8_GATE, FLOAT8_CODES),
    ("deepseek_v3", "tp2 ep2", BF16, BF16_PARTS),
    ("deepseek_v3", "tp2 etp2", BF16, BF16_PARTS),
]


@pytest.mark.parametrize("case", named(FLOAT8_CASES).values(), ids=named(FLOAT8_CASES).keys())
def test_training_in_float8_equals_one_process(case: tuple[str, str, Options, Any], tmp_path: Path) -> None:
    same_as_alone(*case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", named(SLOW_FLOAT8_CASES).values(), ids=named(SLOW_FLOAT8_CASES).keys())
def test_training_in_few_bits_equals_one_process_on_more_meshes(
    case: tuple[str, str, Options, Any], tmp_path: Path
) -> None:
    same_as_alone(*case, tmp_path)


@pytest.mark.parametrize(
    "meshes",
    [
        ("tp2 ep2", "fsdp2 ep2", "fsdp1"),
        pytest.param(("fsdp1", "fsdp2 tp2 ep2 etp2", "fsdp2 tp2 ep4"), marks=pytest.mark.slow),
        pytest.param(("tp2 etp2", "pp2 tp2 ep2", "fsdp2 tp2"), marks=pytest.mark.slow),
    ],
    ids=" to ".join,
)
def test_a_checkpoint_is_resumed_where_experts_and_heads_lie_otherwise(meshes: tuple[str, ...], tmp_path: Path) -> None:
    options = model("deepseek_v3")
    saving = options | {"checkpoint.enable": "true", "checkpoint.interval": "1"}
    runs = [on(axes, saving, tmp_path, steps=step) for step, axes in enumerate(meshes, 1)]
    expected = alone(options)
    assert [len(run.losses) for run in runs] == [1, 1, 1]
    losses, norms = ([value for run in runs for value in getattr(run, name)] for name in ("losses", "norms"))
    assert_same(Run(losses, norms, runs[-1].grads), expected, *HIGH_PRECISION)


def _divide(rank: int, world_size: int, degrees: MeshDegrees) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By name, of the weights of a layer's experts that had values: these, what they are together now, and what this
    rank multiplies with."""
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 32, "max_seq_len": 8, "moe_ffn_dim": 24}
    decoder = Decoder(ModelDims(**sizes, n_experts=8, top_k=2))
    initialize(decoder, seed=0)
    experts = decoder.layers["0"].moe.experts
    before = {name: parameter.detach().clone() for name, parameter in experts.named_parameters()}
    apply_expert_parallel(decoder, mesh_of(degrees, "cpu"))
    here = dict(zip(("w1", "w3", "w2"), experts.weights(), strict=True))
    return {name: (before[name], whole(weight), here[name].detach()) for name, weight in experts.named_parameters()}


@pytest.mark.parametrize(
    ("degrees", "parts"),
    [
        (MeshDegrees(tensor=2, expert_tensor=2), [(0, 0), (0, 1)]),
        (MeshDegrees(tensor=2, expert=2), [(0, 0), (1, 0)]),
        (
            MeshDegrees(data_parallel_shard=2, tensor=2, expert=2, expert_tensor=2),
            [(0, 0), (0, 1), (1, 0), (1, 1)],
        ),
    ],
    ids=["hidden features", "experts", "both"],
)
def test_each_rank_has_its_own_experts_and_of_these_its_own_hidden_features(
    degrees: MeshDegrees, parts: list[tuple[int, int]]
) -> None:
    """parts: by rank, which part of the experts and which of their hidden features it has."""
    for rank, weights in enumerate(run_distributed(_divide, degrees.world_size, degrees)):
        of_experts, of_hidden = parts[rank]
        for name, (before, together, here) in weights.items():
            assert torch.equal(together, before), name
            expected = before.chunk(degrees.expert)[of_experts]
            expected = expected.chunk(degrees.expert_tensor, 2 if name == "w2" else 1)[of_hidden]
            assert torch.equal(here, expected), f"rank {rank}: {name}"
