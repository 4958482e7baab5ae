"""What torchtitan 0.2.2 says of a run: it writes no file of figures unless TensorBoard is on, so its log is read.

A logged step is a line such as

    [rank0]:[titan] 2026-11-22 10:00:00,000 - root - INFO - step:  5  loss: 11.21307  grad_norm:  6.8103
        memory: 49.62GiB(35.50%)  tps: 44,012  tflops: 741.33  mfu: 74.96%

in one line, each figure in a color of its own unless colors are off. Memory is the highest reserved amount of rank 0
since the line before, tps is per GPU and a mean over the steps since then.
"""

import math
import re
from typing import Any

FIRST_STEP = re.compile(r"\bstep:? +1\b.* loss")
"""Finds the log line of step 1, theirs or ours, without colors."""
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_STEP = re.compile(
    r"\bstep:\s*(?P<step>[\d,]+)\s+loss:\s*(?P<loss>\S+)\s+grad_norm:\s*(?P<grad_norm>\S+)"
    r"\s+memory:\s*(?P<memory_gib>[\d.]+)GiB\([\d.]+%\)\s+tps:\s*(?P<tps>[\d,]+)"
    r"\s+tflops:\s*(?P<tflops>[\d.,]+)\s+mfu:\s*(?P<mfu>[\d.]+)%"
)
_SIZE = re.compile(r"\bsize: ([\d,]+) total parameters")


def read_steps(log: str) -> list[dict[str, Any]]:
    """The logged steps, as `bench_runs.read_metrics` has ours; a number that is not finite is None."""
    steps = []
    for match in _STEP.finditer(_COLOR.sub("", log)):
        values = {key: float(text.replace(",", "")) for key, text in match.groupdict().items()}
        line: dict[str, Any] = {key: value if math.isfinite(value) else None for key, value in values.items()}
        steps.append(line | {"step": int(values["step"])})
    return steps


def read_parameters(log: str) -> int | None:
    """How many parameters the model has, or None where the run did not come so far as to say."""
    match = _SIZE.search(_COLOR.sub("", log))
    return int(match[1].replace(",", "")) if match else None
