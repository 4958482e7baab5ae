"""Pipelines against one process: for every schedule the same losses and gradients, by name.

Each case trains a tiny decoder for two steps of SGD on several gloo processes, with two local batches a step, and is
compared with one process, without any wrapper, that accumulates gradients over the same microbatches.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.distributed.harness import run_distributed
from tests.distributed.meshes import mesh_of
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import IGNORE_INDEX, cross_entropy_sum
from titan_fp8.parallel.apply import materialize, parallelize
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection, ParallelismSection
from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.distributed import local_device
from titan_fp8.parallel.mesh import PP
from titan_fp8.parallel.pipeline import Pipeline, split_model
from titan_fp8.parallel.pipeline_split import PipelinePlan, plan_pipeline
from titan_fp8.quantization.fsdp_weight import wrap_weights_for_fsdp
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.weights import cache_weights
from titan_fp8.runtime.errors import UserError

STEPS, BATCHES, SEQ_LEN, VOCAB = 2, 2, 16, 67


@dataclass(frozen=True)
class Case:
    """One training: the model, its pipeline, what else is applied to it."""

    schedule: str = "1F1B"
    pipeline: int = 2
    shard: int = 1
    replicate: int = 1
    n_layers: int = 4
    local_batch: int = 4
    microbatch: int = 1
    compute_dtype: torch.dtype = torch.float32
    float8_recipe: str | None = None
    float8_all_gather: bool = False
    cached_weights: bool = False
    documents: bool = False
    reshard: str = "never"
    parallelized: bool = False
    activation_checkpoint: dict[str, str] = field(default_factory=lambda: {"mode": "none"})
    compile_backend: str | None = None
    device_type: str = "cpu"
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.pipeline * self.shard * self.replicate

    @property
    def device(self) -> torch.device:
        """This process's."""
        return local_device(self.device_type) if self.device_type == "cuda" else torch.device(self.device_type)

    @property
    def data_ranks(self) -> int:
        return self.shard * self.replicate

    @property
    def parallelism(self) -> ParallelismSection:
        return ParallelismSection(
            pipeline_parallel_schedule=self.schedule,
            pipeline_parallel_microbatch_size=self.microbatch,
            fsdp_reshard_after_forward=self.reshard,
            **self.keys,
        )

    @property
    def plan(self) -> PipelinePlan:
        return plan_pipeline(
            self.parallelism,
            degree=self.pipeline,
            n_layers=self.n_layers,
            tied_embeddings=False,
            local_batch_size=self.local_batch,
        )


@dataclass
class Trained:
    """What a training leaves: loss and gradients of every step, the loss of an evaluation before and after, weights."""

    losses: list[float]
    grads: list[dict[str, Tensor]]
    evaluations: list[float]
    weights: dict[str, Tensor]


Forward = Callable[..., Tensor]


def _build(case: Case) -> Decoder:
    dims = ModelDims(
        dim=48, n_layers=case.n_layers, n_heads=3, n_kv_heads=1, ffn_dim=80, vocab_size=VOCAB, max_seq_len=SEQ_LEN
    )
    with torch.device("meta"):
        model = Decoder(dims, compute_dtype=case.compute_dtype, document_masking=case.documents)
    if case.float8_recipe is None:
        return model
    config = Float8Config(RECIPES[case.float8_recipe], emulate=case.device_type == "cpu")
    # The first layer stays in high precision.
    for block in list(model.layers.values())[1:]:
        for parent in (block.attention, block.feed_forward):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Float8Linear.from_linear(child, config))
    linears = [module for module in model.modules() if isinstance(module, Float8Linear)]
    if case.cached_weights:
        cache_weights(model, linears)
    if case.float8_all_gather:
        wrap_weights_for_fsdp(linears, cache=True)
    return model


def _batches(case: Case, rank: int, sequences: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Tokens, labels and documents of the local batches of a data rank in one step."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    batches = []
    for _ in range(BATCHES):
        rows = torch.randint(VOCAB, (sequences, SEQ_LEN + 1), generator=generator)
        labels = rows[:, 1:].clone()
        labels[0, :3] = IGNORE_INDEX
        documents = (torch.arange(SEQ_LEN) >= SEQ_LEN // 3).long().expand(sequences, -1) if case.documents else None
        batch = (rows[:, :-1].contiguous(), labels, documents)
        batches.append(tuple(None if each is None else each.to(case.device) for each in batch))
    return batches


def _label_tokens(case: Case) -> Tensor:
    return torch.tensor(float(case.data_ranks * BATCHES * (case.local_batch * SEQ_LEN - 3)), device=case.device)


def _train(
    case: Case, parts: list[Decoder], ranks: list[int], step: Forward, evaluate: Forward, microbatch: int
) -> Trained:
    """Two steps on the batches of the data ranks `ranks`, in pieces of `microbatch` sequences."""
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.1, momentum=0.9)
    result = Trained([], [], [], {})
    held_out = [part for rank in ranks for part in _batches(case, rank, case.local_batch + 1, seed=99)]
    result.evaluations.append(sum(evaluate(*batch).item() for batch in held_out))
    for number in range(STEPS):
        loss = torch.zeros((), device=case.device)
        for batch in [part for rank in ranks for part in _batches(case, rank, case.local_batch, seed=number)]:
            for first in range(0, case.local_batch, microbatch):
                piece = [None if each is None else each[first : first + microbatch] for each in batch]
                loss += step(*piece, label_tokens=_label_tokens(case))
        result.losses.append(loss.item())
        result.grads.append(
            {n: _whole(p.grad) for part in parts for n, p in part.named_parameters() if p.grad is not None}
        )
        optimizer.step()
        optimizer.zero_grad()
    result.evaluations.append(sum(evaluate(*batch).item() for batch in held_out))
    result.weights = {name: _whole(p) for part in parts for name, p in part.named_parameters()}
    return result


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def train_in_a_pipeline(rank: int, world_size: int, case: Case) -> tuple[int, Trained]:
    """Every rank returns its number on the pp axis and its part of the training."""
    torch._dynamo.reset()
    degrees = MeshDegrees(
        pipeline=case.pipeline, data_parallel_replicate=case.replicate, data_parallel_shard=case.shard
    )
    mesh = mesh_of(degrees, case.device_type)
    plan = case.plan
    parts = split_model(_build(case), plan.stages, plan.stages_of(mesh.place(PP)))
    for part in parts:
        if case.data_ranks > 1 or case.parallelized:
            parallelize(
                part,
                mesh=mesh,
                parallelism=case.parallelism,
                activation_checkpoint=ActivationCheckpointSection(**case.activation_checkpoint),
                compile_config=CompileSection(
                    enable=case.compile_backend is not None, backend=case.compile_backend or "eager"
                ),
                param_dtype=case.compute_dtype,
            )
        materialize(part, case.device)
        initialize(part, seed=7)
    pipeline = Pipeline(
        parts,
        plan,
        group=mesh.device_mesh.get_group(PP),
        device=case.device,
        batch_sequences=case.local_batch,
        seq_len=SEQ_LEN,
        loss_fn=cross_entropy_sum,
    )
    trained = _train(case, parts, [mesh.data_rank], pipeline.step, pipeline.evaluate, case.local_batch)
    for sums in (trained.losses, trained.evaluations):
        sums[:] = mesh.sum_of_losses(torch.tensor(sums, dtype=torch.float64, device=case.device)).tolist()
    return mesh.place(PP), trained


def train_alone(case: Case) -> Trained:
    """The same training in this process, over all data ranks' batches and microbatches."""
    case = replace(case, float8_all_gather=False, cached_weights=False)
    model = _build(case)
    materialize(model, case.device)
    initialize(model, seed=7)

    def step(tokens: Tensor, labels: Tensor, documents: Tensor | None, *, label_tokens: Tensor) -> Tensor:
        loss = cross_entropy_sum(model(tokens, documents), labels) / label_tokens
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def evaluate(tokens: Tensor, labels: Tensor, documents: Tensor | None) -> Tensor:
        pieces = zip(tokens.split(case.microbatch), labels.split(case.microbatch), strict=True)
        documents = None if documents is None else documents[: case.microbatch]
        return torch.stack(
            [cross_entropy_sum(model(x, None if documents is None else documents[: len(x)]), y) for x, y in pieces]
        ).sum()

    return _train(case, [model], list(range(case.data_ranks)), step, evaluate, case.microbatch)


def assert_same(ranks: list[tuple[int, Trained]], expected: Trained, tolerance: float) -> None:
    """What the ranks of the pp axis hold together agrees with one process in name and, within `tolerance`, in value."""
    by_place = dict(reversed(ranks))
    assert sum(len(part.weights) for part in by_place.values()) == len(expected.weights), "a parameter twice or never"
    for trained in by_place.values():
        assert trained.losses == pytest.approx(expected.losses, rel=tolerance, abs=0)
        assert trained.evaluations == pytest.approx(expected.evaluations, rel=tolerance, abs=0)
    for step, wanted in enumerate(expected.grads):
        grads = {name: grad for trained in by_place.values() for name, grad in trained.grads[step].items()}
        assert sorted(grads) == sorted(wanted)
        for name, grad in wanted.items():
            error = (grads[name] - grad).norm() / grad.norm()
            assert grads[name].dtype == torch.float32, name
            assert error <= tolerance, f"step {step}, {name}: relative error {error:.2e}"
    weights = {name: weight for trained in by_place.values() for name, weight in trained.weights.items()}
    for name, weight in expected.weights.items():
        assert (weights[name] - weight).norm() <= tolerance * weight.norm(), name


# Gradients of microbatches add up in the order of the schedule, so fp32 differs in its last bits, and rounding to bf16
# or float8 of what differs in the last bit differs now and then by one code.
FP32, ROUNDED = 2e-6, 1e-2

CASES = {
    "1f1b": Case(),
    "1f1b_documents_larger_microbatches": Case(local_batch=6, microbatch=2, documents=True),
    "gpipe": Case("GPipe"),
    "gpipe_one_microbatch": Case("GPipe", local_batch=2, microbatch=2),
    "interleaved": Case("Interleaved1F1B"),
    "looped_bfs": Case("LoopedBFS"),
    "interleaved_zero_bubble": Case("InterleavedZeroBubble"),
    "zbv": Case("ZBVZeroBubble"),
    "dualpipev": Case("DualPipeV", local_batch=5),
    "1f1b_named_parts": Case(
        keys={
            "module_fqns_per_model_part": [["tok_embeddings"], [*(f"layers.{i}" for i in range(4)), "norm", "output"]]
        }
    ),
    "1f1b_bf16": Case(compute_dtype=torch.bfloat16),
    "interleaved_tensorwise": Case("Interleaved1F1B", float8_recipe="tensorwise"),
    "1f1b_rowwise_cached_bf16": Case(float8_recipe="rowwise", cached_weights=True, compute_dtype=torch.bfloat16),
    "zbv_rowwise_cached": Case("ZBVZeroBubble", float8_recipe="rowwise", cached_weights=True),
    "1f1b_fsdp": Case(shard=2),
    "zbv_fsdp_rowwise_bf16": Case("ZBVZeroBubble", shard=2, float8_recipe="rowwise", compute_dtype=torch.bfloat16),
    "zbv_fsdp_tensorwise_all_gather_always_resharded": Case(
        "ZBVZeroBubble", shard=2, float8_recipe="tensorwise", float8_all_gather=True, reshard="always"
    ),
    "1f1b_of_4": Case(pipeline=4),
}
SLOW_CASES = {
    "interleaved_of_4": Case("Interleaved1F1B", pipeline=4, n_layers=7),
    "dualpipev_of_4": Case("DualPipeV", pipeline=4, n_layers=6, local_batch=9),
    "zbv_of_4": Case("ZBVZeroBubble", pipeline=4, n_layers=6, local_batch=3),
    "interleaved_zero_bubble_of_4": Case("InterleavedZeroBubble", pipeline=4, n_layers=6, local_batch=8),
    "looped_bfs_three_stages_a_rank": Case("LoopedBFS", keys={"pipeline_parallel_layers_per_stage": 1}),
    "gpipe_fsdp_bf16": Case("GPipe", shard=2, compute_dtype=torch.bfloat16),
    "1f1b_fsdp_always_resharded": Case(shard=2, reshard="always"),
    "interleaved_fsdp_always_resharded": Case("Interleaved1F1B", shard=2, reshard="always"),
    "interleaved_fsdp_tensorwise_all_gather": Case(
        "Interleaved1F1B", shard=2, float8_recipe="tensorwise", float8_all_gather=True
    ),
    "dualpipev_fsdp": Case("DualPipeV", shard=2),
    "1f1b_ddp": Case(replicate=2),
    "interleaved_ddp_bf16": Case("Interleaved1F1B", replicate=2, compute_dtype=torch.bfloat16),
    "1f1b_fsdp_of_one": Case(parallelized=True),
    "zero_bubble_full_ac": Case(
        "InterleavedZeroBubble", parallelized=True, activation_checkpoint={"mode": "full"}, float8_recipe="tensorwise"
    ),
    "zbv_compiled": Case("ZBVZeroBubble", parallelized=True, compile_backend="aot_eager", float8_recipe="tensorwise"),
    "dualpipev_bf16": Case("DualPipeV", compute_dtype=torch.bfloat16),
    "interleaved_zero_bubble_bf16": Case("InterleavedZeroBubble", compute_dtype=torch.bfloat16),
}


def _check(case: Case) -> None:
    rounded = case.compute_dtype != torch.float32 or case.float8_recipe is not None
    assert_same(run_distributed(train_in_a_pipeline, case.ranks, case), train_alone(case), ROUNDED if rounded else FP32)


@pytest.mark.parametrize("name", CASES)
def test_training_in_a_pipeline_equals_one_process(name: str) -> None:
    _check(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_training_in_more_pipelines_equals_one_process(name: str) -> None:
    _check(SLOW_CASES[name])


def _write_v_schedule(path: Path, microbatches: int) -> str:
    """Two ranks, stages 0 and 3 on the first; rank 1 splits backward of stage 2."""
    rows = ("0F 3F 3B 0B", "1F 2F 2I 1B 2W")
    with path.open("w", newline="") as file:
        for row in rows:
            csv.writer(file).writerow([f"{action}{n}" for action in row.split() for n in range(microbatches)])
    return str(path)


@pytest.mark.parametrize("float8_recipe", [None, "rowwise"])
def test_a_schedule_from_a_file_equals_one_process(float8_recipe: str | None, tmp_path: Path) -> None:
    path = _write_v_schedule(tmp_path / "schedule.csv", 4)
    case = Case(keys={"pipeline_parallel_schedule_csv": path}, float8_recipe=float8_recipe)
    assert case.plan.placement == (0, 1, 1, 0)
    _check(case)


def _build_pipeline(rank: int, world_size: int, case: Case) -> str:
    """What is said against the pipeline or against a batch of another shape."""
    mesh = mesh_of(MeshDegrees(pipeline=world_size), "cpu")
    plan = case.plan
    parts = split_model(_build(case), plan.stages, plan.stages_of(rank))
    options = {"group": mesh.device_mesh.get_group(PP), "device": torch.device("cpu"), "loss_fn": cross_entropy_sum}
    try:
        pipeline = Pipeline(parts, plan, batch_sequences=case.local_batch, seq_len=SEQ_LEN, **options)
    except UserError as error:
        return str(error)
    tokens = torch.zeros(case.local_batch, SEQ_LEN + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"built for batches of \[4, 16\] got one of \[4, 17\]"):
        pipeline.step(tokens, tokens, label_tokens=torch.ones(()))
    return "built"


def test_a_file_whose_actions_wait_for_each_other_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text("0B0,0F0,0F1,0B1\n1F0,1B0,1F1,1B1\n")
    case = Case(local_batch=2, keys={"pipeline_parallel_schedule_csv": str(path)})
    for message in run_distributed(_build_pipeline, 2, case):
        assert "the actions cannot be run in this order (Rank 0, step 0: Running Full Backward for stage 0" in message


def test_a_batch_of_another_shape_is_refused() -> None:
    assert run_distributed(_build_pipeline, 2, Case()) == ["built", "built"]


def _count_uses(rank: int, world_size: int, case: Case) -> tuple[int, int]:
    """Over two local batches: how often the codes of a cached weight change, and its linear runs backward."""
    mesh = mesh_of(MeshDegrees(pipeline=world_size), "cpu")
    plan = case.plan
    parts = split_model(_build(case), plan.stages, plan.stages_of(rank))
    for part in parts:
        materialize(part, torch.device("cpu"))
        initialize(part, seed=7)
    pipeline = Pipeline(
        parts,
        plan,
        group=mesh.device_mesh.get_group(PP),
        device=torch.device("cpu"),
        batch_sequences=case.local_batch,
        seq_len=SEQ_LEN,
        loss_fn=cross_entropy_sum,
    )
    codes, backward = [], []

    def watch(linear: Float8Linear, inputs: Any, output: Tensor) -> None:
        codes.append(linear.weight_cache.rows)
        output.register_hook(backward.append)

    linears = [module for part in parts for module in part.modules() if isinstance(module, Float8Linear)]
    linears[0].register_forward_hook(watch)
    for tokens, labels, _ in _batches(case, 0, case.local_batch, seed=1):
        pipeline.step(tokens, labels, label_tokens=torch.ones(()))
    assert len(codes) == BATCHES * case.local_batch
    assert codes[0] is not None
    return len({id(rows) for rows in codes}), len(backward)


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
def test_a_weight_is_cast_once_and_a_product_run_once_a_microbatch(schedule: str) -> None:
    case = Case(schedule, float8_recipe="rowwise", cached_weights=True)
    assert run_distributed(_count_uses, 2, case) == [(1, BATCHES * case.local_batch)] * 2
