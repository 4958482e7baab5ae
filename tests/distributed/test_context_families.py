"""Context parallelism of what only some families have: values narrower than keys and a scale of their own (latent
attention), and tokens that see their own window alone (Llama 4's attention in chunks).

Attention by itself, then whole trainings, on ranks and in one process.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.distributed.test_context_parallel import (
    BALANCERS,
    METHODS,
    TOLERANCES,
    Attended,
    _collectives,
    _covered,
    assert_same_attention,
    attend_alone,
    attend_on_ranks,
)
from tests.distributed.test_expert_parallel import NO_AUX_LOSS
from tests.distributed.trainings import (
    COMPILED,
    FULL,
    HIGH_PRECISION,
    PER_OP,
    Mesh,
    Options,
    Run,
    assert_same,
    run_alone,
    run_on,
    train_afresh,
)
from titan_fp8.models.attention_backends import attention_mask, documents_in_chunks
from titan_fp8.parallel import context_attention
from titan_fp8.parallel.attention_blocks import _with_zeros, block_kernels
from titan_fp8.parallel.context import ContextParallel
from titan_fp8.parallel.context_blocks import gathered_blocks, is_seen_by_its_holder_alone, ring_blocks

CPU = torch.device("cpu")

# ---- who meets whom


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(1, 40))
def test_blocks_cover_what_is_visible_in_a_window_exactly_once(
    degree: int, size: int, balanced: bool, rectangular: bool, window: int
) -> None:
    length = 2 * size
    tokens = torch.arange(length * degree)
    ranks = [ContextParallel(rank, degree, "", "headtail" if balanced else None) for rank in range(degree)]
    alone = is_seen_by_its_holder_alone(degree, length, balanced, window)
    for context in ranks:
        positions = context.positions(length * degree)[:, None]
        visible = ((positions >= tokens) & (positions // window == tokens // window)).int()
        gathered = gathered_blocks(context.rank, degree, length, balanced, rectangular, window)
        assert torch.equal(_covered(gathered, length, length * degree), visible)
        passing = torch.zeros_like(visible)
        for source in ranks:
            blocks = ring_blocks(context.rank, source.rank, degree, length, balanced, window)
            passing[:, source.positions(length * degree)] += _covered(blocks, length, length)
            assert not (alone and blocks and source.rank != context.rank), "nothing has to travel"
            gathered += blocks
        assert torch.equal(passing, visible)
        spans = [span for block in gathered for span in (block.queries, block.keys)]
        assert all(span.start < span.stop for span in spans), "no block is empty"


def test_keys_travel_unless_chunks_are_whole_windows() -> None:
    assert is_seen_by_its_holder_alone(1, 12, balanced=True, window=None)
    assert not is_seen_by_its_holder_alone(2, 12, balanced=True, window=None)
    assert [window for window in range(1, 25) if is_seen_by_its_holder_alone(2, 12, True, window)] == [1, 2, 3, 6]
    assert [window for window in range(1, 25) if is_seen_by_its_holder_alone(2, 12, False, window)] == [
        *(1, 2, 3, 4, 6, 12)
    ]


# ---- kernels and masks


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("values", [12, 20, 27])
@pytest.mark.parametrize("backend", ["flash", "math", "efficient", "cudnn"])
def test_a_block_of_values_of_any_width_has_the_output_and_gradients_of_the_formula(
    backend: str, values: int, scale: float | None, causal: bool
) -> None:
    """Of kernels of a GPU it is what they are given, with the reference in their place."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 9, 20), (2, 2, 9, 20), (2, 2, 9, values))
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    products = q @ k.repeat_interleave(2, 1).mT * (20**-0.5 if scale is None else scale)
    if causal:
        products = products.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    expected, expected_lse = products.softmax(-1) @ v.repeat_interleave(2, 1), products.logsumexp(-1)
    grad = torch.randn(expected.shape, generator=generator)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    on_gpu = backend in ("efficient", "cudnn")
    kernels = _with_zeros(backend, block_kernels("math", CPU)) if on_gpu else block_kernels(backend, CPU)
    inputs = [x.detach() for x in (q, k, v)]
    out, lse = kernels.forward(*inputs, causal, scale)
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(lse, expected_lse.detach())
    gradients = kernels.backward(grad, *inputs, out, lse, causal, scale)[:3]
    for name, gradient, reference in zip("qkv", gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("documents", [False, True])
def test_a_rank_has_the_rows_of_the_mask_of_one_process(documents: bool, balancer: str | None) -> None:
    """Of windows too, where there are documents; without any, attention knows the windows itself."""
    ids = (torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) < 0.2).cumsum(1) if documents else None
    for rank in range(2):
        context = ContextParallel(rank, 2, "", balancer)  # pyright: ignore[reportArgumentType]
        mask = context.mask(12, CPU, ids, 5, backend="math")
        if ids is None:
            assert mask is None
            continue
        whole = attention_mask("math", 24, CPU, ids, 5)
        assert isinstance(whole, Tensor)
        assert torch.equal(mask, whole[:, :, context.positions(24)])


def test_documents_in_chunks_differ_where_document_or_chunk_does() -> None:
    ids = torch.tensor([[7, 7, 7, -1, -1, 7, 7]])
    assert documents_in_chunks(None, 7, 3, CPU).tolist() == [[0, 0, 0, 1, 1, 1, 2]]
    numbers = documents_in_chunks(ids, 7, 3, CPU)[0].tolist()
    pieces = [numbers[:3], numbers[3:5], numbers[5:6], numbers[6:]]
    assert all(len(set(piece)) == 1 for piece in pieces)
    assert len({piece[0] for piece in pieces}) == 4


# ---- attention on ranks

LATENT = Attended("allgather", "headtail", head_dim=24, value_dim=16, scale=0.3)
WIDE = replace(LATENT, value_dim=40)
WINDOWS = (2, 3, 5, 8, 12, 23, 24, 40)
"""Of 24 tokens: within chunks of 3 or 6, across them, of several ranks, of all."""


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_attention_over_narrow_and_wide_values_equals_one_process(
    degree: int, method: str, balancer: str | None, backend: str
) -> None:
    given = {"method": method, "balancer": balancer, "backend": backend}
    cases = [replace(case, dtype=dtype, **given) for case in (LATENT, WIDE) for dtype in TOLERANCES]
    cases += [replace(WIDE, scale=None, **given)]
    for case, parts in zip(cases, _attend_all(degree, cases), strict=True):
        assert_same_attention(parts, attend_alone(case), case, TOLERANCES[case.dtype])


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("balancer", BALANCERS)
def test_attention_in_windows_equals_one_process(degree: int, method: str, balancer: str | None) -> None:
    cases = [Attended(method, balancer, window=window) for window in WINDOWS]
    cases += [replace(LATENT, method=method, balancer=balancer, window=5, backend="math")]
    cases += [Attended(method, balancer, torch.bfloat16, window=5)]
    for case, parts in zip(cases, _attend_all(degree, cases), strict=True):
        assert_same_attention(parts, attend_alone(case), case, TOLERANCES[case.dtype])


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("balancer", BALANCERS)
def test_documents_in_windows_and_with_narrow_and_wide_values_equal_one_process(
    degree: int, balancer: str | None
) -> None:
    cases = [Attended("allgather", balancer, documents=True, window=window) for window in WINDOWS]
    cases += [replace(case, balancer=balancer, documents=True) for case in (LATENT, WIDE)]
    for case, parts in zip(cases, _attend_all(degree, cases), strict=True):
        assert_same_attention(parts, attend_alone(case), case, TOLERANCES[case.dtype])


def _attend_each(rank: int, world_size: int, cases: list[Attended]) -> list[list[Tensor]]:
    return [attend_on_ranks(rank, world_size, case) for case in cases]


def _attend_all(degree: int, cases: list[Attended]) -> list[list[list[Tensor]]]:
    """For each case what each rank has."""
    return [list(parts) for parts in zip(*run_distributed(_attend_each, degree, cases), strict=True)]


def test_windows_and_scales_change_what_is_computed() -> None:
    """Otherwise the comparisons would be those of plain attention."""
    plain = attend_alone(Attended("allgather", "headtail"))
    for other in (Attended("allgather", "headtail", window=8), Attended("allgather", "headtail", scale=0.5)):
        for name, mine, theirs in zip(("output", "q", "k", "v"), attend_alone(other), plain, strict=True):
            assert (mine - theirs).norm() > 0.05 * theirs.norm(), name


def _travelled(rank: int, world_size: int, case: Attended) -> Counter[str]:
    """Numbers that this rank sent by each collective, forward and backward."""
    sent: Counter[str] = Counter()

    def counted(name: str, weight: int) -> object:
        inner = getattr(context_attention, name)

        def call(x: Tensor, *rest: object) -> object:
            sent[name] += x.numel() // weight
            return inner(x, *rest)

        return mock.patch.object(context_attention, name, call)

    with counted("all_gather", 1), counted("reduce_scatter", world_size):  # pyright: ignore[reportGeneralTypeIssues]
        attend_on_ranks(rank, world_size, case)
    return sent


@pytest.mark.parametrize("documents", [False, True])
def test_what_travels_is_keys_and_values_and_no_padding(documents: bool) -> None:
    """k and v of a rank: 2 rows, 12 tokens, 2 heads, 24 + 16 features or, with wide values, 24 + 40. Without a mask a
    second time in backward."""
    for case in (LATENT, WIDE):
        each = 2 * 12 * 2 * (24 + (case.value_dim or 0))
        for sent in run_distributed(_travelled, 2, replace(case, documents=documents)):
            assert sent == {"all_gather": each if documents else 2 * each, "reduce_scatter": each}


def _collectives_of_windows(rank: int, world_size: int, case: Attended) -> tuple[Counter[str], Counter[str]]:
    assert dist.group.WORLD is not None
    attend = ContextParallel.attend
    with mock.patch.object(
        ContextParallel, "attend", lambda *args, **kwargs: attend(*args, **kwargs, window=case.window)
    ):
        return _collectives(rank, world_size, case)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_travels_where_chunks_are_whole_windows(method: str) -> None:
    for window, travels in ((6, False), (3, False), (4, True)):
        for each in run_distributed(_collectives_of_windows, 2, Attended(method, "headtail", window=window)):
            assert [bool(counted) for counted in each] == [travels, travels]


# ---- trainings

STEPS = 4
SIZES = "dim=64 ffn_dim=64 n_experts=4 moe_ffn_dim=32 n_shared_experts=1 balance_rate=1e-3"
FAMILIES = {
    # Windows of 12 end within chunks of 8 or 16 of 32 tokens; one layer of three sees all, sharpened from position 7.
    "llama4": f"{SIZES} n_layers=3 nope_interval=3 n_kv_heads=2 attention_chunk=12 temperature_floor=8",
    "deepseek_v3": f"{SIZES} n_kv_heads=None top_k=2 expert_groups=2 expert_groups_per_token=1 kv_lora_rank=32 "
    "q_lora_rank=24 qk_nope_head_dim=16 qk_rope_head_dim=8 v_head_dim=12",
}
RING = {"parallelism.context_parallel_rotate_method": "alltoall"}
WIDE_VALUES = {"model.overrides.v_head_dim": "32"}
YARN = {"model.overrides.yarn_factor": "4", "model.overrides.rope_original_max_position": "16"}
YARN |= {"model.overrides.rope_scaling_factor": "1", "model.overrides.qk_norm": "none"}  # a norm would even it out
CONTIGUOUS = {"parallelism.context_parallel_load_balancer": "None"}
DOCUMENTS = {"training.document_masking": "true"}
LONG_VALIDATION = {
    f"validation.{key}": value
    for key, value in {
        "enable": "true", "dataset": "synthetic", "freq": "2", "steps": "1", "seq_len": "48", "local_batch_size": "4",
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A training of a family: on which ranks and with what."""

    family: str
    axes: str
    options: Options = field(default_factory=dict)

    def all_options(self) -> Options:
        overrides = dict(each.split("=") for each in FAMILIES[self.family].split())
        options = {"model.name": self.family, "training.local_batch_size": "1", **NO_AUX_LOSS}
        return options | {f"model.overrides.{key}": value for key, value in overrides.items()} | self.options

    def run(self, folder: Path) -> Run:
        return run_on(Mesh(self.axes, tuple(self.all_options().items())), folder, steps=STEPS, how=train_afresh)

    def run_alone(self) -> Run:
        return run_alone(self.all_options(), train_afresh, STEPS)


def same_as_alone(case: Case, folder: Path) -> Run:
    run, expected = case.run(folder), case.run_alone()
    assert_same(run, expected, *HIGH_PRECISION)
    assert run.validated == pytest.approx(expected.validated, rel=2e-6)
    return run


CASES = {
    "llama4 cp2": Case("llama4", "cp2"),
    "llama4 cp2 contiguous ring yarn": Case("llama4", "cp2", RING | CONTIGUOUS | YARN),
    "llama4 cp2 documents yarn": Case("llama4", "cp2", DOCUMENTS | YARN),
    "llama4 fsdp2 cp2 ring full ac": Case("llama4", "fsdp2 cp2", RING | FULL),
    "llama4 cp2 ep2": Case("llama4", "cp2 ep2"),
    "deepseek cp2 ring wide values": Case("deepseek_v3", "cp2", RING | WIDE_VALUES),
    "deepseek cp2 documents": Case("deepseek_v3", "cp2", DOCUMENTS | CONTIGUOUS),
    "deepseek fsdp2 cp2": Case("deepseek_v3", "fsdp2 cp2"),
    "deepseek cp2 ep2 ring": Case("deepseek_v3", "cp2 ep2", RING),
}
SLOW_CASES = {
    "llama4 cp4": Case("llama4", "cp4", RING),
    "llama4 cp4 contiguous": Case("llama4", "cp4", CONTIGUOUS),
    "llama4 cp2 validation": Case("llama4", "cp2", LONG_VALIDATION),
    "llama4 cp2 windows of chunks": Case("llama4", "cp2", {"model.overrides.attention_chunk": "8"}),
    "llama4 pp2 cp2": Case("llama4", "pp2 cp2", {"training.local_batch_size": "4"}),
    "llama4 cp2 ep2 compiled op ac": Case("llama4", "cp2 ep2", PER_OP | COMPILED),
    "llama4 fsdp2 cp2 ep4 documents": Case("llama4", "fsdp2 cp2 ep4", DOCUMENTS | PER_OP),
    "llama4 cp2 compiled ring": Case("llama4", "cp2", RING | COMPILED),
    "deepseek cp2 compiled op ac": Case("deepseek_v3", "cp2", PER_OP | COMPILED),
    "deepseek cp4": Case("deepseek_v3", "cp4", RING | FULL),
    "deepseek cp2 full ac compiled": Case("deepseek_v3", "cp2", FULL | COMPILED),
    "deepseek rep2 cp2 ep2": Case("deepseek_v3", "rep2 cp2 ep2"),
    "deepseek pp2 cp2": Case("deepseek_v3", "pp2 cp2", RING | {"training.local_batch_size": "4"}),
    "deepseek fsdp2 cp2 ep4": Case("deepseek_v3", "fsdp2 cp2 ep4", RING | PER_OP | COMPILED),
}


@pytest.mark.parametrize("name", CASES)
def test_training_equals_one_process(name: str, tmp_path: Path) -> None:
    same_as_alone(CASES[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_training_equals_one_process_on_more_meshes(name: str, tmp_path: Path) -> None:
    same_as_alone(SLOW_CASES[name], tmp_path)


def test_windows_and_sharpening_change_what_a_family_computes() -> None:
    """Otherwise the trainings would be compared without them."""
    with_both = Case("llama4", "fsdp1").run_alone()
    for other in ({"model.overrides.attention_chunk": "64"}, {"model.overrides.temperature_floor": "64"}):
        name = "layers.2.attention.wq.weight"
        grad = Case("llama4", "fsdp1", other).run_alone().grads[name]
        assert (grad - with_both.grads[name]).norm() > 1e-3 * grad.norm(), other
