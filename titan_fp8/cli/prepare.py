"""`titan-fp8 prepare`: tokenize text once and write it as shards for `training.dataset = "tokens"`.

Reading text directly is fine for small data and few ranks. For large data, prepare it: nothing is tokenized during
training, samples are shuffled over the whole data set, and a resumed run starts at once.

    titan-fp8 prepare --input corpus/ --output corpus-tokens --tokenizer assets/Llama-3.1-8B
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from titan_fp8.data.dataset_spec import HOLD_OUT_EVERY
from titan_fp8.data.documents import TextDocuments, find_text_files, load_text
from titan_fp8.data.token_store import Manifest
from titan_fp8.data.token_writer import write_token_folder
from titan_fp8.data.tokenizer import build_tokenizer
from titan_fp8.runtime.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Raises `UserError` for input that cannot be read or output that cannot be written."""
    options = _parser().parse_args(argv)
    if options.shard_size_tokens < 1 or options.num_workers < 0:
        raise UserError("--shard-size-tokens must be at least 1 and --num-workers at least 0")
    source, output = Path(options.input).expanduser(), Path(options.output).expanduser()
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--output {output} lies inside --input {source}, where it would be read as text; move it out")
    tokenizer = build_tokenizer(options.tokenizer)
    splits = _splits(source, options.hold_out_every, options.txt_documents)
    started = time.monotonic()
    manifest = write_token_folder(
        output, splits, tokenizer, shard_tokens=options.shard_size_tokens, num_workers=options.num_workers
    )
    _print_summary(manifest, output, options.tokenizer, time.monotonic() - started)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="titan-fp8 prepare", description="Write text as token shards for training.dataset = 'tokens'."
    )
    add = parser.add_argument
    add("--input", required=True, metavar="PATH", help="a txt, json, jsonl, parquet or arrow file, or a folder of them")
    add("--output", required=True, metavar="DIR", help="folder to make")
    add("--tokenizer", metavar="PATH", help="folder with tokenizer.json (default: the built-in byte tokenizer)")
    add(
        "--shard-size-tokens", type=int, default=100_000_000, metavar="N", help="tokens in a shard (default: 100000000)"
    )
    add("--num-workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a CPU)")
    add(
        "--hold-out-every",
        type=int,
        metavar="N",
        help=f"put each Nth document into the validation split (default: {HOLD_OUT_EVERY}; 0: none). "
        "A folder with files named validation* has its split already",
    )
    add(
        "--txt-documents",
        choices=("line", "paragraph", "file"),
        default="line",
        help="what of a txt file is one document (default: line)",
    )
    return parser


def _splits(source: Path, hold_out_every: int | None, txt_documents: str) -> dict[str, TextDocuments]:
    options = {"hold_out_every": hold_out_every, "txt_documents": txt_documents}
    train = load_text(source, "train", **options)
    if find_text_files(source).validation or train.held_out:
        return {"train": train, "validation": load_text(source, "validation", **options)}
    return {"train": train}


def _print_summary(manifest: Manifest, output: Path, tokenizer: str | None, seconds: float) -> None:
    total = 0
    for split, shards in manifest.splits.items():
        tokens, documents = sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards)
        total += tokens
        print(f"{split:<11}{tokens:>16,} tokens {documents:>13,} documents {len(shards):>6,} shards")
    size = total * np.dtype(manifest.dtype).itemsize
    rate = total / max(seconds, 1e-9)
    print(f"{size / 2**30:.2f} GiB of {manifest.dtype} in {output}, {seconds:.0f} s, {rate:,.0f} tokens/s")
    assets = f" --model.hf_assets_path {tokenizer}" if tokenizer else ""
    print(f"Train on it with: --training.dataset tokens --training.dataset_path {output}{assets}")
