#!/usr/bin/env python3
"""The tables of `bench_8gpu.py`, from the records of its runs.

python scripts/bench_8gpu_tables.py RUNS/results.jsonl      of what one or several calls have run
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_common import markdown_table
from peer.jobs import OURS, THEIRS
from peer.table import table as table_of_sides

BASELINE = "bf16-eager"
"""The row that others of the headline and of short sequences are compared with, each side with its own."""
Record = dict[str, Any]


def tables(records: Sequence[Record]) -> str:
    """All tables, each under its heading, of what has run; Markdown."""
    scaling = [r for r in records if r["job"].startswith("scaling-")]
    headline, experts, large = (of_job(records, job) for job in ("headline", "experts", "large"))
    short: dict[str, list[Record]] = {}
    for record in records:
        part, _, ac = record["job"].partition("-")
        if part == "short":
            short.setdefault(ac, []).append(record)
    texts = [
        (f"Llama 3 8B, {size_of(headline)}, 8192 tokens a GPU", headline_table(headline)),
        (f"Llama 3 8B, {size_of(scaling, with_gpus=False)}, 8192 tokens a GPU", scaling_table(scaling)),
        *(
            (f"Llama 3 8B, {size_of(of_ac)}, 4096 tokens a GPU, recomputation: {ac}", memory_table(of_ac))
            for ac, of_ac in short.items()
        ),
        (
            f"Llama 4 Scout, {size_of(experts)}, {batch_of(experts)} x 8192 tokens a GPU, sent to all experts in turns",
            sides_table(experts),
        ),
        (f"Llama 3 70B, {size_of(large)}, 8192 tokens for two GPUs", sides_table(large)),
        ("Communication of a step, ms", communication_table(records)),
    ]
    return "\n\n".join(f"{heading}\n\n{text}" for heading, text in texts if text)


def latest(lines: Sequence[str]) -> list[Record]:
    """Of the lines of results.jsonl, the last record of each run that ended well, or else the last one that did not."""
    found: dict[tuple[Any, ...], Record] = {}
    for record in map(json.loads, lines):
        run = tuple(record[key] for key in ("job", "row", "side", "repeat"))
        if "error" not in record or "error" in found.get(run, {"error": ""}):
            found[run] = record
    return list(found.values())


def size_of(records: Sequence[Record], *, with_gpus: bool = True) -> str:
    """`32 layers on 8 GPUs`."""
    record = records[0] if records else {}
    gpus = f" on {record.get('gpus', '?')} GPUs" if with_gpus else ""
    return f"{record.get('layers', '?')} layers{gpus}"


def batch_of(records: Sequence[Record]) -> str:
    """Sequences a GPU."""
    return str((records[0] if records else {}).get("local_batch", "?"))


def of_job(records: Sequence[Record], job: str) -> list[Record]:
    """Those of one job."""
    return [r for r in records if r["job"] == job]


def find(records: Sequence[Record], row: str, side: str = OURS, job: str | None = None) -> Record:
    """The record of a row and side; empty if it did not run."""
    found = (r for r in records if (r["row"], r["side"]) == (row, side) and job in (None, r["job"]))
    return next(found, {})


def rows_of(records: Sequence[Record]) -> list[str]:
    """Names of rows in the order in which they ran, the baseline first and then what else is in bf16."""
    names = list(dict.fromkeys(r["row"] for r in records))
    return sorted(names, key=lambda name: (name != BASELINE, not name.startswith("bf16")))


def headline_table(records: Sequence[Record]) -> str:
    """A line a row: each side's speed, and how it stands to the side's own baseline."""
    lines = []
    baselines = [find(records, BASELINE, side) for side in (OURS, THEIRS)]
    for row in rows_of(records):
        sides = [find(records, row, side) for side in (OURS, THEIRS)]
        speeds = [
            cell
            for side, baseline in zip(sides, baselines, strict=True)
            for cell in (speed(side), change(side, baseline))
        ]
        ratio = f"{sides[0]['tps'] / sides[1]['tps']:.3f}" if all(side.get("tps") for side in sides) else ""
        lines.append((row, *speeds, ratio, *(number(side, "memory_gib") for side in sides)))
    columns = ("row", "ours, tok/s/GPU", "to eager bf16", "peer, tok/s/GPU", "to eager bf16", "ours / peer")
    return markdown_table((*columns, "peak GiB, ours", "peer"), lines) if lines else ""


def memory_table(records: Sequence[Record]) -> str:
    """A line a row: speed and peak of memory, and how both stand to the baseline's."""
    lines = []
    baseline = find(records, BASELINE)
    for row in rows_of(records):
        record = find(records, row)
        memory = change(record, baseline, "memory_gib")
        lines.append((row, speed(record), number(record, "memory_gib"), change(record, baseline), memory))
    columns = ("row", "tok/s/GPU", "peak GiB", "tok/s to bf16 eager", "peak to bf16 eager")
    return markdown_table(columns, lines) if lines else ""


def sides_table(records: Sequence[Record]) -> str:
    """A line a row, ours beside the peer's."""
    return table_of_sides(rows_of(records), records) if records else ""


def scaling_table(records: Sequence[Record]) -> str:
    """A line a number of GPUs: speed of each row, and its share of the speed on the fewest GPUs."""
    jobs = sorted({r["job"] for r in records}, key=lambda job: int(job.partition("-")[2]))
    rows = rows_of(records)
    lines = []
    for job in jobs:
        cells = [job.partition("-")[2]]
        for row in rows:
            record = find(records, row, job=job)
            fewest = next((r for j in jobs if (r := find(records, row, job=j)).get("tps")), {})
            share = record["tps"] / fewest["tps"] if record.get("tps") and fewest.get("tps") else None
            cells += [speed(record), "" if share is None else f"{share:.1%}", number(record, "exposed_ms")]
        lines.append(cells)
    columns = itertools.chain.from_iterable((f"{row}, tok/s/GPU", "of the fewest", "exposed ms") for row in rows)
    return markdown_table(("GPUs", *columns), lines) if lines else ""


def communication_table(records: Sequence[Record]) -> str:
    """A line a traced run."""
    traced = [r for r in records if "exposed_ms" in r]
    cells = [
        (r["job"], r["row"], r["side"], *(number(r, key) for key in ("step_ms", "exposed_ms", "hidden_ms")))
        for r in traced
    ]
    return markdown_table(("job", "row", "side", "step", "exposed", "hidden"), cells) if cells else ""


def speed(record: Record) -> str:
    """`8,532`, why it failed, or nothing if it did not run."""
    if "error" in record:
        return "failed: " + record["error"].replace("|", "\\|")
    return f"{record['tps']:,.0f}" if record else ""


def number(record: Record, key: str) -> str:
    """One decimal, or nothing."""
    return _if_known(lambda: f"{record[key]:.1f}", record, key)


def change(record: Record, baseline: Record, key: str = "tps") -> str:
    """`+48.1 %`, `-` for the baseline itself, or nothing."""
    if record and record is baseline:
        return "-"
    return _if_known(lambda: f"{100 * (record[key] / baseline[key] - 1):+.1f} %", record, key, baseline)


def _if_known(text: Callable[[], str], record: Record, key: str, other: Record | None = None) -> str:
    known = record.get(key) is not None and (other is None or other.get(key))
    return text() if known else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.jsonl of the folder that runs are in")
    results = parser.parse_args(argv).results
    if not results.is_file():
        parser.error(f"{results} is no file; name the results.jsonl of the folder that --out named")
    print(tables(latest(results.read_text().splitlines())))


if __name__ == "__main__":
    main()
