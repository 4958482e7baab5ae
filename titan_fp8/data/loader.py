"""The loaders: a source, this rank's share of each step, and a state that another world size can continue.

`TrainLoader` hands out one global step at a time. Its state is that of the steps handed out, however far the
background has read ahead:

    samples      consumed so far, by all ranks together
    cursors      of each lane of text that is tokenized on the way (`sources.py`); empty for addressable sources
    bookmark     of a stream

Each rank knows its own lanes, so with several ranks `state_dict` is a collective call: all ranks exchange their
cursors and each returns the same, complete state. It does not depend on the number of ranks, so any number of them
can load it.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from titan_fp8.data.batch import Batch
from titan_fp8.data.config import TrainingSection
from titan_fp8.data.dataset_spec import training_spec
from titan_fp8.data.documents import check_text, load_text
from titan_fp8.data.feeds import Bookmark, open_stream, stream_texts
from titan_fp8.data.packing import Cursor
from titan_fp8.data.prefetch import Job, Prefetcher, Step, prefetch_steps
from titan_fp8.data.sources import (
    BlockSource,
    LaneSource,
    Position,
    Source,
    StepPlan,
    SyntheticSource,
    lanes_of_slots,
    require_one_sample,
)
from titan_fp8.data.token_store import open_shards
from titan_fp8.data.tokenizer import Tokenizer
from titan_fp8.data.validation import ValidationLoader, build_validation_loader
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.logging import logger

__all__ = ["TrainLoader", "ValidationLoader", "build_train_loader", "build_validation_loader"]

_STATE_VERSION = 1

Gather = Callable[[Any], list[Any]]
"""Collects one object of each rank, on each rank."""


def build_train_loader(
    training: TrainingSection,
    tokenizer: Tokenizer,
    *,
    seed: int,
    global_batch_sequences: int,
    local_batch_sequences: int,
    dp_rank: int,
    dp_world_size: int,
    pin_memory: bool | None = None,
    gather: Gather | None = None,
) -> "TrainLoader":
    """The loader of the training data for one rank.

    Args:
        training: the job's section; `dataset`, `dataset_path`, `seq_len` and `dataloader` among others.
        tokenizer: the job's tokenizer.
        seed: decides the order of samples.
        global_batch_sequences: sequences a step over all ranks.
        local_batch_sequences: sequences in one microbatch.
        dp_rank: this data-parallel rank.
        dp_world_size: number of data-parallel ranks.
        pin_memory: overrides `training.dataloader.pin_memory`.
        gather: how ranks exchange their states; None for `torch.distributed` where it is initialized.

    Raises:
        UserError: data that is missing, unreadable, empty, too small for one sample, or made with another tokenizer; a
            global batch that does not divide.
    """
    plan = StepPlan(global_batch_sequences, local_batch_sequences, dp_rank, dp_world_size)
    source = build_training_source(training, tokenizer, seed)
    return TrainLoader(source, plan, training, pin_memory=pin_memory, gather=gather)


def build_training_source(training: TrainingSection, tokenizer: Tokenizer, seed: int) -> Source:
    """The source that `training.dataset` names. Raises `UserError` as `build_train_loader`."""
    spec = training_spec(training)
    seq_len, masking = training.seq_len, training.document_masking
    if spec.kind == "synthetic":
        return SyntheticSource(tokenizer, seq_len, seed, document_masking=masking, name=spec.name)
    if spec.kind == "stream":
        require_one_sample(stream_texts(open_stream(spec)), tokenizer, seq_len, f"dataset {spec.name!r}")
        return LaneSource(spec, tokenizer, seq_len, seed, name=spec.name, document_masking=masking)
    assert spec.path is not None
    if spec.kind == "text":
        documents = load_text(
            Path(spec.path), "train", hold_out_every=training.hold_out_every, txt_documents=training.txt_documents
        )
        require_one_sample(documents, tokenizer, seq_len, spec.path)
        return LaneSource(
            documents,
            tokenizer,
            seq_len,
            seed,
            name=spec.path,
            shuffle=training.shuffle,
            document_masking=masking,
        )
    return _block_source(spec.path, training, tokenizer, seed)


def check_training_data(training: TrainingSection, tokenizer: Tokenizer) -> None:
    """Refuse what `build_train_loader` would refuse, as far as it shows without reading the data.

    Raises:
        UserError: token shards that cannot be used; text files that are missing, empty or have no column `text`.
    """
    spec = training_spec(training)
    if spec.kind == "tokens":
        _block_source(spec.path or "", training, tokenizer, seed=0)
    elif spec.kind == "text":
        check_text(Path(spec.path or ""), "train", hold_out_every=training.hold_out_every)


def _block_source(path: str, training: TrainingSection, tokenizer: Tokenizer, seed: int) -> BlockSource:
    store = open_shards(Path(path), "train", tokenizer)
    source = BlockSource(
        store,
        training.seq_len,
        seed,
        tokenizer.fingerprint,
        shuffle=training.shuffle,
        document_masking=training.document_masking,
        name=path,
    )
    if not source.blocks:
        raise UserError(
            f"{path} has {store.total_tokens} tokens, less than one sample of seq_len + 1 = {training.seq_len + 1}; "
            "give more text or a smaller seq_len"
        )
    return source


class TrainLoader:
    """This rank's microbatches, one global step after the other, without end."""

    def __init__(
        self,
        source: Source,
        plan: StepPlan,
        training: TrainingSection,
        *,
        pin_memory: bool | None = None,
        gather: Gather | None = None,
    ) -> None:
        self._source = source
        self._plan = plan
        self._section = training.dataloader
        self._pin_memory = training.dataloader.pin_memory if pin_memory is None else pin_memory
        self._gather = gather
        self._position = Position(lanes=source.lanes(plan.global_batch))
        self._bookmarks: dict[int, str] = {}
        self._epoch = -1
        self._prefetcher: Prefetcher[Step] | None = None
        self._closed = False

    @property
    def samples(self) -> int:
        """Samples consumed so far by all ranks together."""
        return self._position.samples

    @property
    def seed(self) -> int:
        """What the order of the samples depends on; a loaded state brings its own."""
        return self._source.seed

    def next_step(self) -> list[Batch]:
        """This rank's microbatches of the next global step, on the host, in order.

        Raises:
            Exception: what went wrong while the step was prepared, as it was raised there.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        if self._prefetcher is None:
            job = Job(self._source, self._position, self._plan)
            self._prefetcher = prefetch_steps(job, self._section, pin_memory=self._pin_memory)
        step = next(self._prefetcher)
        self._take(step)
        return step.batches

    def state_dict(self) -> dict[str, Any]:
        """The state after the steps handed out: plain numbers, strings and lists, the same on every rank.

        With several ranks and a source that has lanes this is a collective call.
        """
        position = self._position
        state = {
            "version": _STATE_VERSION,
            "samples": position.samples,
            "seed": self._source.seed,
            "source": json.dumps(self._source.identity(), sort_keys=True),
            "lanes": position.lanes,
            "cursors": [],
            "bookmark": "",
        }
        if not position.lanes:
            return state
        states = self._exchange(self.local_state())
        cursors = [self._furthest(lane, states) for lane in range(position.lanes)]
        oldest = min(lane + cursor.document * position.lanes for lane, cursor in enumerate(cursors))
        bookmarks = [Bookmark.from_json(text) for _, texts in states for text in texts]
        usable = [bookmark for bookmark in bookmarks if bookmark.document <= oldest]
        if usable:
            state["bookmark"] = max(usable, key=lambda bookmark: bookmark.document).to_json()
        state["cursors"] = [[cursor.document, cursor.offset] for cursor in cursors]
        return state

    def local_state(self) -> tuple[dict[int, Cursor], list[str]]:
        """What this rank contributes to the state: the cursors and bookmarks that it knows."""
        bookmarks = [*self._bookmarks.values(), *([self._position.bookmark] if self._position.bookmark else [])]
        return self._position.cursors, bookmarks

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps of `state`, which may come from another world size or global batch.

        The seed is taken from the state, so that the order of samples goes on.

        Raises:
            UserError: the state is of other data, another tokenizer, sequence length or shuffling.
        """
        if state.get("version") != _STATE_VERSION:
            raise UserError(f"the data state in the checkpoint is of version {state.get('version')!r}; {_REMEDY}")
        saved, here = json.loads(state["source"]), self._source.identity()
        if saved != here:
            names = sorted(name for name in {*saved, *here} if saved.get(name) != here.get(name))
            differences = ", ".join(f"{name} was {saved.get(name)!r} and is {here.get(name)!r}" for name in names)
            raise UserError(f"the data state in the checkpoint is of other training data: {differences}; {_REMEDY}")
        if state["seed"] != self._source.seed:
            logger.info("data: the order of samples goes on under the checkpoint's seed %d", state["seed"])
        self._stop_prefetching()
        self._source = replace(self._source, seed=int(state["seed"]))
        samples, lanes = int(state["samples"]), int(state["lanes"])
        cursors = {
            lane: Cursor(_windows_of_lane(lane, lanes, samples), int(document), int(offset))
            for lane, (document, offset) in enumerate(state["cursors"])
        }
        self._position = Position(samples, lanes, cursors, state["bookmark"] or None)
        self._bookmarks = {}
        self._epoch = -1
        slots = self._plan.slots()
        touched = lanes_of_slots(slots, samples, self._plan.global_batch, lanes)
        tokenized, read = len(touched) * self._plan.global_batch, len(slots) * lanes
        if tokenized > read:
            logger.info(
                "data: %d does not divide the run's first global batch %d; each rank tokenizes %.1f times its share",
                self._plan.global_batch,
                lanes,
                tokenized / read,
            )

    def close(self) -> None:
        """End the background thread and the worker processes."""
        self._closed = True
        self._stop_prefetching()

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stop_prefetching(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _take(self, step: Step) -> None:
        """Move the state behind a step."""
        position = self._position
        cursors = dict(position.cursors)
        for part, progress in enumerate(step.progress):
            cursors.update(progress.cursors)
            if progress.bookmark is not None:
                self._bookmarks[part] = progress.bookmark
        samples = position.samples + self._plan.global_batch
        self._position = Position(samples, position.lanes, cursors, position.bookmark)
        epoch = max(progress.epoch for progress in step.progress)
        if 0 <= self._epoch < epoch and self._plan.dp_rank == 0:
            logger.info("%s: epoch %d begins at sample %s", self._source.name, epoch + 1, f"{samples:,}")
        self._epoch = max(epoch, self._epoch)

    def _exchange(self, local: Any) -> list[Any]:
        if self._plan.dp_world_size == 1:
            return [local]
        if self._gather is not None:
            return self._gather(local)
        if not dist.is_initialized():
            raise RuntimeError("a loader of several ranks needs torch.distributed, or `gather`, to make its state")
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, local)
        return states

    def _furthest(self, lane: int, states: list[tuple[dict[int, Cursor], list[str]]]) -> Cursor:
        """The cursor of the rank that read the lane last."""
        known = [cursors[lane] for cursors, _ in states if lane in cursors]
        cursor = max(known, key=lambda cursor: cursor.windows, default=Cursor())
        expected = _windows_of_lane(lane, self._position.lanes, self._position.samples)
        assert cursor.windows == expected, f"lane {lane}: {cursor} but {expected} windows were consumed"
        return cursor


_REMEDY = 'to begin the data anew, add "dataloader" to checkpoint.exclude_from_loading'


def _windows_of_lane(lane: int, lanes: int, samples: int) -> int:
    """How many of the samples 0, ..., samples - 1 belong to a lane."""
    return (samples - lane + lanes - 1) // lanes
