"""The learning rate over time: a linear warm-up, a stable stretch, a decay.

    factor
     1.0       ________________
              /                \\
             /                  \\          linear; `sqrt` falls fast at first, `cosine` slowly
            /                    \\
     0.0   /                      \\___    min_lr_factor
           | warm-up |  stable  | decay |

The learning rate of a step is `optimizer.lr * factor(step)`, and the factor depends on the step alone. So the state of
a schedule is one integer, a resumed run needs nothing else, and what the configuration says (a new peak, more steps) is
what a resumed run does.

Steps are counted from 0 here: the first optimizer step runs at `factor(0) = 1 / warmup_steps`, never at 0. The decay
aims at a step one past the end, so that the last step does not run at `min_lr_factor = 0` for nothing. Both, and the
meaning of every key, are those of torchtitan 0.2.2 (`torchtitan/components/lr_scheduler.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from titan_fp8.optim.config import LRSchedulerSection
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.logging import info_once

DecayType = Literal["linear", "sqrt", "cosine"]


@dataclass(frozen=True)
class Phases:
    """Lengths in steps. They sum to the schedule's total plus one: the step past the end that the decay aims at."""

    warmup_steps: int
    stable_steps: int
    decay_steps: int


def plan_phases(config: LRSchedulerSection, steps: int) -> Phases:
    """Lay the three phases over `config.total_steps`, or over `steps` (those of the training) where that is None.

    `decay_ratio = None` means that the decay starts where the warm-up ends. A warm-up longer than the schedule is cut
    to it, and a decay that would reach into the warm-up starts where the warm-up ends; a line says so.
    """
    total = steps if config.total_steps is None else config.total_steps
    warmup = config.warmup_steps
    if warmup > total:
        info_once(f"lr_scheduler.warmup_steps = {warmup} is longer than the schedule of {total} steps: cut to it")
        warmup = total
    decay = total - warmup
    if config.decay_ratio is not None:
        wanted = round(total * config.decay_ratio)
        if wanted > decay:
            info_once(f"lr_scheduler: the decay takes {decay} steps, not {wanted}: the warm-up takes the others")
        decay = min(wanted, decay)
    return Phases(warmup, total + 1 - warmup - decay, decay)


def lr_factor(step: int, phases: Phases, decay_type: DecayType, min_lr_factor: float) -> float:
    """Factor on the peak learning rate for the optimizer step number `step`, counted from 0.

    Past the end of the schedule it stays at what the decay ends in.
    """
    if step < phases.warmup_steps:
        return (step + 1) / phases.warmup_steps
    into_decay = step + 1 - phases.warmup_steps - phases.stable_steps
    if into_decay <= 0 or phases.decay_steps == 0:
        return 1.0
    progress = min(into_decay / phases.decay_steps, 1.0)
    if decay_type == "linear":
        height = 1.0 - progress
    elif decay_type == "sqrt":
        height = 1.0 - math.sqrt(progress)
    else:
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr_factor + (1.0 - min_lr_factor) * height


class HasParamGroups(Protocol):
    """What a schedule drives: an optimizer, or `titan_fp8.optim.OptimizersContainer`."""

    @property
    def param_groups(self) -> Iterable[dict[str, Any]]: ...


class LRSchedulers:
    """Sets the learning rate of every parameter group; call `step()` once after each optimizer step.

    The rate of a group at factor 1 is the one it had when the scheduler was built.
    """

    def __init__(self, optimizers: HasParamGroups, phases: Phases, decay_type: DecayType, min_lr_factor: float) -> None:
        self.phases = phases
        self.decay_type: DecayType = decay_type
        self.min_lr_factor = min_lr_factor
        # The groups are asked for each time: loading an optimizer's state replaces them by new dicts.
        self._optimizers = optimizers
        self._peaks = [float(group["lr"]) for group in optimizers.param_groups]
        self._step = 0
        self._apply()

    @property
    def factor(self) -> float:
        """Factor of the coming optimizer step."""
        return lr_factor(self._step, self.phases, self.decay_type, self.min_lr_factor)

    @property
    def lr(self) -> float:
        """Learning rate of the coming optimizer step, of the first parameter group."""
        return self._peaks[0] * self.factor

    def step(self) -> None:
        """Go on to the next step's learning rate."""
        self._step += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """`{"step": steps taken}`."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `state["step"]` steps, on this schedule: the saved run's peak and length do not matter.

        Raises:
            UserError: `state` does not hold a step.
        """
        if not isinstance(state.get("step"), int):
            raise UserError(
                f"the checkpoint's lr_scheduler state {state!r} holds no step; "
                "put lr_scheduler into checkpoint.exclude_from_loading"
            )
        self._step = state["step"]
        self._apply()

    def _apply(self) -> None:
        factor = self.factor
        for group, peak in zip(self._optimizers.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor


def build_lr_scheduler(optimizers: HasParamGroups, config: LRSchedulerSection, steps: int) -> LRSchedulers:
    """The schedule of `[lr_scheduler]` for a training of `steps` optimizer steps; sets the first step's rate."""
    return LRSchedulers(optimizers, plan_phases(config, steps), config.decay_type, config.min_lr_factor)
