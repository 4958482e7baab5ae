"""The optimizer: Adam or AdamW over every parameter, and what a trainer needs around it.

A model can come in parts (pipeline stages), and with `early_step_in_backward` every parameter has an optimizer of its
own. `OptimizersContainer` makes all of that look like one optimizer, and adds five things:

- **Clipping as part of the update** (`one_pass.py`), which then touches memory once.
- **Skipping a bad step on the device.** `step(skip=flag)` takes a tensor that says whether this step's gradients are
  unusable. The fused kernels read that flag themselves (the way AMP's GradScaler skips a step: `optimizer.found_inf`),
  so the CPU never waits for the GPU to find out. The other implementations have no such input; for them it is one
  `bool(flag)`. Parameters, moments and the step counts of the bias correction all stay as they were.
- **Post-step hooks**, for what must happen once an optimizer step: a float8 weight whose codes are cached, a scale that
  is computed ahead for the next all-gather.
- **A state that can be resharded.** `state_dict()` names tensors by parameter instead of by position
  (`state.layers.0.attention.wq.weight.exp_avg`), with DTensors as they are.
- **Hyperparameters belong to the configuration.** Learning rate, betas, weight decay and implementation are not part of
  the state: a resumed run does what its configuration says, and a run saved with fused kernels resumes without.

Weight decay applies to every parameter, norms and embeddings included, as in torchtitan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, AdamW, Optimizer

from titan_fp8.optim.clipping import GradNorm, clip_factor, clip_grad_norm_
from titan_fp8.optim.config import OptimizerSection
from titan_fp8.optim.one_pass import OnePassAdam, OnePassAdamW, create_missing_state, takes_one_pass
from titan_fp8.runtime.errors import UserError

_OPTIMIZERS: dict[str, type[Adam]] = {"Adam": Adam, "AdamW": AdamW}
_ONE_PASS: dict[str, type[OnePassAdam | OnePassAdamW]] = {"Adam": OnePassAdam, "AdamW": OnePassAdamW}
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class OptimizersContainer:
    """The optimizers of all model parts as one.

    Args:
        model_parts: the modules whose parameters are optimized.
        optimizers: for each part, its optimizers.
        steps_in_backward: the norm of the gradients, if the parameters are updated during backward, by hooks that add
            to it; `step()` then only runs the post-step hooks.
        stages: ranks that have the other parts of the model.
    """

    def __init__(
        self,
        model_parts: Sequence[nn.Module],
        optimizers: Sequence[Sequence[Adam]],
        *,
        steps_in_backward: GradNorm | None = None,
        stages: dist.ProcessGroup | None = None,
    ) -> None:
        self.model_parts = list(model_parts)
        self._stages = stages
        self._norm_in_backward = steps_in_backward
        self._by_part = [list(part) for part in optimizers]
        self._post_step_hooks: list[Callable[[], None]] = []
        self._clip: Tensor | None = None  # of the next step

    def __iter__(self) -> Iterator[Adam]:
        return (optimizer for part in self._by_part for optimizer in part)

    def __len__(self) -> int:
        return sum(len(part) for part in self._by_part)

    @property
    def _clips_in_step(self) -> bool:
        return all(isinstance(optimizer, OnePassAdam | OnePassAdamW) for optimizer in self)

    @property
    def steps_in_backward(self) -> bool:
        """Whether backward updates the parameters and drops their gradients."""
        return self._norm_in_backward is not None

    def clip_grad_norm(self, max_norm: float, *, is_untouched: bool = False) -> Tensor:
        """Clip the gradients of all parts together: `clip_grad_norm_`. Those that backward dropped are measured only.

        All ranks must call it once a step. Where the update clips (`one_pass.py`), gradients stay as they are and the
        next `step()` multiplies them.

        Args:
            max_norm: at least 0; 0 measures.
            is_untouched: the caller knows that nobody has written to gradients since the backward pass. Hooks that
                parameters have may, and then it is not taken for true.

        Returns:
            The norm before clipping: a plain fp32 tensor `[]`, the same on every rank.
        """
        if self._norm_in_backward is not None:
            return self._norm_in_backward.take()
        parameters = [p for part in self.model_parts for p in part.parameters()]
        if not self._clips_in_step:
            return clip_grad_norm_(parameters, max_norm, stages=self._stages)
        if not max_norm >= 0:
            raise ValueError(f"max_norm = {max_norm}: must be at least 0 (0 measures without clipping)")
        is_untouched &= not any(parameter._post_accumulate_grad_hooks for parameter in parameters)
        norm = clip_grad_norm_(parameters, 0, one_read=True, is_untouched=is_untouched, stages=self._stages)
        self._clip = clip_factor(norm, max_norm) if max_norm > 0 else None
        return norm

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All parameter groups of all optimizers. Loading a state replaces these dicts: ask again after it."""
        return [group for optimizer in self for group in optimizer.param_groups]

    def add_post_step_hook(self, hook: Callable[[], None]) -> None:
        """Call `hook()` after every `step()`, a skipped one too, in the order of registration."""
        self._post_step_hooks.append(hook)

    def step(self, skip: Tensor | None = None) -> None:
        """Update all parameters, then run the post-step hooks.

        Args:
            skip: a plain tensor `[]`, any dtype; non-zero leaves parameters and state as they are. It must be the same
                on every rank. Without it the update is unconditional.

        Raises:
            UserError: `skip` is given, but the parameters were updated in backward already.
        """
        if not self.steps_in_backward:
            self._update(skip)
        elif skip is not None:
            raise UserError(
                "a step cannot be skipped with optimizer.early_step_in_backward: the parameters have been updated "
                'before the gradients are all known; set training.nonfinite_policy = "stop"'
            )
        for hook in self._post_step_hooks:
            hook()

    @torch.no_grad()
    def _update(self, skip: Tensor | None) -> None:
        found_inf = None if skip is None else (skip != 0).to(torch.float32)
        skip_on_host: bool | None = None
        clip, self._clip = self._clip, None
        for optimizer in self:
            if isinstance(optimizer, OnePassAdam | OnePassAdamW):
                optimizer.clip = None if clip is None else clip.to(_device_of(optimizer))
            if found_inf is None:
                optimizer.step()
            elif optimizer.defaults["fused"]:
                optimizer.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue]
                try:
                    optimizer.step()
                finally:
                    del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
            else:
                skip_on_host = bool(found_inf) if skip_on_host is None else skip_on_host
                if not skip_on_host:
                    optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop (or zero) all gradients."""
        self._clip = None
        for optimizer in self:
            optimizer.zero_grad(set_to_none)

    def create_state(self) -> None:
        """Create the state that does not exist before the first step, exactly as that step would.

        A run that has no memory for it ends before the first forward pass then, not after it.
        """
        for optimizer in self:
            for group in optimizer.param_groups:
                create_missing_state(optimizer, group, group["params"])

    def state_dict(self) -> dict[str, Tensor]:
        """The moments and step counts, keyed `state.<parameter>.<exp_avg | exp_avg_sq | step>`.

        The tensors are the optimizers' own, not copies. State that does not exist before the first step is created,
        exactly as that step would. The order and the keys do not depend on how many optimizers there are.
        """
        state: dict[str, Tensor] = {}
        # `get_optimizer_state_dict` would otherwise run a step with zero gradients, which counts: a checkpoint made
        # before the first step would then start the bias correction at the second.
        self.create_state()
        for part, optimizers in self._parts_with_optimizers():
            flat = get_optimizer_state_dict(part, optimizers, options=_FLAT)
            state |= {key: value for key, value in flat.items() if key.startswith("state.")}  # pyright: ignore
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict()` gave, here or on another number of ranks (tensors sharded as this model's).

        Raises:
            UserError: entries are missing, or belong to no parameter of this model.
        """
        expected = self.state_dict().keys()
        missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
        if missing or unexpected:
            raise UserError(f"the optimizer's state does not fit the model: missing {missing}, unexpected {unexpected}")
        for part, optimizers in self._parts_with_optimizers():
            # torch's function wants the hyperparameters too: those in force go in and come out unchanged.
            flat = get_optimizer_state_dict(part, optimizers, options=_FLAT)
            flat = {key: state.get(key, value) for key, value in flat.items()}
            set_optimizer_state_dict(part, optimizers, flat, options=_FLAT)  # pyright: ignore[reportArgumentType]

    def _parts_with_optimizers(self) -> list[tuple[nn.Module, list[Adam]]]:
        """The parts that have something to optimize (a part can be all frozen)."""
        return [pair for pair in zip(self.model_parts, self._by_part, strict=True) if pair[1]]


def build_optimizer(
    model_parts: Sequence[nn.Module], config: OptimizerSection, stages: dist.ProcessGroup | None = None
) -> OptimizersContainer:
    """The optimizer of `[optimizer]` over all parameters of `model_parts` that require a gradient.

    Call it when the parameters are final: after conversion, after sharding. `stages` are the ranks that have the other
    parts of the model, if it is in parts.

    Raises:
        UserError: nothing to optimize; `early_step_in_backward` with DistributedDataParallel.
    """
    trainable = [[p for p in part.parameters() if p.requires_grad] for part in model_parts]
    if not any(trainable):
        raise UserError("the model has no parameter that requires a gradient: there is nothing to optimize")
    if not config.early_step_in_backward:
        return OptimizersContainer(
            model_parts, [[_build_one(p, config)] if p else [] for p in trainable], stages=stages
        )
    if any(isinstance(part, DistributedDataParallel) for part in model_parts):
        raise UserError(
            "optimizer.early_step_in_backward does not work with DistributedDataParallel, which reduces gradients "
            "after they are accumulated; shard instead (parallelism.data_parallel_shard_degree = -1) or unset it"
        )
    optimizers = [[_build_one([p], config) for p in part] for part in trainable]
    norm = GradNorm()
    for part in optimizers:
        for optimizer in part:
            _step_in_backward(optimizer, norm)
    return OptimizersContainer(model_parts, optimizers, steps_in_backward=norm)


def _build_one(parameters: list[nn.Parameter], config: OptimizerSection) -> Adam:
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    # On a GPU one pass is what fused means. On a CPU, and for a parameter at a time, PyTorch's own kernel is faster; it
    # has no means of another dtype.
    fused_on_gpu = config.implementation == "fused" and all(map(takes_one_pass, parameters))
    state_dtype = _state_dtype(parameters, config)
    is_wanted = config.implementation == "one_pass" or state_dtype is not None
    if is_wanted or (fused_on_gpu and not config.early_step_in_backward):
        return _ONE_PASS[config.name](parameters, state_dtype=state_dtype, **options)
    options |= {name: config.implementation == name for name in ("foreach", "fused")}
    return _OPTIMIZERS[config.name](parameters, **options)


def _state_dtype(parameters: list[nn.Parameter], config: OptimizerSection) -> torch.dtype | None:
    """The means' own dtype; None: none is asked for, or fp32 for parameters that are in fp32."""
    wanted = None if config.state_dtype is None else getattr(torch, config.state_dtype)
    is_theirs = all(parameter.dtype == wanted for parameter in parameters)
    return None if is_theirs and wanted == torch.float32 else wanted


def _device_of(optimizer: Adam) -> torch.device:
    return optimizer.param_groups[0]["params"][0].device


def _step_in_backward(optimizer: Optimizer, norm: GradNorm) -> None:
    """Update the optimizer's one parameter as soon as its gradient is accumulated (and reduced), then drop it."""

    def update(parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm.add(parameter.grad)
        optimizer.step()
        parameter.grad = None

    optimizer.param_groups[0]["params"][0].register_post_accumulate_grad_hook(update)
