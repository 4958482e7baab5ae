#!/usr/bin/env python3
"""Where a training step's time goes: profiler traces as one table, a column a trace, milliseconds a step.

    python scripts/profile_table.py RUN/profile_traces/iteration_20/rank0_trace.json [PEER_TRACE ...]
    python scripts/profile_table.py TRACE --kernels 20        # and the longest kernels of each trace

Kernels are sorted by the operator that launched them, where the trace knows it, and otherwise by their names. Their
times add up to more than the step where streams overlap. `exposed communication` is the time in which nothing but
communication runs, exchanges of tokens included, `launch gaps` that in which nothing runs at all. Kernels of the step
before, which still run when the profiler starts if the CPU is ahead of the device, do not count. A trace without the
CPU's operators (`profiling.trace_cpu = false`) does not say how many steps it is of: it is taken for one.
"""

import argparse
import bisect
import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_common import markdown_table

DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
COMMUNICATION, EXCHANGE, OPTIMIZER = "communication", "all-to-all", "optimizer"
TRAVELS = (COMMUNICATION, EXCHANGE)
# The first category that fits, by "operator | kernel" in lower case. Compilers name a kernel after all that it fuses.
CATEGORIES: tuple[tuple[str, str], ...] = (
    (EXCHANGE, r"all_to_all|alltoall|sendrecv"),
    (COMMUNICATION, r"nccl|record_param_comms|c10d|memcpy ptop|symmetric_memory"),
    # The norm of gradients included.
    (OPTIMIZER, r"adam|_foreach_norm|foreach_mul|_squares_kernel|\b_update_kernel|lpnorm|^ \| .*scalartensor"),
    ("attention", r"attention|flash|sdpa|fmha|cudnn::fusion"),
    ("FP8 GEMM", r"scaled_mm|scaled_grouped_mm|grouped_scaled_mm|nvjet_sm\d+_q|e4m3.*gemm|gemm.*e4m3"),
    ("GEMM", r"aten::(mm|addmm|bmm|matmul|linear|_grouped_mm)\b|nvjet|gemm|cutlass|cublas"),
    # Of experts: what brings tokens to their groups, or activates, and writes codes on the way. That of linears, which
    # has its place among norms, is called swiglu_cast.
    ("permutation with casts", r"gather_group_both|_gather_(amax|cast)_kernel"),
    ("experts' activation with casts", r"swiglu_group"),
    ("norm and activation", r"rms_norm|layer_norm|gammabeta|silu|swiglu|\b_norm_(rows|tiles)_kernel"),
    (
        "routing and permutation",
        r"moe_(un)?permute|moe_plan|moe_row_products|_to_groups_kernel|_to_tokens_kernel|_count_kernel|_before_kernel"
        r"|_place_kernel|permute_ind|index_put|index_select|aten::index\b|aten::scatter_add|histc|sort|topk",
    ),
    ("casts", r"titan_fp8::(?!rotate\b)|(?<!_no)_cast_|_amax|_transpose_kernel|amax|clamp|float8"),
    ("loss", r"softmax|logsumexp|nll_loss|cross_entropy|exp_|_exp_|scatter_ad"),
    (
        "copies",
        r"memcpy|memset|copy_|chunk_cat|cat_|split_with_sizes|fill_|zero_|^ \| .*(multi_tensor_apply|fillfunctor)",
    ),
)
OTHER = "other"
STEP = "ProfilerStep#"
ROWS = (*(name for name, _ in CATEGORIES), OTHER)
_MADE_BY_COMPILER = re.compile(r"triton_(poi|red|per)_fused")
_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in CATEGORIES)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Kernel:
    """What ran on the device: times in microseconds."""

    name: str
    category: str
    start: float
    end: float


@dataclass(frozen=True)
class Summary:
    """A trace, in milliseconds a step.

    Attributes:
        steps: that the trace holds.
        by_category: sums of kernels.
        exposed: communication beside which nothing runs.
        gaps: time in which nothing runs.
        span: from the first kernel's start to the last one's end.
        longest: (kernel, milliseconds, launches), the longest first.
    """

    steps: int
    by_category: dict[str, float]
    exposed: float
    gaps: float
    span: float
    longest: list[tuple[str, float, float]]

    @property
    def communication(self) -> float:
        """Sum of all that travels."""
        return sum(self.by_category[name] for name in TRAVELS)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The complete events of a trace file, gzipped or not.

    Raises:
        SystemExit: there is no such file, or it holds no trace.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt") as file:
            return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, EOFError):
        raise SystemExit(f"{path} is not a whole trace of PyTorch's profiler") from None


def kernels_of(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """What ran on the device for the steps that the trace is of, sorted by start."""
    operators = {e["args"].get("External id"): e["name"] for e in events if e.get("cat") == "cpu_op"}
    launched = {e["args"].get("correlation"): e["ts"] for e in events if e.get("cat") in LAUNCHES}
    begin = _begin_of(events, launched)
    updates = _merged(
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith("Optimizer.step")
    )
    found = []
    for event in events:
        if event.get("cat") in DEVICE_EVENTS and event["ts"] >= begin:
            arguments = event["args"]
            operator = operators.get(arguments.get("External id"), "")
            in_update = _contains(updates, launched.get(arguments.get("correlation")))
            category = category_of(operator, event["name"], in_update=in_update)
            found.append(Kernel(event["name"], category, event["ts"], event["ts"] + event["dur"]))
    return sorted(found, key=lambda kernel: kernel.start)


def _begin_of(events: Sequence[dict[str, Any]], launched: Mapping[int, float]) -> float:
    """When the device began with the first step: as it is marked, or with the first kernel that was launched since."""
    marked = [e["ts"] for e in events if e.get("cat") == "gpu_user_annotation" and e["name"].startswith(STEP)]
    kernels = (e for e in events if e.get("cat") in DEVICE_EVENTS)
    return min(marked or [e["ts"] for e in kernels if e["args"].get("correlation") in launched], default=float("-inf"))


def category_of(operator: str, kernel: str, *, in_update: bool = False) -> str:
    """The category of a kernel that `operator` launched ("" if unknown), in the optimizer's step or not."""
    label = f"{operator} | {kernel}".lower()
    if _MADE_BY_COMPILER.search(label):
        label = label.replace("scaled_mm", "")  # whose operands it casts; the product is a kernel of its own
    for name, pattern in _PATTERNS:
        if pattern.search(label):
            return OPTIMIZER if in_update and name not in TRAVELS else name
    return OPTIMIZER if in_update else OTHER


def summarize(events: Sequence[dict[str, Any]], longest: int = 0) -> Summary:
    """A trace's events as sums.

    Raises:
        SystemExit: nothing ran on a device.
    """
    kernels = kernels_of(events)
    if not kernels:
        raise SystemExit("the trace has no kernels; was it taken on a GPU?")
    steps = max(1, sum(e.get("cat") == "user_annotation" and e["name"].startswith(STEP) for e in events))
    per_step = 1e3 * steps
    sums: Counter[str] = Counter()
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for kernel in kernels:
        sums[kernel.category] += kernel.end - kernel.start
        times[kernel.name] += kernel.end - kernel.start
        launches[kernel.name] += 1
    everything = _merged((k.start, k.end) for k in kernels)
    computing = _merged((k.start, k.end) for k in kernels if k.category not in TRAVELS)
    span = everything[-1][1] - everything[0][0]
    return Summary(
        steps,
        {name: sums[name] / per_step for name in ROWS},
        (_length(everything) - _length(computing)) / per_step,
        (span - _length(everything)) / per_step,
        span / per_step,
        [(name, time / per_step, launches[name] / steps) for name, time in times.most_common(longest)],
    )


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union, as intervals that do not touch, in order."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((start, end))
    return union


def _length(union: Sequence[Interval]) -> float:
    return sum(end - start for start, end in union)


def _contains(union: Sequence[Interval], time: float | None) -> bool:
    if time is None:
        return False
    place = bisect.bisect_right(union, (time, float("inf"))) - 1
    return place >= 0 and time <= union[place][1]


def table(names: Sequence[str], summaries: Sequence[Summary]) -> str:
    """A Markdown table, a column a trace."""
    cells = [(name, *(f"{s.by_category[name]:.1f}" for s in summaries)) for name in ROWS]
    cells += [
        ("exposed communication", *(f"{s.exposed:.1f}" for s in summaries)),
        ("hidden communication", *(f"{s.communication - s.exposed:.1f}" for s in summaries)),
        ("launch gaps", *(f"{s.gaps:.1f}" for s in summaries)),
        ("**step**", *(f"**{s.span:.1f}**" for s in summaries)),
    ]
    return markdown_table(("ms a step", *names), cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--names", help="comma-separated headings of the columns (default: the files)")
    parser.add_argument("--kernels", type=int, default=0, help="also list so many of the longest kernels")
    args = parser.parse_args(argv)
    names = args.names.split(",") if args.names else [path.stem for path in args.traces]
    if len(names) != len(args.traces):
        raise SystemExit(f"--names has {len(names)} names for {len(args.traces)} traces")
    summaries = [summarize(read_events(path), args.kernels) for path in args.traces]
    print(table(names, summaries))
    for name, summary in zip(names, summaries, strict=True):
        if args.kernels:
            print(f"\n{name}, {summary.steps} steps\n")
            rows = [(f"{ms:.2f}", f"{count:g}", kernel[:100]) for kernel, ms, count in summary.longest]
            print(markdown_table(("ms a step", "launches", "kernel"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
