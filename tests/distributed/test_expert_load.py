"""Loads of experts over ranks: counts are summed, biases follow the formula, all ranks tell the same metrics."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.harness import run_distributed
from tests.distributed.meshes import mesh_of
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.models.moe import MoE, Routing
from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.expert_load import ExpertLoad, expert_load

RATE, AUX_WEIGHT, N_EXPERTS, TOP_K = 0.01, 0.3, 4, 2
SIZES: dict[str, Any] = {
    "dim": 16, "n_heads": 2, "vocab_size": 31, "ffn_dim": 32, "max_seq_len": 16, "n_experts": N_EXPERTS,
    "top_k": TOP_K, "moe_ffn_dim": 16, "first_dense_layers": 1, "balance_rate": RATE, "aux_loss_weight": AUX_WEIGHT,
}  # fmt: skip


def build(n_layers: int, **options: Any) -> Decoder:
    model = Decoder(ModelDims(**{**SIZES, "n_layers": n_layers, **options}))
    initialize(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.mul_(40.0)  # so that loads differ
    return model


def layers_of(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


@dataclass
class Step:
    """What one rank knows of a step, lists by layer.

    Attributes:
        counts: tokens of each expert on this rank.
        aux: the auxiliary losses of this rank's microbatches, each times its tokens, summed.
        scales: the factor of the auxiliary loss, as the layers have it.
        biases: after the step.
        left: counts and sums that were left behind.
        metrics: as they are told.
    """

    counts: list[Tensor]
    aux: list[float]
    scales: list[float]
    biases: list[Tensor]
    left: list[Tensor]
    metrics: dict[str, float]


class Watched:
    """Notes what a router chose, apart from what the layer counts."""

    def __init__(self, layer: MoE) -> None:
        self.clear()
        layer.router.register_forward_hook(self._note)

    def clear(self) -> None:
        self.counts, self.aux = torch.zeros(N_EXPERTS, dtype=torch.float64), 0.0

    def _note(self, router: nn.Module, inputs: Any, routing: Routing) -> None:
        tokens = routing.experts.shape[0]
        counts = torch.tensor([(routing.experts == expert).sum().item() for expert in range(N_EXPERTS)]).double()
        self.counts += counts
        f = N_EXPERTS / (TOP_K * tokens) * counts
        self.aux += tokens * (f * routing.probabilities.detach().double().mean(0)).sum().item()


TOKENS = 2 * 10 * (1 + 2)  # two microbatches of sequences of ten, of which the first rank has one and the second two
SKIPPED = 2  # the number of a step that is skipped


def _train(rank: int, world_size: int, steps: int) -> list[Step]:
    """Steps of two microbatches, of other tokens on each rank, without an optimizer."""
    model = build(3)
    mesh = mesh_of(MeshDegrees(data_parallel_shard=world_size), "cpu")
    load = expert_load([model], model.dims, mesh)
    assert load is not None
    layers = layers_of(model)
    watched = [Watched(layer) for layer in layers]
    generator = torch.Generator().manual_seed(rank)
    done = []
    for step in range(steps):
        for each in watched:
            each.clear()
        load.begin_step(TOKENS)
        scales = [layer.aux_loss_scale.item() for layer in layers]
        for _ in range(2):
            batch = torch.randint(31, (1 + rank, 11), generator=generator)
            cross_entropy_sum(model(batch[:, :-1]), batch[:, 1:]).backward()
        load.end_step(skip=torch.tensor(step == SKIPPED))
        left = [layer.tokens_per_expert.clone() for layer in layers] + [layer.aux_loss_sum.clone() for layer in layers]
        biases = [layer.expert_bias.clone() for layer in layers if layer.expert_bias is not None]
        counts, aux = [each.counts for each in watched], [each.aux for each in watched]
        done.append(Step(counts, aux, scales, biases, left, load.metrics()))
    return done


@pytest.fixture(scope="module")
def trained() -> list[list[Step]]:
    """Four steps, the third of them skipped: by rank, by step."""
    return run_distributed(_train, 2, 4)


def moves(counts: Tensor) -> Tensor:
    """By how much the biases of a layer move; the formula of the module's docstring."""
    signs = [math.copysign(1.0, counts.mean() - count) if count != counts.mean() else 0.0 for count in counts]
    return torch.tensor([RATE * (sign - sum(signs) / len(signs)) for sign in signs], dtype=torch.float64)


def told(counts: list[Tensor], aux: list[float]) -> dict[str, float]:
    """The metrics of the counts of all ranks and of their sums of auxiliary losses, lists over all layers."""
    shares = [count.double() / count.sum() for count in counts]
    loads = [float(share.max() * len(share)) for share in shares]
    entropies = [-sum(p * math.log(p) for p in share.tolist() if p) / math.log(len(share)) for share in shares]
    tokens = [float(count.sum()) / TOP_K for count in counts]
    losses = [loss / max(count, 1) for loss, count in zip(aux, tokens, strict=True)]
    return {
        "moe/max_load": max(loads),
        "moe/mean_max_load": sum(loads) / len(loads),
        "moe/entropy": sum(entropies) / len(entropies),
        "moe/dropped_tokens": 0,
        "moe/aux_loss": sum(losses) / len(losses),
    }


def test_biases_move_by_the_loads_of_all_ranks_and_keep_their_mean(trained: list[list[Step]]) -> None:
    before = [torch.zeros(N_EXPERTS, dtype=torch.float64)] * 2
    one_rank_would_differ = False
    for step, (first, second) in enumerate(zip(*trained, strict=True)):
        for layer in range(2):
            both = first.counts[layer] + second.counts[layer]
            expected = before[layer] + (moves(both) if step != SKIPPED else 0.0)
            one_rank_would_differ |= not torch.equal(moves(first.counts[layer]), moves(both))
            torch.testing.assert_close(first.biases[layer].double(), expected, rtol=1e-5, atol=1e-7)
            assert torch.equal(first.biases[layer], second.biases[layer]), "the same on every rank"
            assert first.biases[layer].mean().abs() < 1e-8
            before[layer] = expected
    assert one_rank_would_differ
    assert all(bias.abs().max() > RATE / 2 for bias in before)


def test_a_skipped_step_moves_no_bias_and_the_next_one_does(trained: list[list[Step]]) -> None:
    for steps in trained:
        for layer in range(2):
            assert torch.equal(steps[SKIPPED].biases[layer], steps[SKIPPED - 1].biases[layer])
            assert not torch.equal(steps[SKIPPED + 1].biases[layer], steps[SKIPPED].biases[layer])


def test_metrics_are_those_of_all_ranks_and_layers_and_of_the_last_step_alone(trained: list[list[Step]]) -> None:
    for first, second in zip(*trained, strict=True):
        counts = [a + b for a, b in zip(first.counts, second.counts, strict=True)]
        expected = told(counts, [a + b for a, b in zip(first.aux, second.aux, strict=True)])
        assert first.metrics == pytest.approx(expected, rel=1e-5)
        assert first.metrics == second.metrics
        assert first.metrics["moe/max_load"] > 1.1
        assert not any(left.any() for left in (*first.left, *second.left)), "the next step starts from zero"


def test_the_auxiliary_loss_is_the_mean_over_layers_and_tokens_times_its_weight(trained: list[list[Step]]) -> None:
    scales = [scale for steps in trained for step in steps for scale in step.scales]
    assert scales == pytest.approx([AUX_WEIGHT / 2 / TOKENS] * len(scales))


@dataclass(frozen=True)
class Counted:
    """Steps whose counts are written by hand: `[step][rank][layer of the rank]`."""

    degrees: MeshDegrees
    layers_of_ranks: tuple[tuple[str, ...], ...]
    counts: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    n_layers: int = 3
    tokens: int = 8


def _count(rank: int, world_size: int, case: Counted) -> list[Step]:
    """What comes of counts that layers have."""
    model = build(case.n_layers)
    part = nn.ModuleDict({name: model.layers[name] for name in case.layers_of_ranks[rank]})
    load = ExpertLoad([part], model.dims, mesh_of(case.degrees, "cpu"))
    layers = layers_of(part)
    done = []
    for counts_of_ranks in case.counts:
        load.begin_step(case.tokens)
        for layer, counts in zip(layers, counts_of_ranks[rank], strict=True):
            layer.tokens_per_expert += torch.tensor(counts)
            layer.aux_loss_sum += sum(counts) / TOP_K * 1.5
        load.end_step()
        biases = [layer.expert_bias.clone() for layer in layers if layer.expert_bias is not None]
        done.append(Step([], [], [], biases, [], load.metrics()))
    return done


BOTH = (("0", "1", "2"), ("0", "1", "2"))
FIRST = (((5, 1, 1, 1), (2, 2, 2, 2)), ((1, 3, 3, 1), (0, 0, 8, 0)))
SECOND = (((0, 0, 0, 8), (2, 2, 2, 2)), ((4, 0, 4, 0), (4, 2, 2, 0)))
REPLICAS = {
    "fsdp": Counted(MeshDegrees(data_parallel_shard=2), BOTH, (FIRST, SECOND)),
    "replicas": Counted(MeshDegrees(data_parallel_replicate=2), BOTH, (FIRST, SECOND)),
    "parts of sequences": Counted(MeshDegrees(context=2), BOTH, (FIRST, SECOND)),
    "tokens between products": Counted(MeshDegrees(tensor=2), BOTH, (FIRST, SECOND)),
    "tokens of divided experts": Counted(MeshDegrees(tensor=2, expert_tensor=2), BOTH, (FIRST, SECOND)),
}


@pytest.mark.parametrize("name", REPLICAS)
def test_ranks_that_have_different_tokens_count_together(name: str) -> None:
    case = REPLICAS[name]
    results = run_distributed(_count, 2, case)
    biases = [torch.zeros(N_EXPERTS, dtype=torch.float64)] * 2
    for step, counts_of_ranks in enumerate(case.counts):
        counts = [torch.tensor(a) + torch.tensor(b) for a, b in zip(*counts_of_ranks, strict=True)]
        biases = [bias + moves(count.double()) for bias, count in zip(biases, counts, strict=True)]
        expected = told(counts, [float(count.sum()) / TOP_K * 1.5 for count in counts])
        for result in results:
            assert result[step].metrics == pytest.approx(expected, rel=1e-6)
            for bias, wanted in zip(result[step].biases, biases, strict=True):
                torch.testing.assert_close(bias.double(), wanted, rtol=1e-5, atol=1e-8)


STAGES = {
    "one and two layers": Counted(
        MeshDegrees(pipeline=2),
        (("0", "1"), ("2", "3")),
        (((FIRST[0][0],), FIRST[1]), ((SECOND[0][0],), SECOND[1])),
        4,
        tokens=4,
    ),
    "none in the first stage": Counted(
        MeshDegrees(pipeline=2), (("0",), ("1", "2")), (((), FIRST[0]), ((), SECOND[1])), tokens=4
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_a_pipeline_count_for_themselves_and_tell_of_all_layers(name: str) -> None:
    case = STAGES[name]
    results = run_distributed(_count, 2, case)
    for step, counts_of_ranks in enumerate(case.counts):
        counts = [torch.tensor(count) for rank in counts_of_ranks for count in rank]
        expected = told(counts, [float(count.sum()) / TOP_K * 1.5 for count in counts])
        for rank, result in enumerate(results):
            assert result[step].metrics == pytest.approx(expected, rel=1e-6)
            before = results[rank][step - 1].biases if step else [torch.zeros(N_EXPERTS)] * len(counts_of_ranks[rank])
            for bias, old, count in zip(result[step].biases, before, counts_of_ranks[rank], strict=True):
                torch.testing.assert_close(
                    (bias - old).double(), moves(torch.tensor(count).double()), atol=1e-8, rtol=1e-4
                )


def _one_expert(rank: int, world_size: int) -> dict[str, float]:
    model = build(1, n_experts=1, top_k=1, first_dense_layers=0)
    load = expert_load([model], model.dims, mesh_of(MeshDegrees(data_parallel_shard=world_size), "cpu"))
    assert load is not None
    load.begin_step(8)
    for layer in layers_of(model):
        layer.tokens_per_expert += 4
    load.end_step()
    return load.metrics()


def test_the_load_of_one_expert_is_balanced() -> None:
    for metrics in run_distributed(_one_expert, 2):
        assert (metrics["moe/entropy"], metrics["moe/max_load"], metrics["moe/dropped_tokens"]) == (1.0, 1.0, 0)


def _unbalanced(rank: int, world_size: int) -> tuple[dict[str, float], bool, bool]:
    """Of a model without biases, in which every token went to one pair of experts; and of one without experts."""
    model = build(2, balance_rate=0.0, first_dense_layers=0)
    mesh = mesh_of(MeshDegrees(data_parallel_shard=world_size), "cpu")
    load = expert_load([model], model.dims, mesh)
    assert load is not None
    load.begin_step(12)
    for layer in layers_of(model):
        layer.tokens_per_expert += torch.tensor([6.0, 0.0, 6.0, 0.0])
    load.end_step()
    has_biases = any(layer.expert_bias is not None for layer in layers_of(model))
    dense = ModelDims(dim=16, n_layers=1, n_heads=2)
    return load.metrics(), has_biases, expert_load([nn.Module()], dense, mesh) is None


def test_loads_are_told_also_where_nothing_balances_them() -> None:
    for metrics, has_biases, dense_has_none in run_distributed(_unbalanced, 2):
        assert metrics == {
            "moe/max_load": pytest.approx(2.0),
            "moe/mean_max_load": pytest.approx(2.0),
            "moe/entropy": pytest.approx(0.5),
            "moe/dropped_tokens": 0,
            "moe/aux_loss": 0.0,
        }
        assert not has_biases
        assert dense_has_none


LOST = (((5, 1, 1, 1), (2, 2, 2, 2)), ((1, 3, 3, 1), (0, 0, 5, 0)))
MISCOUNTED = {
    "one rank lost three choices": (Counted(MeshDegrees(data_parallel_shard=2), BOTH, (FIRST, LOST, FIRST)), [0, 3, 0]),
    "a stage lost three": (replace(STAGES["none in the first stage"], counts=(((), FIRST[0]), ((), LOST[1]))), [0, 3]),
    "counted twice": (Counted(MeshDegrees(data_parallel_shard=2), BOTH, (FIRST, FIRST), tokens=4), [-16, -16]),
}


@pytest.mark.parametrize("name", MISCOUNTED)
def test_choices_that_are_not_counted_are_told_as_dropped_in_their_step_alone(name: str) -> None:
    case, dropped = MISCOUNTED[name]
    for result in run_distributed(_count, 2, case):
        assert [step.metrics["moe/dropped_tokens"] for step in result] == dropped
