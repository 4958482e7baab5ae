"""Exchanges of FSDP through peer memory on two GPUs: they give what NCCL gives, and trainings are the same."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed
from tests.distributed.test_parallel import Case, assert_same, spread, train_on_ranks
from titan_fp8.kernels import adam
from titan_fp8.kernels.partial_sums import sum_parts
from titan_fp8.optim import clip_grad_norm_
from titan_fp8.parallel import fsdp_exchange
from titan_fp8.parallel.distributed import destroy, init_distributed, local_device
from titan_fp8.parallel.fsdp_exchange import PeerAllGather, PeerReduceScatter, Places
from titan_fp8.parallel.gathered_codes import CodeBuffer, UnitCodes
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.weight_state import Float8WeightState
from titan_fp8.runtime.config import CommSection
from titan_fp8.runtime.known_squares import take_known_squares
from titan_fp8.runtime.peer_memory import check_peer_memory

pytestmark = pytest.mark.gpu
PLAIN = Case(
    shard=2, vocab_size=68, dims={"dim": 256, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 512, "n_layers": 3},
    device_type="cuda", compute_dtype=torch.bfloat16,
)  # fmt: skip
CODES = replace(PLAIN, float8_all_gather=True, dims={**PLAIN.dims, "n_layers": 5})
CASES = {
    "bf16": PLAIN,
    "staying": replace(PLAIN, gradients_stay=True),
    "compiled": replace(PLAIN, compile_backend="inductor"),
    "tensorwise": replace(PLAIN, float8_recipe="tensorwise"),
    "full_ac": replace(PLAIN, activation_checkpoint={"mode": "full"}),
    "codes": replace(CODES, float8_recipe="tensorwise", precomputed_scales=True),
    "codes_compiled": replace(CODES, float8_recipe="tensorwise", compile_backend="inductor"),
    "codes_recomputed": replace(CODES, float8_recipe="rowwise", activation_checkpoint={"mode": "full"}),
    "codes_kept": replace(CODES, float8_recipe="rowwise", reshard="never", microbatches=2),
    "codes_freed": replace(CODES, float8_recipe="blockwise", reshard="always"),
    "codes_of_rows": replace(CODES, float8_recipe="rowwise", microbatches=2),
    "kept": replace(PLAIN, reshard="never", microbatches=2),
    "freed": replace(PLAIN, reshard="always"),
    "microbatches": replace(PLAIN, microbatches=4),
    "sums_in_bf16": replace(PLAIN, reduce_dtype=torch.bfloat16),
    "fp32": replace(PLAIN, compute_dtype=torch.float32),
    "fp32_microbatches": replace(PLAIN, compute_dtype=torch.float32, microbatches=2),
}
"""In fp32 nothing but the order of atomic sums may differ; in bf16 attention's backward does from run to run."""


@pytest.fixture(autouse=True)
def _two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")


def _late_sum(*args, **options) -> None:
    """Adds up when others would long have written to what is read, if nobody waited."""
    torch.cuda._sleep(3_000_000)
    sum_parts(*args, **options)


class _Kept:
    """Stands for `GradientSums` of four units, whose steps have four microbatches."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.round = device, 0
        self.sums: dict[int, torch.Tensor] = {}

    def take(self, numel: int) -> tuple[torch.Tensor, bool]:
        round_, self.round = self.round, self.round + 1
        sums = self.sums.setdefault(round_ % 4, torch.empty(numel, device=self.device))
        return sums, round_ % 16 >= 4


def _exchange(rank: int, world_size: int, mode: str, folder: str) -> list[str]:
    """What differs from NCCL in many rounds of changing sizes, on FSDP's streams and with its waits; gathers and
    reductions "in one" buffer of a size and gradients read in parts, or not; or sums "kept" over rounds."""
    in_one = mode == "in one"
    init_distributed(CommSection(), local_device("cuda"), folder)
    fsdp_exchange.sum_parts = _late_sum
    fsdp_exchange.READ_AT_ONCE = 1 << 19 if in_one else fsdp_exchange.READ_AT_ONCE
    try:
        group, device = dist.group.WORLD, torch.device("cuda", rank)
        check_peer_memory(group, device, "test")
        places = Places(group, turns=1) if in_one else Places(group)
        gather = PeerAllGather(places)
        kept = _Kept(device) if mode == "kept" else None
        reduce = PeerReduceScatter(places if in_one else Places(group, turns=1), torch.float32, kept, squares=True)
        compute = torch.cuda.current_stream(device)
        copy_in, gathers, sums_stream = (torch.cuda.Stream(device) for _ in range(3))
        torch.manual_seed(rank)
        results, reduced = [], None
        for round_ in range(40):
            n = (1 << 20, 1 << 20, 1 << 12, 3 << 18)[round_ % 4]
            shard, gradients = (torch.randn(size, device=device).bfloat16() for size in (n, 2 * n))
            copy_in.wait_stream(compute)
            with torch.cuda.stream(copy_in):
                output = gather.allocate((2 * n,), dtype=torch.bfloat16, device=device)
                output[rank * n : (rank + 1) * n] = shard
            gathers.wait_stream(copy_in)
            with torch.cuda.stream(gathers):
                gather(output, output[rank * n : (rank + 1) * n], group)
            compute.wait_stream(gathers)
            gathered = output.clone()
            del output
            if reduced is not None:
                compute.wait_event(reduced)
            buffer = reduce.allocate((2 * n,), dtype=torch.bfloat16, device=device)
            buffer.copy_(gradients)
            sums_stream.wait_stream(compute)
            with torch.cuda.stream(sums_stream):
                sums = reduce.allocate((n,), dtype=torch.bfloat16, device=device)
                reduce(sums, buffer, group, dist.ReduceOp.SUM)
                reduced = sums_stream.record_event()
            del buffer
            (squares,), _ = take_known_squares([sums])
            if kept is not None:
                compute.wait_event(reduced)
                sums, squares = sums.clone(), squares.clone()
            results.append((shard, gathered, gradients, sums, squares))
        torch.cuda.synchronize(device)
        return _differences(results, is_kept=kept is not None)
    finally:
        destroy()


def _differences(results: list[tuple[torch.Tensor, ...]], *, is_kept: bool) -> list[str]:
    """The rounds in which NCCL gives something else. is_kept: results are sums over the rounds of a step so far."""
    wrong, before = [], dict[int, torch.Tensor]()
    for round_, (shard, gathered, gradients, sums, squares) in enumerate(results):
        if not torch.isclose(squares.double().sum(), sums.double().square().sum(), rtol=1e-6):
            wrong.append(f"squares {round_}")
        expected = torch.empty_like(gathered)
        dist.all_gather_into_tensor(expected, shard)
        wrong += [] if torch.equal(gathered, expected) else [f"gather {round_}"]
        expected = torch.empty_like(sums)
        dist.reduce_scatter_tensor(expected, gradients.float())
        if is_kept and round_ % 16 >= 4:
            expected = before[round_ % 4] + expected
        before[round_ % 4] = expected
        wrong += [] if torch.equal(sums, expected) else [f"reduce {round_}"]
    return wrong


@pytest.mark.parametrize("mode", ["in turns", "in one", "kept"])
def test_gathers_and_sums_are_those_of_nccl_bit_for_bit(mode: str, tmp_path) -> None:
    for wrong in run_distributed(_exchange, 2, mode, str(tmp_path), init=False, timeout_s=200.0):
        assert wrong == []


def _gather_codes(rank: int, world_size: int, folder: str) -> list[str]:
    """In which rounds the codes of a weight that a slow reader finds are not the ranks' own, in FSDP's order: received,
    the next unit gathered, read, freed."""
    init_distributed(CommSection(), local_device("cuda"), folder)
    try:
        group, device = dist.group.WORLD, torch.device("cuda", rank)
        check_peer_memory(group, device, "test")
        buffers, places = [CodeBuffer(group), CodeBuffer(group)], Places(group)
        sizes = [(1 << 20, 3 << 16, 16), (1 << 20, 1 << 18), (1 << 12,), (1 << 21,)]
        states = [[Float8WeightState(RECIPES["rowwise"], caches=True) for _ in size] for size in sizes]
        units = [
            UnitCodes(buffers[number % 2], dict(zip(states[number], size, strict=True)))
            for number, size in enumerate(sizes)
        ]
        gathers = [PeerAllGather(places, unit) for unit in units]
        compute = torch.cuda.current_stream(device)
        copy_in, stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        torch.manual_seed(rank)
        rounds = [
            [torch.randint(256, (n,), dtype=torch.uint8, device=device) for n in sizes[round_ % len(units)]]
            for round_ in range(41)
        ]
        torch.cuda.synchronize(device)

        def gather(round_: int) -> tuple[torch.Tensor, torch.Event]:
            number = round_ % len(units)
            with torch.cuda.stream(copy_in):
                codes = zip(states[number], rounds[round_], strict=True)
                sent = [state.exchange.send(each, torch.bfloat16) for state, each in codes]
                n = sum(each.numel() for each in sent)
                output = gathers[number].allocate((2 * n,), dtype=torch.bfloat16, device=device)
                output[rank * n : (rank + 1) * n] = torch.cat(sent)
            stream.wait_stream(copy_in)
            with torch.cuda.stream(stream):
                gathers[number](output, output[rank * n : (rank + 1) * n], group)
                return output, stream.record_event()

        results, ahead, copied = [], gather(0), None
        for round_, own in enumerate(rounds[:-1]):
            output, event = ahead
            if copied is not None:
                copy_in.wait_event(copied)  # as FSDP does for the copies of the unit before
            compute.wait_event(event)
            stand_in = output.clone()
            copied = compute.record_event()
            del output, ahead
            found = [state.exchange.received(stand_in) for state in states[round_ % len(units)]]
            ahead = gather(round_ + 1)
            # The next but one would long have been written, if it did not wait; one rank is later than the other.
            torch.cuda._sleep(3_000_000 + 6_000_000 * ((rank + round_) % 2))
            results.append((own, [each.clone() for each in found]))
            stand_in.untyped_storage().resize_(0)
        del ahead
        torch.cuda.synchronize(device)
        wrong = []
        for round_, (own, found) in enumerate(results):
            for mine, whole in zip(own, found, strict=True):
                expected = torch.empty_like(whole)
                dist.all_gather_into_tensor(expected, mine)
                wrong += [] if torch.equal(whole, expected) else [f"round {round_}, {mine.numel()} bytes"]
        return wrong
    finally:
        destroy()


def test_codes_stay_until_they_have_been_read(tmp_path) -> None:
    for wrong in run_distributed(_gather_codes, 2, str(tmp_path), init=False, timeout_s=200.0):
        assert wrong == []


def _norms(rank: int, world_size: int, cases: list[Case], folder: str) -> list[tuple[float, float, int]]:
    """Of each case, after a step of all its microbatches: the norm of gradients whose squares are known, in float64,
    and of how many units gradients were read for the first, the embedding's aside."""
    init_distributed(CommSection(), local_device("cuda"), folder)
    found = []
    try:
        for case in cases:
            model, _ = spread(case)
            for microbatch in range(case.microbatches):
                tokens = (torch.arange(2 * 12, device="cuda") * (1 + rank + microbatch)).view(2, 12) % case.vocab_size
                model(tokens).float().square().mean().backward()
            with mock.patch.object(adam, "square_sum", side_effect=adam.square_sum) as square_sum:
                norm = clip_grad_norm_(model.parameters(), 0, one_read=True, is_untouched=True)
            grads = [p.grad.full_tensor() for p in model.parameters()]
            exact = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()
            read = {grad.untyped_storage().data_ptr() for call in square_sum.call_args_list for grad in call.args[0]}
            table = model.tok_embeddings.weight.grad.to_local().untyped_storage().data_ptr()
            found.append((norm.item(), exact.item(), len(read - {table})))
        return found
    finally:
        destroy()


def test_gradients_of_blocks_and_output_layer_are_not_read_for_their_norm(tmp_path) -> None:
    names = ["bf16", "compiled", "microbatches", "codes", "fp32"]
    cases = [replace(CASES[name], fsdp_exchange="peer_memory") for name in names]
    for found in run_distributed(_norms, 2, cases, str(tmp_path), init=False, timeout_s=200.0):
        for norm, exact, read in found:
            assert norm == pytest.approx(exact, rel=1e-5)
            assert read == 0


def _memory_ahead(rank: int, world_size: int, cases: list[Case], folder: str) -> list[int]:
    """Of each case, by how many bytes the peak of a step and of the forward pass after it is higher if the device has
    done nothing of the backward pass when the host has asked for both. Memory counts from when it is taken until
    another tensor may have it."""
    init_distributed(CommSection(), local_device("cuda"), folder)
    found = []
    try:
        for case in cases:
            model, _ = spread(case)
            tokens = torch.randint(case.vocab_size, (128, 16), device="cuda")

            def forward(model=model, tokens=tokens) -> torch.Tensor:
                return model(tokens).float().square().mean()

            for _ in range(3):
                forward().backward()
                model.zero_grad()
            peaks = []
            for cycles in (0, 2_000_000_000):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                loss = forward()
                torch.cuda._sleep(cycles)
                loss.backward()
                if not cycles:
                    torch.cuda.synchronize()
                model.zero_grad()
                del loss
                loss = forward()
                peaks.append(torch.cuda.memory_stats()["active_bytes.all.peak"])
                assert not (cycles and torch.cuda.current_stream().query()), "the device was not behind"
                loss.backward()
                model.zero_grad()
                del loss
            found.append(peaks[1] - peaks[0])
        return found
    finally:
        destroy()


def test_a_host_that_is_ahead_takes_no_more_memory_if_gradients_stay(tmp_path) -> None:
    # Gradients are most of the memory: 6 blocks of 25 million weights, of which each rank has a half.
    sizes = {"dim": 1024, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 7168, "n_layers": 6}
    case = replace(PLAIN, dims=sizes, fsdp_exchange="peer_memory")
    cases = [replace(case, gradients_stay=True), case]
    for staying, going in run_distributed(_memory_ahead, 2, cases, str(tmp_path), init=False, timeout_s=200.0):
        assert staying == 0
        assert going >= 48 << 20, "the test would not notice"  # the sums of a block


def _train(rank: int, world_size: int, cases: list[Case], folder: str) -> list:
    init_distributed(CommSection(), local_device("cuda"), folder)
    try:
        return [train_on_ranks(rank, world_size, case) for case in cases]
    finally:
        destroy()


def test_trainings_are_those_with_collectives(tmp_path) -> None:
    cases = [
        replace(case, fsdp_exchange=choice) for case in CASES.values() for choice in ("peer_memory", "collectives")
    ]
    results = run_distributed(_train, 2, cases, str(tmp_path), init=False, timeout_s=500.0)[0]
    for number, name in enumerate(CASES):
        print(name)
        tolerance = 1e-5 if name.startswith("fp32") else 1e-2
        assert_same(results[2 * number], results[2 * number + 1], tolerance)
