"""The harness itself: results in rank order, the first traceback, hangs and deaths."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import harness
from tests.distributed.harness import RETRIES, DistributedTestError, run_distributed


def _sum_over_ranks(rank: int, world_size: int, offset: float) -> tuple[int, float]:
    value = torch.tensor(rank + offset)
    dist.all_reduce(value)
    return os.getpid(), value.item()


def _fail_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def _die_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def _crash_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def _hang(rank: int, world_size: int) -> None:
    time.sleep(60)


def _environment(rank: int, world_size: int) -> tuple[bool, str, str]:
    return dist.is_initialized(), os.environ["RANK"], os.environ["WORLD_SIZE"]


def test_results_come_in_rank_order_and_the_processes_are_reused() -> None:
    first, second = run_distributed(_sum_over_ranks, 2, 0.5), run_distributed(_sum_over_ranks, 2, 1.5)
    assert [value for _, value in first] == [2.0, 2.0]
    assert [value for _, value in second] == [4.0, 4.0]
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert len({pid for pid, _ in first}) == 2


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_processes_are_stopped_while_they_have_nothing_to_do() -> None:
    for _ in range(2):
        pids = [pid for pid, _ in run_distributed(_sum_over_ranks, 2, 0.5)]
        deadline = time.monotonic() + 10
        while [_state(pid) for pid in pids] != ["T", "T"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _make_groups(rank: int, world_size: int, count: int) -> int:
    for _ in range(count):
        dist.new_group([0, 1])
    return os.getpid()


def test_processes_that_have_made_many_groups_run_no_further_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MANY", 8)
    harness.close_groups()
    first = run_distributed(_make_groups, 2, 4)
    assert run_distributed(_make_groups, 2, 6) == first
    assert set(run_distributed(_make_groups, 2, 1)).isdisjoint(first)


def test_the_traceback_of_the_rank_that_raised_is_the_failure() -> None:
    with pytest.raises(DistributedTestError, match=r"(?s)rank 1 raised.*rank one is unwell"):
        run_distributed(_fail_on_rank_one, 2)


def test_a_rank_that_dies_fails_the_call() -> None:
    with pytest.raises(DistributedTestError, match="rank 1 died with exit code 7"):
        run_distributed(_die_on_rank_one, 2, fresh=True)


def test_a_rank_that_crashes_tells_where() -> None:
    with pytest.raises(DistributedTestError, match=r"(?s)rank 1 died with exit code -11.*in _crash_on_rank_one"):
        run_distributed(_crash_on_rank_one, 2, fresh=True)


def _crash_unless(rank: int, world_size: int, marker: str) -> int:
    """Rank one crashes if there is no marker, and leaves one."""
    if rank == 1 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGABRT)
    value = torch.ones(1)
    dist.all_reduce(value)
    return int(value)


def test_a_crash_in_shared_processes_is_tried_once_more_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes"
    monkeypatch.setenv(RETRIES, str(notes))
    assert run_distributed(_crash_unless, 2, str(tmp_path / "marker")) == [2, 2]
    assert "rank 1 died with exit code -6" in notes.read_text()
    assert "in _crash_unless" in notes.read_text()
    with pytest.raises(DistributedTestError, match="rank 1 died with exit code -11"):
        run_distributed(_crash_on_rank_one, 2)


def _hang_unless(rank: int, world_size: int, marker: str) -> int:
    if not os.path.exists(f"{marker}{rank}"):
        open(f"{marker}{rank}", "w").close()
        time.sleep(60)
    return rank


def test_a_hang_in_shared_processes_is_tried_once_more_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes"
    monkeypatch.setenv(RETRIES, str(notes))
    run_distributed(_sum_over_ranks, 2, 0.5)  # the processes are there
    monkeypatch.setattr(harness, "FIRST_TIMEOUT_S", 3.0)
    assert run_distributed(_hang_unless, 2, str(tmp_path / "marker")) == [0, 1]
    assert "in _hang_unless" in notes.read_text()


def test_ranks_that_hang_are_ended() -> None:
    with pytest.raises(DistributedTestError, match=r"(?s)no answer from ranks \[0, 1\].*rank 1:.*in _hang"):
        run_distributed(_hang, 2, fresh=True, timeout_s=12.0)


def test_without_init_the_ranks_have_torchruns_environment_and_no_group() -> None:
    assert run_distributed(_environment, 2, init=False) == [(False, "0", "2"), (False, "1", "2")]
