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
    try:
        first = subprocess.Popen([sys.executable, "-c", FOLLOWER], stdout=subprocess.PIPE, text=True)
        assert first.stdout is not None
        assert first.stdout.readline() == "started\n"
        time.sleep(0.2)
        assert first.poll() is None
        permission.give()
        assert first.communicate(timeout=20)[0] == "goes on\n"
        later = subprocess.run([sys.executable, "-c", FOLLOWER], capture_output=True, text=True, timeout=20)
        assert later.stdout == "started\ngoes on\n"
        folder = Path(os.environ[VARIABLE].partition(":")[2]).parent
    finally:
        permission.close()
    assert not folder.exists()


def test_processes_end_without_a_word_if_the_launcher_has_gone() -> None:
    command = [sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
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
