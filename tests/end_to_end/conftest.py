"""Runs of the trainer: in this process where one rank is enough, through `run_train.sh` where several are needed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from titan_fp8 import train

REPO = Path(__file__).resolve().parents[2]
TINY = [
    *("--model.flavor", "debugmodel", "--model.overrides.dim", "64", "--model.overrides.n_layers", "2"),
    *("--model.overrides.n_heads", "4", "--model.overrides.vocab_size", "320"),
    *("--training.seq_len", "64", "--training.local_batch_size", "2", "--training.steps", "6"),
    *("--lr_scheduler.warmup_steps", "2", "--metrics.log_freq", "1", "--debug.seed", "0"),
    *("--activation_checkpoint.mode", "none"),
]
FLOAT8 = ["--model.converters", "quantize.linear.float8", "--quantize.linear.float8.emulate"]


@dataclass(frozen=True)
class Result:
    """What a run left: exit code, all that it printed, and its folder."""

    code: int
    output: str
    folder: Path

    @property
    def lines(self) -> list[dict]:
        """The run's metrics, one dict a logged step."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float | None]:
        """Loss by logged step."""
        return [line["loss"] for line in self.lines]


def command_environment(**extra: str) -> dict[str, str]:
    """The environment of a child process that trains on this checkout with this Python."""
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        **os.environ,
        "PATH": search,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **extra,
    }


@pytest.fixture
def run_shell(tmp_path: Path) -> Callable[..., Result]:
    """`run_train.sh` with a tiny model in a folder of the test's own."""

    def run(
        *options: str, tiny: bool = True, folder: str = "run", timeout_s: float = 150, **environment: str
    ) -> Result:
        dump = tmp_path / folder
        if "CONFIG_FILE" not in environment:
            (tmp_path / "defaults.toml").touch()
            environment["CONFIG_FILE"] = str(tmp_path / "defaults.toml")
        arguments = ["--job.dump_folder", str(dump), *(TINY if tiny else []), *options]
        child = subprocess.run(
            ["bash", str(REPO / "run_train.sh"), *arguments],
            cwd=REPO,
            env=command_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return Result(child.returncode, child.stdout, dump)

    return run


@pytest.fixture
def run_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """The trainer's `main` in this process: a world of one on the CPU."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(*options: str, folder: str = "run") -> Result:
        dump = tmp_path / folder
        capfd.readouterr()
        code = train.main(["--job.dump_folder", str(dump), *TINY, *options])
        captured = capfd.readouterr()
        return Result(code, captured.out + captured.err, dump)

    return run
