"""Pairs of a pipeline's passes that take turns where tokens travel: what they compute, in which order, how they fail.

The model has dense layers and layers with experts, not as many in one stage as in the other:

    rank of pp    stages and their layers
    0             0: dense                    3: experts
    1             1: dense, experts           2: experts, experts
"""

import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.cases import some_by_hand
from tests.distributed.harness import run_distributed
from tests.distributed.test_expert_parallel import (
    ALL_IN_FLOAT8,
    ALL_IN_MX,
    BF16,
    EXPERTS_IN_FLOAT8,
    MODEL,
    NO_AUX_LOSS,
    on,
)
from tests.distributed.trainings import COMPILED, FULL, GATHERED_CODES, PER_OP, Mesh, Options, Run, train
from titan_fp8.models.moe import Experts
from titan_fp8.parallel.expert import Exchange
from titan_fp8.runtime.turns import Turns

KEY = "parallelism.pipeline_parallel_expert_parallel_overlap"
AXES = "pp2 fsdp2 ep2"
DUALPIPEV = {
    "parallelism.pipeline_parallel_schedule": "DualPipeV",
    "model.overrides.n_layers": "6",
    "model.overrides.first_dense_layers": "2",
    "training.local_batch_size": "5",
    "training.global_batch_size": "10",
}
CODES = {"parallelism.expert_parallel_payload": "float8"}
EVERY_SECOND = {"activation_checkpoint.mode": "selective"}
RESHARDED = {"parallelism.fsdp_reshard_after_forward": "always"}
TURNS_OF_A_BATCH = {
    "parallelism.expert_parallel_overlap_batches": "2",
    "parallelism.pipeline_parallel_microbatch_size": "2",
    "training.local_batch_size": "8",
    "training.global_batch_size": "16",
    **NO_AUX_LOSS,
}
CASES: dict[str, tuple[str, Options]] = {
    "fp32": (AXES, {}),
    "float8_bf16_full_ac": (AXES, ALL_IN_FLOAT8 | BF16 | FULL),
}
SLOW_CASES: dict[str, tuple[str, Options]] = {
    "fp32_full_ac": (AXES, FULL),
    "bf16_resharded": (AXES, BF16 | RESHARDED),
    "every_second_layer_ac": (AXES, EVERY_SECOND),
    "op_ac_compiled": (AXES, PER_OP | COMPILED),
    "compiled_full_ac": (AXES, COMPILED | FULL | EXPERTS_IN_FLOAT8),
    "codes_gathered_codes": (AXES, CODES | ALL_IN_FLOAT8 | GATHERED_CODES | BF16),
    "mxfp8": (AXES, ALL_IN_MX | BF16),
    "turns_of_a_batch": (AXES, TURNS_OF_A_BATCH | FULL),
    "cp2_ep2": ("pp2 cp2 ep2", NO_AUX_LOSS),
    "tp2_ep2": ("pp2 tp2 ep2", NO_AUX_LOSS),
    "two_shards_of_experts": ("pp2 fsdp4 ep2", {"training.global_batch_size": "20"} | FULL),
    "copies": ("pp2 rep2 fsdp2 ep2", {"training.global_batch_size": "20"}),
}


def assert_equal(actual: Run, expected: Run) -> None:
    assert actual.losses == expected.losses
    assert actual.norms == expected.norms
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert grad.equal(actual.grads[name]), name


def _check(axes: str, options: Options, folder: Path) -> None:
    both = [on(axes, {**DUALPIPEV, **options, KEY: key}, folder / key, steps=2) for key in ("true", "false")]
    assert_equal(*both)


@pytest.mark.parametrize("name", some_by_hand(CASES, "float8_bf16_full_ac"))
def test_passes_in_turns_compute_what_they_do_one_after_the_other(name: str, tmp_path: Path) -> None:
    _check(*CASES[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_more_passes_in_turns_compute_what_they_do_one_after_the_other(name: str, tmp_path: Path) -> None:
    _check(*SLOW_CASES[name], tmp_path)


@pytest.mark.slow
def test_pairs_of_a_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text(
        "0F0,3F0,(0F1;3B0)OVERLAP_F_B,(3F1;0B0)OVERLAP_F_B,3B1,0B1\n"
        "1F0,2F0,(1F1;2I0)OVERLAP_F_B,(2F1;1B0)OVERLAP_F_B,2W0,2B1,1B1\n"
    )
    of_file = {"parallelism.pipeline_parallel_schedule_csv": str(path)}
    batches = {"training.local_batch_size": "2", "training.global_batch_size": "4"}
    options = {**of_file, **batches, "parallelism.pipeline_parallel_schedule": "1F1B"}
    _check(AXES, options, tmp_path)
    assert [len(pairs) for pairs in _orders(options, tmp_path)] == [2] * 4


# ---- the order of things


class _Mark(torch.autograd.Function):
    """Logs when its gradient comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: "Log") -> Tensor:
        ctx.log = log
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.log.add("experts back")
        return grad, None


class Log:
    """What happens in pairs: `F goes` is an exchange of the forward pass that has begun, `B came` is when the backward
    pass waits for one."""

    def __init__(self) -> None:
        self.pairs: list[list[str]] = []
        self._is_inside = False

    def add(self, what: str) -> None:
        if self._is_inside:
            of_pass = "F" if threading.current_thread() is threading.main_thread() else "B"
            self.pairs[-1].append(f"{of_pass} {what}")

    @contextmanager
    def recording(self) -> Iterator[None]:
        run, start, finish, forward = Turns.run, Exchange.start, Exchange.finish, Experts.forward

        def logged_run(turns: Turns, first: Any, second: Any) -> None:
            self.pairs.append([])
            self._is_inside = True
            run(turns, first, second)
            self._is_inside = False

        def logged_start(exchange: Exchange, x: Tensor, *, back: bool) -> Tensor:
            self.add("goes")
            return start(exchange, x, back=back)

        def logged_finish(exchange: Exchange) -> Tensor:
            self.add("came")
            return finish(exchange)

        def logged_forward(experts: Experts, *args: Any) -> Tensor:
            self.add("experts")
            return _Mark.apply(forward(experts, *args), self)

        with (
            mock.patch.object(Turns, "run", logged_run),
            mock.patch.object(Exchange, "start", logged_start),
            mock.patch.object(Exchange, "finish", logged_finish),
            mock.patch.object(Experts, "forward", logged_forward),
        ):
            yield


def _order(rank: int, world_size: int, arguments: list[str], folder: str) -> list[list[str]]:
    log = Log()
    with log.recording():
        train(rank, world_size, arguments, folder, 1)
    return log.pairs


def _orders(options: Options, folder: Path) -> list[list[list[str]]]:
    mesh = Mesh(AXES, tuple({**MODEL, **DUALPIPEV, **options}.items()))
    return run_distributed(_order, mesh.ranks, mesh.arguments(), str(folder))


def test_while_tokens_of_one_pass_travel_the_other_one_computes(tmp_path: Path) -> None:
    ranks = _orders({}, tmp_path)
    # In stage 2 two layers with experts, in stage 1 one: what is left of the longer pass runs alone.
    of_2_and_1 = [
        "F goes", "B goes", "F came", "F experts", "F goes", "B came", "B experts back", "B goes", "F came",
        "F goes", "B came", "F came", "F experts", "F goes", "F came",
    ]  # fmt: skip
    of_1_and_2 = [
        "F goes", "B goes", "F came", "F experts", "F goes", "B came", "B experts back", "B goes", "F came",
        "B came", "B goes", "B came", "B experts back", "B goes", "B came",
    ]  # fmt: skip
    assert ranks[2] == ranks[3] == [of_2_and_1, of_1_and_2, of_2_and_1, of_1_and_2, of_2_and_1]
    # Stage 0 exchanges nothing: there is nothing to hand over at.
    forward, backward = (
        ["F goes", "F came", "F experts", "F goes", "F came"],
        ["B goes", "B came", "B experts back", "B goes", "B came"],
    )
    assert [sorted(pair) for pair in ranks[0]] == [sorted(backward), sorted(forward)] * 2 + [sorted(forward)]
    assert ranks[0] == ranks[1]


def test_exchanges_that_are_repeated_in_backward_have_their_turns_too(tmp_path: Path) -> None:
    ranks = _orders(FULL, tmp_path)
    assert ranks[2] == ranks[3]
    assert ranks[0] == ranks[1]
    again = ["B goes", "B came", "B experts", "B goes", "B came"]
    for pair in ranks[2]:
        of_backward = [each for each in pair if each.startswith("B")]
        layers = of_backward.count("B experts back")
        assert of_backward == layers * [*again, "B goes", "B came", "B experts back", "B goes", "B came"]
        begun = pair.index("F goes")
        assert "B goes" in pair[begun : pair.index("F came")]


def test_nothing_takes_turns_if_the_key_says_so(tmp_path: Path) -> None:
    assert _orders({KEY: "false"}, tmp_path) == [[]] * 4


# ---- failures


def _fail(rank: int, world_size: int, arguments: list[str], folder: str, of_pass: str) -> tuple[str, float, bool]:
    """What comes out if the first exchange of a pass in a pair fails, after how long, and whether no pair followed."""
    log, finish = Log(), Exchange.finish

    def fail(exchange: Exchange) -> Tensor:
        log.add("came")
        if log.pairs and log.pairs[-1] and log.pairs[-1][-1] == f"{of_pass} came":
            raise ValueError("tokens were lost")
        return finish(exchange)

    with log.recording(), mock.patch.object(Exchange, "finish", fail):
        begun = time.monotonic()
        try:
            train(rank, world_size, arguments, folder, 1)
        except BaseException:
            return traceback.format_exc(), time.monotonic() - begun, len(log.pairs) == 1
    return "nothing", 0.0, False


@pytest.mark.parametrize("of_pass", some_by_hand(["F", "B"], "F"))
def test_a_failure_in_either_pass_comes_out_and_ends_the_other(of_pass: str, tmp_path: Path) -> None:
    mesh = Mesh(AXES, tuple({**MODEL, **DUALPIPEV, "model.overrides.first_dense_layers": "0"}.items()))
    failed = run_distributed(_fail, mesh.ranks, mesh.arguments(), str(tmp_path), of_pass, fresh=True, timeout_s=40.0)
    for message, seconds, is_first_pair in failed:
        assert "ValueError: tokens were lost" in message
        assert "AbandonedError" not in message
        assert seconds < 20
        assert is_first_pair
