"""TensorBoard and Weights & Biases over starts, restarts and ranks."""

import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest

from titan_fp8.observability.config import MetricsSection
from titan_fp8.observability.trackers import TensorBoardTracker, WandbTracker, build_trackers
from titan_fp8.runtime.errors import UserError


def log_losses(folder, steps, *, resume_step=0, value=1.0):
    tracker = TensorBoardTracker(folder, resume_step=resume_step)
    for step in steps:
        tracker.log(step, {"step": step, "loss": value, "mfu": None})
    tracker.close()


def scalars(folder, tag="loss"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), purge_orphaned_data=True)
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_each_number_is_a_curve_and_null_is_left_out(tmp_path):
    tracker = TensorBoardTracker(tmp_path, resume_step=0)
    tracker.log(1, {"step": 1, "loss": 2.5, "grad_norm": math.nan, "mfu": None})
    tracker.log(2, {"step": 2, "loss": 1.5, "grad_norm": 1.0, "mfu": None})
    tracker.close()
    assert scalars(tmp_path) == [(1, 2.5), (2, 1.5)]
    assert scalars(tmp_path, "grad_norm") == [(2, 1.0)]
    with pytest.raises(KeyError):
        scalars(tmp_path, "mfu")


def test_a_resume_hides_what_was_logged_after_the_checkpoint(tmp_path, monkeypatch):
    log_losses(tmp_path, [1, 10, 20, 30], value=1.0)
    # Event files are read in the order of their names, which begin with the second they were made in.
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.0000000001.host.1.0")
    log_losses(tmp_path, [30, 40], resume_step=20, value=2.0)
    assert scalars(tmp_path) == [(1, 1.0), (10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


def test_a_fresh_start_keeps_the_old_curves_apart(tmp_path):
    for value in (1.0, 2.0, 3.0):
        log_losses(tmp_path, [1, 2], value=value)
    assert scalars(tmp_path) == [(1, 3.0), (2, 3.0)]
    assert scalars(tmp_path / "previous_1") == [(1, 1.0), (2, 1.0)]
    assert scalars(tmp_path / "previous_2") == [(1, 2.0), (2, 2.0)]


def test_flush_puts_the_events_on_the_disk_while_the_run_goes_on(tmp_path):
    tracker = TensorBoardTracker(tmp_path, resume_step=0)
    tracker.log(1, {"loss": 1.0})
    tracker.flush()
    assert scalars(tmp_path) == [(1, 1.0)]
    tracker.close()


@pytest.mark.parametrize(
    ("rank", "all_ranks", "folder"), [(0, False, "ev"), (0, True, "ev/rank_0"), (3, True, "ev/rank_3")]
)
def test_event_files_go_to_the_folder_of_the_section_and_of_the_rank(tmp_path, rank, all_ranks, folder):
    config = MetricsSection(enable_tensorboard=True, save_tb_folder="ev", save_for_all_ranks=all_ranks)
    for tracker in build_trackers(config, tmp_path, rank=rank, resume_step=0):
        tracker.close()
    assert [path.name.split(".")[2] for path in (tmp_path / folder).iterdir()] == ["tfevents"]


def test_other_ranks_are_silent_unless_asked(tmp_path):
    assert build_trackers(MetricsSection(enable_tensorboard=True), tmp_path, rank=1, resume_step=0) == []
    assert list(tmp_path.iterdir()) == []


def test_without_trackers_there_are_none(tmp_path):
    assert build_trackers(MetricsSection(), tmp_path, rank=0, resume_step=0) == []


def test_wandb_without_its_package_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"enable_wandb.*pip install 'titan-fp8\[wandb\]'"):
        WandbTracker(tmp_path, rank_name=None, resume_step=0)


def test_the_section_refuses_wandb_without_its_package_before_any_work(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = MetricsSection(enable_wandb=True).problems()
    assert problem.key == "enable_wandb"
    assert "pip install 'titan-fp8[wandb]'" in problem.text
    assert [*MetricsSection().problems()] == []


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package that keeps what it was given."""
    calls = SimpleNamespace(init=[], log=[])

    def init(**arguments):
        calls.init.append(arguments)
        name = arguments["id"] or f"id{len(calls.init)}"
        return SimpleNamespace(id=name, log=lambda values, step: calls.log.append((step, values)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for variable in ("WANDB_PROJECT", "WANDB_TEAM", "WANDB_RUN_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return calls


def test_wandb_gets_the_numbers_and_the_configuration_of_the_folder(tmp_path, wandb):
    (tmp_path / "config.toml").write_text("[training]\nsteps = 3\n")
    tracker = WandbTracker(tmp_path, rank_name=None, resume_step=0)
    tracker.log(5, {"step": 5, "loss": 1.0, "mfu": None})
    tracker.close()
    assert wandb.init[0]["config"] == {"training": {"steps": 3}}
    assert wandb.init[0]["project"] == "titan_fp8"
    assert wandb.log == [(5, {"loss": 1.0})]


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_a_fresh_one_does_not(tmp_path, wandb):
    WandbTracker(tmp_path, rank_name=None, resume_step=0)
    WandbTracker(tmp_path, rank_name=None, resume_step=10)
    WandbTracker(tmp_path, rank_name=None, resume_step=0)
    assert [(call["id"], call["resume"]) for call in wandb.init] == [(None, None), ("id1", "allow"), (None, None)]
