"""`[optimizer]` and `[lr_scheduler]`: the update, and the learning rate over time."""

from collections.abc import Iterator
from typing import Literal

from titan_fp8.config.section import Problem, Section, key

LARGEST_BETA_IN_BF16 = 0.95
"""A step moves a mean by (1 - beta) of its distance from the gradient, or not at all where that is less than half of
what bf16 numbers are apart: the larger beta is, the farther from its gradients a mean can stand still. With this one
losses have been measured."""


class OptimizerSection(Section):
    """The optimizer and its constants."""

    name: Literal["Adam", "AdamW"] = "AdamW"
    """Optimizer: `AdamW` (decoupled weight decay) or `Adam` (weight decay added to the gradient)."""

    lr: float = key(8e-4, ge=0)
    """Peak learning rate; `[lr_scheduler]` says how it is reached and left."""

    beta1: float = key(0.9, ge=0, lt=1)
    """Decay of the running mean of the gradient, per step."""

    beta2: float = key(0.95, ge=0, lt=1)
    """Decay of the running mean of the squared gradient, per step."""

    eps: float = key(1e-8, gt=0)
    """Added to the root of the squared gradient's mean, by which the update is divided: with 0 a gradient of zero, such
    as that of a token which did not occur, would make a weight NaN."""

    weight_decay: float = key(0.1, ge=0)
    """Weight decay, multiplied by the learning rate at each step."""

    implementation: Literal["for-loop", "foreach", "fused", "one_pass"] = "fused"
    """How the update runs: one parameter at a time, in groups, or in one pass over memory that also clips: `one_pass`,
    and on GPUs `fused`, which on CPUs is PyTorch's own kernel."""

    state_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the two running means, if not that of the parameters (`training.dtype`); one pass over memory updates
    them then. `bfloat16` halves their memory beside fp32 parameters, with `beta1` and `beta2` of at most 0.95."""

    early_step_in_backward: bool = False
    """Update each parameter as soon as its gradient is there, and free the gradient. Needs `training.max_norm = 0` and
    no gradient accumulation."""

    def problems(self) -> Iterator[Problem]:
        """Means of a dtype of their own are those of the update in one pass, and bf16 can follow them."""
        if self.state_dtype is not None and self.implementation in ("for-loop", "foreach"):
            yield Problem(
                "implementation",
                f'keeps running means in the dtype of the parameters, and state_dtype = "{self.state_dtype}" asks for '
                'another; set it to "fused" or "one_pass"',
            )
        for name in ("beta1", "beta2"):
            if self.state_dtype == "bfloat16" and getattr(self, name) > LARGEST_BETA_IN_BF16:
                yield Problem(
                    name,
                    f'is more than {LARGEST_BETA_IN_BF16}, so that means in state_dtype = "bfloat16" would not follow '
                    'the gradients; lower it, or set state_dtype to "float32"',
                )


class LRSchedulerSection(Section):
    """Learning rate over time: linear warm-up, then stable, then decay."""

    warmup_steps: int = key(200, ge=0, unit="steps")
    """The learning rate rises linearly from 0 over so many steps."""

    total_steps: int | None = key(None, ge=1, unit="steps")
    """Length of the schedule. Unset means `training.steps`; set it to stop a run before its schedule ends."""

    decay_ratio: float | None = key(None, ge=0, le=1)
    """Share of the schedule, at its end, in which the learning rate decays; it is stable between warm-up and decay.
    Unset means that it decays right after the warm-up, 0 that it never does."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""

    min_lr_factor: float = key(0.0, ge=0, le=1)
    """The learning rate decays to this share of its peak."""

    def problems(self) -> Iterator[Problem]:
        """The phases fit into a schedule of a stated length, and there is a decay to shape."""
        if self.total_steps is not None and self.warmup_steps > self.total_steps:
            yield Problem("warmup_steps", f"is longer than the schedule of total_steps = {self.total_steps}")
        if self.decay_ratio == 0:
            if self.decay_type != "linear":
                yield Problem("decay_type", "has no effect while decay_ratio = 0, which means no decay")
            if self.min_lr_factor != 0:
                yield Problem("min_lr_factor", "has no effect while decay_ratio = 0, which means no decay")
