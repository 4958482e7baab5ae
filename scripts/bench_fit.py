#!/usr/bin/env python3
"""Find the largest batch and the longest sequence that fit one GPU, with this project and with the peer.

    scripts/bench_peers.sh ... --repeats 1                                     once: installs the peer in RUNS/peer_site
    python scripts/bench_fit.py --data TOKENS --tokenizer DIR --out RUNS
    python scripts/bench_fit.py ... --lanes 4                                  four searches at a time, a GPU each

Llama 3 8B dims, 8 of 32 layers, the options of `bench_peers.py`'s row (tensorwise, compiled). `batch` is sequences of
8192 tokens, `sequence` the length of one sequence in steps of 8192. A size fits if it trains for a few steps. The
search begins with two small sizes, goes on where their peaks of memory say that the device is full, and ends with a
size that fits beside one that does not.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench_common import append_records, markdown_table
from bench_peers import check_devices, execute, inspect_peer, parser_of, settle
from bench_runs import lanes_of, side_by_side, visible_gpus
from peer.jobs import LOG_FREQ, OURS, ROWS, SEQ_LEN, THEIRS, Job, Run
from peer.text import write_peer_text

LAYERS = 8
KINDS = ("batch", "sequence")
SECOND = (8, 2)
"""Tried after 1, until one fits."""
RESERVE_GIB = 1.5
"""What a device has beside PyTorch's memory: the context of CUDA and the libraries."""
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory")
Result = Mapping[str, Any]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--row", default="tensorwise-compiled", choices=ROWS, help="configuration (default: tensorwise-compiled)")
    add("--kinds", default=",".join(KINDS), help="comma-separated (default: batch,sequence)")
    add("--sides", default=f"{OURS},{THEIRS}", help="comma-separated (default: ours,peer)")
    add("--lanes", type=int, default=1, help="searches at a time, each on a GPU of its own (default: 1)")
    add("--row-timeout", type=float, default=300, help="seconds after which a run is ended (default: 300)")
    args = parser.parse_args(argv)
    settle(args, kinds=KINDS, sides=(OURS, THEIRS))
    # What the runs of bench_peers.py are told besides.
    args.steps, args.warm_up, args.lr, args.ac = LOG_FREQ, 0, 3e-4, "op"
    args.vocab_size, args.peer_options, args.same_start = 128256, [], False
    return args


def largest(try_size: Callable[[int], Result], capacity_gib: float) -> tuple[int, dict[int, Result]]:
    """The largest size that fits, and what was found out about each size tried.

    Args:
        try_size: trains with a size and returns `memory_gib`, or an `error`.
        capacity_gib: of the device; it decides where to look, not what fits.

    Raises:
        SystemExit: a run failed for another reason than memory, or the smallest does not fit.
    """
    tried: dict[int, Result] = {}

    def fits(size: int) -> bool:
        if size not in tried:
            tried[size] = try_size(size)
            error = tried[size].get("error")
            if error and not any(words in error for words in OUT_OF_MEMORY):
                raise SystemExit(f"size {size} failed, but not for memory: {error}")
        return "error" not in tried[size]

    if not fits(1):
        raise SystemExit(f"the smallest size does not fit: {tried[1]['error']}")
    # Far apart, so that what a size takes comes out well.
    second = next((size for size in SECOND if fits(size)), 1)
    guess = second + 1
    if second > 1:
        a_size = (tried[second]["memory_gib"] - tried[1]["memory_gib"]) / (second - 1)
        guess = second + int((capacity_gib - RESERVE_GIB - tried[second]["memory_gib"]) / max(a_size, 0.1))
    while not fits(guess):
        guess -= 1
    while fits(guess + 1):
        guess += 1
    return guess, tried


def job_of(kind: str, size: int) -> Job:
    """The training of a size."""
    name = f"fit-{kind}-{size}"
    if kind == "batch":
        return Job(name, gpus=1, layers=LAYERS, local_batch=size, global_batch=size)
    return Job(name, gpus=1, layers=LAYERS, local_batch=1, global_batch=1, seq_len=size * SEQ_LEN)


def search(
    kind: str, side: str, args: argparse.Namespace, found: Mapping[str, Any], lane: Mapping[str, str]
) -> dict[str, Any]:
    """The largest size of a kind for a side, on the GPU of a lane."""
    environment = {**os.environ, **lane}

    def try_size(size: int) -> Result:
        job = job_of(kind, size)
        if side == THEIRS:
            tokens = args.steps * job.global_batch * (job.seq_len + 1)
            write_peer_text(args.data, args.tokenizer, args.out / job.name, ranks=1, tokens=tokens)
        record = execute(Run(job, ROWS[args.row], side, 1), args, found, environment)
        append_records(args.out, [record])
        print(f"{job.name}, {side}: {record.get('error') or record['memory_gib']}", flush=True)
        return record

    size, tried = largest(try_size, found["capacity_gib"])
    return {"kind": kind, "side": side, "size": size, "record": tried[size]}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line a kind and side."""
    lines = []
    for result in results:
        size = result["size"] if result["kind"] == "batch" else result["size"] * SEQ_LEN
        record = result["record"]
        lines.append(
            (result["kind"], result["side"], f"{size:,}", f"{record['memory_gib']:.1f}", f"{record['tps']:,.0f}")
        )
    return markdown_table(("largest", "side", "fits", "peak GiB", "tok/s/GPU"), lines)


def main() -> int:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    found = inspect_peer(args.site, args.out)
    check_devices([], found["devices"])
    import torch

    found = {**found, "capacity_gib": torch.cuda.get_device_properties(0).total_memory / 2**30}
    pairs = [(kind, side) for kind in args.kinds for side in args.sides]
    lanes = lanes_of(args.lanes, 1, visible_gpus())
    results = side_by_side(lambda pair, lane: search(*pair, args, found, lane), pairs, lanes)
    (args.out / "fit.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    print(f"\n{found['devices'][0]}, {args.row}, {LAYERS} of 32 layers\n\n{table(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
