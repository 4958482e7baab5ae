"""Which sample comes when: the rule that makes a run repeatable on any number of ranks.

Samples are numbered 0, 1, 2, ... once for the whole run. A step with a global batch of G consumes the next G numbers;
which rank reads which of them follows from the step alone (`StepPlan`). What a sample *is* depends on its number
only, so neither the number of ranks nor a change of G can make one appear twice or not at all. Two kinds of source
give that meaning:

- **Addressable** sources compute sample i: a story of the built-in grammar, or a block of the token shards at the
  place that a computed shuffle gives (`permutation.py`). Their whole state is the number of samples consumed.
- **Lanes** serve text that is tokenized on the way, where nobody knows in which document sample i begins before
  everything before it was read. A fixed number L of lanes, each packing documents of its own, cuts that dependence:
  sample i is the next window of lane i mod L. L is the global batch of the first step and stays in the state, so each
  slot of a step has its lane, and a rank tokenizes for its own slots only. After a change of G the slots wander over
  lanes; a rank that meets a lane that others moved on reads after them first, which costs time but gives the same
  samples.

Legend: S tokens a sequence, G sequences a global batch, L lanes.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from titan_fp8.data.dataset_spec import DatasetSpec
from titan_fp8.data.documents import TextDocuments
from titan_fp8.data.feeds import Feed, ListFeed, StreamFeed, open_stream
from titan_fp8.data.packing import Cursor, Lane, Window, encode_document
from titan_fp8.data.permutation import mix, permuted
from titan_fp8.data.synthetic import story
from titan_fp8.data.token_store import TokenStore
from titan_fp8.data.tokenizer import Tokenizer
from titan_fp8.runtime.errors import UserError


@dataclass(frozen=True)
class StepPlan:
    """Who reads which samples of a step: rank r of R has the slots [r G / R, (r + 1) G / R).

    Attributes:
        global_batch: G, sequences a step over all ranks.
        local_batch: sequences in one microbatch.
        dp_rank: this data-parallel rank.
        dp_world_size: number of data-parallel ranks.
    """

    global_batch: int
    local_batch: int
    dp_rank: int
    dp_world_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.dp_rank < self.dp_world_size:
            raise ValueError(f"dp_rank {self.dp_rank} of {self.dp_world_size} ranks")
        if self.global_batch < 1 or self.global_batch % (self.local_batch * self.dp_world_size):
            raise UserError(
                f"training.global_batch_size = {self.global_batch} is not a multiple of "
                f"{self.local_batch * self.dp_world_size} (training.local_batch_size = {self.local_batch} x "
                f"{self.dp_world_size} data-parallel ranks)"
            )

    def slots(self, part: int = 0, parts: int = 1) -> range:
        """Slots of this rank, or of one of `parts` worker processes that share them."""
        count = self.global_batch // self.dp_world_size
        first = self.dp_rank * count
        return range(first + count * part // parts, first + count * (part + 1) // parts)


@dataclass(frozen=True)
class Position:
    """Where a source stands.

    Attributes:
        samples: samples consumed so far, by all ranks together.
        lanes: L; 0 for an addressable source.
        cursors: lane -> where it stands; a lane that is missing stands at its beginning.
        bookmark: of a stream, a place not behind any cursor.
    """

    samples: int = 0
    lanes: int = 0
    cursors: dict[int, Cursor] = field(default_factory=dict)
    bookmark: str | None = None


@dataclass(frozen=True)
class Progress:
    """What changed since the last call of `Reader.progress`.

    Attributes:
        cursors: the lanes that moved, and where they stand.
        bookmark: the newest one that is not behind any lane of this reader.
        epoch: the furthest epoch that was read from.
    """

    cursors: dict[int, Cursor] = field(default_factory=dict)
    bookmark: str | None = None
    epoch: int = 0


class Reader(Protocol):
    """Reads samples in one process. Each sample number is asked for once, growing."""

    def window(self, sample: int) -> Window:
        """The sample with that number."""
        ...

    def progress(self) -> Progress:
        """What changed since the last call."""
        ...


class _AddressableReader:
    """A reader without state, for sources that compute any sample."""

    def __init__(self, source: "SyntheticSource | BlockSource") -> None:
        self._source = source
        self._epoch = 0

    def window(self, sample: int) -> Window:
        self._epoch = self._source.epoch(sample)
        return self._source.window(sample)

    def progress(self) -> Progress:
        return Progress(epoch=self._epoch)


@dataclass(frozen=True)
class SyntheticSource:
    """Stories of the built-in grammar. A sample is as many whole stories as fit, and the beginning of one more."""

    tokenizer: Tokenizer
    seq_len: int
    seed: int
    document_masking: bool = False
    validation: bool = False
    name: str = "synthetic"

    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        return {"dataset": "synthetic", "seq_len": self.seq_len, "tokenizer": self.tokenizer.fingerprint}

    def lanes(self, global_batch: int) -> int:
        """See `Source`."""
        return 0

    def reader(self, position: Position, lanes: frozenset[int]) -> Reader:
        """See `Source`."""
        return _AddressableReader(self)

    def epoch(self, sample: int) -> int:
        """0: the stories never end."""
        return 0

    def window(self, sample: int) -> Window:
        """The sample with that number. No story of a validation source has the key of a training one."""
        stories = (story(self.validation, self.seed, sample, number) for number in itertools.count())
        tokens, starts = collect_tokens(stories, self.tokenizer, self.seq_len + 1)
        count = self.seq_len + 1
        ids = np.searchsorted(starts, np.arange(count), side="right") - 1
        return Window(tokens[:count], ids.astype(np.int32) if self.document_masking else None, count)


@dataclass(frozen=True)
class BlockSource:
    """A long sequence of tokens, cut into blocks of S tokens (and one more as the last label).

    Attributes:
        shuffle: each epoch has its own order of blocks, else file order.
        padding: token to fill the last block with, so that no token is lost; None drops an incomplete block.
    """

    store: TokenStore
    seq_len: int
    seed: int
    tokenizer_fingerprint: str
    shuffle: bool = True
    document_masking: bool = False
    padding: int | None = None
    name: str = "tokens"

    @property
    def blocks(self) -> int:
        """Samples in one epoch."""
        labels = max(self.store.total_tokens - 1, 0)
        return labels // self.seq_len if self.padding is None else -(-labels // self.seq_len)

    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "dataset": "tokens",
            "seq_len": self.seq_len,
            "shuffle": self.shuffle,
            "tokenizer": self.tokenizer_fingerprint,
            "tokens": self.store.total_tokens,
        }

    def lanes(self, global_batch: int) -> int:
        """See `Source`."""
        return 0

    def reader(self, position: Position, lanes: frozenset[int]) -> Reader:
        """See `Source`."""
        return _AddressableReader(self)

    def epoch(self, sample: int) -> int:
        """How often all blocks were read before this sample."""
        return sample // self.blocks

    def window(self, sample: int) -> Window:
        """The sample with that number. Behind the end of a padded source, rows of nothing but padding."""
        count = self.seq_len + 1
        if self.padding is not None and sample >= self.blocks:
            ids = np.zeros(count, dtype=np.int32) if self.document_masking else None
            return Window(np.full(count, self.padding, dtype=np.int32), ids, 0)
        epoch, block = divmod(sample, self.blocks)
        if self.shuffle:
            block = permuted(block, self.blocks, mix(self.seed, epoch))
        start = block * self.seq_len
        stop = min(start + count, self.store.total_tokens)
        tokens = self.store.read(start, stop)
        ids = self.store.document_ids(start, stop) if self.document_masking else None
        missing = count - len(tokens)
        if missing:
            assert self.padding is not None
            tokens = np.concatenate([tokens, np.full(missing, self.padding, dtype=np.int32)])
            ids = None if ids is None else np.concatenate([ids, np.repeat(ids[-1:], missing)])
        return Window(tokens, ids, count - missing)


@dataclass(frozen=True)
class LaneSource:
    """Text that is tokenized on the way: local documents, or a stream."""

    documents: TextDocuments | DatasetSpec
    tokenizer: Tokenizer
    seq_len: int
    seed: int
    name: str
    shuffle: bool = True
    document_masking: bool = False

    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        common = {"seq_len": self.seq_len, "tokenizer": self.tokenizer.fingerprint}
        if isinstance(self.documents, DatasetSpec):
            spec = self.documents
            return {**common, "dataset": "stream", "path": spec.path, "config": spec.config, "split": spec.split}
        sizes = {"documents": len(self.documents), "bytes": self.documents.total_bytes}
        return {**common, "dataset": "text", "shuffle": self.shuffle, **sizes}

    def lanes(self, global_batch: int) -> int:
        """See `Source`. No more lanes than documents, or two would read the same one at the same time."""
        if isinstance(self.documents, DatasetSpec):
            return global_batch
        return min(global_batch, len(self.documents))

    def reader(self, position: Position, lanes: frozenset[int]) -> "LaneReader":
        """See `Source`."""
        return LaneReader(self, position, lanes)

    def feed(self, position: Position, lanes: frozenset[int]) -> Feed:
        """The documents from `position` on."""
        if not isinstance(self.documents, DatasetSpec):
            return ListFeed(self.documents, seed=self.seed, shuffle=self.shuffle)
        cursors = {lane: position.cursors.get(lane, Cursor()) for lane in lanes}
        first_needed = {lane: lane + cursor.document * position.lanes for lane, cursor in cursors.items()}
        return StreamFeed(partial(open_stream, self.documents), position.lanes, first_needed, position.bookmark)


class LaneReader:
    """Reads the samples of some lanes, tokenizing only what they need."""

    def __init__(self, source: LaneSource, position: Position, lanes: frozenset[int]) -> None:
        self._count = position.lanes
        self._feed = source.feed(position, lanes)
        self._lanes = {lane: self._lane(source, lane, position.cursors.get(lane, Cursor())) for lane in sorted(lanes)}
        self._moved: set[int] = set()

    def window(self, sample: int) -> Window:
        """See `Reader`."""
        windows, number = divmod(sample, self._count)
        lane = self._lanes[number]
        while lane.cursor.windows < windows:  # samples that another rank consumed
            lane.next_window()
        assert lane.cursor.windows == windows, f"sample {sample} of lane {number} was read before"
        self._moved.add(number)
        return lane.next_window()

    def progress(self) -> Progress:
        """See `Reader`."""
        documents = [number + lane.cursor.document * self._count for number, lane in self._lanes.items()]
        moved = {number: self._lanes[number].cursor for number in sorted(self._moved)}
        self._moved.clear()
        return Progress(moved, self._feed.bookmark(min(documents)), self._feed.epoch(max(documents)))

    def _lane(self, source: LaneSource, number: int, cursor: Cursor) -> Lane:
        return Lane(
            lambda document: self._feed.text(number + document * self._count),
            source.tokenizer,
            source.seq_len,
            cursor=cursor,
            document_masking=source.document_masking,
        )


Source = SyntheticSource | BlockSource | LaneSource
"""An ordered, endless supply of samples: frozen, and it can be pickled. Every kind has

    name, seed          for messages; what the order depends on
    identity()          what must be the same for a state to be continued, by the name of what sets it
    lanes(G)            lanes for a run that begins with a global batch of G; 0 if the samples are addressable
    reader(p, lanes)    continue at position p; of a source with lanes only samples of `lanes` will be asked for
"""


def lanes_of_slots(slots: range, first_sample: int, global_batch: int, lanes: int) -> frozenset[int]:
    """All lanes that some slots will ever meet, in steps of `global_batch` samples from `first_sample` on.

    From step to step a slot moves on by G modulo L, that is, through all lanes of its class modulo gcd(G, L).
    """
    if not lanes:
        return frozenset()
    stride = math.gcd(global_batch, lanes)
    classes = {(first_sample + slot) % stride for slot in slots}
    return frozenset(lane for lane in range(lanes) if lane % stride in classes)


def collect_tokens(texts: Iterable[str], tokenizer: Tokenizer, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [T] int32 of documents one after the other, and [D] int64 where each begins.

    Stops behind the document that reaches `limit` tokens, so T may be larger than that, or smaller if the texts end.
    """
    pieces: list[np.ndarray] = []
    starts: list[int] = []
    total = 0
    for text in texts:
        for number, piece in enumerate(encode_document(tokenizer, text)):
            if number == 0:
                starts.append(total)
            pieces.append(piece)
            total += len(piece)
            if limit is not None and total >= limit:
                break
        if limit is not None and total >= limit:
            break
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    return tokens, np.asarray(starts, dtype=np.int64)


def require_one_sample(texts: Iterable[str], tokenizer: Tokenizer, seq_len: int, what: str) -> None:
    """Refuse data that does not fill one sample.

    Raises:
        UserError: fewer than S + 1 tokens in all of `texts`.
    """
    tokens, _ = collect_tokens(texts, tokenizer, seq_len + 1)
    if len(tokens) <= seq_len:
        raise UserError(
            f"{what} has {len(tokens)} tokens, less than one sample of seq_len + 1 = {seq_len + 1}; "
            "give more text or a smaller seq_len"
        )
