"""The training run: everything built once, in one order, and the loop over it.

The loss of a step is the mean cross-entropy over all label tokens of the global batch. Each rank divides the sum of its
own tokens by the count of all ranks, and gradients are summed over ranks and microbatches, so a batch means the same
however it is cut into microbatches and spread over processes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from titan_fp8.checkpoint.checkpointer import Checkpointer
from titan_fp8.converters.protocol import Converter
from titan_fp8.data.batch import IGNORE_INDEX, Batch
from titan_fp8.data.loader import TrainLoader
from titan_fp8.data.validation import ValidationLoader
from titan_fp8.job_config import JobConfig
from titan_fp8.models.decoder import Decoder
from titan_fp8.observability.metrics import MetricsLogger
from titan_fp8.observability.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling
from titan_fp8.observability.summary import format_summary
from titan_fp8.optim.optimizers import OptimizersContainer
from titan_fp8.optim.schedule import LRSchedulers
from titan_fp8.parallel.context import ContextParallel
from titan_fp8.parallel.distributed import any_rank, barrier, set_train_timeouts
from titan_fp8.parallel.expert_load import ExpertLoad
from titan_fp8.parallel.fsdp import set_gradient_sync
from titan_fp8.parallel.mesh import ParallelMesh
from titan_fp8.parallel.pipeline import Pipeline
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.gc import GarbageCollector
from titan_fp8.runtime.host_copy import HostCopy
from titan_fp8.runtime.logging import info_once, logger
from titan_fp8.runtime.preemption import StopSignals, leave
from titan_fp8.train_state import TrainState


@dataclass(frozen=True)
class _UnderWay:
    """A step whose loss and gradient norm `[2]` the host has not read yet."""

    step: int
    found: HostCopy


class NonFiniteError(UserError):
    """The loss or a gradient is NaN or infinite, and the policy says to stop."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step found out, equal on every rank.

    Attributes:
        loss: mean cross-entropy over the label tokens of the global batch.
        grad_norm: L2 norm of the whole gradient before clipping.
    """

    loss: float
    grad_norm: float


@dataclass
class Trainer:
    """A built run. `titan_fp8.building.build_trainer` makes one; `train` runs it; `close` ends it.

    `loss_fn(logits [B, S, V], labels [B, S])` returns the fp32 sum of the cross-entropy of the labels that count.
    `runs_ahead`: the host may ask for a forward pass before it knows what the step before has found out. The memory of
    that step's gradients is free for it in the order of the stream.
    """

    job: JobConfig
    folder: Path
    device: torch.device
    mesh: ParallelMesh
    context: ContextParallel | None
    parts: list[Decoder]
    expert_load: ExpertLoad | None
    pipeline: Pipeline | None
    converters: list[Converter]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    optimizers: OptimizersContainer
    lr_scheduler: LRSchedulers
    loader: TrainLoader
    validation: ValidationLoader | None
    checkpointer: Checkpointer
    state: TrainState
    metrics: MetricsLogger
    runs_ahead: bool
    _under_way: _UnderWay | None = field(default=None, init=False)

    def train(self) -> None:
        """Train to `training.steps`, from the step that `state` stands at.

        Raises:
            UserError: a non-finite step under the policy "stop", or something outside that fails (disk, data).
            Preempted: a signal asked the run to stop; a checkpoint was saved if the run saves any.
        """
        training = self.job.training
        first_step, last_step = self.state.step + 1, training.steps
        tokens_logged = self.state.tokens_seen
        self._set_training(True)
        self.optimizers.create_state()
        for converter in self.converters:
            converter.pre_training(self.parts)
        with (
            self._hooks() as after_step,
            closing(GarbageCollector(training.gc_freq, training.gc_debug)) as garbage,
            closing(StopSignals()) as stop_signals,
        ):
            for step in range(first_step, last_step + 1):
                garbage.run(step)
                self._train_step()
                self.state.step = step
                if self.metrics.should_log(step):
                    self._log(step, self._read_result(), self.state.tokens_seen - tokens_logged)
                    tokens_logged = self.state.tokens_seen
                after_step()
                self._validate(step)
                if step < last_step and any_rank(stop_signals.received):
                    self._stop_early(step)
                self._save(step)
                if step == first_step:
                    set_train_timeouts(self.job.comm, self.mesh)
        self.checkpointer.close()
        self.metrics.flush()
        info_once(format_summary(self.metrics.summary(), self.folder, renamed=self._renamed()))

    def close(self) -> None:
        """Release threads, worker processes and files; a second call does nothing."""
        with ExitStack() as stack:
            for part in (self.metrics, self.loader, self.validation, self.checkpointer):
                if part is not None:
                    stack.callback(part.close)

    def _train_step(self) -> None:
        """Start a step on the device. What it finds out, `_read_result` tells: when somebody asks, or in the next step,
        before its backward pass."""
        batches = [self._on_device(batch) for batch in self.loader.next_step()]
        label_tokens = self._label_tokens(batches)
        tokens = sum(batch.tokens.numel() for batch in batches) * self.mesh.data_ranks
        if not self.runs_ahead:
            self._settle()
        self.optimizers.zero_grad()
        if self.expert_load is not None:
            self.expert_load.begin_step(tokens)
        loss_sum = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            loss_sum += self._forward_backward(batch, label_tokens, is_last=number == len(batches))
        loss = self.mesh.sum_of_losses(loss_sum)
        grad_norm = self.optimizers.clip_grad_norm(self.job.training.max_norm, is_untouched=True)
        # The host reads them later, and so is ahead of the device by most of a step: in a forward pass it may need
        # longer for a block than the device. The device decides whether there is an update.
        self._under_way = _UnderWay(self.state.step + 1, HostCopy(torch.stack([loss, grad_norm.to(loss)])))
        nonfinite = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        self.state.lr = self.lr_scheduler.lr
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step(skip=None if self.optimizers.steps_in_backward else nonfinite)
        for converter in self.converters:
            converter.post_optimizer(self.parts)
        if self.expert_load is not None:
            self.expert_load.end_step(skip=nonfinite)
        self.lr_scheduler.step()
        self.state.tokens_seen += tokens

    def _read_result(self) -> StepResult:
        """Wait for what the step under way finds out, once.

        Raises:
            NonFiniteError: it is not finite, and the policy says to stop.
        """
        assert self._under_way is not None
        step, self._under_way, found = self._under_way.step, None, self._under_way.found
        result = StepResult(*found.read().tolist())
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            self._on_nonfinite(step, result)
        return result

    def _settle(self) -> None:
        """Know what the last step has found out, if that is not known yet."""
        if self._under_way is not None:
            self._read_result()

    def _on_device(self, batch: Batch) -> Batch:
        """A batch where it is computed, with those labels whose loss this rank computes."""
        # From other memory than page-locked, a copy may wait for all that the device has been asked for.
        batch = batch.pin_memory() if self.device.type == "cuda" else batch
        batch = batch.to(self.device, non_blocking=True)
        return batch if self.context is None else replace(batch, labels=self.context.shard(batch.labels))

    def _forward_backward(self, batch: Batch, label_tokens: Tensor, *, is_last: bool) -> Tensor:
        """The loss of a batch, divided by `label_tokens`; its gradients are added to those that there are."""
        tokens, where = self._inputs(batch)
        if self.pipeline is not None:
            self._settle()
            return self.pipeline.step(tokens, batch.labels, batch.document_ids, label_tokens=label_tokens, **where)
        (model,) = self.parts
        set_gradient_sync(model, self.mesh, is_last_microbatch=is_last)
        loss = self._loss_of(model, batch, tokens, where) / label_tokens
        # Not later: the memory of the last step's gradients is that of this one's, once the device is done with them.
        self._settle()
        loss.backward()
        return loss.detach()

    def _evaluate(self, batch: Batch) -> Tensor:
        """The fp32 sum of the cross-entropy of a batch's labels."""
        tokens, where = self._inputs(batch)
        if self.pipeline is not None:
            return self.pipeline.evaluate(tokens, batch.labels, batch.document_ids, **where)
        (model,) = self.parts
        return self._loss_of(model, batch, tokens, where)

    def _loss_of(self, model: nn.Module, batch: Batch, tokens: Tensor, where: dict[str, Any]) -> Tensor:
        """The sum of the cross-entropy, by the model itself where the logits of all tokens shall not exist."""
        if self.job.training.loss_chunk_tokens:
            return model(tokens, batch.document_ids, labels=batch.labels, **where)
        return self.loss_fn(model(tokens, batch.document_ids, **where), batch.labels)

    def _inputs(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """The tokens that this rank computes, and where in their sequences they are."""
        if self.context is None:
            return batch.tokens, {}
        seq_len = batch.tokens.shape[1]
        positions = self.context.positions(seq_len, self.device)
        return self.context.shard(batch.tokens), {"seq_len": seq_len, "positions": positions}

    def _set_training(self, mode: bool) -> None:
        for part in self.parts:
            part.train(mode)

    def _label_tokens(self, batches: Iterable[Batch]) -> Tensor:
        """Labels that count in the global batch, an fp32 scalar on the device; at least 1."""
        count = torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in batches]).sum()
        return self.mesh.sum_over_tokens(count).clamp(min=1).to(torch.float32)

    def _on_nonfinite(self, step: int, result: StepResult) -> None:
        """Apply `training.nonfinite_policy`. The update of this step has been left out on the device already."""
        self.state.nonfinite_steps += 1
        training = self.job.training
        count = self.state.nonfinite_steps
        found = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}"
        if training.nonfinite_policy == "skip" and count <= training.max_nonfinite_steps:
            logger.warning("%s: update skipped (%d of at most %d)", found, count, training.max_nonfinite_steps)
            return
        barrier()  # no rank leaves while the GPU of another reads its memory, for a forward pass that is under way
        self.state.step = step
        self._log(step, result, 0)
        self.metrics.flush()
        if training.nonfinite_policy == "skip":
            rule = f"{count} steps were not finite, training.max_nonfinite_steps = {training.max_nonfinite_steps}"
            remedy = "Lower optimizer.lr or resume from an earlier checkpoint"
        else:
            rule = 'training.nonfinite_policy = "stop"'
            remedy = 'Lower optimizer.lr, or resume from a checkpoint with training.nonfinite_policy = "skip"'
        raise NonFiniteError(f"{found}; {rule}. {remedy}")

    def _log(self, step: int, result: StepResult, tokens: int) -> None:
        extra = {"tokens_seen": self.state.tokens_seen, "nonfinite_steps": self.state.nonfinite_steps}
        if self.expert_load is not None:
            extra |= self.expert_load.metrics()
        self.metrics.log_step(
            step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=self.state.lr,
            tokens=tokens,
            extra=extra,
        )

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """Mean loss over the validation batches of all ranks, every `validation.freq` steps and after the last."""
        if self.validation is None or (step % self.job.validation.freq and step != self.job.training.steps):
            return
        self._settle()
        with self.metrics.untimed():
            self._set_training(False)
            sums = torch.zeros(2, dtype=torch.float64)
            for batch in self.validation:
                batch = self._on_device(batch)
                loss_sum = self._evaluate(batch)
                sums += torch.stack([loss_sum.double(), (batch.labels != IGNORE_INDEX).sum().double()]).cpu()
            self._set_training(True)
            tokens = int(self.mesh.sum_over_tokens(sums[1]))
            loss_sum = self.mesh.sum_of_losses(sums[0]).item()
            self.metrics.log_validation(step, loss_sum / max(tokens, 1), tokens)

    def _save(self, step: int, *, now: bool = False) -> None:
        is_last = step == self.job.training.steps
        if self.checkpointer.is_due(step, last_step=is_last, now=now):
            self._settle()
            # A checkpoint that counts as complete must find the lines up to its step on the disk.
            self.metrics.flush()
            with self.metrics.untimed():
                self.checkpointer.save(step, last_step=is_last, now=now)

    def _stop_early(self, step: int) -> NoReturn:
        """Save after this step, whether or not it is time to, and end the run."""
        self._settle()
        saved = self.checkpointer.is_due(step, now=True)
        self._save(step, now=True)
        self.checkpointer.close()
        self.metrics.flush()
        done = f"asked to stop by a signal: ended after step {step} of {self.job.training.steps}"
        if saved:
            info_once(f"{done}, which is saved; the same command goes on from there")
        elif self.mesh.is_main:
            logger.warning("%s; nothing is saved, because checkpoint.enable is off or checkpoint.load_only on", done)
        leave(saved=saved)

    @contextmanager
    def _hooks(self) -> Iterator[Callable[[], None]]:
        """The profiler and the memory recorder around the loop; yields what to call after each step."""
        profiling, start = self.job.profiling, self.state.step
        rank = self.mesh.rank
        with (
            maybe_enable_profiling(profiling, self.folder, start, rank) as profiler,
            maybe_enable_memory_snapshot(profiling, self.folder, start, rank, device=self.device) as snapshots,
        ):

            def after_step() -> None:
                profiler.step()
                snapshots.step()

            yield after_step

    def _renamed(self) -> dict[str, str]:
        """Folders that the configuration calls otherwise than usual, for the closing summary."""
        return {
            "tb": self.job.metrics.save_tb_folder,
            "checkpoint": self.job.checkpoint.folder,
            "profile_traces": self.job.profiling.save_traces_folder,
            "memory_snapshot": self.job.profiling.save_memory_snapshot_folder,
        }
