"""Checkpoints of sharded models: any number of ranks can load what any number wrote, and ranks fail together."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.harness import run_distributed
from tests.unit.checkpoint.tiny_run import Batches, TinyModel, TinyRun, assert_same, names
from titan_fp8.checkpoint import tensor_files
from titan_fp8.runtime.errors import UserError


def _shard(model: nn.Module, layout: str) -> nn.Module:
    world_size = torch.distributed.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _run(path: Path, layout: str, **keys: Any) -> TinyRun:
    tied = keys.pop("tied", False)
    torch.manual_seed(keys.get("seed", 0))
    return TinyRun(path, model=TinyModel(tied=tied), shard=lambda model: _shard(model, layout), **keys)


def _portable(state: dict[str, Any]) -> dict[str, Any]:
    """The state under plain names, and as numpy arrays: tensors do not travel between processes by pickle alone."""
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in plain.items()}


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(v) if hasattr(v, "dtype") else v for name, v in state.items()}


def _train(_rank: int, _world_size: int, path: Path, layout: str, until: int, keys: dict[str, Any]) -> dict[str, Any]:
    return _portable(_run(path, layout, **keys).train(until).close().state())


def _load(_rank: int, _world_size: int, path: Path, layout: str, keys: dict[str, Any]) -> dict[str, Any]:
    return _portable(_run(path, layout, seed=1, **keys).resume().close().state())


def _resume(_rank: int, _world_size: int, path: Path, layout: str, keys: dict[str, Any]) -> dict[str, Any]:
    return _portable(_run(path, layout, seed=1, **keys).resume().train().close().state())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_state_saved_on_four_ranks_is_the_same_on_two_and_on_one(tmp_path: Path, async_mode: str, tied: bool) -> None:
    keys = {"async_mode": async_mode, "tied": tied}
    saved = _tensors(run_distributed(_train, 4, tmp_path, "fsdp", 4, keys)[0])
    assert saved["step"] == 4
    for loaded in run_distributed(_load, 2, tmp_path, "fsdp", keys):
        assert_same(_tensors(loaded), saved)
    assert_same(TinyRun(tmp_path, model=TinyModel(tied=tied), seed=1).resume().state(), saved)


def test_state_saved_on_one_process_loads_on_four_ranks(tmp_path: Path) -> None:
    saved = TinyRun(tmp_path).train(until=4).state()
    for loaded in run_distributed(_load, 4, tmp_path, "fsdp", {}):
        assert_same(_tensors(loaded), saved)


@pytest.mark.parametrize(("first", "second"), [("hsdp", "fsdp"), ("fsdp", "ddp"), ("ddp", "hsdp")])
def test_layout_may_change_between_saving_and_loading(tmp_path: Path, first: str, second: str) -> None:
    saved = _tensors(run_distributed(_train, 4, tmp_path, first, 4, {})[0])
    for loaded in run_distributed(_load, 4, tmp_path, second, {}):
        assert_same(_tensors(loaded), saved)


@pytest.mark.parametrize("keys", [{}, {"async_mode": "async", "optimizer": {"early_step_in_backward": True}}])
def test_resumed_sharded_run_ends_like_the_uninterrupted_one(tmp_path: Path, keys: dict[str, Any]) -> None:
    expected = run_distributed(
        _train, 2, tmp_path / "whole", "fsdp", 6, {**keys, "enable": False, "async_mode": "disabled"}
    )
    run_distributed(_train, 2, tmp_path, "fsdp", 5, keys)
    for ours, theirs in zip(run_distributed(_resume, 2, tmp_path, "fsdp", keys), expected, strict=True):
        assert_same(_tensors(ours), _tensors(theirs))


def _per_rank_data(rank: int, _world_size: int, path: Path, resume: bool) -> int:
    run = TinyRun(path, batches=Batches(rank, per_rank=True), seed=rank)
    (run.resume() if resume else run.train(until=2)).close()
    return run.batches.position


def test_each_rank_gets_its_own_data_position_back(tmp_path: Path) -> None:
    assert run_distributed(_per_rank_data, 2, tmp_path, False) == [2, 102]
    assert run_distributed(_per_rank_data, 2, tmp_path, True) == [2, 102]
    with pytest.raises(UserError, match="saved on 2 ranks, not 1"):
        TinyRun(tmp_path).resume()


def _random_numbers(rank: int, _world_size: int, path: Path, resume: bool) -> list[float]:
    run = TinyRun(path, seed=10 * rank)
    (run.resume() if resume else run.train(until=2)).close()
    return torch.rand(3).tolist()


def test_each_rank_gets_its_own_random_numbers_back(tmp_path: Path) -> None:
    first = run_distributed(_random_numbers, 2, tmp_path, False)
    assert first[0] != first[1]
    assert run_distributed(_random_numbers, 2, tmp_path, True) == first


# ---- ranks fail together


def _error(run: TinyRun, **train: Any) -> str:
    try:
        run.train(**train).close()
    except UserError as error:
        return str(error)
    return "no error"


def _full_disk_on_rank_1(rank: int, _world_size: int, path: Path, async_mode: str) -> str:
    run = _run(path, "fsdp", async_mode=async_mode).train(until=2)
    run.checkpointer._finish_pending()
    write = tensor_files._Writer._write_data

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tensor_files._Writer._write_data = full if rank == 1 else write
    try:
        return _error(run, until=4)
    finally:
        tensor_files._Writer._write_data = write


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_full_disk_on_one_rank_is_the_same_error_on_all(tmp_path: Path, async_mode: str) -> None:
    errors = run_distributed(_full_disk_on_rank_1, 2, tmp_path, async_mode)
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"rank 1: writing step-4 to {tmp_path / 'checkpoint'} failed: No space left on device")
    assert "free some space" in errors[0]
    assert names(tmp_path) == {"step-2"}


def _unreadable_on_rank_1(rank: int, _world_size: int, path: Path) -> str:
    run = _run(path, "fsdp")

    def broken(_: dict[str, Any]) -> None:
        raise UserError("this rank's data is gone")

    if rank == 1:
        run.batches.load_state_dict = broken
    try:
        run.resume()
    except UserError as error:
        return str(error)
    return "no error"


def test_state_that_one_rank_cannot_take_is_the_same_error_on_all(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=2)
    assert run_distributed(_unreadable_on_rank_1, 2, tmp_path) == ["rank 1: this rank's data is gone"] * 2


def _defect_on_rank_1(rank: int, _world_size: int, path: Path) -> str:
    run = _run(path, "fsdp")

    def broken() -> dict[str, Any]:
        raise ZeroDivisionError("a defect")

    if rank == 1:
        run.batches.state_dict = broken
    try:
        run.train(until=2)
    except (RuntimeError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_defect_on_one_rank_ends_all_and_keeps_its_type_there(tmp_path: Path) -> None:
    others, own = run_distributed(_defect_on_rank_1, 2, tmp_path)
    assert own == "ZeroDivisionError: a defect"
    assert others == "RuntimeError: rank 1: collecting the state of step 2 failed: ZeroDivisionError: a defect"


def _wrong_model(_rank: int, _world_size: int, path: Path) -> str:
    run = TinyRun(path, model=TinyModel(vocab=20), shard=lambda m: _shard(m, "fsdp"), prints={"model": {"dim": 1}})
    try:
        run.resume()
    except UserError as error:
        return str(error)
    return "no error"


def test_checkpoint_of_another_model_is_the_same_error_on_all_ranks(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=2)
    errors = run_distributed(_wrong_model, 2, tmp_path)
    assert errors[0] == errors[1]
    assert "model.dim: 6 in the checkpoint, 1 here" in errors[0]


def _seed_checkpoint(_rank: int, _world_size: int, path: Path) -> str:
    try:
        TinyRun(path, create_seed_checkpoint=True)
    except UserError as error:
        return str(error)
    return "no error"


def test_seed_checkpoint_of_many_ranks_is_refused_and_of_one_serves_many(tmp_path: Path) -> None:
    assert "NGPU=1" in run_distributed(_seed_checkpoint, 2, tmp_path)[0]
    seed = TinyRun(tmp_path, create_seed_checkpoint=True, seed=5)
    seed.checkpointer.save(0, last_step=True)
    loaded = _tensors(run_distributed(_load, 2, tmp_path, "fsdp", {})[1])
    for name, value in seed.model.state_dict().items():
        assert torch.equal(loaded[name], value)
