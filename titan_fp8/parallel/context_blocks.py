"""Which of a rank's queries meet which keys, where sequences are spread over ranks (`context_attention.py`).

A rank holds one chunk of every sequence or, balanced, two. In some layers of some models a token sees the tokens of its
own window alone, that is from the last multiple of `window` positions on. Windows and chunks begin and end where they
like: a chunk is cut where a window ends, and the pieces meet the keys of their own window.

    window 6, chunks of 4    0 1 2 3    4 5 | 6 7    8 9 10 11    12 13 14 15
    pieces see               4 5: 0 1 2 3 and themselves      6 7: themselves      8 9 10 11: 6 7 and themselves

Blocks that no query sees are not computed, and where a chunk is whole windows no key has to travel. Nothing here
imports torch.

Legend: S tokens of a sequence, L = S / ranks those of a rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A kernel call: which of a rank's queries meet which of the keys at hand. Causal: aligned at the last of both."""

    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True)
class _Piece:
    """Tokens of one chunk and one window: where they lie in the rank's part, their positions, and the first position of
    the window."""

    local: slice
    start: int
    end: int
    first_seen: int


def held_chunks(rank: int, degree: int, balanced: bool) -> tuple[int, ...]:
    """The chunks of a sequence that `rank` of `degree` holds, ascending: `rank` of `degree` equal chunks or, balanced,
    the `rank`-th from the head and the `rank`-th from the tail of `2 * degree`."""
    return (rank, 2 * degree - 1 - rank) if balanced else (rank,)


def is_seen_by_its_holder_alone(degree: int, local_len: int, balanced: bool, window: int | None) -> bool:
    """Whether no rank needs another's keys."""
    chunk = local_len // 2 if balanced else local_len
    return degree == 1 or (window is not None and chunk % window == 0)


def gathered_blocks(
    rank: int, degree: int, local_len: int, balanced: bool, rectangular: bool, window: int | None = None
) -> list[Block]:
    """The blocks of a rank's queries with all keys in natural order.

    Args:
        local_len: L.
        rectangular: whether the kernel's causal blocks may have more keys than queries.
        window: positions that see each other; None: the whole sequence.
    """
    blocks = []
    for piece in _pieces(rank, degree, local_len, balanced, window):
        if piece.first_seen < piece.start and not rectangular:
            blocks.append(Block(piece.local, slice(piece.first_seen, piece.start), causal=False))
        start = piece.first_seen if rectangular else piece.start
        blocks.append(Block(piece.local, slice(start, piece.end), causal=True))
    return blocks


def ring_blocks(
    rank: int, source: int, degree: int, local_len: int, balanced: bool, window: int | None = None
) -> list[Block]:
    """The blocks of `rank`'s queries with the L keys of `source`; none where no query sees any.

    Args:
        local_len: L.
        window: positions that see each other; None: the whole sequence.
    """
    if window is None:
        return _ring_blocks_of_whole_sequences(rank, source, local_len, balanced)
    blocks = []
    for queries in _pieces(rank, degree, local_len, balanced, window):
        for keys in _pieces(source, degree, local_len, balanced, window):
            if queries.first_seen <= keys.start <= queries.start:
                blocks.append(Block(queries.local, keys.local, causal=keys.start == queries.start))
    return blocks


def _ring_blocks_of_whole_sequences(rank: int, source: int, local_len: int, balanced: bool) -> list[Block]:
    """In fewer blocks: one, or none where all keys come after all queries.

    Head and tail of `rank` enclose those of all higher ranks: its head sees nothing of them, its tail all. Of a lower
    rank both see the head and neither the tail.
    """
    whole, half = slice(0, local_len), local_len // 2
    if source == rank:
        return [Block(whole, whole, causal=True)]
    if source > rank:
        return [Block(slice(half, local_len), whole, causal=False)] if balanced else []
    return [Block(whole, slice(0, half) if balanced else whole, causal=False)]


def _pieces(rank: int, degree: int, local_len: int, balanced: bool, window: int | None) -> Iterator[_Piece]:
    """A rank's part, cut where chunks and windows end."""
    chunks = held_chunks(rank, degree, balanced)
    size = local_len // len(chunks)
    window = degree * local_len if window is None else window
    for slot, chunk in enumerate(chunks):
        start, chunk_end = chunk * size, (chunk + 1) * size
        to_local = slot * size - start
        while start < chunk_end:
            first_seen = start // window * window
            end = min(first_seen + window, chunk_end)
            yield _Piece(slice(start + to_local, end + to_local), start, end, first_seen)
            start = end
