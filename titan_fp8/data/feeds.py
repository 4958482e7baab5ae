"""How lanes get their documents: by number from a list, or by reading a stream forward.

All lanes together read one endless sequence of documents, numbered 0, 1, 2, ...; lane l of L reads the numbers l, l +
L, l + 2 L, ... Where the sequence ends, it begins again: that is an epoch.

From a list any number can be had at any time, and each epoch has its own order. A stream has one order, its own, and
can only be read forward. A process keeps the texts that its lanes have not come to yet and drops those of other lanes
unread, so the costly part, tokenizing, is shared among processes though each of them reads the whole stream. To
resume without reading a terabyte again, the stream's own bookmark (`IterableDataset.state_dict`) is kept for a place
shortly before the document that the slowest lane needs next.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from titan_fp8.data.dataset_spec import DatasetSpec
from titan_fp8.data.documents import TextDocuments, quiet_datasets
from titan_fp8.data.permutation import mix, permuted
from titan_fp8.runtime.errors import UserError

BOOKMARK_EVERY = 256
"""Documents of a stream between two bookmarks."""


class Feed(Protocol):
    """Where a process's lanes get their documents."""

    def text(self, document: int) -> str:
        """Text of a document of the endless sequence; each is asked for at most once, growing within a lane."""
        ...

    def epoch(self, document: int) -> int:
        """How often the data was read to its end before this document."""
        ...

    def bookmark(self, oldest: int) -> str | None:
        """Where to start reading again if nothing before document `oldest` is needed; None: from the start."""
        ...


class ListFeed:
    """Documents of a list, in an order of its own for each epoch."""

    def __init__(self, documents: TextDocuments, *, seed: int, shuffle: bool) -> None:
        self._documents = documents
        self._seed = seed
        self._shuffle = shuffle

    def text(self, document: int) -> str:
        """See `Feed`."""
        epoch, place = divmod(document, len(self._documents))
        if self._shuffle:
            place = permuted(place, len(self._documents), mix(self._seed, epoch))
        return self._documents[place]

    def epoch(self, document: int) -> int:
        """See `Feed`."""
        return document // len(self._documents)

    def bookmark(self, oldest: int) -> str | None:
        """None: a list needs no bookmark."""
        return None


@dataclass(frozen=True)
class Bookmark:
    """A place in a stream.

    Attributes:
        document: the next document's number.
        epoch: how often the stream had ended before it.
        state: `IterableDataset.state_dict()` there.
    """

    document: int
    epoch: int
    state: dict[str, Any]

    def to_json(self) -> str:
        """As text, for a checkpoint."""
        return json.dumps([self.document, self.epoch, self.state])

    @classmethod
    def from_json(cls, text: str) -> "Bookmark":
        """Back from text."""
        return cls(*json.loads(text))


class StreamFeed:
    """Documents of a stream, read forward once."""

    def __init__(
        self,
        open_stream: Callable[[], Any],
        lanes: int,
        first_needed: Mapping[int, int],
        bookmark: str | None = None,
    ) -> None:
        """
        Args:
            open_stream: gives the stream (a `datasets.IterableDataset`) from its beginning.
            lanes: number of lanes that share the sequence.
            first_needed: lane -> first document that will be asked for, for each lane of this process.
            bookmark: where to start; not behind any document of `first_needed`.
        """
        self._open_stream = open_stream
        self._lanes = lanes
        self._first_needed = dict(first_needed)
        self._kept: dict[int, str] = {}
        self._bookmarks: list[Bookmark] = []
        self._epoch_ends: list[int] = []  # numbers of the first documents of the epochs that this feed saw begin
        start = Bookmark.from_json(bookmark) if bookmark else None
        self._first_epoch = start.epoch if start else 0
        self._next = start.document if start else 0
        self._texts = self._read(start)

    def text(self, document: int) -> str:
        """See `Feed`. Raises `UserError` if the stream is empty or has no column `text`."""
        while self._next <= document:
            text = next(self._texts)
            lane = self._next % self._lanes
            if self._next >= self._first_needed.get(lane, self._next + 1):
                self._kept[self._next] = text
            self._next += 1
        return self._kept.pop(document)

    def epoch(self, document: int) -> int:
        """See `Feed`."""
        return self._first_epoch + sum(end <= document for end in self._epoch_ends)

    def bookmark(self, oldest: int) -> str | None:
        """See `Feed`."""
        while len(self._bookmarks) > 1 and self._bookmarks[1].document <= oldest:
            del self._bookmarks[0]
        if self._bookmarks and self._bookmarks[0].document <= oldest:
            return self._bookmarks[0].to_json()
        return None

    def _read(self, start: Bookmark | None) -> Iterator[str]:
        """Texts from `start` on, without end. `self._next` is the number of the text that comes next."""
        epoch = start.epoch if start else 0
        while True:
            stream = self._open_stream()
            if start is not None:
                stream.load_state_dict(start.state)
                self._bookmarks.append(start)
            empty = start is None
            start = None
            for text in stream_texts(stream):
                empty = False
                yield text
                if self._next % BOOKMARK_EVERY == 0:
                    self._bookmarks.append(Bookmark(self._next, epoch, stream.state_dict()))
            if empty:
                raise UserError("the streamed data set is empty: it ended without one document with text")
            epoch += 1
            self._epoch_ends.append(self._next)


def stream_texts(stream: Any) -> Iterator[str]:
    """The non-empty texts of a stream.

    Raises:
        UserError: a row without `text`, or one that is no string.
    """
    for row in stream:
        if "text" not in row:
            raise UserError(f'the streamed data set has no column "text" (columns: {", ".join(row)})')
        text = row["text"]
        if text is not None and not isinstance(text, str):
            raise UserError(f'the column "text" of the streamed data set holds {type(text).__name__}, not strings')
        if text:
            yield text


def open_stream(spec: DatasetSpec) -> Any:
    """The `datasets.IterableDataset` that a spec names, from its beginning.

    Raises:
        UserError: it cannot be opened: no network, no such name, configuration or split.
    """
    import datasets

    assert spec.path is not None
    try:
        with quiet_datasets():
            return datasets.load_dataset(spec.path, name=spec.config, split=spec.split, streaming=True)
    except Exception as error:  # the hub, the network and each file format have errors of their own
        what = spec.path if spec.config is None else f"{spec.path} ({spec.config})"
        raise UserError(
            f"dataset {spec.name!r}: cannot stream split {spec.split!r} of {what}: {type(error).__name__}: {error}; "
            'check the name and the network, or use local files with dataset = "text" and dataset_path'
        ) from error
