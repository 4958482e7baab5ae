"""The console's line for a logged step.

    step  10/300   loss   5.1234   grad_norm   1.2345   lr 8.00e-04   tok/s    12,345   TFLOP/s 1.23   MFU n/a   mem ...

Numbers keep their width from line to line, so that a column can be followed by eye. What is not known (MFU on a device
without a known peak, the ETA of the first step, which compiles) reads `n/a`.
"""

import math
import os
import sys
from collections.abc import Mapping
from typing import Any

_RESET = "\033[0m"
_RED = "\033[1;31m"
_COLORS = {"step": "\033[31m", "loss": "\033[32m", "grad_norm": "\033[33m", "tps": "\033[34m", "eta": "\033[35m"}
_COLORS |= {"tflops": "\033[36m", "mfu": "\033[35m", "memory": "\033[36m", "lr": "\033[2m"}


def use_colors(*, disabled: bool) -> bool:
    """Whether to colour: not if `disabled`, not if the log (standard error) is no terminal.

    `NO_COLOR` and `FORCE_COLOR` in the environment mean what they mean elsewhere (no-color.org, force-color.org);
    `FORCE_COLOR` serves launchers that put a pipe between the process and the terminal.
    """
    if disabled or os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stderr.isatty()


def format_step(
    record: Mapping[str, Any], *, loss: float, grad_norm: float, total_steps: int, eta_s: float | None, colors: bool
) -> str:
    """One line for a step.

    Args:
        record: the step's line of `metrics.jsonl` (see `MetricsLogger`).
        loss, grad_norm: as measured; a value that is not finite stands here as itself.
        total_steps: steps of the whole run.
        eta_s: seconds until the last step, or None.
        colors: with ANSI colour codes.
    """
    width = len(str(total_steps))
    parts = {
        "step": f"step {record['step']:>{width}}/{total_steps}",
        "loss": f"loss {loss:8.4f}",
        "grad_norm": f"grad_norm {grad_norm:8.4f}",
        "lr": f"lr {record['lr']:.2e}",
        "tps": f"tok/s {record['tps']:>9,.0f}",
        "tflops": "TFLOP/s " + _known(record["tflops"], "{:.2f}"),
        "mfu": "MFU " + _known(record["mfu"], "{:.2f}%"),
        "memory": f"mem {record['memory_gib']:.2f} GiB",
        "eta": "ETA " + ("n/a" if eta_s is None else format_duration(eta_s)),
    }
    if not colors:
        return "   ".join(parts.values())
    alarms = {"loss": loss, "grad_norm": grad_norm}
    styles = _COLORS | {name: _RED for name, value in alarms.items() if not math.isfinite(value)}
    return "   ".join(f"{styles[name]}{text}{_RESET}" for name, text in parts.items())


def format_duration(seconds: float) -> str:
    """`H:MM:SS`, with days in front when there are any: `2 d 3:04:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def _known(value: float | None, form: str) -> str:
    return "n/a" if value is None else form.format(value)
