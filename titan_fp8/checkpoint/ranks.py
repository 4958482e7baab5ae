"""Ranks that act together: either all succeed, or all raise the same error.

Saving and loading are full of things that can fail on one rank alone: a disk, a missing file, a loader. If that rank
raised and left, the others would wait for it in their next collective until a timeout ends the job with a message about
collectives. So every step that can fail ends in an exchange of failures, after which all ranks raise the same error.

The exchange has a gloo group of its own. Its messages are small and on the CPU, it must not disturb the training's
collectives (checkpoints can be written by a background thread), and it has to be more patient than they are: writing a
large checkpoint takes longer than any training step.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from titan_fp8.checkpoint.folder import CheckpointError
from titan_fp8.runtime.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class _Failure:
    message: str
    mendable: bool  # by the user: a full disk, a wrong path; anything else is a defect and keeps its traceback


class Ranks:
    """All ranks of the job, or this process alone when there is no process group. Build it on all ranks at once."""

    def __init__(self) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.group: dist.ProcessGroup | None = None
        if self.distributed:
            self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))

    def together(self, what: str, action: Callable[[], T]) -> T:
        """Run `action` on every rank.

        Args:
            what: what is being done, for the message: "reading step-5".

        Raises:
            CheckpointError: on all ranks with one message, if it failed on any with an OSError or a UserError.
            RuntimeError: the same for any other failure; the rank where it happened raises that failure itself.
        """
        result, error = _attempt(action)
        _raise_first(self.all_gather(_describe(what, error)), error)
        return result  # pyright: ignore[reportReturnType]

    def on_rank_0(self, what: str, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 only and return its result on all ranks; raises as `together` does."""
        result, error = _attempt(action) if self.rank == 0 else (None, None)
        result, failure = self._broadcast((result, _describe(what, error)))
        _raise_first([failure], error)
        return result

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_on_rank_0(self, value: T) -> list[T]:
        """The values of all ranks on rank 0, an empty list elsewhere."""
        if not self.distributed:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values or []

    def _broadcast(self, value: Any) -> Any:
        if not self.distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def _attempt(action: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return action(), None
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
        return None, error


def _describe(what: str, error: BaseException | None) -> _Failure | None:
    if error is None:
        return None
    if isinstance(error, CheckpointException):  # all ranks hold the same one
        causes = {rank: _describe(what, cause) for rank, (cause, _) in sorted(error.failures.items())}
        failures = [failure for failure in causes.values() if failure is not None]
        rank = next(iter(causes))
        message = f"rank {rank}: {failures[0].message}" if rank else failures[0].message
        return _Failure(message, all(failure.mendable for failure in failures))
    if isinstance(error, UserError):
        return _Failure(str(error), mendable=True)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space and start again, which resumes from the newest complete checkpoint"
        return _Failure(f"{what} failed: {error.strerror}; {remedy}", mendable=True)
    return _Failure(f"{what} failed: {type(error).__name__}: {error}", mendable=isinstance(error, OSError))


def _raise_first(failures: Sequence[_Failure | None], own: BaseException | None) -> None:
    """Raise the failure of the lowest rank, on every rank alike; `own` is what this rank caught."""
    for rank, failure in enumerate(failures):
        if failure is None:
            continue
        if isinstance(own, Exception) and not isinstance(own, (OSError, UserError)):
            raise own
        message = f"rank {rank}: {failure.message}" if rank else failure.message
        mendable = all(other.mendable for other in failures if other is not None)
        raise (CheckpointError if mendable else RuntimeError)(message) from own
