"""Killed, resumed, finished and extended runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.end_to_end.conftest import FLOAT8, TINY, command_environment
from titan_fp8.trainer import Trainer

CHECKPOINTS = ["--checkpoint.enable", "--checkpoint.interval", "2"]
FULL_LAST = ["--checkpoint.no_last_save_model_only"]
FULL_START = ["--checkpoint.no_initial_load_model_only"]


def _train_until_step_and_kill(folder: Path, step: int, *options: str) -> None:
    """Start a run, wait until the checkpoint of `step` is complete, and end it the hard way."""
    command = [sys.executable, "-m", "titan_fp8.train", "--job.dump_folder", str(folder), *TINY, *options]
    child = subprocess.Popen(command, env=command_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (folder / "checkpoint" / f"step-{step}").exists():
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


def test_an_interrupted_run_ends_with_one_line_and_can_go_on(run_here, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = Trainer._validate

    def interrupted(trainer: Trainer, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        validate(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", interrupted)
        result = run_here(*CHECKPOINTS, "--checkpoint.async_mode", "async")
    assert result.code == 130
    assert "interrupted" in result.output
    assert "Traceback" not in result.output
    assert run_here(*CHECKPOINTS, "--checkpoint.async_mode", "async").code == 0


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_killed_and_resumed_run_repeats_the_uninterrupted_one(run_here, tmp_path: Path, mode: str) -> None:
    options = ["--checkpoint.enable", "--checkpoint.interval", "4", *FLOAT8, "--training.steps", "20"]
    options += ["--checkpoint.async_mode", mode]
    whole = run_here(*options, folder="whole")
    assert whole.code == 0, whole.output
    _train_until_step_and_kill(tmp_path / "killed", 4, *options)
    resumed = run_here(*options, folder="killed")
    assert resumed.code == 0, resumed.output
    assert [line["step"] for line in resumed.lines] == list(range(1, 21))
    for key in ("loss", "grad_norm", "lr"):
        assert [line[key] for line in resumed.lines] == [line[key] for line in whole.lines]


def test_a_finished_run_started_again_says_so_and_changes_nothing(run_here) -> None:
    first = run_here(*CHECKPOINTS)
    before = (first.folder / "metrics.jsonl").read_bytes()
    again = run_here(*CHECKPOINTS)
    assert again.code == 0
    assert "finished already" in again.output
    assert (first.folder / "metrics.jsonl").read_bytes() == before


def test_a_loaded_checkpoint_with_nothing_left_to_train_is_said_and_changes_nothing(run_here) -> None:
    first = run_here(*CHECKPOINTS, *FULL_LAST, folder="first")
    before = (first.folder / "metrics.jsonl").read_bytes()
    saved = str(first.folder / "checkpoint" / "step-6")
    again = run_here(*CHECKPOINTS, "--checkpoint.load_step", "6", folder="first")
    other = run_here(*CHECKPOINTS, "--checkpoint.initial_load_path", saved, *FULL_START, folder="other")
    for result in (again, other):
        assert result.code == 0
        assert "nothing to train" in result.output
        assert "trained 0 steps" not in result.output
    assert (first.folder / "metrics.jsonl").read_bytes() == before


def test_more_steps_go_on_from_the_newest_full_checkpoint(run_here) -> None:
    short = run_here(*CHECKPOINTS, "--training.steps", "5", "--lr_scheduler.total_steps", "8", folder="run")
    assert short.code == 0, short.output
    longer = run_here(*CHECKPOINTS, "--training.steps", "8", "--lr_scheduler.total_steps", "8", folder="run")
    assert longer.code == 0, longer.output
    whole = run_here("--training.steps", "8", "--lr_scheduler.total_steps", "8", folder="whole")
    assert longer.losses == whole.losses
    assert "step 4" in longer.output or "step-4" in longer.output


def test_a_fresh_start_keeps_the_old_metrics_aside(run_here) -> None:
    run_here("--training.steps", "2")
    second = run_here("--training.steps", "3")
    assert len(second.lines) == 3
    assert len((second.folder / "metrics.jsonl.1").read_text().splitlines()) == 2


def test_float8_and_bf16_checkpoints_are_interchangeable_when_asked_by_name(run_here) -> None:
    run_here(*CHECKPOINTS, *FULL_LAST, "--training.steps", "4")
    refused = run_here(*CHECKPOINTS, *FULL_LAST, *FLOAT8, "--training.steps", "6")
    assert refused.code != 0
    assert "recipe" in refused.output
    assert "Traceback" not in refused.output
    allowed = run_here(*CHECKPOINTS, *FULL_LAST, *FLOAT8, "--training.steps", "6", "--checkpoint.allow_recipe_change")
    assert allowed.code == 0, allowed.output
    assert [line["step"] for line in allowed.lines] == [1, 2, 3, 4, 5, 6]


def test_running_means_are_saved_in_their_dtype_and_loaded_in_the_one_asked_for(run_here) -> None:
    whole = run_here(*CHECKPOINTS, *FULL_LAST, "--training.steps", "8", folder="whole")
    for steps, dtype in ((4, "bfloat16"), (6, None), (8, "bfloat16")):
        options = [] if dtype is None else ["--optimizer.state_dtype", dtype]
        result = run_here(*CHECKPOINTS, *FULL_LAST, "--training.steps", str(steps), *options)
        assert result.code == 0, result.output
        assert [line["step"] for line in result.lines] == list(range(1, steps + 1))
        metadata = FileSystemReader(result.folder / "checkpoint" / f"step-{steps}").read_metadata()
        means = {key: entry for key, entry in metadata.state_dict_metadata.items() if ".exp_avg" in key}
        assert {entry.properties.dtype for entry in means.values()} == {getattr(torch, dtype or "float32")}
    for ours, theirs in zip(result.lines, whole.lines, strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 0.05


def test_a_checkpoint_of_another_shape_is_one_clear_error(run_here) -> None:
    first = run_here(*CHECKPOINTS, *FULL_LAST, "--training.steps", "4")
    other = run_here(*CHECKPOINTS, *FULL_LAST, "--training.steps", "6", "--model.overrides.n_layers", "3")
    assert other.code != 0
    assert "n_layers" in other.output
    assert "Traceback" not in other.output
    assert (first.folder / "checkpoint" / "step-4").is_dir()


def test_a_seed_checkpoint_starts_runs_from_the_same_weights(run_here) -> None:
    seed = run_here("--checkpoint.enable", "--checkpoint.create_seed_checkpoint", folder="seeded")
    assert seed.code == 0, seed.output
    started = run_here("--checkpoint.enable", "--training.steps", "2", "--debug.seed", "0", folder="seeded")
    plain = run_here("--training.steps", "2", folder="plain")
    assert started.losses == plain.losses


PARTS = {
    "expert_bias": ["--model.overrides.balance_rate", "0", "--model.overrides.router_bias", "false"],
    "shared_experts": ["--model.overrides.n_shared_experts", "0"],
}


@pytest.mark.parametrize(("part", "without"), PARTS.items(), ids=PARTS)
def test_following_the_messages_a_model_that_lost_a_part_trains_on(run_here, part: str, without: list[str]) -> None:
    options = ["--model.name", "llama4", "--checkpoint.enable", "--checkpoint.interval", "1", *FULL_LAST]
    first = run_here(*options, "--training.steps", "1")
    assert first.code == 0, first.output
    before = _files_with_times(first.folder)
    options += without
    for remedy in (["--checkpoint.allow_model_change"], ["--checkpoint.exclude_from_loading", part]):
        refused = run_here(*options, "--training.steps", "2")
        assert refused.code == 2, refused.output
        assert remedy[0].removeprefix("--") in refused.output
        assert "another model" in refused.output or f"layers.1.moe.{part}" in refused.output
        assert _files_with_times(first.folder) == before
        options += remedy
    for steps in (2, 3):  # the second goes on from what the first has saved
        result = run_here(*options, "--training.steps", str(steps))
        assert result.code == 0, result.output
        assert [line["step"] for line in result.lines] == list(range(1, steps + 1))


def test_tensors_that_do_not_fit_are_refused_before_there_are_ranks(run_here, run_shell) -> None:
    options = ["--model.name", "llama4", "--checkpoint.enable", "--checkpoint.interval", "1", *FULL_LAST]
    assert run_here(*options, "--training.steps", "1").code == 0
    options += ["--training.steps", "2", *PARTS["shared_experts"], "--checkpoint.allow_model_change"]
    refused = run_shell(*options, NGPU="2")
    assert refused.code == 2, refused.output
    assert refused.output.count("in the checkpoint, but not in this model:") == 1
    assert "Traceback" not in refused.output
    assert "rank" not in refused.output


def _files_with_times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
