"""Text and tokenizer for the peer that give it, step for step, the text that ours reads from token shards.

Ours reads the shards in file order: a step takes the next sequences, and each rank its share of them. The peer gives
rank r of R the r-th part of the documents, and packs each part from its beginning. So documents are dealt out in their
order, each to the part that has the fewest tokens, and the parts are written one after the other. A step of all ranks
then covers the same stretch of text on both sides, up to a document or so. The cuts between sequences differ (the
peer's lie a sequence length and one token apart), and so does which rank gets which.

What a token stands for is the same: documents are decoded from the shards, and the tokenizer's files tell the peer to
put the same marks around them.
"""

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from titan_fp8.data.token_store import open_shards
from titan_fp8.data.tokenizer import HFTokenizer, Tokenizer, build_tokenizer
from titan_fp8.runtime.errors import UserError

MOST_DIFFERENT = 0.01
"""Share of documents that may have other tokens after decoding and encoding again."""


def write_peer_text(shards: Path, tokenizer_folder: Path, out: Path, *, ranks: int, tokens: int) -> tuple[Path, Path]:
    """Write `out/text/data.jsonl` and `out/tokenizer`, the peer's data set and tokenizer; their folders.

    Args:
        shards: written by `titan-fp8 prepare`.
        tokenizer_folder: of the tokenizer that they were written with.
        ranks: data-parallel ranks that read the text.
        tokens: that the run reads; text is written for those and some more.

    Raises:
        SystemExit: the shards cannot be read with this tokenizer, or the tokenizer does not read back what it writes.
    """
    try:
        tokenizer = build_tokenizer(str(tokenizer_folder))
        documents = read_documents(shards, tokenizer, tokens + tokens // 10)
    except UserError as error:
        raise SystemExit(str(error)) from error
    assert isinstance(tokenizer, HFTokenizer)
    if len(documents) < ranks:
        raise SystemExit(f"{shards} has {len(documents)} documents for {ranks} ranks; prepare more text")
    texts = [tokenizer.decode(_without_marks(document, tokenizer)) for document in documents]
    again = tokenizer.encode_batch(texts, bos=True, eos=True)
    different = sum(codes != list(document) for codes, document in zip(again, documents, strict=True))
    if different > MOST_DIFFERENT * len(documents):
        raise SystemExit(
            f"{different} of {len(documents)} documents of {shards} get other tokens when decoded and encoded with "
            f"{tokenizer_folder}, so the sides would not see the same text; take a byte-level tokenizer"
        )
    parts = deal([len(document) for document in documents], ranks)
    text, assets = out / "text", out / "tokenizer"
    text.mkdir(parents=True, exist_ok=True)
    with open(text / "data.jsonl", "w") as file:
        file.writelines(json.dumps({"text": texts[number]}) + "\n" for part in parts for number in part)
    write_peer_tokenizer(tokenizer_folder, tokenizer, assets)
    return text, assets


def read_documents(shards: Path, tokenizer: Tokenizer, tokens: int) -> list[np.ndarray]:
    """The first documents of the training split, whole and with their marks, up to `tokens` tokens, at least one."""
    store = open_shards(shards, "train", tokenizer)
    stop = min(tokens, store.total_tokens)
    while True:
        ids = store.document_ids(0, stop)
        if stop == store.total_tokens or ids[-1] > 0:
            break
        stop = min(2 * stop, store.total_tokens)
    documents = np.split(store.read(0, stop), np.flatnonzero(np.diff(ids)) + 1)
    return documents if stop == store.total_tokens else documents[:-1]


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Numbers of the documents of each rank: the next one goes to the rank with the fewest tokens.

    All ranks get equally many, since the peer divides the documents by their number: those with fewer begin again.
    """
    parts: list[list[int]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    for number, length in enumerate(lengths):
        rank = filled.index(min(filled))
        parts[rank].append(number)
        filled[rank] += length
    return [list(islice(cycle(part), max(map(len, parts)))) for part in parts]


def write_peer_tokenizer(source: Path, tokenizer: HFTokenizer, folder: Path) -> None:
    """A copy of `tokenizer.json` without marks of its own, and the marks in the form that the peer knows."""
    file = source / "tokenizer.json" if source.is_dir() else source
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    content |= {"post_processor": None, "truncation": None, "padding": None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    names = tokenizers.Tokenizer.from_file(str(file))
    marks = {"eos_token": names.id_to_token(tokenizer.eos_id)}
    if tokenizer.bos_id is not None:
        marks["bos_token"] = names.id_to_token(tokenizer.bos_id)
    (folder / "tokenizer_config.json").write_text(json.dumps(marks), encoding="utf-8")


def _without_marks(document: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    first = int(tokenizer.bos_id is not None and document[0] == tokenizer.bos_id)
    last = len(document) - int(document[-1] == tokenizer.eos_id)
    return document[first:last].tolist()
