"""Checkpoints of a run on a GPU: page-locked copies hold the right values, the device's random numbers come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.checkpoint.tiny_run import TinyModel, TinyRun, assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _run(path: Path, seed: int = 0, **keys: object) -> TinyRun:
    torch.manual_seed(seed)
    return TinyRun(path, model=TinyModel().cuda(), seed=seed, **keys)


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("async_mode", ["disabled", "async", "async_with_pinned_mem"])
def test_resumed_run_ends_like_the_uninterrupted_one(tmp_path: Path, async_mode: str, implementation: str) -> None:
    keys = {"async_mode": async_mode, "optimizer": {"implementation": implementation}}
    expected = _run(tmp_path / "whole", enable=False, optimizer=keys["optimizer"]).train().state()
    _run(tmp_path, **keys).train(until=5).close()
    resumed = _run(tmp_path, seed=1, **keys).resume()
    assert resumed.counter.step == 4
    assert_same(resumed.train().close().state(), expected)


def test_page_locked_copies_hold_the_values_before_the_next_change(tmp_path: Path) -> None:
    from titan_fp8.checkpoint.staging import HostCopies

    copies = HostCopies(pinned=True)
    tensor = torch.zeros(64 * 2**20, device="cuda")  # 256 MiB: the copy takes longer than it takes to launch a change
    for value in range(4):
        tensor.fill_(value)
        host = copies.copy({"tensor": tensor, "on_host": torch.full((), float(value))})
        copies.hold_back_changes()
        tensor.fill_(-1)
        copies.wait()
        assert host["tensor"].is_pinned()
        assert host["tensor"].min() == host["tensor"].max() == host["on_host"] == value


def test_page_locked_buffers_are_kept_from_one_save_to_the_next() -> None:
    from titan_fp8.checkpoint.staging import HostCopies

    copies = HostCopies(pinned=True)
    tensor = torch.ones(1000, device="cuda")
    first = copies.copy({"tensor": tensor})["tensor"].data_ptr()
    copies.wait()
    assert copies.copy({"tensor": tensor})["tensor"].data_ptr() == first
    assert copies.copy({"tensor": torch.ones(7, device="cuda")})["tensor"].shape == (7,)


def test_random_numbers_of_the_device_come_back(tmp_path: Path) -> None:
    _run(tmp_path).train(until=2)
    expected = torch.rand(5, device="cuda")
    _run(tmp_path, seed=1).resume()
    assert torch.equal(torch.rand(5, device="cuda"), expected)


def test_checkpoint_of_a_gpu_loads_on_a_cpu(tmp_path: Path) -> None:
    saved = _run(tmp_path).train(until=2).state()
    loaded = TinyRun(tmp_path, seed=1).resume().state()
    assert_same(loaded, {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in saved.items()})
