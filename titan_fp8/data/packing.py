"""Documents of any length to samples of one length, without padding and without losing a token.

Documents are written one after the other, each between its marks, and the stream of tokens is cut into *windows* of
S + 1 tokens that start S tokens apart (the last token of a window is the first of the next one: once a label, once an
input):

    stream     bos a a a eos bos b b b b b eos bos c ...
    window 0   [.............]
    window 1               [...............]

A *lane* is one such stream. Where it stands is told by a cursor of two numbers, the document that its next window
begins in and the token within that document; tokenizing that document again and dropping the tokens before the cursor
continues the lane exactly. The cost of resuming is therefore one document, however much was read before.

Very long documents are tokenized in pieces, so that a book in one string neither stalls the training nor fills the
memory. The pieces are cut at fixed places of the text, so they are the same in every run and for every source.

Legend: S tokens a sequence.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from titan_fp8.data.tokenizer import Tokenizer

PIECE_CHARACTERS = 1 << 18
"""Documents longer than this are tokenized in pieces of about this length."""


@dataclass(frozen=True, eq=False)
class Window:
    """One sample.

    Attributes:
        tokens: [S + 1] int32.
        document_ids: [S + 1] int32, counted from 0 within the window; None without document masking.
        length: tokens that are real; less than S + 1 only at the end of a finite validation set.
    """

    tokens: np.ndarray
    document_ids: np.ndarray | None
    length: int


def encode_document(tokenizer: Tokenizer, text: str) -> Iterator[np.ndarray]:
    """Tokens of `bos text eos` as int32 arrays, one a piece. An empty text has no tokens, not even marks."""
    start = 0
    while start < len(text):
        stop = _piece_end(text, start)
        ids = tokenizer.encode(text[start:stop], bos=start == 0, eos=stop == len(text))
        yield np.asarray(ids, dtype=np.int32)
        start = stop


def _piece_end(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends: behind a line if possible, else before a space."""
    limit = start + PIECE_CHARACTERS
    if limit >= len(text):
        return len(text)
    earliest = start + PIECE_CHARACTERS // 2
    newline = text.rfind("\n", earliest, limit)
    if newline >= 0:
        return newline + 1
    space = text.rfind(" ", earliest, limit)
    return space if space >= 0 else limit


@dataclass(frozen=True)
class Cursor:
    """Where a lane stands.

    Attributes:
        windows: windows taken from the lane so far.
        document: the lane's document (0, 1, 2, ... of this lane) in which the next window begins.
        offset: token of that document at which it begins.
    """

    windows: int = 0
    document: int = 0
    offset: int = 0


class Lane:
    """One packed stream of documents, continued from a cursor."""

    def __init__(
        self,
        text_of: Callable[[int], str],
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        cursor: Cursor,
        document_masking: bool,
    ) -> None:
        """`text_of(n)` is the text of the lane's n-th document; it is asked for growing n, once for each."""
        self._text_of = text_of
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._document_masking = document_masking
        self._windows = cursor.windows
        self._next_piece = self._pieces(cursor)
        self._pending: deque[tuple[int, int, np.ndarray]] = deque()  # (document, offset, tokens)
        self._pending_tokens = 0
        self._start = cursor

    @property
    def cursor(self) -> Cursor:
        """The place at which a new `Lane` would give the same next window."""
        if not self._pending:
            return self._start
        document, offset, _ = self._pending[0]
        return Cursor(self._windows, document, offset)

    def next_window(self) -> Window:
        """The next S + 1 tokens; the lane moves on by S."""
        while self._pending_tokens <= self._seq_len:
            piece = next(self._next_piece)
            if len(piece[2]):
                self._pending.append(piece)
                self._pending_tokens += len(piece[2])
        window = self._first_tokens(self._seq_len + 1)
        self._drop(self._seq_len)
        self._windows += 1
        return window

    def _pieces(self, cursor: Cursor) -> Iterator[tuple[int, int, np.ndarray]]:
        document, skip = cursor.document, cursor.offset
        while True:
            offset = 0
            for tokens in encode_document(self._tokenizer, self._text_of(document)):
                dropped = min(max(skip - offset, 0), len(tokens))
                yield document, offset + dropped, tokens[dropped:]
                offset += len(tokens)
            document, skip = document + 1, 0

    def _first_tokens(self, count: int) -> Window:
        parts: list[np.ndarray] = []
        ids: list[np.ndarray] = []
        first_document, number = self._pending[0][0], 0
        missing = count
        for document, _, tokens in self._pending:
            part = tokens[:missing]
            if document != first_document:
                first_document, number = document, number + 1
            parts.append(part)
            if self._document_masking:
                ids.append(np.full(len(part), number, dtype=np.int32))
            missing -= len(part)
            if not missing:
                break
        return Window(np.concatenate(parts), np.concatenate(ids) if ids else None, count)

    def _drop(self, count: int) -> None:
        self._pending_tokens -= count
        while count:
            document, offset, tokens = self._pending.popleft()
            if len(tokens) > count:
                self._pending.appendleft((document, offset + count, tokens[count:]))
                return
            count -= len(tokens)
