"""Writing token shards: text in, a finished folder out, or nothing.

Everything is written into a hidden folder beside the output and renamed at the end, when each file is on disk and the
manifest is complete. A run that is killed, fails or meets a full disk therefore leaves no folder that could be
mistaken for data.

Documents are tokenized as `packing.py` does it for text that is read directly, in the same order and with the same
split, so training on the shards sees the same documents as training on the text.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from titan_fp8.data.documents import TextDocuments
from titan_fp8.data.packing import encode_document
from titan_fp8.data.token_store import MANIFEST, Manifest, Shard
from titan_fp8.data.tokenizer import Tokenizer
from titan_fp8.data.workers import WorkerPool
from titan_fp8.runtime.errors import UserError

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some documents in a row: their tokens one after the other, and the tokens of each."""

    tokens: np.ndarray
    lengths: np.ndarray


class _SplitWriter:
    """Writes the shards of one split. A shard ends at the first document's end at or behind `shard_tokens` tokens."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._starts: list[np.ndarray] = []
        self._tokens = 0
        self.shards: list[Shard] = []

    def write(self, chunk: _Chunk) -> None:
        """Append documents."""
        ends = np.cumsum(chunk.lengths)
        first_document, first_token = 0, 0
        while first_document < len(ends):
            room = self._shard_tokens - self._tokens
            last = min(int(np.searchsorted(ends, first_token + room)), len(ends) - 1)
            stop = int(ends[last])
            starts = np.concatenate([[first_token], ends[first_document:last]]) - first_token + self._tokens
            if self._file is None:
                self._file = self._open("bin")
            self._file.write(chunk.tokens[first_token:stop].astype(self._dtype, copy=False).tobytes())
            self._starts.append(starts)
            self._tokens += stop - first_token
            first_document, first_token = last + 1, stop
            if self._tokens >= self._shard_tokens:
                self.finish_shard()

    def finish_shard(self) -> None:
        """End the shard in hand, if there is one, and see it onto the disk."""
        if self._file is None:
            return
        starts = np.concatenate(self._starts).astype("<i8")
        _close_on_disk(self._file)
        with self._open("starts") as starts_file:
            starts_file.write(starts.tobytes())
            _close_on_disk(starts_file)
        self.shards.append(Shard(self._name, self._tokens, len(starts)))
        self._file, self._starts, self._tokens = None, [], 0

    def close(self) -> None:
        """Close a file that was left open by an error."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    @property
    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):05d}"

    def _open(self, suffix: str) -> BinaryIO:
        return open(self._folder / f"{self._name}.{suffix}", "wb")


def write_token_folder(
    output: Path,
    splits: dict[str, TextDocuments],
    tokenizer: Tokenizer,
    *,
    shard_tokens: int,
    num_workers: int,
) -> Manifest:
    """Tokenize documents into a folder of shards, with a progress bar on standard error.

    Args:
        output: folder to make; it may exist if it is empty.
        splits: documents by split, `train` and possibly `validation`.
        tokenizer: what to tokenize with.
        shard_tokens: tokens in one shard; the document that reaches it is the shard's last.
        num_workers: processes that tokenize; 0 does it in this one. The result does not depend on it.

    Raises:
        UserError: the output exists, cannot be written, or the disk is full. Nothing of it is left then.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder; remove it or name another --output")
    partial = output.parent / f".{output.name}.partial"
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        shards = {
            split: _write_split(partial, split, documents, tokenizer, dtype, shard_tokens, num_workers)
            for split, documents in splits.items()
        }
        manifest = Manifest(dtype, tokenizer.vocab_size, tokenizer.name, tokenizer.fingerprint, shards)
        with open(partial / MANIFEST, "wb") as file:
            file.write(manifest.to_json().encode())
            _close_on_disk(file)
        os.replace(partial, output)
    except OSError as error:
        remedy = (
            "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the path and its permissions"
        )
        raise UserError(f"cannot write {output}: {error.strerror or error}; {remedy}. Nothing was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write_split(
    folder: Path,
    split: str,
    documents: TextDocuments,
    tokenizer: Tokenizer,
    dtype: str,
    shard_tokens: int,
    num_workers: int,
) -> tuple[Shard, ...]:
    writer = _SplitWriter(folder, split, dtype, shard_tokens)
    with tqdm(total=len(documents), desc=split, unit=" documents", unit_scale=True) as bar:
        try:
            for chunk in _chunks(documents, tokenizer, dtype, num_workers):
                writer.write(chunk)
                bar.update(len(chunk.lengths))
            writer.finish_shard()
        finally:
            writer.close()
    return tuple(writer.shards)


def _chunks(documents: TextDocuments, tokenizer: Tokenizer, dtype: str, num_workers: int) -> Iterator[_Chunk]:
    """The documents' tokens, in order."""
    work = _Tokenizing(documents, tokenizer, dtype)
    workers = min(num_workers, len(work.ranges))
    if workers < 2:
        yield from (chunk for chunk in work.parts() if chunk is not None)
        return
    pool: WorkerPool[_Chunk | None] = WorkerPool(work, workers)
    try:
        for chunks in pool.rounds():
            yield from (chunk for chunk in chunks if chunk is not None)
    finally:
        pool.close()


@dataclass(frozen=True, eq=False)
class _Tokenizing:
    """Documents to tokenize, shared among processes chunk by chunk in turn."""

    documents: TextDocuments
    tokenizer: Tokenizer
    dtype: str

    @property
    def ranges(self) -> list[range]:
        """Document numbers of each chunk."""
        count = len(self.documents)
        step = max(1, _CHUNK_BYTES * count // max(self.documents.total_bytes, 1))
        return [range(start, min(start + step, count)) for start in range(0, count, step)]

    def parts(self, part: int = 0, parts: int = 1) -> Iterator[_Chunk | None]:
        """Each `parts`-th chunk, and None in a last round that has none left for this process."""
        ranges = self.ranges
        for first in range(0, len(ranges), parts):
            yield self._encode(ranges[first + part]) if first + part < len(ranges) else None

    def _encode(self, numbers: range) -> _Chunk:
        pieces: list[np.ndarray] = []
        lengths: list[int] = []
        for number in numbers:
            document = list(encode_document(self.tokenizer, self.documents[number]))
            pieces += document
            lengths.append(sum(map(len, document)))
        return _Chunk(np.concatenate(pieces).astype(self.dtype), np.asarray(lengths, dtype=np.int64))


def _close_on_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
