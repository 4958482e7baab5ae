"""Context parallelism against one process: the same attention, the same decoder, on parts of each sequence."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

from tests.cases import some_by_hand
from tests.distributed.harness import run_distributed
from titan_fp8.models.attention_backends import Backend, attention_mask, causal_attention
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.parallel.activation_checkpoint import apply_activation_checkpointing
from titan_fp8.parallel.compile import apply_compile
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection
from titan_fp8.parallel.context import (
    ContextParallel,
    apply_context_parallel,
    check_rotate_method,
    check_sequence,
)
from titan_fp8.parallel.context_blocks import Block, gathered_blocks, held_chunks, ring_blocks
from titan_fp8.runtime.errors import UserError

METHODS, BALANCERS = ("allgather", "alltoall"), ("headtail", None)
CPU = torch.device("cpu")
degrees, balancers = st.integers(1, 9), st.sampled_from(BALANCERS)


def _ranks(degree: int, balancer: Any) -> list[ContextParallel]:
    return [ContextParallel(rank, degree, "", balancer) for rank in range(degree)]


# ---- who computes what


@given(degrees, st.integers(1, 5), balancers)
def test_every_position_belongs_to_exactly_one_rank(degree: int, size: int, balancer: str | None) -> None:
    seq_len = 2 * degree * size
    positions = [context.positions(seq_len) for context in _ranks(degree, balancer)]
    assert {len(held) for held in positions} == {seq_len // degree}
    assert torch.cat(positions).sort().values.tolist() == list(range(seq_len))
    assert all((held.diff() > 0).all() for held in positions)


@given(degrees, st.integers(1, 5))
def test_headtail_gives_every_rank_the_same_number_of_visible_keys(degree: int, size: int) -> None:
    work = [int((context.positions(2 * degree * size) + 1).sum()) for context in _ranks(degree, "headtail")]
    assert len(set(work)) == 1


def test_head_and_tail_are_dealt_out_in_ascending_order() -> None:
    assert [held_chunks(rank, 4, balanced=True) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]


def test_without_a_balancer_parts_are_contiguous_and_the_last_rank_has_most_to_do() -> None:
    positions = [context.positions(8) for context in _ranks(4, None)]
    assert [held.tolist() for held in positions] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [context.positions(8).tolist() for context in _ranks(2, "headtail")] == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_shard_takes_the_columns_of_the_positions() -> None:
    batch = torch.arange(24).view(2, 12)
    for context in _ranks(3, "headtail"):
        assert torch.equal(context.shard(batch), batch[:, context.positions(12)])


@given(degrees, st.integers(1, 3), st.booleans(), st.booleans())
def test_blocks_cover_what_is_visible_exactly_once(degree: int, size: int, balanced: bool, rectangular: bool) -> None:
    length = 2 * size
    for context in _ranks(degree, "headtail" if balanced else None):
        positions = context.positions(length * degree)
        visible = (positions[:, None] >= torch.arange(length * degree)).int()
        gathered = gathered_blocks(context.rank, degree, length, balanced, rectangular)
        assert torch.equal(_covered(gathered, length, length * degree), visible)
        passing = torch.zeros_like(visible)
        for source in _ranks(degree, context.load_balancer):
            blocks = ring_blocks(context.rank, source.rank, degree, length, balanced)
            passing[:, source.positions(length * degree)] += _covered(blocks, length, length)
        assert torch.equal(passing, visible)


def _covered(blocks: list[Block], queries: int, keys: int) -> Tensor:
    """How often each pair of query and key is computed."""
    count = torch.zeros(queries, keys, dtype=torch.int)
    for block in blocks:
        part = count[block.queries, block.keys]
        ones = torch.ones_like(part)
        part += ones.tril(part.shape[1] - part.shape[0]) if block.causal else ones
    return count


# ---- rules


@pytest.mark.parametrize(
    ("seq_len", "degree", "balancer", "rule", "nearest"),
    [
        (100, 4, "headtail", "2 x 4 = 8", "96 or 104"),
        (4, 4, "headtail", "2 x 4 = 8", "are 8"),
        (10, 4, None, "multiple of 4", "8 or 12"),
        (0, 2, None, "multiple of 2", "are 2"),
    ],
)
def test_a_sequence_that_cannot_be_cut_is_refused_with_the_nearest_lengths(
    seq_len: int, degree: int, balancer: Any, rule: str, nearest: str
) -> None:
    problem = check_sequence(seq_len, degree, balancer)
    assert problem is not None
    assert problem.startswith(f"training.seq_len = {seq_len} ")
    assert rule in problem
    assert problem.endswith(nearest)
    with pytest.raises(UserError, match="multiple of"):
        ContextParallel(0, degree, "", balancer).positions(seq_len)


@pytest.mark.parametrize(("seq_len", "degree", "balancer"), [(96, 4, "headtail"), (12, 4, None), (5, 1, None)])
def test_a_sequence_of_equal_chunks_is_accepted(seq_len: int, degree: int, balancer: str | None) -> None:
    assert check_sequence(seq_len, degree, balancer) is None


def test_an_unknown_load_balancer_is_named() -> None:
    assert '"zigzag": no such load balancer; use "headtail"' in (check_sequence(8, 2, "zigzag") or "")


def test_a_ring_refuses_what_needs_a_mask_and_says_what_to_change() -> None:
    assert check_rotate_method("allgather", "flex", document_masking=True) is None
    assert check_rotate_method("alltoall", "flash", document_masking=False) is None
    remedy = 'set context_parallel_rotate_method = "allgather"'
    assert remedy in (check_rotate_method("alltoall", "flash", document_masking=True) or "")
    assert remedy in (check_rotate_method("alltoall", "flex", document_masking=False) or "")
    assert "no such method" in (check_rotate_method("broadcast", "flash", document_masking=False) or "")
    ring = ContextParallel(0, 2, "", "headtail", "alltoall")
    with pytest.raises(UserError, match="document_masking is set"):
        ring.mask(4, CPU, torch.zeros(1, 8), backend="flash")


def test_document_numbers_of_a_part_of_the_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match="8, for 4 tokens on each of 2 ranks"):
        ContextParallel(0, 2, "").mask(4, CPU, torch.zeros(1, 4), backend="flash")


# ---- attention


@dataclass(frozen=True)
class Attended:
    """An attention to compute: B 2, H 4, G 2 and odd chunks of 3 tokens for 4 ranks, of 6 for 2."""

    method: str
    balancer: str | None
    dtype: torch.dtype = torch.float32
    backend: Backend = "flash"
    documents: bool = False
    seq_len: int = 24
    head_dim: int = 16
    device_type: str = "cpu"
    value_dim: int | None = None
    scale: float | None = None
    window: int | None = None

    def inputs(self) -> list[Tensor]:
        """q, k, v and the gradient of the output, in the layout of the model."""
        generator = torch.Generator().manual_seed(0)
        keys, values = self.head_dim, self.value_dim or self.head_dim
        shapes = [(2, self.seq_len, heads, width) for heads, width in ((4, keys), (2, keys), (2, values), (4, values))]
        return [
            torch.randn(shape, generator=generator).to(self.device_type, self.dtype).transpose(1, 2) for shape in shapes
        ]

    def document_ids(self) -> Tensor | None:
        """Documents that begin inside, at the ends and across the chunks."""
        if not self.documents:
            return None
        starts = torch.rand(2, self.seq_len, generator=torch.Generator().manual_seed(1)) < 0.2
        return starts.cumsum(1).to(self.device_type)


def attend_alone(case: Attended) -> list[Tensor]:
    """Output and gradients of q, k, v, in one process. Not every kernel takes the mask of a window."""
    q, k, v, grad = case.inputs()
    backend = case.backend if case.window is None or case.backend == "flex" else "math"
    mask = attention_mask(backend, case.seq_len, q.device, case.document_ids(), case.window)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = causal_attention(*leaves, backend=backend, mask=mask, scale=case.scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def attend_on_ranks(rank: int, world_size: int, case: Attended) -> list[Tensor]:
    """The same, of this rank's positions."""
    assert dist.group.WORLD is not None
    context = ContextParallel.over(dist.group.WORLD, load_balancer=case.balancer, rotate_method=case.method)
    positions = context.positions(case.seq_len, torch.device(case.device_type))
    q, k, v, grad = (x.transpose(1, 2)[:, positions].transpose(1, 2) for x in case.inputs())
    mask = context.mask(len(positions), q.device, case.document_ids(), case.window, backend=case.backend)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = context.attend(*leaves, mask, backend=case.backend, scale=case.scale, window=case.window)
    assert out.dtype == case.dtype
    return [x.cpu() for x in (out.detach(), *torch.autograd.grad(out, leaves, grad))]


def assert_same_attention(parts: list[list[Tensor]], expected: list[Tensor], case: Attended, tolerance: float) -> None:
    """`parts` of all ranks, put together, are `expected` up to `tolerance` of the largest value."""
    degree = len(parts)
    order = torch.cat([context.positions(case.seq_len) for context in _ranks(degree, case.balancer)])
    for name, wanted, *pieces in zip(("output", "q", "k", "v"), expected, *parts, strict=True):
        whole = torch.cat(pieces, dim=2)[:, :, order.argsort()].double()
        error = (whole - wanted.cpu().double()).abs().max() / wanted.abs().max().cpu()
        assert error <= tolerance, f"{name}: {error:.1e}"


TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_attention_and_its_gradients_equal_one_process(
    degree: int, method: str, balancer: str | None, backend: Backend, dtype: torch.dtype
) -> None:
    case = Attended(method, balancer, dtype, backend)
    parts = run_distributed(attend_on_ranks, degree, case)
    assert_same_attention(parts, attend_alone(case), case, TOLERANCES[dtype])


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_attention_within_documents_equals_one_process(degree: int, balancer: str | None, dtype: torch.dtype) -> None:
    case = Attended("allgather", balancer, dtype, documents=True)
    parts = run_distributed(attend_on_ranks, degree, case)
    expected = attend_alone(case)
    assert not torch.allclose(expected[0], attend_alone(Attended("allgather", balancer, dtype))[0], atol=0.1)
    assert_same_attention(parts, expected, case, TOLERANCES[dtype])


def _collectives(rank: int, world_size: int, case: Attended) -> tuple[Counter[str], Counter[str]]:
    assert dist.group.WORLD is not None
    context = ContextParallel.over(dist.group.WORLD, load_balancer=case.balancer, rotate_method=case.method)
    q, k, v = (x.chunk(world_size, dim=2)[rank].detach().requires_grad_() for x in case.inputs()[:3])
    with _profile() as forward:
        out = context.attend(q, k, v, None, backend="flash")
    with _profile() as backward:
        out.sum().backward()
    return _communication(forward), _communication(backward)


def _profile() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


_COMMUNICATION = {
    "_c10d_functional::all_gather_into_tensor": "gather",
    "_c10d_functional::reduce_scatter_tensor": "scatter",
    "c10d::send": "send",
    "c10d::recv_": "receive",
    "c10d::alltoall_base_": "exchange",
    "c10d::allreduce_": "reduce",
}


def _communication(profile: torch.profiler.profile) -> Counter[str]:
    return Counter(_COMMUNICATION[event.name] for event in profile.events() or () if event.name in _COMMUNICATION)


def test_allgather_is_one_collective_forward_and_the_ring_none() -> None:
    for forward, backward in run_distributed(_collectives, 2, Attended("allgather", "headtail")):
        assert forward == {"gather": 1}
        assert backward == {"gather": 1, "scatter": 1}
    # Keys and values make three moves; backwards their gradients follow them, and then go home.
    for forward, backward in run_distributed(_collectives, 4, Attended("alltoall", "headtail")):
        assert forward == {"send": 3, "receive": 3}
        assert backward == {"send": 7, "receive": 7}


# ---- the decoder


@dataclass(frozen=True)
class Job:
    """A decoder's loss and gradients."""

    method: str = "allgather"
    balancer: str | None = "headtail"
    compute_dtype: torch.dtype = torch.float32
    documents: bool = False
    activation_checkpoint: dict[str, str] = field(default_factory=lambda: {"mode": "none"})
    compile_backend: str | None = None
    attention_backend: str = "auto"
    seq_len: int = 16
    head_dim: int = 8
    device_type: str = "cpu"

    def model(self) -> Decoder:
        """With its initial weights."""
        dims = ModelDims(
            dim=6 * self.head_dim,
            n_layers=3,
            n_heads=6,
            n_kv_heads=3,
            ffn_dim=80,
            vocab_size=67,
            max_seq_len=self.seq_len,
        )
        model = Decoder(
            dims,
            compute_dtype=self.compute_dtype,
            document_masking=self.documents,
            attention_backend=self.attention_backend,
        )
        model.to(self.device_type)
        initialize(model, seed=7, device=torch.device(self.device_type))
        return model

    def batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, labels and document numbers of whole sequences."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(67, (3, self.seq_len + 1), generator=generator).to(self.device_type)
        ids = (torch.rand(3, self.seq_len, generator=generator) < 0.2).cumsum(1).to(self.device_type)
        return tokens[:, :-1], tokens[:, 1:], ids if self.documents else None


Computed = tuple[Tensor, dict[str, Tensor]]  # logits, gradients by name


def _gradients(model: Decoder, logits: Tensor, labels: Tensor) -> Computed:
    model.zero_grad()
    (cross_entropy_sum(logits, labels) / 48).backward()
    return logits.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def compute_alone(job: Job) -> Computed:
    tokens, labels, ids = job.batch()
    model = job.model()
    return _gradients(model, model(tokens, ids), labels)


def compute_on_ranks(rank: int, world_size: int, job: Job) -> list[Computed]:
    """Twice, since a compiled model's second step is another one than its first."""
    if job.compile_backend is not None:
        torch._dynamo.reset()  # what earlier jobs compiled counts against the limit of recompilations
        counters.clear()
    mesh = init_device_mesh(job.device_type, (world_size,), mesh_dim_names=("cp",))
    context = ContextParallel.over(mesh["cp"], load_balancer=job.balancer, rotate_method=job.method)
    model = job.model()
    names = [name for name, _ in model.named_parameters()]
    section = CompileSection(enable=job.compile_backend is not None, backend=job.compile_backend or "eager")
    apply_context_parallel(model, context)
    apply_activation_checkpointing(
        model, ActivationCheckpointSection(**job.activation_checkpoint), compile_config=section
    )
    apply_compile(model, section)
    assert [name for name, _ in model.named_parameters()] == names
    tokens, labels, ids = job.batch()
    positions = context.positions(job.seq_len, tokens.device)
    results = []
    for _ in range(2):
        logits = model(context.shard(tokens), ids, seq_len=job.seq_len, positions=positions)
        results.append(_gradients(model, logits, context.shard(labels)))
    if job.compile_backend is not None and not (job.documents and job.device_type == "cuda"):
        assert counters["stats"]["unique_graphs"] == 1, "blocks do not share one compilation"
    return results


def assert_same_decoder(parts: list[list[Computed]], expected: Computed, job: Job, tolerance: float) -> None:
    """Logits of all ranks put together, and gradients summed over them, are those of one process."""
    order = torch.cat([context.positions(job.seq_len) for context in _ranks(len(parts), job.balancer)])
    for step in zip(*parts, strict=True):
        logits = torch.cat([logits for logits, _ in step], dim=1)[:, order.argsort()]
        assert (logits - expected[0]).norm() <= tolerance * expected[0].norm()
        for name, wanted in expected[1].items():
            summed = sum(grads[name] for _, grads in step)
            error = (summed - wanted).norm() / wanted.norm()
            assert error <= tolerance, f"{name}: relative error {error:.1e}"


FP32, BF16 = 2e-6, 3e-2
FULL, PER_OP = {"mode": "full"}, {"mode": "selective", "selective_ac_option": "op"}
JOBS = {
    "allgather": (2, Job(), FP32),
    "allgather_4": (4, Job(), FP32),
    "allgather_contiguous": (4, Job(balancer=None), FP32),
    "allgather_bf16": (2, Job(compute_dtype=torch.bfloat16), BF16),
    "ring": (2, Job("alltoall"), FP32),
    "ring_4": (4, Job("alltoall"), FP32),
    "ring_contiguous_bf16": (4, Job("alltoall", None, torch.bfloat16), BF16),
    "documents": (4, Job(documents=True), FP32),
    "documents_contiguous_math": (2, Job(balancer=None, documents=True, attention_backend="math"), FP32),
    "allgather_full_ac": (2, Job(activation_checkpoint=FULL), FP32),
    "allgather_op_ac": (2, Job(activation_checkpoint=PER_OP), FP32),
    "ring_full_ac": (4, Job("alltoall", activation_checkpoint=FULL), FP32),
    "documents_full_ac": (2, Job(documents=True, activation_checkpoint=FULL), FP32),
    "allgather_compiled": (2, Job(compile_backend="aot_eager"), FP32),
    "ring_compiled": (2, Job("alltoall", compile_backend="aot_eager"), FP32),
    "documents_compiled": (2, Job(documents=True, compile_backend="aot_eager"), FP32),
    "allgather_compiled_op_ac": (2, Job(activation_checkpoint=PER_OP, compile_backend="aot_eager"), FP32),
    "ring_compiled_full_ac": (2, Job("alltoall", activation_checkpoint=FULL, compile_backend="aot_eager"), FP32),
    "allgather_inductor": (2, Job(compile_backend="inductor"), FP32),
}


@pytest.mark.parametrize("name", some_by_hand(JOBS, "allgather_inductor"))
def test_a_decoder_on_parts_of_sequences_equals_one_process(name: str) -> None:
    degree, job, tolerance = JOBS[name]
    assert_same_decoder(run_distributed(compute_on_ranks, degree, job), compute_alone(job), job, tolerance)


def _refusal(rank: int, world_size: int, job: Job) -> str:
    assert dist.group.WORLD is not None
    context = ContextParallel.over(dist.group.WORLD, load_balancer=job.balancer, rotate_method=job.method)
    with pytest.raises(UserError) as refused:
        apply_context_parallel(job.model(), context)
    with pytest.raises(UserError, match="no such load balancer"):
        ContextParallel.over(dist.group.WORLD, load_balancer="zigzag", rotate_method="allgather")
    return str(refused.value)


def test_a_ring_refuses_a_model_that_masks_documents() -> None:
    for message in run_distributed(_refusal, 2, Job("alltoall", documents=True)):
        assert message.endswith("turn training.document_masking off")
