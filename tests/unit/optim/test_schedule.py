"""The learning-rate factor against values worked out by hand."""

import math

import pytest
import torch
from torch import nn

from titan_fp8.optim import build_lr_scheduler, build_optimizer, lr_factor
from titan_fp8.optim.config import LRSchedulerSection, OptimizerSection
from titan_fp8.optim.schedule import Phases, plan_phases
from titan_fp8.runtime.errors import UserError


def _factors(steps: int, count: int | None = None, **keys: object) -> list[float]:
    config = LRSchedulerSection(**keys)
    phases = plan_phases(config, steps)
    return [lr_factor(s, phases, config.decay_type, config.min_lr_factor) for s in range(count or steps)]


def test_decay_follows_the_warmup_at_once_when_no_ratio_is_given() -> None:
    # torchtitan 0.2.2: 2 warm-up steps, one stable (the virtual last step), then 1 - k/8
    expected = [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert _factors(10, warmup_steps=2) == pytest.approx(expected)


def test_stable_stretch_lies_between_warmup_and_the_decay_ratio() -> None:
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3 / 4, 2 / 4, 1 / 4]
    assert _factors(10, warmup_steps=2, decay_ratio=0.4) == pytest.approx(expected)


def test_sqrt_decay_is_one_minus_the_root_of_the_progress() -> None:
    tail = _factors(10, warmup_steps=2, decay_ratio=0.4, decay_type="sqrt")[-3:]
    assert tail == pytest.approx([0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])


def test_cosine_decay_follows_half_a_period() -> None:
    tail = _factors(10, warmup_steps=2, decay_ratio=0.4, decay_type="cosine")[-3:]
    assert tail == pytest.approx([0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])


def test_decay_ends_in_the_minimum_factor_and_stays_there() -> None:
    factors = _factors(10, 15, warmup_steps=0, decay_ratio=0.2, min_lr_factor=0.1)
    assert factors[9:] == pytest.approx([0.55, 0.1, 0.1, 0.1, 0.1, 0.1])


def test_total_steps_sets_the_length_instead_of_the_training() -> None:
    assert _factors(4, warmup_steps=2, total_steps=10) == pytest.approx([0.5, 1.0, 1.0, 7 / 8])


def test_training_past_total_steps_never_has_a_negative_rate() -> None:
    assert _factors(8, warmup_steps=0, total_steps=4) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0])


def test_warmup_longer_than_the_training_is_cut_to_it() -> None:
    assert plan_phases(LRSchedulerSection(warmup_steps=200), 4) == Phases(4, 1, 0)
    assert _factors(4, warmup_steps=200) == [0.25, 0.5, 0.75, 1.0]


def test_decay_that_reaches_into_the_warmup_starts_after_it() -> None:
    assert plan_phases(LRSchedulerSection(warmup_steps=6, decay_ratio=0.9), 10) == Phases(6, 1, 4)


def test_decay_ratio_zero_never_decays() -> None:
    assert _factors(5, 8, warmup_steps=1, decay_ratio=0.0) == [1.0] * 8


def _optimizer(lr: float = 0.5):
    return build_optimizer([nn.Linear(2, 2)], OptimizerSection(lr=lr))


def test_scheduler_sets_the_rate_of_every_group_before_the_first_step() -> None:
    optimizers = _optimizer()
    scheduler = build_lr_scheduler(optimizers, LRSchedulerSection(warmup_steps=2), 10)
    seen = []
    for _ in range(4):
        assert scheduler.lr == optimizers.param_groups[0]["lr"]
        seen.append(scheduler.lr)
        scheduler.step()
    assert seen == pytest.approx([0.25, 0.5, 0.5, 0.5 * 7 / 8])


def test_scheduler_still_drives_an_optimizer_that_has_loaded_a_state() -> None:
    optimizers = _optimizer()
    scheduler = build_lr_scheduler(optimizers, LRSchedulerSection(warmup_steps=2), 10)
    optimizers.load_state_dict(optimizers.state_dict())
    scheduler.step()
    assert optimizers.param_groups[0]["lr"] == 0.5


def test_resumed_schedule_takes_its_peak_and_length_from_the_configuration() -> None:
    first = build_lr_scheduler(_optimizer(), LRSchedulerSection(warmup_steps=0), 10)
    for _ in range(5):
        first.step()
    optimizers = _optimizer(lr=2.0)
    resumed = build_lr_scheduler(optimizers, LRSchedulerSection(warmup_steps=0), 20)
    resumed.load_state_dict(first.state_dict())
    assert optimizers.param_groups[0]["lr"] == pytest.approx(2.0 * 15 / 20)


def test_state_without_a_step_is_refused() -> None:
    scheduler = build_lr_scheduler(_optimizer(), LRSchedulerSection(), 10)
    with pytest.raises(UserError, match="lr_scheduler"):
        scheduler.load_state_dict({"last_epoch": torch.tensor(3)})
