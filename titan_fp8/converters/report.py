"""What a conversion did: a row for every linear layer of the model, whether it was converted or left alone, and why."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReportRow:
    """One linear layer.

    Attributes:
        fqn: its name in the model.
        global_shape: weight `(out_features, in_features)`.
        local_shape: the part of it that one rank holds after tensor parallelism.
        recipe: the recipe it was converted with, or None.
        reason: why it was left in high precision, or None.
        flop_share: its share of the FLOPs of all linear layers' matrix products, 0 to 1.
    """

    fqn: str
    global_shape: tuple[int, int]
    local_shape: tuple[int, int]
    recipe: str | None
    reason: str | None
    flop_share: float


@dataclass(frozen=True)
class ConversionReport:
    """The result of one converter. `str(report)` is the whole table, `summary()` one line.

    Attributes:
        converter: name of the converter.
        recipe: name of the recipe.
        mode: how products are computed: "native", or "emulated" and why.
        rows: one row a linear layer, in the model's order.
    """

    converter: str
    recipe: str
    mode: str
    rows: list[ReportRow] = field(default_factory=list)

    @property
    def converted(self) -> list[ReportRow]:
        """The rows of converted layers."""
        return [row for row in self.rows if row.recipe is not None]

    @property
    def flop_share(self) -> float:
        """Share of the linear layers' FLOPs that runs in converted layers, 0 to 1."""
        return sum(row.flop_share for row in self.converted)

    def summary(self) -> str:
        """One line: how many layers, what share of the FLOPs, and what was left alone for which reason."""
        reasons = Counter(row.reason for row in self.rows if row.reason is not None)
        left = "".join(f"; {count} left alone ({reason})" for reason, count in reasons.items())
        return (
            f"{self.converter}: {self.recipe} ({self.mode}) in {len(self.converted)} of {len(self.rows)} linears, "
            f"{100 * self.flop_share:.1f} % of their FLOPs{left}"
        )

    def __str__(self) -> str:
        header = ("module", "out x in", "local", "FLOPs", "recipe or reason")
        table: list[tuple[str, ...]] = [header]
        for row in self.rows:
            shape, local = (" x ".join(map(str, s)) for s in (row.global_shape, row.local_shape))
            outcome = row.recipe or f"high precision: {row.reason}"
            table.append((row.fqn, shape, local, f"{100 * row.flop_share:.2f} %", outcome))
        widths = [max(len(line[i]) for line in table) for i in range(len(header) - 1)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)) for line in table]
        return "\n".join([*(f"{line}  {cells[-1]}" for line, cells in zip(lines, table, strict=True)), self.summary()])

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, ready for `json.dump`."""
        return {
            "converter": self.converter,
            "recipe": self.recipe,
            "mode": self.mode,
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
