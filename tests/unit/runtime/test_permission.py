"""Processes that wait for their launcher's permission, in real processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titan_fp8.runtime.permission import VARIABLE, Permission, follow_launcher

FOLLOWER = """
from titan_fp8.runtime.permission import VARIABLE, follow_launcher
import os
launcher = follow_launcher()
assert VARIABLE not in os.environ, "its own children follow nobody"
print("started", flush=True)
launcher.wait()
print("goes on", flush=True)
"""
LAUNCHER = f"""
import subprocess, sys, time
from titan_fp8.runtime.permission import Permission
permission = Permission()
process = subprocess.Popen([sys.executable, "-c", {FOLLOWER!r}])
print(process.pid, flush=True)
time.sleep(60)
"""


def test_without_a_launcher_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert follow_launcher() is None


def test_processes_go_on_when_they_are_let_and_so_do_those_started_after_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    permission = Permission()
    folder = Path(os.environ[VARIABLE].partition(":")[2]).parent
    try:
        first = subprocess.Popen([sys.executable, "-c", FOLLOWER], stdout=subprocess.PIPE, text=True)
        assert first.stdout is not None
        assert first.stdout.readline() == "started\n"
        time.sleep(0.2)
        assert first.poll() is None
        permission.give()
        assert first.communicate(timeout=20)[0] == "goes on\n"
        permission.close()
        later = [sys.executable, "-c", "from titan_fp8.runtime.permission import follow_launcher as f; print(f())"]
        assert subprocess.run(later, capture_output=True, text=True, timeout=20).stdout == "None\n"
    finally:
        permission.close()
    assert not folder.exists()


def test_a_process_that_something_between_has_started_follows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    permission = Permission()
    try:
        command = f"{sys.executable} -c '{FOLLOWER}'; echo $?"
        with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True) as between:
            assert between.stdout is not None
            assert between.stdout.readline() == "started\n"
            time.sleep(0.2)
            permission.give()
            assert between.stdout.read() == "goes on\n0\n"
    finally:
        permission.close()


def test_a_process_ends_as_one_that_failed_if_the_file_can_no_longer_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    permission = Permission()
    follower = subprocess.Popen([sys.executable, "-c", FOLLOWER], stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    assert follower.stdout.readline() == "started\n"
    permission.close()
    assert follower.communicate(timeout=20)[0] == ""
    assert follower.returncode == 1


def test_processes_end_without_a_word_if_the_launcher_has_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed one leaves its folder
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        assert launcher.stdout.readline() == "started\n"
        launcher.kill()
        assert launcher.stdout.read() == "", "to the end of the pipe, which the process holds open as well"
    for _ in range(200):
        if not _is_running(pid):
            return
        time.sleep(0.05)
    pytest.fail("it still waits")


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
