"""The metrics of a run: what a line says, and that each step stands once however often the run is killed."""

import json
import logging
import math
import re

import pytest
import torch

from titan_fp8.observability.config import MetricsSection
from titan_fp8.observability.json_lines import JsonLinesFile, read_json_lines
from titan_fp8.observability.metrics import MetricsLogger
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.logging import logger as package_logger

ANSI = re.compile(r"\033\[[0-9;]*m")


class Clock:
    """A clock that stands still until it is told to advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def console():
    """The messages that the package logs."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level = package_logger.level
    package_logger.setLevel(logging.INFO)
    package_logger.addHandler(handler)
    yield messages
    package_logger.removeHandler(handler)
    package_logger.setLevel(level)


def make_logger(folder, clock, *, log_freq=10, total_steps=100, **arguments):
    config = MetricsSection(log_freq=log_freq)
    arguments = {"device": torch.device("cpu"), "rank": 0, "world_size": 1} | arguments
    return MetricsLogger(config, folder, total_steps=total_steps, clock=clock, **arguments)


def train(metrics, clock, steps, *, tokens_a_step=100, seconds_a_step=2.0, loss=lambda step: 1 / step):
    """Do what a trainer does in `steps`, an iterable of consecutive step numbers."""
    tokens = 0
    for step in steps:
        clock.now += seconds_a_step
        tokens += tokens_a_step
        if metrics.should_log(step):
            metrics.log_step(step, loss=loss(step), grad_norm=0.5, lr=1e-3, tokens=tokens)
            tokens = 0


def logged(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def logged_steps(folder, name="metrics.jsonl"):
    return [record["step"] for record in logged(folder, name)]


def test_the_first_step_the_last_step_and_every_log_freq_th_have_a_line(tmp_path, clock):
    metrics = make_logger(tmp_path, clock, log_freq=4, total_steps=10)
    train(metrics, clock, range(1, 11))
    metrics.close()
    assert logged_steps(tmp_path) == [1, 4, 8, 10]


def test_a_line_has_the_promised_keys_and_the_unrounded_loss(tmp_path, clock):
    metrics = make_logger(tmp_path, clock, total_steps=1)
    train(metrics, clock, [1], loss=lambda step: 1 / 3)
    metrics.close()
    (record,) = logged(tmp_path)
    assert list(record)[:8] == ["step", "loss", "grad_norm", "lr", "tps", "tflops", "mfu", "memory_gib"]
    assert record["loss"] == 1 / 3
    assert record["memory_gib"] > 0.01


def test_throughput_is_tokens_since_the_last_line_a_second_and_device(tmp_path, clock):
    metrics = make_logger(tmp_path, clock, log_freq=5, total_steps=10, world_size=4)
    train(metrics, clock, range(1, 11), tokens_a_step=800, seconds_a_step=2.0)
    metrics.close()
    assert [record["tps"] for record in logged(tmp_path)] == pytest.approx([100.0, 100.0, 100.0])
    assert [record["step_time_s"] for record in logged(tmp_path)] == pytest.approx([2.0, 2.0, 2.0])


def test_mfu_is_the_share_of_the_peak_in_per_cent(tmp_path, clock):
    metrics = make_logger(tmp_path, clock, total_steps=1, flops_per_token=6e12, peak_flops=1000e12)
    train(metrics, clock, [1], tokens_a_step=100, seconds_a_step=2.0)
    metrics.close()
    (record,) = logged(tmp_path)
    assert record["tflops"] == pytest.approx(300.0)
    assert record["mfu"] == pytest.approx(30.0)


def test_mfu_is_null_and_not_guessed_when_the_peak_is_unknown(tmp_path, clock, console):
    metrics = make_logger(tmp_path, clock, total_steps=1, flops_per_token=6e12)
    train(metrics, clock, [1])
    metrics.close()
    assert logged(tmp_path)[0]["mfu"] is None
    assert logged(tmp_path)[0]["tflops"] is not None
    assert "MFU n/a" in console[-1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_null_in_the_file_and_itself_on_the_console(tmp_path, clock, console, value):
    metrics = make_logger(tmp_path, clock, total_steps=1)
    metrics.log_step(1, loss=value, grad_norm=value, lr=1e-3, tokens=10)
    metrics.close()
    assert logged(tmp_path)[0]["loss"] is None
    assert logged(tmp_path)[0]["grad_norm"] is None
    assert re.search(rf"loss +{value} +grad_norm +{value}", console[-1])


def test_untimed_work_does_not_lower_the_throughput(tmp_path, clock):
    metrics = make_logger(tmp_path, clock, log_freq=1, total_steps=3)
    train(metrics, clock, [1])
    with metrics.untimed():
        clock.now += 500.0
    train(metrics, clock, [2, 3])
    metrics.close()
    assert [record["tps"] for record in logged(tmp_path)] == pytest.approx([50.0, 50.0, 50.0])


def test_what_a_gpu_still_had_to_do_before_untimed_work_is_timed(tmp_path, clock, monkeypatch):
    def finish() -> None:
        clock.now += 500.0

    metrics = make_logger(tmp_path, clock, log_freq=1, total_steps=2)
    train(metrics, clock, [1])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", finish)
    with metrics.untimed():
        clock.now += 7.0
    monkeypatch.undo()
    train(metrics, clock, [2])
    metrics.close()
    first, second = (record["step_time_s"] for record in logged(tmp_path))
    assert second == pytest.approx(first + 500.0)


def test_extra_numbers_stand_in_the_line(tmp_path, clock):
    metrics = make_logger(tmp_path, clock)
    metrics.log_step(1, loss=1.0, grad_norm=1.0, lr=0.1, tokens=10, extra={"nonfinite_steps": 2})
    metrics.close()
    assert logged(tmp_path)[0]["nonfinite_steps"] == 2


def test_the_eta_follows_the_pace_after_the_first_line(tmp_path, clock, console):
    metrics = make_logger(tmp_path, clock, log_freq=10, total_steps=30)
    clock.now += 300.0  # the first step compiles
    train(metrics, clock, [1])
    assert "ETA n/a" in console[-1]
    train(metrics, clock, range(2, 11), seconds_a_step=3.0)
    assert "ETA 0:01:00" in console[-1]
    train(metrics, clock, range(11, 31))
    assert "ETA 0:00:00" in console[-1]
    metrics.close()


def test_colours_are_for_terminals_and_can_be_turned_off(tmp_path, clock, console, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    for disabled in (False, True):
        config = MetricsSection(disable_color_printing=disabled)
        metrics = MetricsLogger(config, tmp_path, device=torch.device("cpu"), total_steps=5, clock=clock)
        train(metrics, clock, [1])
        metrics.close()
        assert bool(ANSI.search(console[-1])) is not disabled
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    metrics = make_logger(tmp_path, clock)
    train(metrics, clock, [1])
    metrics.close()
    assert not ANSI.search(console[-1])


def test_colours_change_no_text(tmp_path, clock, console, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for disabled in (False, True):
        config = MetricsSection(disable_color_printing=disabled)
        metrics = MetricsLogger(config, tmp_path, device=torch.device("cpu"), total_steps=5, clock=clock)
        metrics.log_step(1, loss=1.0, grad_norm=1.0, lr=0.1, tokens=10)
        metrics.close()
    step_lines = [message for message in console if "grad_norm" in message]
    without_memory = [re.sub(r"mem [\d.]+", "mem", ANSI.sub("", line)) for line in step_lines]
    assert without_memory[0] == without_memory[1]


def test_only_rank_0_writes_files_and_every_rank_speaks(tmp_path, clock, console):
    metrics = make_logger(tmp_path, clock, rank=1, world_size=2)
    train(metrics, clock, [1])
    metrics.log_validation(1, 2.0, 100)
    metrics.flush()
    metrics.close()
    assert list(tmp_path.iterdir()) == []
    assert console[-2].startswith("step")


def test_a_killed_and_resumed_run_has_each_step_once_and_the_lines_of_an_uninterrupted_one(tmp_path, clock):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    metrics = make_logger(whole, clock, total_steps=40)
    train(metrics, clock, range(1, 41))
    metrics.close()

    metrics = make_logger(parts, clock, total_steps=40)
    train(metrics, clock, range(1, 34))  # killed after step 33; the newest checkpoint is of step 20
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 34, "loss": 0.')
    metrics = make_logger(parts, clock, total_steps=40, resume_step=20)
    train(metrics, clock, range(21, 41))
    metrics.close()

    deterministic = [(record["step"], record["loss"], record["lr"]) for record in logged(parts)]
    assert deterministic == [(record["step"], record["loss"], record["lr"]) for record in logged(whole)]


def test_a_fresh_start_moves_the_old_metrics_aside(tmp_path, clock):
    for _ in range(3):
        metrics = make_logger(tmp_path, clock)
        train(metrics, clock, range(1, 21))
        metrics.log_validation(20, 1.5, 1000)
        metrics.close()
    for suffix in ("", ".1", ".2"):
        assert logged_steps(tmp_path, f"metrics.jsonl{suffix}") == [1, 10, 20]
        assert logged_steps(tmp_path, f"validation.jsonl{suffix}") == [20]


def test_a_start_that_died_before_its_first_line_leaves_nothing_to_move(tmp_path, clock):
    make_logger(tmp_path, clock).close()
    make_logger(tmp_path, clock).close()
    assert sorted(path.name for path in tmp_path.glob("metrics*")) == ["metrics.jsonl"]


def test_validations_have_a_file_of_their_own_and_stand_once_after_a_resume(tmp_path, clock):
    metrics = make_logger(tmp_path, clock)
    for step in (10, 20, 30):
        metrics.log_validation(step, 3.0, 640)
    metrics = make_logger(tmp_path, clock, resume_step=20)
    metrics.log_validation(30, math.nan, 640)
    metrics.close()
    assert logged(tmp_path, "validation.jsonl") == [
        {"step": 10, "validation_loss": 3.0, "validation_tokens": 640},
        {"step": 20, "validation_loss": 3.0, "validation_tokens": 640},
        {"step": 30, "validation_loss": None, "validation_tokens": 640},
    ]
    assert logged(tmp_path) == []


def test_flush_makes_both_files_durable(tmp_path, clock, monkeypatch):
    metrics = make_logger(tmp_path, clock)
    metrics.log_validation(1, 3.0, 640)
    flushed = []
    monkeypatch.setattr(JsonLinesFile, "flush", lambda self: flushed.append(self.path.name))
    metrics.flush()
    assert flushed == ["metrics.jsonl", "validation.jsonl"]
    metrics.close()


def test_logging_a_step_twice_is_refused(tmp_path, clock):
    metrics = make_logger(tmp_path, clock, resume_step=20)
    with pytest.raises(AssertionError, match="step 20 was logged already"):
        metrics.log_step(20, loss=1.0, grad_norm=1.0, lr=0.1, tokens=10)
    metrics.close()


def test_damaged_metrics_stop_a_resume_and_are_left_as_they_are(tmp_path, clock):
    text = '{"step": 1}\nnoise\n{"step": 10}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        make_logger(tmp_path, clock, resume_step=10)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_the_files_can_be_read_while_the_run_goes_on(tmp_path, clock):
    metrics = make_logger(tmp_path, clock)
    train(metrics, clock, range(1, 11))
    assert [record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 10]
    metrics.close()


def test_closing_twice_is_harmless(tmp_path, clock):
    metrics = make_logger(tmp_path, clock)
    metrics.close()
    metrics.close()
