#!/usr/bin/env python3
"""Draw the loss curves of `bench_peers.py`'s runs, ours beside the peer's: a panel for each job and row, and a table.

    scripts/bench_peers.sh ... --out CURVES --same-start --repeats 1 --rows bf16-compiled,tensorwise-compiled
    python scripts/peer_curves.py CURVES --output curves.png

The curves are those of the first repeats. For each pair the table has the first and last losses and how far apart the
curves are: in the first steps, before rounding has grown, over all steps, and over the last ones as a signed mean,
which says whether a side is ahead. Two runs of one side are as far apart as `--repeats 2` shows. A row that the peer
lacks is drawn beside its tensorwise one, as `bench_peers.py` compares their speeds.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench_common import markdown_table
from peer.jobs import OURS, PROFILE, ROWS, THEIRS

from titan_fp8.cli.plot import Curve, draw_panels
from titan_fp8.runtime.errors import UserError

FIRST = 3
"""Steps in which two runs from the same start can differ by their rounding alone."""
LAST = 10
"""Steps that a mean is taken of."""
STAND_IN = "tensorwise-compiled"
"""Row of the peer's that rows of ours alone are compared with."""
Pair = tuple[str, str]
"""Job and row."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="folder of the runs, with results.jsonl")
    add("--output", type=Path, default=Path("curves.png"), help="picture to write (default: curves.png)")
    add("--jobs", help="comma-separated (default: all that have run)")
    add("--rows", help="comma-separated (default: all that have run)")
    add("--repeats", type=int, default=1, help="runs of each side to draw (default: the first)")
    return parser.parse_args(argv)


def read_curves(out: Path, jobs: Sequence[str] | None, rows: Sequence[str] | None) -> dict[Pair, dict[str, Curve]]:
    """For each job and row that both sides have run, or ours alone has, the curves by their labels, such as `ours-1`;
    later runs count.

    Raises:
        SystemExit: there are none.
    """
    file = out / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found: dict[Pair, dict[str, Curve]] = {}
    for record in map(json.loads, lines):
        pair, label = (record["job"], record["row"]), f"{record['side']}-{record['repeat']}"
        is_wanted = (jobs is None or pair[0] in jobs) and (rows is None or pair[1] in rows)
        if is_wanted and "error" not in record and record["repeat"] != PROFILE:
            steps, losses = zip(*record["losses"], strict=True)
            values = [math.nan if loss is None else loss for loss in losses]
            found.setdefault(pair, {})[label] = Curve(label, list(steps), values)
    for (job, row), curves in found.items():
        if row not in ROWS or THEIRS not in ROWS[row].sides:
            beside = found.get((job, STAND_IN), {})
            curves |= {label: curve for label, curve in beside.items() if label.startswith(THEIRS)}
    both = {pair: curves for pair, curves in found.items() if {f"{OURS}-1", f"{THEIRS}-1"} <= curves.keys()}
    if not both:
        raise SystemExit(f"{file}: no row here that both sides have run; run scripts/bench_peers.sh --out {out} first")
    return both


def table(pairs: Mapping[Pair, Mapping[str, Curve]]) -> str:
    """A line a job and row: losses, and how far the curves are apart."""
    lines = []
    for (job, row), curves in pairs.items():
        ours, theirs = curves[f"{OURS}-1"], curves[f"{THEIRS}-1"]
        mine, peers = (dict(zip(curve.steps, curve.values, strict=True)) for curve in (ours, theirs))
        shared = [step for step in mine if step in peers and math.isfinite(mine[step] + peers[step])]
        apart = [mine[step] - peers[step] for step in shared]
        ends = [f"{curve.values[0]:.4f} -> {curve.values[-1]:.4f}" for curve in (ours, theirs)]
        early = [abs(difference) for step, difference in zip(shared, apart, strict=True) if step <= FIRST]
        last = statistics.fmean(apart[-LAST:])
        share = 100 * last / statistics.fmean(peers[step] for step in shared[-LAST:])
        largest = (f"{max(early):.4f}" if early else "", f"{max(map(abs, apart)):.4f}")
        lines.append((job, row, *ends, *largest, f"{last:+.4f} ({share:+.2f} %)"))
    columns = ("job", "row", "ours", "peer", f"largest apart, first {FIRST} steps", "largest apart")
    return markdown_table((*columns, f"ours less peer's, mean of the last {LAST} logged"), lines)


def panels(pairs: Mapping[Pair, Mapping[str, Curve]], repeats: int) -> list[list[tuple[str, list[Curve]]]]:
    """A line of panels for each job: title and curves."""
    grid: dict[str, list[tuple[str, list[Curve]]]] = {}
    for (job, row), curves in pairs.items():
        labels = [f"{side}-{repeat}" for repeat in range(1, repeats + 1) for side in (OURS, THEIRS)]
        chosen = [curves[label] for label in labels if label in curves]
        if repeats == 1:
            chosen = [Curve(curve.label.removesuffix("-1"), curve.steps, curve.values) for curve in chosen]
        grid.setdefault(job, []).append((f"{job}, {row}", chosen))
    return list(grid.values())


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    jobs, rows = (None if names is None else names.split(",") for names in (args.jobs, args.rows))
    pairs = read_curves(args.out, jobs, rows)
    try:
        draw_panels(panels(pairs, args.repeats), args.output, key="loss")
    except UserError as error:
        raise SystemExit(str(error)) from error
    print(f"{args.output}: {len(pairs)} panels\n\n{table(pairs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
