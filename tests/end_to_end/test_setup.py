"""`scripts/setup.sh` with a Python that only notes how it was called: when an environment is made, and of what."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/bash
echo "$(basename "$(dirname "$(dirname "$0")")") $*" >> "$CALLS"
case "$*" in
  *find_spec*) exit "${HAS_EVERYTHING:-1}" ;;
  "-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    [ -z "${WITHOUT_PIP:-}" ] || exit 1
    touch "$3/has-pip" ;;
  "-m pip --version") [ -e "$(dirname "$0")/../has-pip" ] ;;
  "-m pip install "*) [ -e "$(dirname "$0")/../has-pip" ] && exit "${PIP_FAILS:-0}" ;;
esac
"""

Setup = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """`setup("dev", HAS_EVERYTHING="0")` -> exit code, what was printed, the calls of Python."""
    repo = tmp_path / "it's a clone"
    (repo / "scripts").mkdir(parents=True)
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt", "constraints-gpu.txt"):
        shutil.copy(REPO / name, repo / name)
    system = tmp_path / "system" / "bin"
    system.mkdir(parents=True)
    (system / "python3").write_text(PYTHON)
    (system / "python3").chmod(0o755)

    def run(*arguments: str, script: str = '. scripts/setup.sh "$@"; echo "PYTHON=$PYTHON"', **extra: str):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        environment = {"PATH": f"{system}:/usr/bin:/bin", "CALLS": str(calls), "HOME": os.environ.get("HOME", "/")}
        child = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script, "bash", *arguments],
            cwd=repo,
            env=environment | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
        )
        return child.returncode, child.stdout, calls.read_text().splitlines() if calls.exists() else []

    return run


def installs(calls: list[str]) -> list[str]:
    return [call for call in calls if "pip install" in call]


def test_a_python_that_has_everything_is_used_as_it_is(setup: Setup) -> None:
    code, output, calls = setup("", HAS_EVERYTHING="0")
    assert code == 0
    assert output.endswith("system/bin/python3\n")
    assert not installs(calls)


def test_an_environment_is_made_once_with_the_pinned_torch_first(setup: Setup) -> None:
    code, output, calls = setup("")
    assert code == 0
    assert output.endswith(".venv/bin/python\n")
    torch, package = installs(calls)
    assert torch.split()[-1].startswith("torch==")
    assert package.endswith("-e " + output.rpartition("PYTHON=")[2].removesuffix("/.venv/bin/python\n"))
    assert not installs(setup("")[2])


def test_run_train_does_not_take_its_own_options_for_an_extra(setup: Setup) -> None:
    line = next(line for line in (REPO / "run_train.sh").read_text().splitlines() if "scripts/setup.sh" in line)
    code, _, calls = setup("--training.steps", "20", script=f"repo=$PWD; {line}")
    assert code == 0
    assert "training" not in "".join(installs(calls))
    assert len(installs(calls)) == 2


def test_an_environment_for_the_tests_serves_training_too(setup: Setup) -> None:
    assert installs(setup("dev")[2])[1].endswith("[dev]")
    assert not installs(setup("")[2])


def test_an_environment_for_training_is_completed_for_the_tests(setup: Setup) -> None:
    setup("")
    assert installs(setup("dev")[2])[1].endswith("[dev]")


def test_changed_requirements_are_installed(setup: Setup) -> None:
    setup("")
    assert installs(setup("", script='echo >> pyproject.toml; . scripts/setup.sh ""')[2])


def test_an_interrupted_installation_is_repeated(setup: Setup) -> None:
    assert setup("", PIP_FAILS="1")[0] != 0
    code, _, calls = setup("")
    assert code == 0
    assert len(installs(calls)) == 2


def test_an_environment_without_pip_is_completed_once_python_can(setup: Setup) -> None:
    code, output, _ = setup("", WITHOUT_PIP="1")
    assert code != 0
    assert "apt-get install python3-venv" in output
    code, _, calls = setup("")
    assert code == 0
    assert len(installs(calls)) == 2


@pytest.mark.parametrize("other", [{}, {"torch": "2.4.1"}, {"torch": "2.14.0"}, {"pydantic": "1.10.2"}])
def test_a_python_with_other_versions_is_passed_over(other: dict[str, str]) -> None:
    """The probe itself in this Python, which has all modules; a version is replaced."""
    text = (REPO / "scripts" / "setup.sh").read_text()
    probe = text[text.index("import importlib.metadata, ") : text.index('"\n  if command -v python3')]
    prelude = (
        "import importlib.metadata; real = importlib.metadata.version\n"
        f"importlib.metadata.version = lambda name: {other!r}.get(name) or real(name)\n"
    )
    program = prelude + probe.replace("$modules", "titan_fp8, torch, pydantic")
    child = subprocess.run([sys.executable, "-c", program, str(REPO)], stderr=subprocess.PIPE, text=True)
    assert (child.returncode, child.stderr) == (1 if other else 0, "")
