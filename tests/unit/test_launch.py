"""Check first, then torchrun. With real processes: tests/end_to_end/test_run_train.py."""

import importlib
import os
import sys
from types import SimpleNamespace

import pytest

from titan_fp8 import launch

OPTIONS = ["--job.config_file", "a job.toml", "--training.steps", "3", "--", "x"]


class Ended(Exception):
    pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What is started, with which WORLD_SIZE; `wait` is how the check ends."""
    found = SimpleNamespace(check=None, torchrun=None, worlds=[], wait=lambda: 0, killed=False)

    def popen(command: list[str]) -> SimpleNamespace:
        found.check = command
        found.worlds.append(os.environ.get("WORLD_SIZE"))
        return SimpleNamespace(wait=lambda: found.wait(), kill=lambda: setattr(found, "killed", True))

    def torchrun(arguments: list[str]) -> None:
        found.torchrun = arguments
        found.worlds.append(os.environ.get("WORLD_SIZE"))

    def ended(code: int) -> None:
        raise Ended(code)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    monkeypatch.setattr(launch.importlib, "import_module", lambda name: SimpleNamespace(main=torchrun))
    monkeypatch.setattr(launch.os, "_exit", ended)
    return found


def test_a_job_without_mistakes_is_launched_with_its_options_as_they_are(started) -> None:
    assert launch.main(["--nproc_per_node", "2", "--", *OPTIONS]) == 0
    assert started.check == [sys.executable, "-m", "titan_fp8.cli.main", "check", *OPTIONS]
    assert started.torchrun == ["--nproc_per_node", "2", "-m", "titan_fp8.train", *OPTIONS]
    assert started.worlds == ["2", None], "torchrun's processes get theirs from it"
    assert not started.killed
    assert importlib.util.find_spec(launch.TORCHRUN)
    assert importlib.util.find_spec(launch.TRAINER)


def _interrupt() -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("wait", "code"), [(lambda: 2, 2), (lambda: 1, 1), (lambda: -15, 143), (_interrupt, 130)])
def test_nothing_is_launched_after_a_check_that_did_not_end_well(started, wait, code: int) -> None:
    started.wait = wait
    with pytest.raises(Ended) as ended:
        launch.main(["--nproc_per_node", "2", "--", *OPTIONS])
    assert ended.value.args == (code,)
    assert started.torchrun is None
    assert started.killed, "an interrupt may have reached the launcher alone"
