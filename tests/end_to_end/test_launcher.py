"""How a command of several processes ends before they train: nothing stays, and nobody but the check says anything."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import REPO, TINY, command_environment

WITHIN_S = 20


def _processes(folder: Path) -> list[str]:
    """The commands of all processes that are told of a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if str(folder) in command:
            found.append(command)
    return found


def _until(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + WITHIN_S
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_trainers_start_ends_all_processes_without_a_trace(
    tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    (tmp_path / "defaults.toml").touch()
    environment = command_environment(NGPU="2", CONFIG_FILE=str(tmp_path / "defaults.toml"))
    command = ["bash", str(REPO / "run_train.sh"), "--job.dump_folder", str(folder), *TINY]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=REPO, env=environment, **options) as launcher:
        trainers = lambda: [line for line in _processes(folder) if "titan_fp8.train" in line]  # noqa: E731
        assert _until(lambda: len(trainers()) == 2), _processes(folder)
        time.sleep(0.5)  # Python itself would trace an interrupt of its own start
        launcher.send_signal(number)
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + number, output
    assert "Traceback" not in output
    assert _until(lambda: not _processes(folder)), _processes(folder)
    assert not folder.exists()


def test_a_mistake_that_only_the_model_shows_is_answered_once_and_nothing_stays(run_shell) -> None:
    filters = ["--model.converters", "quantize.linear.float8", "--quantize.linear.float8.filter_fqns", "no_such_linear"]
    result = run_shell(*filters, NGPU="2")
    assert result.code == 2
    assert result.output.count("no_such_linear") == 1
    assert not any(word in result.output for word in ("Traceback", "torch.distributed", "[rank"))
    assert not result.folder.exists()
    assert _until(lambda: not _processes(result.folder)), _processes(result.folder)
