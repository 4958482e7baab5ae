"""Tokens on disk: shards that are mapped into memory, and a manifest that says what they are.

`titan-fp8 prepare` writes a folder

    manifest.json          dtype, vocabulary, tokenizer, and of each split the shards with their counts
    train-00000.bin        tokens of whole documents, one after the other, little-endian, no header
    train-00000.starts     int64: where in the shard each document begins
    validation-00000.bin   ...

The shards of a split are one long sequence of tokens; where one file ends makes no difference to who reads it. A
folder without a manifest does not count, and the manifest is checked against the files' sizes, so that a copy that
was cut short is found before the training starts and not as a page of zeros in the middle of it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from titan_fp8.data.dataset_spec import Split
from titan_fp8.data.tokenizer import Tokenizer
from titan_fp8.runtime.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "titan_fp8 tokens"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One file of a split: its name without suffix, and what is in it."""

    name: str
    tokens: int
    documents: int


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        dtype: `uint16` or `uint32`.
        vocab_size: of the tokenizer that made the tokens.
        tokenizer: its name, for messages.
        fingerprint: its fingerprint, which the tokenizer in use must have.
        splits: shards of `train` and, if any document was held out, of `validation`.
    """

    dtype: str
    vocab_size: int
    tokenizer: str
    fingerprint: str
    splits: dict[str, tuple[Shard, ...]]

    def to_json(self) -> str:
        """As text, with a checksum over everything in it."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder, checked against itself and against the sizes of the files.

        Raises:
            UserError: no manifest, one that is damaged or of another version, or a shard that is missing or cut short.
        """
        remedy = "write the folder again with `titan-fp8 prepare`"
        file = folder / MANIFEST
        if not file.is_file():
            raise UserError(f"{folder} holds no {MANIFEST}, so it is no finished folder of token shards; {remedy}")
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            checksum = body.pop("checksum")
            if body.get("format") != FORMAT or body.get("version") != VERSION:
                raise UserError(f"{file} is not of format {FORMAT!r} version {VERSION}; {remedy}")
            if checksum != _checksum(body):
                raise UserError(f"{file} does not match its checksum; {remedy}")
            splits = {name: tuple(Shard(**shard) for shard in shards) for name, shards in body["splits"].items()}
            manifest = cls(body["dtype"], body["vocab_size"], body["tokenizer"], body["fingerprint"], splits)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); {remedy}") from error
        for shard in (shard for shards in splits.values() for shard in shards):
            for path, size in manifest.sizes(folder, shard):
                found = path.stat().st_size if path.is_file() else None
                if found != size:
                    state = "is missing" if found is None else f"has {found:,} bytes"
                    raise UserError(f"{path} {state}, but the manifest says {size:,}; copy it again, or {remedy}")
        return manifest

    def sizes(self, folder: Path, shard: Shard) -> tuple[tuple[Path, int], ...]:
        """The files of a shard and their sizes in bytes."""
        return (
            (folder / f"{shard.name}.bin", shard.tokens * np.dtype(self.dtype).itemsize),
            (folder / f"{shard.name}.starts", shard.documents * 8),
        )


class TokenStore(Protocol):
    """A long sequence of tokens with random access. Can be pickled."""

    total_tokens: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [stop - start] int32 of that range."""
        ...

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] int32: the number of each token's document, counted from the first in the range."""
        ...


class ArrayStore:
    """Tokens in memory."""

    def __init__(self, tokens: np.ndarray, document_starts: np.ndarray) -> None:
        """`tokens` [T] int32; `document_starts` [D] int64, growing."""
        self._tokens = tokens
        self._starts = document_starts
        self.total_tokens = len(tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `TokenStore`."""
        return self._tokens[start:stop]

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """See `TokenStore`."""
        return _document_ids(self._starts, start, stop)


class ShardStore:
    """Tokens of one split in a folder of shards, mapped into memory when first read."""

    def __init__(self, folder: Path, manifest: Manifest, split: Split) -> None:
        self._folder = folder
        self._manifest = manifest
        self._shards = manifest.splits[split]
        self._ends = np.cumsum([shard.tokens for shard in self._shards], dtype=np.int64)
        self._maps: dict[str, np.ndarray] = {}
        self.total_tokens = int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a map is opened again, not copied, in another process

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `TokenStore`."""
        parts = [
            self._map(f"{shard.name}.bin", self._manifest.dtype)[low:high].astype(np.int32)
            for shard, low, high in self._overlaps(start, stop)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """See `TokenStore`."""
        parts: list[np.ndarray] = []
        first = 0
        for shard, low, high in self._overlaps(start, stop):
            ids = _document_ids(self._map(f"{shard.name}.starts", "<i8"), low, high) + first
            first = int(ids[-1]) + 1  # a shard begins with a document
            parts.append(ids)
        return np.concatenate(parts).astype(np.int32)

    def _overlaps(self, start: int, stop: int) -> list[tuple[Shard, int, int]]:
        """The shards that the range touches, each with the range inside it."""
        found = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while number < len(self._shards) and (begin := int(self._ends[number]) - self._shards[number].tokens) < stop:
            shard = self._shards[number]
            found.append((shard, max(start - begin, 0), min(stop - begin, shard.tokens)))
            number += 1
        return found

    def _map(self, name: str, dtype: str) -> np.ndarray:
        if name not in self._maps:
            little_endian = np.dtype(dtype).newbyteorder("<")
            self._maps[name] = np.memmap(self._folder / name, dtype=little_endian, mode="r")
        return self._maps[name]


def open_shards(folder: Path, split: Split, tokenizer: Tokenizer) -> ShardStore:
    """The tokens of one split of a folder that `titan-fp8 prepare` wrote.

    Raises:
        UserError: a folder that is no such folder, is damaged, was made by another tokenizer, or has no such split.
    """
    manifest = Manifest.read(folder)
    if manifest.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{folder} was written with another tokenizer ({manifest.tokenizer}, {manifest.vocab_size} codes) than the "
            f"one in use ({tokenizer.name}, {tokenizer.vocab_size} codes); set model.hf_assets_path to that "
            "tokenizer, or prepare the data again"
        )
    if not manifest.splits.get(split):
        rest = ", ".join(name for name, shards in manifest.splits.items() if shards)
        raise UserError(
            f"{folder} has no {split} split (only {rest}); prepare it with --hold-out-every, "
            "or set validation.dataset_path"
        )
    return ShardStore(folder, manifest, split)


def _document_ids(starts: np.ndarray, start: int, stop: int) -> np.ndarray:
    positions = np.arange(start, stop)
    ids = np.searchsorted(starts, positions, side="right")
    return (ids - ids[0]).astype(np.int32)


def _checksum(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Sequence[Any]) -> list[Any]:
    return list(value)
