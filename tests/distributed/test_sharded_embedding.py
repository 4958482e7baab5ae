"""The embedding that exchanges rows of tokens in place of its table: equal to one process, in fewer bytes."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.distributed.float8_linears import Wire
from tests.distributed.harness import run_distributed
from tests.distributed.meshes import mesh_of
from tests.distributed.test_mesh_matrix import ZERO_BUBBLE, alone
from tests.distributed.test_parallel import (
    FP32,
    ROWS,
    SEQ_LEN,
    Case,
    _whole,
    assert_same,
    built,
    spread,
    train_alone,
    train_on_ranks,
)
from tests.distributed.trainings import HIGH_PRECISION, Mesh, run_on
from tests.distributed.trainings import assert_same as assert_same_run
from titan_fp8.checkpoint.tensors import model_tensors
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.parallel import sharded_embedding
from titan_fp8.parallel.apply import materialize
from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.sharded_embedding import ShardedEmbedding, exchanges_rows, shard_embedding
from titan_fp8.runtime.collectives import Axis

VOCABULARY = 259  # no multiple of 2, 3 or 4, and more rows than a batch has tokens
ROWS2 = Case(shard=2, vocab_size=VOCABULARY, batch_tokens=ROWS // 2 * SEQ_LEN)
ROWS4 = replace(ROWS2, shard=4, batch_tokens=ROWS // 4 * SEQ_LEN)
BF16 = 1e-2
"""Sums in another order move a weight's last bit, and with it now and then a weight in bf16."""

# ---- the numbers

CASES = {
    "fsdp2": ROWS2,
    "fsdp4": ROWS4,
    "fsdp2_accumulating": replace(ROWS2, microbatches=2),
    "fsdp2_bf16": replace(ROWS2, compute_dtype=torch.bfloat16),
    "fsdp4_with_empty_shards": replace(ROWS4, vocab_size=5, batch_tokens=1),
    "fsdp2_cp2": replace(ROWS2, context=2),
    "cp2": replace(ROWS2, shard=1, context=2),
    "fsdp2_never_resharded_full_ac": replace(ROWS2, reshard="never", activation_checkpoint={"mode": "full"}),
    "fsdp2_compiled": replace(ROWS2, compile_backend="aot_eager"),
}


def _train_on_ranks(rank: int, world_size: int, case: Case) -> Any:
    assert isinstance(spread(case)[0].tok_embeddings, ShardedEmbedding)
    return train_on_ranks(rank, world_size, case)


@pytest.mark.parametrize("name", CASES)
def test_training_with_rows_that_travel_equals_one_process(name: str) -> None:
    case = CASES[name]
    tolerance = FP32 if case.compute_dtype is torch.float32 else BF16
    assert_same(run_distributed(_train_on_ranks, case.ranks, case)[0], train_alone(case), tolerance)


ONE_BATCH = {
    "training.max_norm": "0",
    "training.global_batch_size": "2",
}


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh("pp2 fsdp2", ZERO_BUBBLE),  # a stage that is an embedding and nothing else
        Mesh("fsdp2", (("debug.deterministic", "true"),)),
    ],
    ids=lambda mesh: mesh.axes.replace(" ", "_"),
)
def test_a_run_equals_one_process(mesh: Mesh, tmp_path: Path) -> None:
    assert_same_run(run_on(mesh, tmp_path), alone(None), *HIGH_PRECISION)


def test_an_update_in_the_backward_pass_is_the_one_after_it(tmp_path: Path) -> None:
    runs = []
    for early in ("true", "false"):
        folder = tmp_path / early
        folder.mkdir()
        options = ONE_BATCH | {"optimizer.early_step_in_backward": early}
        runs.append(run_on(Mesh("fsdp2", tuple(options.items())), folder))
    assert runs[0].losses == runs[1].losses
    assert runs[0].norms == pytest.approx(runs[1].norms, rel=1e-6)


def _exchange(rank: int, world_size: int, vocab_size: int, frozen: bool, at_a_time: int) -> None:
    """Two microbatches, forward and backward, against the whole table."""
    generator = torch.Generator().manual_seed(0)
    whole = nn.Embedding(vocab_size, 24, _weight=torch.randn(vocab_size, 24, generator=generator))
    mine = nn.Embedding(vocab_size, 24, _weight=whole.weight.detach().clone()).requires_grad_(not frozen)
    mesh = mesh_of(MeshDegrees(data_parallel_shard=world_size), "cpu")
    weight = shard_embedding(mine, mesh.fsdp_mesh, Axis.of(mesh.shards.get_group()), None)
    assert weight is mine.weight
    assert dict(mine.named_parameters()) == {"weight": weight}
    assert weight.requires_grad is not frozen
    assert isinstance(weight, DTensor)
    assert torch.equal(weight.full_tensor(), whole.weight)
    for _ in range(2):
        codes = torch.randint(vocab_size, (world_size, 3, 7), generator=generator)
        grads = torch.randn(world_size, 3, 7, 24, generator=generator)
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(sharded_embedding, "_FORWARD_TOKENS", at_a_time))
            stack.enter_context(mock.patch.object(sharded_embedding, "_BACKWARD_ELEMENTS", at_a_time * 24))
            rows = mine(codes[rank])
            if not frozen:
                rows.backward(grads[rank])
        expected = whole(codes)
        expected.backward(grads)
        assert torch.equal(rows, expected[rank])
        assert rows.requires_grad is not frozen
    if frozen:
        assert weight.grad is None
        return
    assert isinstance(weight.grad, DTensor)
    assert weight.grad.placements == weight.placements
    torch.testing.assert_close(weight.grad.full_tensor(), whole.weight.grad)


@pytest.mark.parametrize("at_a_time", [5, 1 << 13])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("vocab_size", [64, 2, 9])
def test_uneven_shards_and_parts_are_one_table(vocab_size: int, frozen: bool, at_a_time: int) -> None:
    """On three ranks; of two rows, the last has none."""
    run_distributed(_exchange, 3, vocab_size, frozen, at_a_time)


def _codes_outside(rank: int, world_size: int) -> list[str]:
    model, _ = spread(ROWS2)
    assert model.tok_embeddings is not None
    plain = nn.Embedding(VOCABULARY, 4)
    messages = []
    for code in (-1, VOCABULARY):
        codes = torch.full((1, 4), code if rank == 0 else 0)  # one rank's code, but every rank's error
        for embed, wrong in ((model.tok_embeddings, codes), (plain, torch.full((1, 4), code))):
            with pytest.raises(IndexError) as error:
                embed(wrong)
            messages.append(str(error.value))
    return messages


def test_a_code_outside_the_vocabulary_is_the_error_of_an_embedding_on_every_rank() -> None:
    for messages in run_distributed(_codes_outside, 2):
        assert len(set(messages)) == 1


def _frozen_or_not(rank: int, world_size: int) -> None:
    """A frozen embedding leaves the other gradients as they are; without autograd nothing is kept."""
    tokens = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN) + rank
    found = []
    for frozen in (False, True):
        model, _ = spread(ROWS2)
        assert model.tok_embeddings is not None
        model.tok_embeddings.weight.requires_grad_(not frozen)
        with torch.no_grad():
            evaluated = model(tokens)
        loss = cross_entropy_sum(model(tokens), tokens)
        assert loss.item() == cross_entropy_sum(evaluated, tokens).item()
        assert not evaluated.requires_grad
        loss.backward()
        found.append({name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() - found[1].keys() == {"tok_embeddings.weight"}
    assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items())


def test_a_frozen_embedding_and_an_evaluation_leave_no_gradient() -> None:
    run_distributed(_frozen_or_not, 2)


def _without_tokens(rank: int, world_size: int) -> None:
    model, _ = spread(ROWS2)
    embedding = model.tok_embeddings
    assert isinstance(embedding, ShardedEmbedding)
    rows = embedding(torch.empty(0, SEQ_LEN, dtype=torch.int64))
    assert rows.shape == (0, SEQ_LEN, embedding.embedding_dim)
    rows.sum().backward()
    assert embedding.weight.grad is not None
    assert not _whole(embedding.weight.grad).any()


def test_a_batch_without_tokens_has_no_rows_and_no_gradient() -> None:
    run_distributed(_without_tokens, 2)


# ---- what travels


class _Wire(Wire):
    """With the collectives that autograd functions call; bytes of a part, one rank's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.sent.append(("all_gather", args[0].nbytes))
        elif func is torch.ops._c10d_functional.reduce_scatter_tensor.default:
            self.sent.append(("reduce_scatter", args[0].nbytes // args[2]))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _bytes_of_a_step(rank: int, world_size: int, case: Case) -> list[tuple[str, int]]:
    model, _ = spread(case)
    tokens = torch.zeros(ROWS // world_size, SEQ_LEN, dtype=torch.int64)
    with _Wire() as wire:
        cross_entropy_sum(model(tokens), tokens).backward()
    return wire.sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_tokens_travel_and_the_table_does_not(dtype: torch.dtype) -> None:
    case, dim = replace(ROWS2, compute_dtype=dtype), 48
    tokens, shard = ROWS // 2 * SEQ_LEN, 130  # 259 rows on two ranks
    rows, tables = (run_distributed(_bytes_of_a_step, 2, each) for each in (case, replace(case, batch_tokens=None)))
    for with_rows, with_table in zip(map(Counter, rows), map(Counter, tables), strict=True):
        row = dim * dtype.itemsize
        parts = [("all_gather", 8 * tokens), ("reduce_scatter", tokens * row), ("all_gather", tokens * row)]
        assert with_rows - with_table == Counter(parts)
        table = 4 * shard * dim
        assert with_table - with_rows == Counter([("all_gather", table), ("reduce_scatter", table)])


def _choices(rank: int, world_size: int) -> None:
    def chosen(degrees: MeshDegrees, tokens: int | None, *, cpu_offload: bool = False, **keys: Any) -> bool:
        model = built(Case(vocab_size=260, **keys))
        return exchanges_rows(model, mesh_of(degrees, "cpu"), batch_tokens=tokens, cpu_offload=cpu_offload)

    fsdp = MeshDegrees(data_parallel_shard=4)
    assert chosen(fsdp, 64)
    assert not chosen(fsdp, 65)  # as many bytes as the table: 4 x 65 rows of 260
    assert chosen(fsdp, 129, compute_dtype=torch.bfloat16)
    assert not chosen(fsdp, 130, compute_dtype=torch.bfloat16)
    assert chosen(MeshDegrees(data_parallel_shard=2, context=2), 64)
    assert chosen(MeshDegrees(pipeline=2, data_parallel_shard=2), 129)
    assert not chosen(fsdp, None)
    assert not chosen(fsdp, 1, cpu_offload=True)
    assert not chosen(fsdp, 1, tied_embeddings=True)
    assert not chosen(MeshDegrees(data_parallel_replicate=4), 1)
    assert not chosen(MeshDegrees(data_parallel_replicate=2, data_parallel_shard=2), 1)
    assert not chosen(MeshDegrees(data_parallel_shard=2, tensor=2), 1)


def test_rows_travel_where_they_are_fewer_bytes_than_the_table() -> None:
    run_distributed(_choices, 4)


def _units_and_table(rank: int, world_size: int, case: Case) -> tuple[bool, bool]:
    embedding = spread(case)[0].tok_embeddings
    return isinstance(embedding, ShardedEmbedding), isinstance(embedding, FSDPModule)


def test_the_table_is_a_unit_or_not_by_the_tokens_of_a_batch() -> None:
    boundary = replace(ROWS2, vocab_size=260)
    assert run_distributed(_units_and_table, 2, replace(boundary, batch_tokens=129))[0] == (True, False)
    assert run_distributed(_units_and_table, 2, replace(boundary, batch_tokens=130))[0] == (False, True)


# ---- checkpoints

MESHES = {
    "one process": replace(ROWS2, shard=1),
    "rows on 2": ROWS2,
    "rows on 3": replace(ROWS2, shard=3, batch_tokens=1),
    "table on 2": replace(ROWS2, batch_tokens=None),
    "copies": replace(ROWS2, shard=1, replicate=2),
}


def _save(rank: int, world_size: int, case: Case, path: str) -> None:
    save(model_tensors([spread(case)[0]]), checkpoint_id=path)


def _load(rank: int, world_size: int, case: Case, path: str) -> dict[str, Any]:
    model, _ = spread(case)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    load(model_tensors([model]), checkpoint_id=path)
    return {name: _whole(parameter).numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("source", "target"),
    [*(("rows on 3", name) for name in MESHES), ("one process", "rows on 3"), ("table on 2", "rows on 3")],
)
def test_a_checkpoint_is_one_of_the_whole_table(source: str, target: str, tmp_path: Path) -> None:
    expected = built(ROWS2)
    materialize(expected, torch.device("cpu"))
    initialize(expected, seed=7)
    run_distributed(_save, MESHES[source].ranks, MESHES[source], str(tmp_path))
    for loaded in run_distributed(_load, MESHES[target].ranks, MESHES[target], str(tmp_path)):
        assert list(loaded) == [name for name, _ in expected.named_parameters()]
        for name, wanted in expected.named_parameters():
            assert torch.equal(torch.from_numpy(loaded[name]), wanted), name
