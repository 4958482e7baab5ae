"""Processes that share work, and what signals do to them and to the process that uses them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from titan_fp8.data.workers import WorkerPool
from titan_fp8.runtime.preemption import StopSignals

ROOT = Path(__file__).parents[3]
MORE_THAN_A_PIPE_HOLDS = bytes(1 << 20)


class Numbers:
    """Work without end: (process, round, enough bytes that no round waits in a pipe)."""

    def parts(self, part: int = 0, parts: int = 1) -> Iterator[tuple[int, int, bytes]]:
        number = 0
        while True:
            yield part, number, MORE_THAN_A_PIPE_HOLDS
            number += 1


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _ended(pids: list[int], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(map(_is_running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _take(rounds: Iterator, count: int) -> list[list[tuple[int, int]]]:
    return [[(part, number) for part, number, _ in next(rounds)] for _ in range(count)]


def use_after_sigterm_to_all() -> None:
    """The main program of a process that is taken back while it reads from workers."""
    stop = StopSignals()
    pool = WorkerPool(Numbers(), workers=2)
    rounds = pool.rounds()
    assert _take(rounds, 1) == [[(0, 0), (1, 0)]]
    pids = [process.pid for process in pool._processes]
    os.killpg(os.getpgid(0), signal.SIGTERM)
    while not stop.received:
        time.sleep(0.01)
    assert _take(rounds, 20) == [[(0, number), (1, number)] for number in range(1, 21)]
    pool.close()
    assert _ended(pids)
    print("saved")


def end_without_closing() -> None:
    """The main program of a process that forgets its workers."""
    pool = WorkerPool(Numbers(), workers=2)
    print(len(_take(pool.rounds(), 1)))
    setattr(sys, "a pool that lives to the end", pool)  # else its pipes end here, and its processes with them


def _run(function: str) -> subprocess.CompletedProcess[str]:
    """One of the programs above, in a process group of its own."""
    program = f"from tests.unit.data.test_workers import {function}; {function}()"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, start_new_session=True)


def test_data_flow_until_the_parent_closes_though_sigterm_came_to_all_processes() -> None:
    finished = _run("use_after_sigterm_to_all")
    assert (finished.returncode, finished.stdout) == (0, "saved\n"), finished.stderr


def test_a_parent_that_does_not_close_ends_all_the_same() -> None:
    finished = _run("end_without_closing")
    assert (finished.returncode, finished.stdout) == (0, "1\n"), finished.stderr


def test_closing_ends_processes_that_ignore_sigterm() -> None:
    pool = WorkerPool(Numbers(), workers=2)
    _take(pool.rounds(), 1)
    for process in pool._processes:
        process.terminate()
        process.join(timeout=0.2)
    assert [process.exitcode for process in pool._processes] == [None, None]
    pool.close()
    assert [process.exitcode for process in pool._processes] == [-signal.SIGKILL] * 2
