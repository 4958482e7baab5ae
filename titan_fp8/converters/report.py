"""What a conversion did: a row for every linear layer of the model, whether it was converted or left alone, and why."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from titan_fp8.converters.filters import AUTO_FILTER

HIGH_PRECISION = "high precision"


@dataclass(frozen=True)
class ReportRow:
    """One linear layer.

    Attributes:
        fqn: its name in the model.
        global_shape: weight `(out_features, in_features)`, of experts with their number before it.
        local_shape: the part of it that one rank holds after tensor parallelism.
        recipe: the recipe it was converted with, or None.
        reason: why it was left in high precision, or None.
        flop_share: its share of the FLOPs of all linear layers' matrix products, 0 to 1.
        assigned: the recipe that the settings give it, whether or not something keeps it in high precision.
    """

    fqn: str
    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    recipe: str | None
    reason: str | None
    flop_share: float
    assigned: str


@dataclass(frozen=True)
class ConversionReport:
    """The result of one converter. `str(report)` is the whole table, `summary()` one line.

    Attributes:
        converter: name of the converter.
        modes: each recipe in use, the most used first -> how its products are computed: "native", or "emulated" and
            why. If nothing was converted, the recipe that was asked for.
        kernels: what casts: "triton" or "torch".
        weights: what becomes of the weights: how often they are cast, and what FSDP gathers.
        fused: names of the modules that write float8 for the linears that read them, or multiply for several linears at
            once (`fusion.py`).
        exchanges: under tensor parallelism, what ranks exchange -> how it travels: "float8 codes", or "high precision"
            and why.
        size_rule: if `auto_filter_small_kn` was asked for, each recipe that the settings give -> what is too small for
            it, in words.
        rows: one row a linear layer, in the model's order.
        what: what the rows are, in a word or two.
    """

    converter: str
    modes: Mapping[str, str]
    kernels: str = "torch"
    weights: str = ""
    fused: list[str] = field(default_factory=list)
    exchanges: Mapping[str, str] = field(default_factory=dict)
    size_rule: Mapping[str, str] = field(default_factory=dict)
    rows: list[ReportRow] = field(default_factory=list)
    what: str = "linears"

    @property
    def recipe(self) -> str:
        """The recipes in use, the most used first: `rowwise`, `rowwise + blockwise`."""
        return " + ".join(self.modes)

    @property
    def mode(self) -> str:
        """How products are computed; where recipes differ in it, each recipe's own."""
        if len(set(self.modes.values())) == 1:
            return next(iter(self.modes.values()))
        return "; ".join(f"{recipe} {mode}" for recipe, mode in self.modes.items())

    @property
    def converted(self) -> list[ReportRow]:
        """The rows of converted layers."""
        return [row for row in self.rows if row.recipe is not None]

    @property
    def flop_share(self) -> float:
        """Share of the linear layers' FLOPs that runs in converted layers, 0 to 1."""
        return sum(row.flop_share for row in self.converted)

    def summary(self) -> str:
        """One line: which recipes in how many layers, what share of the FLOPs, what was left alone for which reason."""
        counts = Counter(row.recipe for row in self.converted)
        mixed = len(self.modes) > 1
        recipes = ", ".join(
            f"{recipe} ({mode}) in {counts[recipe]}" if mixed else f"{recipe} ({mode})"
            for recipe, mode in self.modes.items()
        )
        reasons = Counter(row.reason for row in self.rows if row.reason is not None)
        left = "".join(f"; {count} left alone ({reason})" for reason, count in reasons.items())
        weights = f"; weights {self.weights}" if self.weights and self.converted else ""
        fused = f"; {len(self.fused)} modules around them are fused with them" if self.fused else ""
        ways = Counter(self.exchanges.values())
        travels = ", ".join(f"{count} as {way}" for way, count in ways.most_common())
        exchanges = f"; between ranks travel {travels}" if travels else ""
        return (
            f"{self.converter}: {recipes}{', together' if mixed else ''} in {len(self.converted)} of {len(self.rows)} "
            f"{self.what}, {100 * self.flop_share:.1f} % of their FLOPs{left}{weights}{fused}{exchanges}"
        )

    def __str__(self) -> str:
        header = ("module", "out x in", "local", "FLOPs", "recipe or reason")
        table: list[tuple[str, ...]] = [header]
        for row in self.rows:
            shape, local = (" x ".join(map(str, s)) for s in (row.global_shape, row.local_shape))
            outcome = row.recipe or f"{HIGH_PRECISION}: {row.reason}"
            table.append((row.fqn, shape, local, f"{100 * row.flop_share:.2f} %", outcome))
        widths = [max(len(line[i]) for line in table) for i in range(len(header) - 1)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)) for line in table]
        return "\n".join([*(f"{line}  {cells[-1]}" for line, cells in zip(lines, table, strict=True)), self.summary()])

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, ready for `json.dump`."""
        counts = Counter(row.recipe for row in self.converted)
        return {
            "converter": self.converter,
            "recipe": self.recipe,
            "recipes": {name: {"mode": mode, "linears": counts[name]} for name, mode in self.modes.items()},
            "mode": self.mode,
            "kernels": self.kernels,
            "weights": self.weights,
            "fused": self.fused,
            "exchanges": dict(self.exchanges),
            "linears": len(self.rows),
            "converted": len(self.converted),
            "flop_share": self.flop_share,
            "rows": [
                {
                    "fqn": row.fqn,
                    "global_shape": list(row.global_shape),
                    "local_shape": list(row.local_shape),
                    "recipe": row.recipe,
                    "reason": row.reason,
                    "flop_share": row.flop_share,
                }
                for row in self.rows
            ],
        }

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with: the recipe of most linears, what the others have instead, and the rule of
        size if there is one.

        How products are computed is no part of it, so a run may move to another device; nor is which linears are too
        small, since that depends on the mesh, so a run may move to another mesh.
        """
        outcomes = {row.fqn: self._outcome_on_any_mesh(row) for row in self.rows}
        counts = Counter(outcome for outcome in outcomes.values() if outcome != HIGH_PRECISION)
        main = max(counts, key=lambda recipe: counts[recipe]) if counts else next(iter(self.modes), None)
        others = {fqn: outcome for fqn, outcome in outcomes.items() if outcome != main}
        size_rule = {AUTO_FILTER: dict(self.size_rule)} if self.size_rule else {}
        return {"recipe": main, "exceptions": _merge_numbers(others, outcomes), **size_rule}

    @staticmethod
    def _outcome_on_any_mesh(row: ReportRow) -> str:
        """The row's recipe, or high precision, were it large enough."""
        return row.assigned if row.reason in (None, AUTO_FILTER) else HIGH_PRECISION


def _merge_numbers(outcomes: Mapping[str, str], all_names: Iterable[str]) -> dict[str, str]:
    """`outcomes` by name, with one entry `layers.*.wk` for names that differ in numbers alone, where all that the model
    has of them have the same outcome."""
    groups: dict[str, list[str]] = {}
    for name in all_names:
        groups.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), []).append(name)
    merged: dict[str, str] = {}
    for pattern, names in groups.items():
        theirs = {outcomes.get(name) for name in names}
        merge = len(theirs) == 1
        merged |= {pattern if merge else name: outcomes[name] for name in names if name in outcomes}
    return merged
