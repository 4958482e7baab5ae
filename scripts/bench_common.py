"""What the benchmarks of single layers share: fair timing, the peer where it is installed, tables and records.

Fair means: contestants take turns on one device, each for a short block of iterations, in another order each round,
since one that draws much power slows the next one's clock; the first iteration of a block is dropped. Within a block
iterations follow each other without waiting, so a contestant that the CPU cannot feed fast enough shows the time that
the device waits for it. The time that the CPU needs to issue an iteration is reported beside.
"""

import importlib.metadata
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PEER_VERSION = "0.17.0"


@dataclass
class Times:
    """Milliseconds of each timed iteration: on the device, and for the CPU to issue it."""

    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.device_ms)

    @property
    def spread(self) -> float:
        """Distance of the quartiles, relative to the median."""
        if len(self.device_ms) < 4:
            return (max(self.device_ms) - min(self.device_ms)) / self.median_ms
        low, _, high = statistics.quantiles(self.device_ms, n=4)
        return (high - low) / self.median_ms

    @property
    def median_host_ms(self) -> float:
        return statistics.median(self.host_ms)


@dataclass(frozen=True)
class Contestant:
    """What is timed.

    Attributes:
        prepare: called before each iteration, outside of what is timed.
        run: one iteration.
    """

    prepare: Callable[[], Any]
    run: Callable[[], Any]


def take_turns(
    contestants: Mapping[str, Contestant], device: torch.device, *, rounds: int, iterations: int, warm_up: int = 3
) -> dict[str, Times]:
    """Time every contestant in `rounds` blocks of `iterations` timed iterations each."""
    for contestant in contestants.values():
        for _ in range(warm_up):
            contestant.prepare()
            contestant.run()
    synchronize(device)
    times = {name: Times() for name in contestants}
    orders = random.Random(0)
    for _ in range(rounds):
        for name in orders.sample(list(contestants), len(contestants)):
            _block(contestants[name], times[name], device, iterations)
    return times


def _block(contestant: Contestant, times: Times, device: torch.device, iterations: int) -> None:
    marks = []
    for _ in range(iterations + 1):
        contestant.prepare()
        begin = _mark(device)
        issued = time.perf_counter()
        contestant.run()
        issued = time.perf_counter() - issued
        marks.append((begin, _mark(device), issued * 1e3))
    synchronize(device)
    for begin, end, host_ms in marks[1:]:
        times.device_ms.append(begin.elapsed_time(end) if device.type == "cuda" else (end - begin) * 1e3)
        times.host_ms.append(host_ms)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def pick_device(name: str) -> torch.device:
    """`name`, or a clear exit where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --tiny shows that everything runs, not how fast")
    return torch.device(name)


def compiler_settings(device: torch.device) -> dict[str, Any]:
    """How contestants are compiled: to one graph. A CPU only shows that the graph can be made."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return {"fullgraph": True, "dynamic": False, "backend": backend}


def reset_compiler() -> None:
    """Forget all that is compiled, and let a recompile limit be an error instead of a quiet return to eager mode."""
    torch.compiler.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def peer_is_here() -> bool:
    """Whether torchao is installed."""
    try:
        importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def choose_rows(asked: str | None, known: Sequence[str], defaults: Sequence[str] | None = None) -> list[str]:
    """The rows to run: those asked for, comma-separated, or all defaults that can run here.

    Raises:
        SystemExit: an unknown row, or one of the peer that is asked for and not installed.
    """
    if asked is None:
        rows = list(known if defaults is None else defaults)
        left_out = [] if peer_is_here() else [row for row in rows if row.startswith("torchao")]
        if left_out:
            print(f"torchao is not installed: without {', '.join(left_out)}")
        return [row for row in rows if row not in left_out]
    rows = asked.split(",")
    unknown = [row for row in rows if row not in known]
    if unknown:
        raise SystemExit(f"no such row: {', '.join(unknown)}; known: {', '.join(known)}")
    if any(row.startswith("torchao") for row in rows) and not peer_is_here():
        raise SystemExit(f"torchao is not installed; pip install torchao=={PEER_VERSION}, or the extra 'bench'")
    return rows


def sqnr_db(reference: Tensor, result: Tensor) -> float:
    """Signal-to-noise ratio of `result` in dB."""
    signal = reference.float()
    noise = (signal - result.float()).square().sum(dtype=torch.float64)
    return float(10 * torch.log10(signal.square().sum(dtype=torch.float64) / noise))


def versions(device: torch.device) -> dict[str, str]:
    """What a figure must be quoted with."""
    found = {"device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"}
    for package in ("torch", "triton", "torchao"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version()}


def append_records(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to `results.jsonl` in `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "results.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def kernel_table(contestant: Contestant) -> str:
    """Device time of each kernel in one iteration, the longest first."""
    contestant.prepare()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        contestant.run()
        torch.cuda.synchronize()
    kernels = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    lines = [
        f"    {event.self_device_time_total:9.1f} us {event.count:3}x  {event.key[:110]}" for event in kernels[:14]
    ]
    return "\n".join([f"    {total:9.1f} us in all", *lines])
