"""A check and torchrun side by side, with a gate between. With real processes: tests/end_to_end/test_run_train.py."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from titan_fp8 import launch, train, worker

OPTIONS = ["--job.config_file", "a job.toml", "--training.steps", "3", "--", "x"]


class Ended(BaseException):
    pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """What is started, with which WORLD_SIZE; `wait` is how the check ends, `torchrun` what its processes meet."""
    found = SimpleNamespace(check=None, workers=None, worlds=[], killed=False, code=None, gate=None)
    found.wait, found.ended = lambda: 0, threading.Event()
    found.torchrun = lambda: _until(lambda: (found.gate / worker.OPEN).exists())

    def popen(command: list[str], process_group: int) -> SimpleNamespace:
        found.check, found.group = command, process_group
        found.worlds.append(os.environ.get("WORLD_SIZE"))
        return SimpleNamespace(wait=lambda: found.wait(), kill=lambda: setattr(found, "killed", True))

    def torchrun(arguments: list[str]) -> None:
        found.workers, found.gate = arguments, Path(os.environ[worker.GATE])
        found.worlds.append(os.environ.get("WORLD_SIZE"))
        found.torchrun()

    def ended(code: int) -> None:
        found.code = code
        found.ended.set()
        if threading.current_thread() is threading.main_thread():  # another one is at its end anyway
            raise Ended

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(worker.GATE, "")  # so that what is set is taken back
    monkeypatch.setattr(launch.tempfile, "mkdtemp", lambda prefix: str(_made(tmp_path / "gate")))
    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    monkeypatch.setattr(launch.importlib, "import_module", lambda name: SimpleNamespace(main=torchrun))
    monkeypatch.setattr(launch.os, "_exit", ended)
    return found


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_job_without_mistakes_is_launched_with_its_options_as_they_are(started) -> None:
    assert launch.main(["--nproc_per_node", "2", "--", *OPTIONS]) == 0
    assert started.check == [sys.executable, "-m", "titan_fp8.cli.main", "check", *OPTIONS]
    assert started.group == 0, "an interrupt from the keyboard reaches the launcher alone"
    assert started.workers == ["--nproc_per_node", "2", "-m", "titan_fp8.worker", *OPTIONS]
    assert started.worlds == ["2", None], "torchrun's processes get theirs from it"
    assert not started.killed
    assert not started.gate.exists()
    assert all(importlib.util.find_spec(name) for name in (launch.TORCHRUN, launch.WORKER, worker.TRAINER))


@pytest.mark.parametrize(("ends_with", "code"), [(2, 2), (1, 1), (-15, 143)])
def test_all_ends_after_a_check_that_did_not_end_well(started, ends_with: int, code: int) -> None:
    started.wait = lambda: ends_with
    started.torchrun = lambda: started.ended.wait(30)
    launch.main(["--nproc_per_node", "2", "--", *OPTIONS])
    assert started.code == code
    assert not started.gate.exists(), "by which workers know"


class SignalException(Exception):
    """As torchrun's."""

    sigval = signal.SIGTERM


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (SignalException, 143)])
def test_an_interrupt_before_the_gate_is_open_ends_all_without_a_trace(started, error, code: int) -> None:
    checked = threading.Event()

    def killed() -> int:
        checked.wait(30)
        return -9

    started.wait = killed

    def interrupted() -> None:
        raise error

    started.torchrun = interrupted
    with pytest.raises(Ended):
        launch.main(["--nproc_per_node", "2", "--", *OPTIONS])
    assert started.code == code
    assert started.killed
    assert not started.gate.exists()
    checked.set()
    time.sleep(0.1)
    assert started.code == code, "the check, which was killed for it, has nothing to say any more"


def test_a_mistake_in_torchruns_own_options_ends_the_check(started) -> None:
    started.wait = lambda: _until(lambda: started.killed) or -9

    def refused() -> None:
        raise SystemExit(2)

    started.torchrun = refused
    with pytest.raises(SystemExit):
        launch.main(["--nproc_per_node", "x", "--", *OPTIONS])
    assert started.killed
    assert started.code is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SignalException, SystemExit])
def test_what_ends_torchrun_later_is_its_own_affair(started, error) -> None:
    def ends() -> None:
        _until(lambda: (started.gate / worker.OPEN).exists())
        time.sleep(0.05)
        raise error

    started.torchrun = ends
    with pytest.raises(error):
        launch.main(["--nproc_per_node", "2", "--", *OPTIONS])
    assert started.code is None
    assert not started.gate.exists()


SLOW = "import time; deadline = time.time() + 20\nwhile time.time() < deadline: pass"
STAND_IN = """
import sys, types
from titan_fp8 import worker
def load(name):
    if name == "titan_fp8.building":
        print("imports", flush=True)
        exec(sys.argv[1])
    return types.SimpleNamespace(main=lambda: print("trains") or 7, prepare_process=lambda: None)
worker.importlib.import_module = load
sys.exit(worker.main())
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Starts a worker behind a gate, whose import runs some code."""
    processes = []

    def start(code: str, gate: Path | None) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if key != worker.GATE}
        environment |= {} if gate is None else {worker.GATE: str(gate)}
        command = [sys.executable, "-c", STAND_IN, code]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_worker_trains_when_the_gate_opens(start, tmp_path: Path) -> None:
    gate = _made(tmp_path / "gate")
    process = start("pass", gate)
    assert process.stdout.readline() == b"imports\n"
    time.sleep(0.2)
    assert process.poll() is None
    (gate / worker.OPEN).touch()
    assert process.communicate(timeout=30) == (b"trains\n", None)
    assert process.returncode == 7


def test_a_worker_without_a_gate_trains_at_once(start) -> None:
    process = start("pass", None)
    assert process.communicate(timeout=30) == (b"trains\n", None)
    assert process.returncode == 7


@pytest.mark.parametrize("code", ["pass", SLOW], ids=["waiting", "importing"])
def test_a_worker_ends_without_a_word_when_the_gate_is_gone(start, tmp_path: Path, code: str) -> None:
    gate = _made(tmp_path / "gate")
    process = start(code, gate)
    assert process.stdout.readline() == b"imports\n"
    gate.rmdir()
    assert process.communicate(timeout=10) == (b"", None)
    assert process.returncode == 0


def test_an_interrupt_ends_a_waiting_worker_without_a_trace(start, tmp_path: Path) -> None:
    process = start("pass", _made(tmp_path / "gate"))
    assert process.stdout.readline() == b"imports\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == (b"", None)
    assert process.returncode == train.INTERRUPTED == worker.INTERRUPTED


def test_a_worker_ends_with_its_launcher(tmp_path: Path) -> None:
    gate = _made(tmp_path / "gate")
    launcher = "import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); input()"
    command = [sys.executable, "-c", launcher, sys.executable, "-c", STAND_IN, "pass"]
    environment = os.environ | {worker.GATE: str(gate)}
    parent = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    assert parent.stdout.readline() == b"imports\n"
    parent.kill()
    parent.communicate()
    _until(lambda: not _runs(number))


def _runs(number: int) -> bool:
    status = Path(f"/proc/{number}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
