"""Parts of a batch that take turns in layers with experts, and tokens that travel as float8 codes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.harness import run_distributed
from tests.distributed.meshes import mesh_of
from tests.distributed.test_expert_parallel import (
    ALL_IN_FLOAT8,
    BATCH,
    BF16,
    BF16_SUMS,
    EXPERTS_IN_FLOAT8,
    EXPERTS_IN_MX,
    NO_AUX_LOSS,
    Case,
    on,
    same_as_alone,
)
from tests.distributed.trainings import COMPILED, FLOAT8_CODES, FULL, LOCAL_SCALES
from titan_fp8 import convert_to_float8_grouped_training, from_mx, to_mx
from titan_fp8.models.decoder import Decoder, TransformerBlock
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.moe import MoE
from titan_fp8.parallel import expert
from titan_fp8.parallel.activation_checkpoint import apply_activation_checkpointing
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection
from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.expert import Exchange, apply_expert_parallel
from titan_fp8.parallel.expert_overlap import overlap_batches
from titan_fp8.quantization.ops import cast_rows
from titan_fp8.quantization.tensor_parallel import local_tensor
from titan_fp8.runtime.collectives import Axis

TURNS = {"parallelism.expert_parallel_overlap_batches": "2", **NO_AUX_LOSS}
CODES = {"parallelism.expert_parallel_payload": "float8"}
EIGHT = {"training.global_batch_size": "8"}
CASES = {
    "turns": Case("fsdp2 ep2", TURNS, batch=2),
    "turns_full_ac_two_shards_of_experts": Case("fsdp4 ep2", TURNS | EIGHT | FULL, batch=2),
    "turns_of_float8": Case("fsdp2 ep2", TURNS | ALL_IN_FLOAT8, FLOAT8_CODES, batch=2, batch_alone=2),
    "codes": Case("fsdp2 ep2", CODES | ALL_IN_FLOAT8, LOCAL_SCALES, batch_alone=2),
}
SLOW_CASES = {
    "turns_compiled": Case("fsdp2 ep2", TURNS | COMPILED, batch=2),
    "turns_compiled_full_ac": Case("fsdp2 ep2", TURNS | COMPILED | FULL | EIGHT, batch=4),
    "turns_bf16": Case("fsdp2 ep2", TURNS | BF16, BF16_SUMS, batch=2),
    "turns_two_shards_of_float8_experts": Case(
        "fsdp4 ep2", TURNS | EIGHT | EXPERTS_IN_FLOAT8, FLOAT8_CODES, batch=2, batch_alone=2
    ),
    "turns_cp2_ep4": Case("fsdp2 cp2 ep4", TURNS, batch=2),
    "turns_hsdp": Case("rep2 fsdp2 ep2", TURNS | EIGHT, batch=2),
    "turns_pp2": Case("pp2 fsdp2 ep2", TURNS | {"parallelism.pipeline_parallel_microbatch_size": "2"} | EIGHT, batch=4),
    "turns_with_codes": Case("fsdp2 ep2", TURNS | CODES | ALL_IN_FLOAT8, LOCAL_SCALES, batch=2, batch_alone=2),
}


@pytest.mark.parametrize("name", CASES)
def test_training_equals_one_process(name: str, tmp_path: Path) -> None:
    same_as_alone(CASES[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_wider_training_equals_one_process(name: str, tmp_path: Path) -> None:
    same_as_alone(SLOW_CASES[name], tmp_path)


def test_what_float8_experts_multiply_is_the_same_if_it_travels_as_codes(tmp_path: Path) -> None:
    """So the first loss, before any gradient, has the same bits. Experts in high precision get other numbers."""
    payload = "parallelism.expert_parallel_payload"
    cases = ((EXPERTS_IN_FLOAT8, "float8", True), (EXPERTS_IN_MX, "mxfp8", True), (NO_AUX_LOSS, "float8", False))
    for number, (options, travels, is_same) in enumerate(cases):
        whole = on("fsdp2 ep2", {**options, BATCH: "1"}, tmp_path / f"whole{number}", steps=1)
        as_codes = on("fsdp2 ep2", {**options, payload: travels, BATCH: "1"}, tmp_path / f"codes{number}", steps=1)
        assert (whole.losses == as_codes.losses) == is_same
        assert as_codes.losses == pytest.approx(whole.losses, rel=2e-3)


# ---- the order of things

DIM, SEQ = 32, 6
SIZES: dict[str, Any] = {
    "dim": DIM, "n_layers": 1, "n_heads": 2, "vocab_size": 32, "max_seq_len": 16, "ffn_dim": 16, "n_experts": 4,
    "top_k": 2, "moe_ffn_dim": 16, "n_shared_experts": 1, "first_dense_layers": 0, "aux_loss_weight": 0.0,
}  # fmt: skip


class _Mark(torch.autograd.Function):
    """Logs when its gradient comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str], name: str) -> Tensor:
        ctx.log, ctx.name = log, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.append(ctx.name)
        return grad, None, None


@contextmanager
def _logged(block: Any, log: list[str]) -> Iterator[None]:
    """What a block computes, and when exchanges begin and end; 0 and 1 are the parts."""
    calls: dict[str, int] = {}

    def numbered(name: str, inner: Any, pick: Any = lambda result: result) -> Any:
        def call(*args: Any) -> Any:
            part = calls[name] = calls.get(name, -1) + 1
            log.append(f"{name}{part}")
            result = inner(*args)
            if isinstance(result, tuple):
                return result[0], _Mark.apply(result[1], log, f"{name}{part} back")
            return _Mark.apply(result, log, f"{name}{part} back")

        return call

    block.attend_and_norm = numbered("attention", block.attend_and_norm)
    block.moe.experts.forward = numbered("experts", block.moe.experts.forward)
    block.moe.shared_experts.forward = numbered("shared", block.moe.shared_experts.forward)
    begun: dict[int, str] = {}

    def start(self: Exchange, x: Tensor, *, back: bool) -> Tensor:
        name = begun[id(self)] if back else begun.setdefault(id(self), "ABCD"[len(begun)])
        log.append(f"{name}{' back' if back else ''} goes")
        return _START(self, x, back=back)

    def finish(self: Exchange) -> Tensor:
        log.append(f"{begun[id(self)]} came")
        return _FINISH(self)

    with mock.patch.object(expert.Exchange, "start", start), mock.patch.object(expert.Exchange, "finish", finish):
        yield


_START, _FINISH = Exchange.start, Exchange.finish


def _order(rank: int, ranks: int, parts: int) -> tuple[list[str], list[str]]:
    model = Decoder(ModelDims(**SIZES))
    initialize(model, seed=0)
    mesh = mesh_of(MeshDegrees(data_parallel_shard=2, expert=2), "cpu")
    apply_expert_parallel(model, mesh)
    overlap_batches(model, parts)
    forward: list[str] = []
    block = model.layers["0"]
    assert isinstance(block, TransformerBlock)
    with _logged(block, forward):
        tokens = torch.arange(4 * SEQ).view(4, SEQ) % 32
        out = model(tokens)
        backward = forward[:]
        forward.clear()
        out.sum().backward()
    return backward, forward


def test_every_exchange_has_computation_beside_it() -> None:
    for forward, backward in run_distributed(_order, 2, 2):
        assert forward == [
            "attention0", "A goes", "attention1", "B goes", "A came", "experts0", "C goes", "B came", "experts1",
            "D goes", "shared0", "shared1", "C came", "D came",
        ]  # fmt: skip
        assert backward == [
            "D back goes", "C back goes", "shared1 back", "shared0 back", "D came", "experts1 back", "B back goes",
            "C came", "experts0 back", "A back goes", "B came", "attention1 back", "A came", "attention0 back",
        ]  # fmt: skip


def test_of_a_whole_batch_two_exchanges_have_the_shared_expert_beside_them() -> None:
    for forward, backward in run_distributed(_order, 2, 1):
        assert forward == ["attention0", "A goes", "shared0", "A came", "experts0", "B goes", "B came"]
        assert backward == [
            "B back goes", "B came", "experts0 back", "A back goes", "shared0 back", "A came", "attention0 back",
        ]  # fmt: skip


def _whole_and_in_turns(rank: int, ranks: int) -> None:
    """In high precision, a batch that the parts divide and one that they do not."""
    results = []
    for parts in (1, 2):
        model = Decoder(ModelDims(**SIZES))
        initialize(model, seed=0)
        apply_expert_parallel(model, mesh_of(MeshDegrees(data_parallel_shard=2, expert=2), "cpu"))
        overlap_batches(model, parts)
        for sequences in (4, 3):
            out = model((torch.arange(sequences * SEQ).view(sequences, SEQ) * (rank + 3)) % 32)
            out.square().sum().backward()
            results.append(out.detach())
        results.append([p.grad for p in model.parameters()])
    for a, b in zip(results[:2], results[3:5], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(results[2], results[5], strict=True):
        a, b = (each.to_local() if hasattr(each, "to_local") else each for each in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_in_turns_is_the_whole_batch_and_one_that_does_not_divide_is_taken_whole() -> None:
    run_distributed(_whole_and_in_turns, 2)


# ---- what is computed a second time


MODES = {
    "none": {"mode": "none"},
    "op": {"mode": "selective", "selective_ac_option": "op"},
    "full": {"mode": "full"},
}


class _Count(TorchDispatchMode):
    """How often exchanges and products of experts are carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name.rpartition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def _recompute(rank: int, ranks: int, mode: dict[str, str], in_float8: bool) -> Counter[str]:
    model = Decoder(ModelDims(**SIZES))
    initialize(model, seed=0)
    if in_float8:
        convert_to_float8_grouped_training(model, emulate=True)
    apply_expert_parallel(model, mesh_of(MeshDegrees(data_parallel_shard=2, expert=2), "cpu"))
    section = ActivationCheckpointSection(**mode)  # pyright: ignore[reportArgumentType]
    apply_activation_checkpointing(model, section, compile_config=CompileSection(), around_experts=True)
    out = model(torch.arange(4 * SEQ).view(4, SEQ) % 32)
    with _Count() as counted:
        out.sum().backward()
    return counted.calls


@pytest.mark.parametrize("in_float8", [False, True], ids=["plain", "float8"])
def test_by_operation_no_exchange_and_every_second_product_is_repeated(in_float8: bool) -> None:
    product = "grouped_scaled_mm_rows" if in_float8 else "grouped_rows_one_by_one"
    calls = {name: run_distributed(_recompute, 2, mode, in_float8)[0] for name, mode in MODES.items()}
    exchanges = {name: each["all_to_all_single"] for name, each in calls.items()}
    assert exchanges == {"none": 2, "op": 2, "full": 2 + 2}, "gradients alone, or tokens and results too; no counts"

    repeated = {name: each[product] - calls["none"][product] for name, each in calls.items()}
    # Of a shared expert's three products the second is repeated, so of these it is the first and the third.
    assert repeated == {"none": 0, "op": 2, "full": 3}


def _experts_of_passes(rank: int, ranks: int) -> None:
    model = Decoder(ModelDims(**SIZES))
    initialize(model, seed=0)
    apply_expert_parallel(model, mesh_of(MeshDegrees(data_parallel_shard=2, expert=2), "cpu"))
    section = ActivationCheckpointSection(mode="full")
    apply_activation_checkpointing(model, section, compile_config=CompileSection(), around_experts=True)
    moes = [block.moe for block in model.layers.values() if block.moe is not None]
    passes: list[list[Tensor]] = [[] for _ in moes]
    for moe, chosen in zip(moes, passes, strict=True):
        dispatch = moe.dispatcher.dispatch
        moe.dispatcher.dispatch = lambda x, experts, *rest, chosen=chosen, dispatch=dispatch: (  # pyright: ignore
            chosen.append(experts) or dispatch(x, experts, *rest)
        )
    out = model(torch.arange(4 * SEQ).view(4, SEQ) * 7 % 31)
    with torch.no_grad():
        for moe in moes:
            moe.router.gate.weight.neg_()
    out.sum().backward()
    assert passes
    for first, again in passes:
        assert torch.equal(first, again)
    assert all(moe.experts.w2.grad is not None for moe in moes)


def test_recomputation_sends_tokens_where_they_were_sent_at_first() -> None:
    run_distributed(_experts_of_passes, 2)


# ---- codes


def _as_codes(rank: int, ranks: int, payload: str, dtype: torch.dtype) -> None:
    group = dist.group.WORLD
    assert group is not None
    sent, came = [[2, 0], [3, 1]][rank], [[2, 3], [0, 1]][rank]
    x = torch.randn(sum(sent), DIM, generator=torch.Generator().manual_seed(rank)).to(dtype) * 100
    x[0, 0] = torch.nan
    exchange = Exchange(sent, came, Axis.of(group), forward=payload)
    exchange.start(x, back=False)
    rows = exchange.finish()
    whole = Exchange(sent, came, Axis.of(group))
    whole.start(x, back=False)
    expected = whole.finish()
    assert rows.dtype == dtype
    values = _numbers(expected, payload)
    assert torch.equal(rows.isnan(), expected.isnan() | values.isnan())
    assert torch.equal(rows.nan_to_num(), values.to(dtype).nan_to_num())
    assert torch.equal(_numbers(rows, payload).nan_to_num(), values.nan_to_num()), "no number changes"


def _numbers(x: Tensor, payload: str) -> Tensor:
    """What x `[T, D]` is in the codes of a payload, fp32."""
    if payload == "mxfp8":
        return from_mx(*to_mx(x, scaling_mode="rceil"), torch.float32)
    codes, scale = cast_rows(x, torch.float8_e4m3fn)
    return codes.float() * scale


@pytest.mark.parametrize("payload", ["float8", "mxfp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rows_that_travel_as_codes_are_what_their_codes_stand_for(dtype: torch.dtype, payload: str) -> None:
    run_distributed(_as_codes, 2, payload, dtype)


def _what_travels(rank: int, ranks: int, payload: str) -> tuple[list[torch.dtype], list[torch.dtype], Any]:
    """Dtypes of what goes forward and backward, and the gradient of the experts here."""
    model = Decoder(ModelDims(**{**SIZES, "n_shared_experts": 0}))
    initialize(model, seed=0)
    apply_expert_parallel(model, mesh_of(MeshDegrees(data_parallel_shard=2, expert=2), "cpu"), payload=payload)
    sent: list[torch.dtype] = []

    def send(x: Tensor, *others: Any) -> Tensor:
        sent.append(x.dtype)
        return _EXCHANGE(x, *others)

    with mock.patch.object(expert, "exchange_rows", send):
        out = model((torch.arange(4 * SEQ).view(4, SEQ) + rank) % 32)
        forward = sent[:]
        sent.clear()
        out.square().sum().backward()
    block = model.layers["0"]
    assert isinstance(block, TransformerBlock)
    assert block.moe is not None
    return forward, sent, local_tensor(block.moe.experts.w1.grad)


_EXCHANGE = expert.exchange_rows


@pytest.mark.parametrize(("payload", "scale"), [("float8", torch.float32), ("mxfp8", torch.uint8)])
def test_tokens_and_gradients_of_outputs_travel_as_codes_and_nothing_else_does(
    payload: str, scale: torch.dtype
) -> None:
    codes, full = [torch.uint8, scale], [torch.float32]
    plain, as_codes = (run_distributed(_what_travels, 2, each) for each in ("activations", payload))
    for before, after in zip(plain, as_codes, strict=True):
        assert (before[0], before[1]) == (full * 2, full * 2)
        assert (after[0], after[1]) == (codes + full, codes + full)
        error = (after[2] - before[2]).norm() / before[2].norm()
        assert 1e-3 < error < 0.1


def test_layers_without_experts_are_left_alone() -> None:
    model = Decoder(ModelDims(**{**SIZES, "n_layers": 2, "first_dense_layers": 1}))
    forwards = {name: block.forward for name, block in model.layers.items()}
    overlap_batches(model, 2)
    assert model.layers["0"].forward == forwards["0"]
    assert model.layers["1"].forward != forwards["1"]
    assert any(isinstance(module, MoE) for module in model.layers["1"].modules())
