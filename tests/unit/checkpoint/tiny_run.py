"""A whole training run in miniature: a few parameters, an optimizer, a schedule, data with a position, random numbers.

`TinyRun` is to a `Checkpointer` what the trainer is. Its steps depend on everything that a checkpoint holds, so a
resumed run that misses any part of it ends in other weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from titan_fp8.checkpoint import Checkpointer
from titan_fp8.checkpoint.config import CheckpointSection
from titan_fp8.optim import build_lr_scheduler, build_optimizer
from titan_fp8.optim.config import LRSchedulerSection, OptimizerSection

VOCAB, DIM = 12, 6


class TinyModel(nn.Module):
    """Embedding, one odd-sized layer, output; the output weight may be tied to the embedding's."""

    def __init__(self, *, tied: bool = False, vocab: int = VOCAB) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, DIM)
        self.layers = nn.ModuleDict({"0": nn.Linear(DIM, 5), "1": nn.Linear(5, DIM)})
        self.output = nn.Linear(DIM, vocab, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tok_embeddings(tokens)
        return self.output(hidden + self.layers["1"](self.layers["0"](hidden).tanh()))


class Counter:
    """The trainer's step count."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Batches:
    """Batches that depend on a position, the same on all ranks (or, with `per_rank`, on the rank too)."""

    def __init__(self, rank: int = 0, per_rank: bool = False) -> None:
        self.position = 100 * rank if per_rank else 0

    def next(self) -> Tensor:
        self.position += 1
        return torch.arange(self.position, self.position + 8) * 5 % VOCAB

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "buffer": [1, "two", {"three": 3.0}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def fingerprint(**model: Any) -> dict[str, Any]:
    return {"model": {"dim": DIM, "vocab_size": VOCAB, **model}, "recipe": {"recipe_name": "tensorwise"}}


class TinyRun:
    """A run of `total` steps; keys of `[checkpoint]` as keyword arguments."""

    def __init__(
        self,
        run_folder: Path,
        /,
        *,
        total: int = 6,
        seed: int = 0,
        model: nn.Module | None = None,
        shard: Callable[[nn.Module], nn.Module] | None = None,
        batches: Batches | None = None,
        optimizer: dict[str, Any] | None = None,
        prints: dict[str, Any] | None = None,
        **checkpoint: Any,
    ) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.total = total
        self.model = TinyModel() if model is None else model
        if shard is not None:
            self.model = shard(self.model)
        self.optimizers = build_optimizer([self.model], OptimizerSection(lr=0.01, **(optimizer or {})))
        self.schedule = build_lr_scheduler(self.optimizers, LRSchedulerSection(warmup_steps=2), total)
        self.counter = Counter()
        self.batches = batches or Batches()
        config = CheckpointSection(**({"enable": True, "interval": 2, "last_save_model_only": False} | checkpoint))
        self.checkpointer = Checkpointer(
            config,
            run_folder,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedule,
            train_state=self.counter,
            data_loader=self.batches,
            fingerprint=fingerprint() if prints is None else prints,
            total_steps=total,
        )

    def step(self) -> None:
        """One training step, whose gradient depends on the data and on every random number generator."""
        tokens = self.batches.next().to(next(self.model.parameters()).device)
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        loss = nn.functional.cross_entropy(self.model(tokens), tokens.flip(0)) * noise
        loss.backward()
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        self.schedule.step()
        self.optimizers.zero_grad()
        self.counter.step += 1

    def train(self, until: int | None = None) -> TinyRun:
        """Step and save until `until` (or the end of the run); does not load."""
        while self.counter.step < (self.total if until is None else until):
            self.step()
            self.checkpointer.save(self.counter.step, last_step=self.counter.step == self.total)
        return self

    def resume(self) -> TinyRun:
        """Load; the step count must be the one that loading answers."""
        assert self.checkpointer.load() == self.counter.step
        return self

    def close(self) -> TinyRun:
        self.checkpointer.close()
        return self

    def state(self) -> dict[str, Any]:
        """Everything that a full checkpoint holds, as plain tensors and values."""
        tensors = {**self.model.state_dict(), **self.optimizers.state_dict()}
        full = {name: whole(value).detach().clone() for name, value in tensors.items()}
        return {**full, "step": self.counter.step, "lr": self.schedule.lr, "position": self.batches.position}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
        assert same, f"{name} differs: {value} and {right[name]}"


def names(folder: Path) -> set[str]:
    """What lies in a run's checkpoint folder."""
    return {path.name for path in (folder / "checkpoint").iterdir()}
