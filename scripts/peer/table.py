"""The table of a job: a line a row, ours beside the peer."""

import statistics
from collections.abc import Sequence
from typing import Any

from bench_common import markdown_table
from peer.jobs import OURS, PROFILE, THEIRS


def table(rows: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one line a row; a side that never ended well says why."""
    cells = []
    for row in rows:
        sides = [[r for r in records if (r["row"], r["side"]) == (row, side)] for side in (OURS, THEIRS)]
        speeds = [speed(of_side) for of_side in sides]
        ratio = f"{speeds[0] / speeds[1]:.3f}" if speeds[0] and speeds[1] else ""
        others = (cell(of_side) for cell in (memory_cell, start_cell, loss_cell) for of_side in sides)
        cells.append((row, *map(speed_cell, sides), ratio, *others))
    speeds_of = ("ours, tok/s/GPU [spread]", "peer, tok/s/GPU [spread]", "ratio")
    figures = ("peak GiB", "first step, s", "loss")
    columns = ("row", *speeds_of, *(f"{side}, {figure}" for figure in figures for side in ("ours", "peer")))
    return markdown_table(columns, cells)


def counted(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that count: not failed and not traced."""
    return [r for r in records if "error" not in r and r["repeat"] != PROFILE]


def speed(records: Sequence[dict[str, Any]]) -> float | None:
    """Median of the runs' tok/s per GPU."""
    rates = [r["tps"] for r in counted(records)]
    return statistics.median(rates) if rates else None


def speed_cell(records: Sequence[dict[str, Any]]) -> str:
    """`44,012 [0.8 %]`, and what failed."""
    errors = [r["error"].replace("|", "\\|") for r in records if "error" in r and r["repeat"] != PROFILE]
    middle = speed(records)
    if middle is None:
        return f"failed: {errors[-1]}" if errors else ""
    rates = [r["tps"] for r in counted(records)]
    spread = f"{100 * (max(rates) - min(rates)) / middle:.1f} %" if len(rates) > 1 else "one run"
    return f"{middle:,.0f} [{spread}]" + (f", then failed: {errors[-1]}" if errors else "")


def memory_cell(records: Sequence[dict[str, Any]]) -> str:
    """The highest peak."""
    return f"{max(r['memory_gib'] for r in counted(records)):.1f}" if counted(records) else ""


def start_cell(records: Sequence[dict[str, Any]]) -> str:
    """`42 / 25`: seconds to the first step of the first run, and the median of those of the others."""
    first, *others = [r.get("first_step_s") for r in counted(records)] or [None]
    known = [seconds for seconds in others if seconds is not None]
    if first is None:
        return ""
    return f"{first:.0f}" + (f" / {statistics.median(known):.0f}" if known else "")


def loss_cell(records: Sequence[dict[str, Any]]) -> str:
    """First and last loss."""
    if not counted(records):
        return ""
    first = counted(records)[0]
    losses = (first["first_loss"], first["last_loss"])
    return " -> ".join("n/a" if loss is None else f"{loss:.3f}" for loss in losses)
