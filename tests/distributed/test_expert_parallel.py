"""Expert parallelism through the trainer: on every mesh the losses and gradients of one process.

The model is small and has what families have: norms of queries and keys, a dense layer before one with experts, a
shared expert, loads that are balanced in both ways. A step has four sequences. In high precision each is a microbatch
of its own, in one process and on every rank. In float8 the experts of a rank have one scale for a column of what comes
to them from all ranks of `ep`, so one process computes the same where its microbatches are as large.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.cases import some_by_hand
from tests.distributed.harness import run_distributed
from tests.distributed.meshes import mesh_of
from tests.distributed.trainings import (
    COMPILED,
    FLOAT8,
    FLOAT8_CODES,
    FULL,
    GATHERED_CODES,
    HIGH_PRECISION,
    LOCAL_SCALES,
    PER_OP,
    Mesh,
    Options,
    Run,
    assert_same,
    run_alone,
    run_on,
    train,
    train_afresh,
    whole,
)
from titan_fp8 import building
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.dispatch import Dispatcher, LocalDispatcher
from titan_fp8.models.initialization import initialize
from titan_fp8.models.moe import MoE
from titan_fp8.optim.clipping import clip_factor
from titan_fp8.optim.optimizers import OptimizersContainer
from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.expert import ExchangeDispatcher, apply_expert_parallel
from titan_fp8.parallel.mesh import EP

STEPS = 4
GROUPED = "quantize.grouped_mm.float8"
BATCH = "training.local_batch_size"
OVERRIDES = (
    "dim=64 head_dim=16 n_kv_heads=2 ffn_dim=64 n_experts=4 top_k=2 moe_ffn_dim=32 n_shared_experts=1 "
    "first_dense_layers=1 balance_rate=1e-3"
)
MODEL = {"model.name": "qwen3_moe"} | {
    f"model.overrides.{key}": value for key, value in (each.split("=") for each in OVERRIDES.split())
}
NO_AUX_LOSS = {"model.overrides.aux_loss_weight": "0"}
"""The auxiliary loss is one of a microbatch on a rank: it is another where these have other tokens together."""
EXPERTS_IN_FLOAT8 = {
    "model.converters": GROUPED,
    f"{GROUPED}.fqns": "experts",
    f"{GROUPED}.emulate": "true",
    **NO_AUX_LOSS,
}
ALL_IN_FLOAT8 = {
    **EXPERTS_IN_FLOAT8,
    "model.converters": f"{FLOAT8},{GROUPED}",
    f"{FLOAT8}.recipe_name": "rowwise",
    f"{FLOAT8}.filter_fqns": "output",
    f"{FLOAT8}.emulate": "true",
}
MX, MX_GROUPED = "quantize.linear.mx", "quantize.grouped_mm.mx"
EXPERTS_IN_MX = {
    "model.converters": MX_GROUPED,
    f"{MX_GROUPED}.fqns": "experts",
    f"{MX_GROUPED}.emulate": "true",
    **NO_AUX_LOSS,
}
ALL_IN_MX = {
    **EXPERTS_IN_MX,
    "model.converters": f"{MX},{MX_GROUPED}",
    f"{MX}.recipe_name": "mxfp8_cublas_rceil",
    f"{MX}.emulate": "true",
}
BF16 = {"training.mixed_precision_param": "bfloat16"}
EARLY_STEP = {"optimizer.early_step_in_backward": "true", "training.max_norm": "0"}
FOUR_LAYERS = {"model.overrides.n_layers": "4"}
ZERO_BUBBLE = {
    **FOUR_LAYERS,
    "parallelism.pipeline_parallel_schedule": "InterleavedZeroBubble",
    "training.global_batch_size": "8",
}
"""Gradients of activations and of weights apart, in an order of their own."""
BF16_SUMS = (2e-4, 2e-2)
"""An expert's gradient leaves its product in bf16 once for the tokens of all ranks, not once for each microbatch."""


def on(axes: str, options: Options, folder: Path, how: Any = train_afresh, steps: int = STEPS) -> Run:
    folder.mkdir(exist_ok=True)
    return run_on(Mesh(axes, tuple({**MODEL, **options}.items())), folder, steps=steps, how=how)


def alone(options: Options, how: Any = train_afresh) -> Run:
    """`run_alone` of this model."""
    return run_alone({**MODEL, **options}, how, STEPS)


@dataclass(frozen=True)
class Case:
    """A training: on which ranks, with what, how near to one process, and the size of that one's microbatches."""

    axes: str
    options: Options = field(default_factory=dict)
    tolerance: tuple[float, float] = HIGH_PRECISION
    batch: int = 1
    batch_alone: int = 1


def same_as_alone(case: Case, folder: Path) -> Run:
    result = on(case.axes, {**case.options, BATCH: str(case.batch)}, folder)
    assert_same(result, alone({**case.options, BATCH: str(case.batch_alone)}), *case.tolerance)
    return result


SCORES_BEFORE = {"model.overrides.router_score": "sigmoid", "model.overrides.score_before_experts": "true"}
THREE_EACH = {"model.overrides.n_experts": "6"}
"""Of three experts two shards have no whole number: each expert is cut."""
ONE_EACH = {"model.overrides.n_experts": "2", "model.overrides.top_k": "1"}
CASES = {
    "ep2": Case("fsdp2 ep2"),
    "ep2_full_ac": Case("fsdp2 ep2", FULL),
    "ep2_op_ac_compiled": Case("fsdp2 ep2", PER_OP | COMPILED),
    "ep2_one_pass": Case("fsdp2 ep2", {"optimizer.implementation": "one_pass"}),
    "ep2_early_step": Case("fsdp2 ep2", EARLY_STEP | NO_AUX_LOSS, batch=2, batch_alone=4),
    "ep2_bf16": Case("fsdp2 ep2", BF16, BF16_SUMS),
    "cp2_ep2": Case("cp2 ep2", NO_AUX_LOSS),
    "ep4": Case("fsdp4 ep4"),
    "ep4_bf16": Case("fsdp4 ep4", BF16, BF16_SUMS),
    "two_shards_of_experts": Case("fsdp4 ep2"),
    "two_shards_of_three_experts_full_ac": Case("fsdp4 ep2", THREE_EACH | FULL),
    "hsdp": Case("rep2 fsdp2 ep2"),
    "pp2_ep2": Case("pp2 fsdp2 ep2", batch=2),
}
COMPILED_FLOAT8_CASES = {
    "compiled": Case("fsdp2", EXPERTS_IN_FLOAT8 | COMPILED, FLOAT8_CODES, batch=2, batch_alone=2),
    "compiled_full_ac_cut_experts": Case("fsdp4", EXPERTS_IN_FLOAT8 | COMPILED | FULL | THREE_EACH, FLOAT8_CODES),
}
"""Blocks that are compiled whole, with experts that FSDP gathers as codes."""
SLOW_CASES = {
    "ep2_op_ac": Case("fsdp2 ep2", PER_OP),
    "ep2_compiled": Case("fsdp2 ep2", COMPILED),
    "ep2_scores_before_experts": Case("fsdp2 ep2", SCORES_BEFORE),
    "pp2_ep2_zero_bubble": Case("pp2 fsdp2 ep2", ZERO_BUBBLE, batch=4),
    "ep2_full_ac_compiled": Case("fsdp2 ep2", FULL | COMPILED),
    "ep4_compiled_op_ac": Case("fsdp4 ep4", PER_OP | COMPILED),
    "two_shards_of_one_expert": Case("fsdp4 ep2", ONE_EACH),
    "four_shards_of_two_experts": Case("fsdp4", ONE_EACH),
    "copies_of_two_shards_of_three_experts": Case("rep2 fsdp2", THREE_EACH | PER_OP),
    "two_shards_of_experts_never_freed": Case(
        "fsdp4 ep2", {"parallelism.fsdp_reshard_after_forward": "never", "optimizer.implementation": "one_pass"}
    ),
    "two_shards_of_experts_bf16": Case("fsdp4 ep2", BF16, BF16_SUMS),
    "cp2_ep4": Case("fsdp2 cp2 ep4", NO_AUX_LOSS),
    "cp2_two_shards_of_experts": Case("fsdp2 cp2 ep2", NO_AUX_LOSS | PER_OP),
    "copies_of_cp2_ep2": Case("rep2 cp2 ep2", NO_AUX_LOSS),
    "pp2_cp2_ep2": Case("pp2 cp2 ep2", NO_AUX_LOSS | FULL, batch=4),
}


@pytest.mark.parametrize("name", some_by_hand(COMPILED_FLOAT8_CASES, "compiled_full_ac_cut_experts"))
def test_compiled_training_with_gathered_experts_equals_one_process(name: str, tmp_path: Path) -> None:
    same_as_alone(COMPILED_FLOAT8_CASES[name], tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_training_equals_one_process(name: str, tmp_path: Path) -> None:
    same_as_alone(CASES[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_training_equals_one_process_on_more_meshes(name: str, tmp_path: Path) -> None:
    same_as_alone(SLOW_CASES[name], tmp_path)


FLOAT8_CASES = {
    # Where one process has the same tokens together, scales and codes are the same.
    "ep2": Case("fsdp2 ep2", EXPERTS_IN_FLOAT8, batch=2, batch_alone=4),
    "ep4": Case("fsdp4 ep4", EXPERTS_IN_FLOAT8, batch_alone=4),
    "two_shards_of_experts": Case("fsdp4 ep2", EXPERTS_IN_FLOAT8, batch_alone=2),
    "cp2_ep2": Case("cp2 ep2", EXPERTS_IN_FLOAT8),
    # A microbatch of the pipeline is one sequence of each rank; both stages have experts.
    "pp2_ep2": Case("pp2 fsdp2 ep2", EXPERTS_IN_FLOAT8 | FOUR_LAYERS, batch=2, batch_alone=2),
    "ep2_full_ac_compiled": Case("fsdp2 ep2", EXPERTS_IN_FLOAT8 | FULL | COMPILED, batch=2, batch_alone=4),
    # Linears have the tokens of a rank together, and experts those of all, as no single process has.
    "ep2_linears": Case("fsdp2 ep2", ALL_IN_FLOAT8 | GATHERED_CODES, FLOAT8_CODES),
    "hsdp_linears": Case("rep2 fsdp2 ep2", ALL_IN_FLOAT8 | GATHERED_CODES, FLOAT8_CODES),
}
SLOW_FLOAT8_CASES = {
    "hsdp": Case("rep2 fsdp2 ep2", EXPERTS_IN_FLOAT8, batch_alone=2),
    "ep2_scores_before_experts": Case("fsdp2 ep2", SCORES_BEFORE | EXPERTS_IN_FLOAT8, batch=2, batch_alone=4),
    "pp2_ep2_zero_bubble": Case("pp2 fsdp2 ep2", ZERO_BUBBLE | ALL_IN_FLOAT8, FLOAT8_CODES, batch=4),
    "ep2_op_ac_linears": Case("fsdp2 ep2", ALL_IN_FLOAT8 | PER_OP, FLOAT8_CODES),
    "ep2_compiled_linears": Case("fsdp2 ep2", ALL_IN_FLOAT8 | PER_OP | COMPILED | GATHERED_CODES, FLOAT8_CODES),
    "ep4_linears": Case("fsdp4 ep4", ALL_IN_FLOAT8 | FULL, FLOAT8_CODES),
    "two_shards_of_experts_linears": Case("fsdp4 ep2", ALL_IN_FLOAT8 | GATHERED_CODES, FLOAT8_CODES),
    "cp2_ep2_linears": Case("cp2 ep2", ALL_IN_FLOAT8, LOCAL_SCALES),
    "pp2_ep2_linears": Case("pp2 fsdp2 ep2", ALL_IN_FLOAT8, FLOAT8_CODES, batch=2),
}


@pytest.mark.parametrize("name", FLOAT8_CASES)
def test_training_in_float8_equals_one_process(name: str, tmp_path: Path) -> None:
    same_as_alone(FLOAT8_CASES[name], tmp_path)


MX_CASES = {
    "ep2": Case("fsdp2 ep2", EXPERTS_IN_MX, batch=2, batch_alone=4),
    "two_shards_of_experts_full_ac_compiled": Case("fsdp4 ep2", EXPERTS_IN_MX | FULL | COMPILED, batch_alone=2),
    # Blocks of a linear's tokens are those of one sequence, of as many tokens as a block has.
    "ep2_linears": Case("fsdp2 ep2", ALL_IN_MX, FLOAT8_CODES),
    "pp2": Case("pp2", EXPERTS_IN_MX, batch=4),
}


@pytest.mark.parametrize("name", some_by_hand(MX_CASES, "two_shards_of_experts_full_ac_compiled"))
def test_training_in_mxfp8_equals_one_process(name: str, tmp_path: Path) -> None:
    same_as_alone(MX_CASES[name], tmp_path)


@pytest.mark.slow
def test_training_in_mxfp8_in_a_zero_bubble_pipeline_equals_one_process(tmp_path: Path) -> None:
    same_as_alone(Case("pp2 fsdp2 ep2", ZERO_BUBBLE | ALL_IN_MX, FLOAT8_CODES, batch=4), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_FLOAT8_CASES)
def test_training_in_float8_equals_one_process_on_more_meshes(name: str, tmp_path: Path) -> None:
    same_as_alone(SLOW_FLOAT8_CASES[name], tmp_path)


@pytest.mark.parametrize("options", [{}, EXPERTS_IN_FLOAT8], ids=["high precision", "float8"])
def test_validation_is_that_of_one_process_and_leaves_training_alone(options: Options, tmp_path: Path) -> None:
    """Of sequences of another length than the training's."""
    validation = {"enable": "true", "dataset": "synthetic", "freq": "2", "steps": "1", "seq_len": "48"}
    options = {**options, **NO_AUX_LOSS, **{f"validation.{key}": value for key, value in validation.items()}}
    size = "validation.local_batch_size"
    result = on("fsdp4 ep2", {**options, BATCH: "1", size: "1"}, tmp_path)
    expected = alone({**options, BATCH: "2", size: "4"})
    assert_same(result, expected, *HIGH_PRECISION)
    assert len(result.validated) == 2
    assert result.validated == pytest.approx(expected.validated, rel=2e-6)


def test_float8_changes_what_is_computed() -> None:
    """Otherwise the comparisons in float8 would be those in high precision."""
    high, low, all_low = (alone(each) for each in (NO_AUX_LOSS, EXPERTS_IN_FLOAT8, ALL_IN_FLOAT8))
    for other, name in ((low, "layers.1.moe.experts.w1"), (all_low, "layers.0.attention.wq.weight")):
        error = (other.grads[name] - high.grads[name]).norm() / high.grads[name].norm()
        assert 1e-2 < error < 0.3, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("axes", "batch", "batch_alone", "quantized"),
    [
        ("fsdp2", 2, 2, EXPERTS_IN_FLOAT8),
        ("fsdp2 ep2", 2, 4, EXPERTS_IN_FLOAT8),
        ("fsdp4 ep2", 1, 2, EXPERTS_IN_FLOAT8),
        ("fsdp2", 2, 2, ALL_IN_MX),
    ],
    ids=["shards", "ep2", "two_shards_of_experts", "shards_mxfp8"],
)
def test_experts_are_quantized_from_their_master_weights_on_every_mesh(
    axes: str, batch: int, batch_alone: int, quantized: Options, tmp_path: Path
) -> None:
    """In bf16, where FSDP would gather what is rounded already. One step: its codes are the same, bit for bit, and so
    is the loss of each rank; gradients differ by where sums are rounded to bf16."""
    options = quantized | BF16
    result = on(axes, {**options, BATCH: str(batch)}, tmp_path / "ranks", steps=1)
    expected = on("fsdp1", {**options, BATCH: str(batch_alone)}, tmp_path / "alone", steps=1)
    assert_same(result, expected, loss_tolerance=2e-7, grad_tolerance=4e-3)


# ---- loads that are as uneven as they can be


def _train_with_one_expert(rank: int, world_size: int, arguments: list[str], folder: str, steps: int) -> Run:
    """Every token of every rank goes to the first expert, which is on the first rank."""

    def biased(model: nn.Module, *rest: Any, **more: Any) -> None:
        initialize(model, *rest, **more)
        for module in model.modules():
            if isinstance(module, MoE):
                module.expert_bias[0] = 100.0

    with mock.patch.object(building, "initialize", biased):
        return train(rank, world_size, arguments, folder, steps)


@pytest.mark.parametrize(
    ("axes", "options", "batch", "batch_alone"),
    [
        ("fsdp2 ep2", NO_AUX_LOSS, 1, 1),
        ("fsdp4 ep4", NO_AUX_LOSS | FULL, 1, 1),
        ("fsdp4 ep2", NO_AUX_LOSS, 1, 1),
        ("fsdp2 ep2", EXPERTS_IN_FLOAT8, 2, 4),
        ("fsdp4 ep4", EXPERTS_IN_FLOAT8, 1, 4),
    ],
    ids=["ep2", "ep4", "two shards of experts", "ep2 in float8", "ep4 in float8"],
)
def test_all_tokens_may_go_to_one_rank_and_none_to_the_others(
    axes: str, options: Options, batch: int, batch_alone: int, tmp_path: Path
) -> None:
    options = {**options, "model.overrides.top_k": "1", "model.overrides.router_norm": "false"}
    result = on(axes, {**options, BATCH: str(batch)}, tmp_path, _train_with_one_expert)
    expected = alone({**options, BATCH: str(batch_alone)}, _train_with_one_expert)
    assert_same(result, expected, *HIGH_PRECISION)
    for weight in ("w1", "w2", "w3"):
        used = result.grads[f"layers.1.moe.experts.{weight}"].flatten(1).any(1)
        assert used.tolist() == [True, False, False, False]


# ---- the norm of all gradients, and clipping by it


def _clip_once(rank: int, world_size: int, arguments: list[str], folder: str, steps: int) -> Run:
    """One step; beside each gradient, the same after it was clipped, as `clipped NAME`."""
    clip, clipped = OptimizersContainer.clip_grad_norm, {}

    def recorded(self: OptimizersContainer, max_norm: float, **told: bool) -> Tensor:
        norm = clip(self, max_norm, **told)
        for part in self.model_parts:
            clipped.update({name: whole(p.grad) for name, p in part.named_parameters() if p.grad is not None})
        return norm

    with mock.patch.object(OptimizersContainer, "clip_grad_norm", recorded):
        run = train(rank, world_size, arguments, folder, 1)
    run.grads |= {f"clipped {name}": grad for name, grad in clipped.items()}
    return run


@pytest.mark.parametrize(
    ("axes", "batch"), [("fsdp2 ep2", 1), ("fsdp4 ep2", 1), ("rep2 fsdp2 ep2", 1), ("pp2 fsdp2 ep2", 2)]
)
def test_gradients_are_clipped_by_the_norm_of_all_on_both_meshes(axes: str, batch: int, tmp_path: Path) -> None:
    max_norm = 0.03
    options = {"training.max_norm": str(max_norm), "optimizer.implementation": "foreach"}
    run = on(axes, {**options, BATCH: str(batch)}, tmp_path, _clip_once, steps=1)
    before = {name: grad for name, grad in run.grads.items() if not name.startswith("clipped ")}
    assert len(run.grads) == 2 * len(before)
    norm = torch.stack([grad.double().norm() for grad in before.values()]).norm()
    assert run.norms == pytest.approx([norm.item()], rel=1e-5)
    assert norm > 10 * max_norm
    of_experts = torch.stack([grad.double().norm() for name, grad in before.items() if ".experts." in name]).norm()
    assert of_experts > 1e-3 * norm, "leaving out experts would show"
    for name, grad in before.items():
        torch.testing.assert_close(run.grads[f"clipped {name}"], grad * clip_factor(norm, max_norm).float(), msg=name)


# ---- checkpoints


def same_after_a_move(before: str, after: str, options: Options, folder: Path) -> None:
    half = STEPS // 2
    saving = {**options, "checkpoint.enable": "true", "checkpoint.interval": str(half)}
    on(before, {**saving, BATCH: "2" if "pp" in before else "1"}, folder, steps=half)
    resumed = on(after, {**saving, BATCH: "2" if "pp" in after else "1"}, folder)
    expected = alone({**options, BATCH: "1"})
    assert len(resumed.losses) == STEPS - half
    assert_same(resumed, Run(expected.losses[half:], expected.norms[half:], expected.grads), *HIGH_PRECISION)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp2 ep2", "fsdp1"),
        ("fsdp1", "fsdp4 ep4"),
        ("fsdp4 ep2", "fsdp4 ep4"),
        ("fsdp4 ep4", "rep2 fsdp2 ep2"),
        ("fsdp2", "fsdp2 ep2"),
        pytest.param("rep2 fsdp2 ep2", "fsdp2", marks=pytest.mark.slow),
        pytest.param("pp2 fsdp2 ep2", "fsdp4 ep2", marks=pytest.mark.slow),
        pytest.param("fsdp2 ep2", "pp2 fsdp2 ep2", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_resumed_on_another_mesh(before: str, after: str, tmp_path: Path) -> None:
    same_after_a_move(before, after, {}, tmp_path)


@pytest.mark.parametrize(
    ("before", "after"), [("fsdp4 ep2", "fsdp1"), pytest.param("fsdp4", "fsdp2 ep2", marks=pytest.mark.slow)]
)
def test_a_checkpoint_of_experts_that_were_cut_is_resumed_where_they_arewhole(
    before: str, after: str, tmp_path: Path
) -> None:
    same_after_a_move(before, after, ONE_EACH, tmp_path)


# ---- where experts are


def _deal_out(rank: int, world_size: int, expert: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By name, of the weights of a layer's experts that had values: these, what they are together now, and what this
    rank multiplies with."""
    torch.manual_seed(0)
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 32, "max_seq_len": 8, "moe_ffn_dim": 24}
    model = Decoder(ModelDims(**sizes, n_experts=8, top_k=2))
    initialize(model, seed=0)
    experts = model.layers["0"].moe.experts
    before = {name: parameter.detach().clone() for name, parameter in experts.named_parameters()}
    mesh = mesh_of(MeshDegrees(data_parallel_shard=world_size, expert=expert), "cpu")
    apply_expert_parallel(model, mesh)
    here = dict(zip(("w1", "w3", "w2"), experts.weights(), strict=True))
    return {
        name: (before[name], whole(parameter), here[name].detach()) for name, parameter in experts.named_parameters()
    }


@pytest.mark.parametrize(("ranks", "expert"), [(2, 2), (4, 2), (4, 4), (2, 1)])
def test_a_model_that_has_weights_keeps_them_and_each_rank_has_its_own_experts(ranks: int, expert: int) -> None:
    for rank, weights in enumerate(run_distributed(_deal_out, ranks, expert)):
        number, each = rank % expert, 8 // expert
        for name, (before, together, here) in weights.items():
            assert torch.equal(together, before), name
            assert torch.equal(here, before[number * each : (number + 1) * each]), f"rank {rank}: {name}"


# ---- tokens on their way

N_EXPERTS, TOP_K, DIM = 8, 3, 5


def _choices(rank: int, tokens: int, how: str) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    if how == "one rank":
        return torch.arange(TOP_K).expand(tokens, TOP_K).contiguous()
    return torch.rand(tokens, N_EXPERTS, generator=generator).topk(TOP_K).indices


def _there_and_back(
    dispatcher: Dispatcher, first: int, x: Tensor, experts: Tensor, scores: Tensor, before: bool
) -> dict[str, Tensor]:
    """Each expert multiplies by a number of its own. Rows behind the last group become NaN."""
    x, scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
    groups = dispatcher.dispatch(x, experts, *((scores, None) if before else (None, scores))).wait()
    made = groups.rows.make()
    rows = torch.arange(made.shape[0], dtype=torch.int32)
    factors = torch.full((N_EXPERTS + 1,), torch.nan)
    factors[: len(groups.ends)] = 1.5 ** torch.arange(first, first + len(groups.ends))
    factors = factors[torch.bucketize(rows, groups.ends, right=True)]
    output = dispatcher.combine(groups.rows.bring_back(made * factors.unsqueeze(1)), groups).wait()
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(7)))
    assert not (groups.ends % dispatcher.alignment).any()
    in_groups = made[: groups.ends[-1]]
    is_empty = ~in_groups.any(1)
    return {"output": output.detach(), "x": x.grad, "scores": scores.grad, "empty": is_empty.sum()}


def _exchange(
    rank: int, world_size: int, tokens: tuple[int, ...], how: str, alignment: int, before: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    group = mesh_of(MeshDegrees(data_parallel_shard=world_size, expert=world_size), "cpu").expert_mesh[EP].get_group()
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(tokens[rank], DIM, generator=generator)
    experts, scores = _choices(rank, tokens[rank], how), torch.rand(tokens[rank], TOP_K, generator=generator)
    spread = ExchangeDispatcher(N_EXPERTS, group, alignment)
    here = N_EXPERTS // world_size
    result = _there_and_back(spread, rank * here, x, experts, scores, before)
    expected = _there_and_back(LocalDispatcher(N_EXPERTS, alignment), 0, x, experts, scores, before)
    everybodys = torch.cat([_choices(other, tokens[other], how).flatten() for other in range(world_size)])
    counts = torch.bincount(everybodys, minlength=N_EXPERTS)[rank * here : (rank + 1) * here]
    return result, expected, int((-counts % alignment).sum())


@pytest.mark.parametrize("before", [False, True], ids=["scores after", "scores before"])
@pytest.mark.parametrize(
    ("tokens", "how", "alignment"),
    [
        ((21, 13), "any", 8),
        ((0, 6), "any", 16),
        ((9, 1), "one rank", 16),
        ((21, 0, 1, 40), "any", 16),
        ((3, 5, 7, 0), "one rank", 1),
        ((0, 0), "any", 8),
    ],
    ids=str,
)
def test_tokens_come_back_from_other_ranks_as_from_here(
    tokens: tuple[int, ...], how: str, alignment: int, before: bool
) -> None:
    """Bit for bit, gradients too: the same choices are summed in the same order."""
    for rank, (result, expected, padding) in enumerate(
        run_distributed(_exchange, len(tokens), tokens, how, alignment, before)
    ):
        for name in ("output", "x", "scores"):
            assert result[name].shape == expected[name].shape
            assert torch.equal(result[name], expected[name]), f"rank {rank}: {name}"
        assert result["empty"] == padding, f"rank {rank}: groups are filled up, and with zeros"
