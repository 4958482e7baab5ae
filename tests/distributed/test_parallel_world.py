"""Start and end of the process group, sums over ranks, the mesh, one seed for all."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed
from titan_fp8.parallel.config import ParallelismSection
from titan_fp8.parallel.degrees import MeshDegrees, resolve_degrees
from titan_fp8.parallel.distributed import (
    all_reduce_sum,
    any_rank,
    barrier,
    destroy,
    init_distributed,
    local_device,
    set_train_timeouts,
    threads_that_run,
    world_size_of_environment,
)
from titan_fp8.parallel.mesh import build_mesh
from titan_fp8.runtime.config import CommSection, DebugSection
from titan_fp8.runtime.determinism import set_seed

CPU = torch.device("cpu")


def _start_as_torchrun_does(rank: int, world_size: int, folder: str) -> dict[str, object]:
    comm = CommSection(init_timeout_seconds=40, train_timeout_seconds=20)
    init_distributed(comm, local_device("cpu"), folder)
    mesh = build_mesh(resolve_degrees(ParallelismSection(), world_size_of_environment()), "cpu")
    set_train_timeouts(comm, mesh)
    result = {
        "backend": dist.get_backend(),
        "ranks": (mesh.rank, mesh.data_rank, mesh.data_ranks),
        "sum": mesh.sum_over_tokens(torch.tensor([rank + 1.0, float("nan")])).tolist()[0],
        "any": (any_rank(rank == 1), any_rank(False)),
        "timeouts": {group._get_backend(CPU).options._timeout for group in mesh.groups},
    }
    destroy()
    return result | {"destroyed": not dist.is_initialized()}


def _start_alone(rank: int, world_size: int, folder: str) -> tuple[int, float, bool]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    init_distributed(CommSection(), local_device("cpu"), folder)
    barrier()
    result = dist.get_world_size(), all_reduce_sum(torch.tensor(3.0)).item(), any_rank(True)
    destroy()
    return result


def _mesh_places(rank: int, world_size: int) -> tuple[int, int, list[int], list[int], tuple[int, ...]]:
    mesh = build_mesh(MeshDegrees(data_parallel_replicate=2, data_parallel_shard=2), "cpu")
    axes = [dist.get_process_group_ranks(mesh.device_mesh.get_group(name)) for name in ("dp_replicate", "dp_shard")]
    return mesh.data_rank, mesh.data_ranks, *axes, mesh.fsdp_mesh.shape


def _draw_a_seed(rank: int, world_size: int) -> tuple[int, float]:
    seed = set_seed(DebugSection(), CPU)
    return seed, torch.rand(()).item()


def test_processes_of_torchrun_find_each_other_and_train_with_the_training_timeout(tmp_path: Path) -> None:
    first, second = run_distributed(_start_as_torchrun_does, 2, str(tmp_path), init=False)
    assert first["backend"] == second["backend"] == "gloo"
    assert (first["ranks"], second["ranks"]) == ((0, 0, 2), (1, 1, 2))
    assert first["sum"] == second["sum"] == 3.0
    assert first["any"] == second["any"] == (True, False)
    assert first["timeouts"] == {timedelta(seconds=20)}
    assert first["destroyed"]


def test_a_process_ends_after_its_threads_have_given_up_what_they_exchanged(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.distributed.leaving", str(tmp_path), "5"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert ended.stdout.splitlines() == ["0 0"] * 5, ended.stderr


def test_threads_that_run_are_those_that_do_something() -> None:
    stop, numbers = threading.Event(), bytes(1_000_000)

    def compute() -> None:
        while not stop.is_set():
            hashlib.sha256(numbers)  # without Python's lock

    busy, idle = threading.Thread(target=compute), threading.Thread(target=stop.wait)
    for thread in (busy, idle):
        thread.start()
    try:
        time.sleep(0.1)
        seen = set(chain.from_iterable(threads_that_run() for _ in range(20)))
        assert busy.native_id in seen
        assert not {idle.native_id, threading.get_native_id()} & seen
    finally:
        stop.set()
        busy.join(), idle.join()


def test_a_process_without_torchrun_is_a_world_of_one(tmp_path: Path) -> None:
    assert run_distributed(_start_alone, 1, str(tmp_path), init=False) == [(1, 3.0, True)]


def test_axes_of_a_2x2_mesh_are_neighbours_in_shards_and_apart_in_copies() -> None:
    places = run_distributed(_mesh_places, 4)
    assert [place[0] for place in places] == [0, 1, 2, 3]
    assert places[1] == (1, 4, [1, 3], [0, 1], (2, 2))
    assert places[2] == (2, 4, [0, 2], [2, 3], (2, 2))


def test_without_a_seed_all_ranks_use_the_one_that_rank_0_drew() -> None:
    first, second = run_distributed(_draw_a_seed, 2), run_distributed(_draw_a_seed, 2)
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0] != second[0]


@pytest.mark.parametrize("value", ["four", "-2"])
def test_a_world_size_that_is_no_number_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(ValueError, match=f"WORLD_SIZE is '{value}'"):
        world_size_of_environment()


def test_a_world_size_without_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK is not set; start with torchrun"):
        init_distributed(CommSection(), CPU, tmp_path)
