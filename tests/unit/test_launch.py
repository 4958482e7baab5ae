"""The check beside torchrun. With real processes: tests/end_to_end/test_run_train.py."""

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from titan_fp8 import launch
from titan_fp8.runtime import permission

OPTIONS = ["--job.config_file", "a job.toml", "--training.steps", "3", "--", "x"]
ONE, TWO = ["--nnodes", "1", "--nproc_per_node", "2"], ["--nnodes", "1:2", "--nproc_per_node", "2"]


class SignalException(Exception):
    sigval = signal.SIGTERM


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What is started, with which WORLD_SIZE; the check ends with `code` when it may, torchrun does as `train` does."""
    found = SimpleNamespace(check=None, torchrun=None, worlds=[], code=0, killed=False, left=None, file=None)
    found.check_may_end, found.has_left = threading.Event(), threading.Event()
    found.train = lambda: None

    def wait() -> int:
        found.check_may_end.wait(20)
        return -signal.SIGKILL if found.killed else found.code

    def kill() -> None:
        found.killed = True
        found.check_may_end.set()

    def popen(command: list[str]) -> SimpleNamespace:
        found.check = command
        found.file = os.environ[permission.VARIABLE].partition(":")[2]
        found.worlds.append(os.environ.get("WORLD_SIZE"))
        return SimpleNamespace(wait=wait, kill=kill)

    def torchrun(arguments: list[str]) -> None:
        found.torchrun = arguments
        found.worlds.append(os.environ.get("WORLD_SIZE"))
        found.train()

    def leave(code: int) -> None:  # of the thread that waits for the check
        found.left = code
        found.has_left.set()

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(permission.VARIABLE, "another launcher's")
    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    monkeypatch.setattr(launch.importlib, "import_module", lambda name: SimpleNamespace(main=torchrun))
    monkeypatch.setattr(launch.os, "_exit", leave)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found.file is None or not os.path.exists(os.path.dirname(found.file))


def _raise(error: BaseException) -> None:
    raise error


def test_a_job_without_mistakes_is_launched_with_its_options_as_they_are(started) -> None:
    started.check_may_end.set()
    assert launch.main([*ONE, "--", *OPTIONS]) == 0
    assert started.check == [sys.executable, "-m", "titan_fp8.cli.main", "check", *OPTIONS]
    assert started.torchrun == [*ONE, "-m", "titan_fp8.train", *OPTIONS]
    assert started.worlds == ["2", None], "torchrun's processes get theirs from it"
    assert started.left is None
    assert importlib.util.find_spec(launch.TORCHRUN)
    assert importlib.util.find_spec(launch.TRAINER)


def test_trainers_of_one_machine_start_while_the_job_is_checked_and_go_on_after_that(started) -> None:
    def train() -> None:
        assert not os.path.exists(started.file)
        started.check_may_end.set()
        while not os.path.exists(started.file):
            pass

    started.train = train
    assert launch.main([*ONE, "--", *OPTIONS]) == 0


def test_an_answer_that_cannot_be_given_ends_the_command(started, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(launch.Permission, "give", lambda self: _raise(OSError("no space left")))
    started.train = lambda: started.has_left.wait(20)
    started.check_may_end.set()
    launch.main([*ONE, "--", *OPTIONS])
    assert started.left == 1
    assert "no space left" in capsys.readouterr().err


def test_a_machine_joins_others_only_with_a_job_that_is_checked(started) -> None:
    started.train = lambda: None if os.path.exists(started.file) else pytest.fail("it joined before the check")
    threading.Timer(0.2, started.check_may_end.set).start()
    assert launch.main([*TWO, "--", *OPTIONS]) == 0


@pytest.mark.parametrize(("code", "told"), [(2, 2), (1, 1), (-15, 143)])
@pytest.mark.parametrize("machines", [ONE, TWO])
def test_a_check_that_does_not_end_well_ends_the_command_with_its_code(
    started, monkeypatch: pytest.MonkeyPatch, machines: list[str], code: int, told: int
) -> None:
    def until_it_has_left(_: object = None) -> None:  # which the command does not survive
        assert started.has_left.wait(20)
        raise SystemExit(0)

    monkeypatch.setattr(launch.Permission, "wait", until_it_has_left)
    started.train = until_it_has_left
    started.code = code
    started.check_may_end.set()
    launch.main([*machines, "--", *OPTIONS])
    assert started.left == told
    assert (started.torchrun is None) == (machines is TWO)


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (SignalException(), 143), (SystemExit(143), 143), (SystemExit(0), 0)],
)
def test_a_signal_ends_the_check_too_and_needs_no_words(started, error: BaseException, code: int) -> None:
    started.train = lambda: _raise(error)
    assert launch.main([*ONE, "--", *OPTIONS]) == code
    assert started.killed, "the signal may have reached the launcher alone"
    assert started.left is None, "the check's own code would hide the signal's"


def test_another_error_of_torchrun_is_told(started) -> None:
    started.train = lambda: _raise(RuntimeError("a trainer failed"))
    with pytest.raises(RuntimeError, match="a trainer failed"):
        launch.main([*ONE, "--", *OPTIONS])
    assert started.killed
    assert started.left is None
