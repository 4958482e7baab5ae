"""The closing summary says what the run did and names only files that are there."""

import math

import torch

from titan_fp8.observability.config import MetricsSection
from titan_fp8.observability.metrics import MetricsLogger
from titan_fp8.observability.summary import format_summary


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(folder, *, steps, resume_step=0, losses=None):
    """Train `steps` of 20 at 100 tokens each: the first takes 100 s (it compiles), the others 2 s."""
    clock = Clock()
    metrics = MetricsLogger(
        MetricsSection(log_freq=5),
        folder,
        device=torch.device("cpu"),
        total_steps=20,
        resume_step=resume_step,
        clock=clock,
    )
    tokens = 0
    for index, step in enumerate(steps):
        clock.now += 2.0 if index else 100.0
        tokens += 100
        if metrics.should_log(step):
            loss = (losses or {}).get(step, 10 / step)
            metrics.log_step(step, loss=loss, grad_norm=1.0, lr=0.1, tokens=tokens)
            tokens = 0
    summary = metrics.summary()
    metrics.close()
    return summary


def test_the_mean_throughput_leaves_out_the_first_line(tmp_path):
    summary = run(tmp_path, steps=range(1, 21))
    assert summary.mean_tps == 50.0
    assert summary.wall_time_s == 138.0


def test_a_run_of_one_line_reports_the_throughput_of_that_line(tmp_path):
    assert run(tmp_path, steps=[1]).mean_tps == 1.0


def test_a_resumed_run_still_knows_the_loss_of_step_1(tmp_path):
    run(tmp_path, steps=range(1, 11))
    summary = run(tmp_path, steps=range(11, 21), resume_step=10)
    assert (summary.first_step, summary.first_loss) == (1, 10.0)
    text = format_summary(summary, tmp_path)
    assert text.startswith("trained 10 steps (11 to 20 of 20) in 0:01:58")
    assert "10.0000 (step 1) -> 0.5000 (step 20)" in text


def test_a_run_that_stopped_early_says_so(tmp_path):
    assert format_summary(run(tmp_path, steps=range(1, 11)), tmp_path).startswith("trained 10 steps of 20 in 0:01:58")


def test_a_final_loss_that_is_nan_is_shown_as_nan(tmp_path):
    summary = run(tmp_path, steps=range(1, 21), losses={20: math.nan})
    assert "-> nan (step 20)" in format_summary(summary, tmp_path)


def test_a_process_that_trained_nothing_has_a_summary_too(tmp_path):
    assert format_summary(run(tmp_path, steps=[]), tmp_path).startswith("trained 0 steps")


def test_files_are_named_when_they_are_there_and_under_the_names_they_have(tmp_path):
    for step in (5, 20, 10):
        (tmp_path / "saved" / f"step-{step}").mkdir(parents=True)
    (tmp_path / "saved" / "step-999.incomplete").mkdir()
    (tmp_path / "tb").mkdir()
    text = format_summary(run(tmp_path, steps=range(1, 21)), tmp_path, renamed={"checkpoint": "saved"})
    assert str(tmp_path) in text
    assert "saved/step-20 " in text
    assert "tensorboard" in text
    assert "metrics.jsonl" in text
    assert "profile_traces" not in text
    assert "config.toml" not in text
