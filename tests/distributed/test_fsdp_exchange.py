"""FSDP2 with its units exchanged through peer memory, in processes on CPUs that share files in place of GPUs' memory.

In FSDP's own order of calls no buffer is taken twice, and a training is the one with collectives.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.cases import some_by_hand
from tests.distributed.harness import run_distributed
from tests.distributed.test_parallel import Case, assert_same, spread, train_on_ranks
from titan_fp8.kernels import adam
from titan_fp8.optim import clip_grad_norm_
from titan_fp8.parallel import fsdp, fsdp_exchange, gathered_codes
from titan_fp8.parallel.gradient_sums import GradientSums

PLAIN = Case(shard=2, vocab_size=64, dims={"dim": 64, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 128, "n_layers": 3})
BF16 = replace(PLAIN, compute_dtype=torch.bfloat16)
CODES = replace(BF16, float8_all_gather=True, dims={**PLAIN.dims, "n_layers": 5})
CASES = {
    "fp32": PLAIN,
    "bf16": BF16,
    "microbatches": replace(BF16, microbatches=2),
    "kept": replace(BF16, reshard="never", microbatches=2),
    "freed": replace(PLAIN, reshard="always"),
    "full_ac": replace(BF16, activation_checkpoint={"mode": "full"}),
    "compiled": replace(BF16, compile_backend="aot_eager"),
    "codes": replace(CODES, float8_recipe="tensorwise", precomputed_scales=True),
    "codes_of_microbatches": replace(CODES, float8_recipe="rowwise", microbatches=2),
    "codes_made_for_each_gather": replace(CODES, float8_recipe="tensorwise", precomputed_scales=True, keep_codes=False),
    "codes_kept": replace(
        CODES, float8_recipe="blockwise", reshard="never", microbatches=2, dims={**CODES.dims, "dim": 128}
    ),
    "codes_freed": replace(CODES, float8_recipe="rowwise", reshard="always"),
    "codes_recomputed": replace(
        CODES, float8_recipe="tensorwise", activation_checkpoint={"mode": "full"}, dims={**PLAIN.dims, "n_layers": 6}
    ),
    "codes_compiled": replace(CODES, float8_recipe="rowwise", compile_backend="aot_eager"),
    "codes_of_master_units": replace(CODES, compute_dtype=torch.float32, float8_recipe="rowwise", microbatches=2),
    "codes_uneven": replace(
        CODES, float8_recipe="rowwise", compute_dtype=torch.float32, shard=3, dims={**CODES.dims, "ffn_dim": 96}
    ),
    "codes_tied": replace(CODES, float8_recipe="tensorwise", tied_embeddings=True, microbatches=2),
    "masters": replace(BF16, float8_recipe="tensorwise"),
    "uneven": replace(PLAIN, dims={**PLAIN.dims, "ffn_dim": 131}),
    "uneven_microbatches": replace(PLAIN, dims={**PLAIN.dims, "ffn_dim": 131}, vocab_size=67, microbatches=4),
    "microbatches_in_bf16": replace(BF16, microbatches=4, reduce_dtype=torch.bfloat16),
}
KEPT = {"microbatches", "kept", "codes_of_microbatches", "codes_kept", "codes_of_master_units"} | {
    "codes_tied",
    "uneven_microbatches",
}
"""Whose sums over microbatches lie in memory of their own, those of blocks and of the output layer. Sums in bf16 do
not, since gradients are fp32."""


BUFFERS = dict.fromkeys((name for name in CASES if name.startswith("codes")), 8) | {"codes_freed": 10, "codes_kept": 10}
BUFFERS |= {"masters": 7, "freed": 6}
"""Two of gathers and one of gradients for each size of block, of which the first may be in high precision; two for
the codes of blocks, or one for each that stays gathered; and one of the output layer, or three where it is gathered
twice in a row. Otherwise 4."""


class Buffer:
    """A `PeerBuffer` of files that all processes map; whoever publishes or ends a round waits for the others to."""

    made = 0

    @torch.inference_mode(False)
    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device) -> None:
        self.group, self.rank = group, group.rank()
        self.peers = [(self.rank + i) % group.size() for i in range(1, group.size())]
        self.round, self.step = 0, "end"
        Buffer.made += 1
        first = dist.get_process_group_ranks(group)[0]
        names = [f"{FOLDER[0]}/{first}.{Buffer.made}.{rank}" for rank in range(group.size())]
        self.parts = [torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names]
        dist.barrier(group)  # who maps a file that is not as long yet writes a zero into it

    def _after(self, step: str, *before: str) -> None:
        assert self.step in before, f"{step} after {self.step}"
        self.step = step

    def begin(self) -> Tensor:
        self._after("begin", "end")
        self.parts[self.rank].fill_(0xFF)  # NaN, where nothing is written
        return self.parts[self.rank]

    def publish(self) -> None:
        self._after("publish", "begin")
        dist.barrier(self.group)

    def of(self, peer: int) -> Tensor:
        return self.parts[peer]

    def wait(self, peer: int) -> None:
        self._after("read", "publish", "read")

    def read(self, peer: int, start: int, into: Tensor) -> None:
        self.wait(peer)
        into.copy_(self.parts[peer][start : start + into.numel()])

    def end(self) -> None:
        self._after("end", "read")
        dist.barrier(self.group)


FOLDER: list[str] = []


class _Stream:
    def __getattr__(self, name: str) -> Any:
        return lambda *args: _Stream()


class Taken:
    """Notes what `GradientSums.take` returns: its place, and whether it is added to."""

    take = GradientSums.take

    def __init__(self) -> None:
        self.places: list[tuple[int, bool] | None] = []

    def __call__(self, sums: GradientSums, numel: int) -> tuple[Tensor, bool] | None:
        taken = Taken.take(sums, numel)
        assert taken is not None or sums._sums is None, "no memory that nobody uses"
        self.places.append(None if taken is None else (taken[0].data_ptr(), taken[1]))
        return taken


@contextlib.contextmanager
def through_files(folder: str) -> Iterator[Taken]:
    """Units are exchanged through files in `folder`."""
    FOLDER[:], Buffer.made, taken = [folder], 0, Taken()
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (fsdp, "_exchanges_by_peers", lambda *args: True),
            (fsdp_exchange, "PeerBuffer", Buffer),
            (gathered_codes, "PeerBuffer", Buffer),
            (torch.cuda, "current_stream", lambda *args: _Stream()),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (Tensor, "record_stream", lambda self, stream: None),
            (GradientSums, "take", lambda *args: taken(*args)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield taken


def _train(rank: int, world_size: int, case: Case, folder: str) -> tuple[Any, ...]:
    """With collectives, then through files; how many buffers that took, and where gradients were added up."""
    expected = train_on_ranks(rank, world_size, case)
    with through_files(folder) as taken:
        return train_on_ranks(rank, world_size, case), expected, Buffer.made, taken.places


def _evaluate(rank: int, world_size: int, case: Case, frozen: int, folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of forward passes alone, before, between and after those of a training, with and without files; of a
    model of which the embedding and `frozen` blocks do not train."""

    def logits() -> list[Tensor]:
        model, _ = spread(case)
        if frozen:
            for part in (model.tok_embeddings, *list(model.layers.values())[:frozen]):
                part.requires_grad_(False)
        tokens = torch.arange(2 * 12).view(2, 12) % case.vocab_size
        found = []
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad, torch.no_grad):
            with mode():
                output = model(tokens)
            found.append(output.detach().clone())
            if output.requires_grad:
                output.float().square().mean().backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0 if parameter.grad is None else parameter.grad
        return found

    expected = logits()
    with through_files(folder):
        return logits(), expected


@pytest.mark.parametrize("reshard", ["default", "never"])
@pytest.mark.parametrize(("layers", "frozen"), [(4, 0), (5, 0), (6, 4)])
def test_passes_without_a_backward_pass_read_the_codes_of_their_weights(
    reshard: str, layers: int, frozen: int, tmp_path: Path
) -> None:
    """Of a block in front of those that train FSDP begins a gather that it never waits for."""
    dims = {**PLAIN.dims, "n_layers": layers}
    case = replace(CODES, float8_recipe="tensorwise", reshard=reshard, dims=dims)
    actual, expected = run_distributed(_evaluate, 2, case, frozen, str(tmp_path), timeout_s=200.0)[0]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not torch.equal(expected[1], expected[3])


def _differentiate_inside(rank: int, world_size: int, case: Case, folder: str) -> str:
    """What is said of gradients of a block's inner values: FSDP gathers weights for those of its output alone."""
    with through_files(folder):
        model, _ = spread(case)
        inner: list[Tensor] = []
        model.layers["1"].feed_forward.register_forward_hook(lambda module, given, output: inner.append(output))
        model(torch.arange(2 * 12).view(2, 12) % case.vocab_size)
        try:
            inner[0].float().sum().backward()
        except RuntimeError as error:
            return str(error)
        return ""


def test_gradients_that_would_be_computed_from_other_blocks_codes_are_an_error(tmp_path: Path) -> None:
    case = replace(CODES, float8_recipe="tensorwise")
    for said in run_distributed(_differentiate_inside, 2, case, str(tmp_path), timeout_s=200.0):
        assert "modified by an inplace operation" in said


def _measure(rank: int, world_size: int, name: str, folder: str) -> list[tuple[float, float, int]]:
    """The norm of gradients where those whose squares are known are not read, the norm in float64, and of how many
    units they have to be read; of three steps, in which gradients of none, one and two units are written to."""
    case = CASES["microbatches" if name == ADDED_BY_FSDP else name]
    with contextlib.ExitStack() as stack:
        stack.enter_context(through_files(folder))
        if name == ADDED_BY_FSDP:
            stack.enter_context(mock.patch.object(GradientSums, "create", return_value=None))
        model, _ = spread(case)
        found = []

        def measure() -> None:
            whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
            exact = torch.stack([grad.double().square().sum() for grad in whole if grad is not None]).sum().sqrt()
            with mock.patch.object(adam, "square_sum", side_effect=adam.square_sum) as square_sum:
                norm = clip_grad_norm_(model.parameters(), 0, one_read=True, is_untouched=True)
            read = {grad.untyped_storage().data_ptr() for call in square_sum.call_args_list for grad in call.args[0]}
            of_table = model.tok_embeddings.weight.grad._local_tensor.untyped_storage().data_ptr()
            found.append((norm.item(), exact.item(), len(read - {of_table})))

        for written in range(3):
            model.zero_grad()
            for microbatch in range(case.microbatches):
                tokens = (torch.arange(2 * 12) * (1 + rank + written + microbatch)).view(2, 12) % case.vocab_size
                model(tokens).float().square().mean().backward()
            first, second = (model.layers[name].feed_forward.w1.weight.grad for name in "01")
            with torch.no_grad():
                if written > 0:
                    first.mul_(2)
                if written > 1:
                    second._local_tensor.mul_(2)
            measure()
        measure()  # once more, and nothing is known
        return found


ADDED_BY_FSDP = "added by FSDP"
READ = {
    "fp32": (0, 0),
    "bf16": (0, 0),
    "microbatches": (0, 0),
    "codes": (0, 0),
    "uneven": (0, 3),
    ADDED_BY_FSDP: (4, 4),
}
"""Units whose gradients each rank reads for their norm: blocks with padding, and all that FSDP adds microbatches of."""


@pytest.mark.parametrize("name", READ)
def test_the_norm_is_that_of_gradients_as_they_are_and_most_are_not_read_for_it(name: str, tmp_path: Path) -> None:
    for found, least in zip(
        run_distributed(_measure, 2, name, str(tmp_path), timeout_s=200.0), READ[name], strict=True
    ):
        for norm, exact, _ in found:
            assert norm == pytest.approx(exact, rel=2e-6)
        units = CASES.get(name, PLAIN).dims["n_layers"] + 1
        assert [read for *_, read in found] == [*(max(written, least) for written in range(3)), units]


STAYING = replace(PLAIN, gradients_stay=True)
STAYS = [
    (STAYING, {True}),
    (PLAIN, {False}),  # nobody has promised it
    (replace(STAYING, microbatches=2), {False}),  # FSDP adds, or the sums lie in memory of their own
    (replace(STAYING, compute_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16), {False}),  # FSDP casts
    (replace(STAYING, shard=1, replicate=2), set()),  # no exchange between shards
]


def _promises(rank: int, world_size: int, cases: list[Case], folder: str) -> list[set[bool]]:
    found = []
    for case in cases:
        with (
            through_files(folder),
            mock.patch.object(fsdp, "_exchanges_by_peers", lambda mesh, _: mesh.shards.size() > 1),
            mock.patch.object(fsdp, "PeerReduceScatter", side_effect=fsdp.PeerReduceScatter) as made,
        ):
            spread(case)
        found.append({call.kwargs["sums_stay"] for call in made.call_args_list})
    return found


def test_sums_stay_where_they_are_the_gradients_and_these_stay(tmp_path: Path) -> None:
    cases, expected = zip(*STAYS, strict=True)
    for found in run_distributed(_promises, 2, list(cases), str(tmp_path), timeout_s=200.0):
        assert found == list(expected)


@pytest.mark.parametrize("name", some_by_hand(CASES, "codes_compiled"))
def test_a_training_is_the_one_with_collectives(name: str, tmp_path: Path) -> None:
    results = run_distributed(_train, CASES[name].shard, CASES[name], str(tmp_path), timeout_s=200.0)
    actual, expected, buffers, taken = results[0]
    assert actual is not None
    assert expected is not None
    assert buffers == BUFFERS.get(name, 4)
    assert_same(actual, expected, 0.0 if CASES[name].shard == 2 else 1e-3)  # two addends have one sum
    steps, microbatches = len(expected.losses), CASES[name].microbatches
    units = CASES[name].dims["n_layers"] + (not CASES[name].tied_embeddings)
    if name in KEPT:
        adds = [place is not None and place[1] for place in taken]
        assert adds == ([False] * units + [True] * units * (microbatches - 1)) * steps
        assert taken[:units] == [(place, False) for place, _ in taken[-units:]], "in the same memory in every step"
    else:
        assert set(taken) <= {None}
        assert len(taken) == (units * microbatches * steps if microbatches > 1 else 0)
