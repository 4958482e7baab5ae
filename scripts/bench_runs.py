"""What the scripts share that start one `./run_train.sh` a row: running it, its figures, why it failed."""

import itertools
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

REPO = Path(__file__).resolve().parent.parent
TIMED_OUT = 124
"""Exit code of a command that ran past its limit, as timeout(1) has it."""
_EXCEPTION = re.compile(r"((?:\w+\.)+[A-Z]\w*|[A-Z]\w*(?:Error|Exception)): \S")
_RANK = re.compile(r"^(?:\[rank\d+\]:|\s)*")
_LONGEST_ERROR = 240  # characters
_RUNNING: set[subprocess.Popen] = set()
"""Commands that `run_command` waits for, in any thread."""
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def run_command(
    command: Sequence[str], log: Path, environment: Mapping[str, str], timeout_s: float | None = None
) -> tuple[int, float]:
    """Run `command` in the repository's folder, all it prints into `log`: its exit code and the seconds it took.

    Args:
        log: written anew; its folder is made.
        environment: all of it.
        timeout_s: seconds after which the command and all processes below it are killed; the code is then `TIMED_OUT`.
            None: no limit. They are killed as well when this process is interrupted or terminated; in another thread
            than the main one, if that one is in `side_by_side`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with open(log, "w") as out, _termination_raises():
        process = subprocess.Popen(
            command, cwd=REPO, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        _RUNNING.add(process)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = TIMED_OUT
        finally:
            _RUNNING.discard(process)
            if process.returncode is None:
                _kill_with_descendants(process)
    return code, time.monotonic() - begin


class FirstMatch:
    """Watches a log that a command writes: `with FirstMatch(log, pattern) as first: run_command(...)`.

    Attributes:
        seconds: from the beginning to the first line in which the pattern is found, to 0.1 s; None: there was none.
    """

    def __init__(self, log: Path, pattern: re.Pattern[str]) -> None:
        self.seconds: float | None = None
        self._log, self._pattern = log, pattern
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "FirstMatch":
        self._log.unlink(missing_ok=True)  # that of a run before
        self._begin = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while self.seconds is None:
            is_last = self._ended.wait(0.1)
            if self._log.exists() and self._pattern.search(self._log.read_text(errors="replace")):
                self.seconds = time.monotonic() - self._begin
            if is_last:
                return


def lanes_of(count: int, gpus: int, visible: Sequence[str]) -> list[dict[str, str]]:
    """For runs side by side, what the environment of each says about the GPUs that it sees.

    Args:
        count: how many runs.
        gpus: of each.
        visible: the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them; none: runs are on the CPU.

    Raises:
        SystemExit: there are too few.
    """
    if count < 1:
        raise SystemExit(f"--lanes {count}: at least one must run at a time")
    if count == 1 or not visible:
        return [{}] * count
    if count * gpus > len(visible):
        raise SystemExit(f"--lanes {count}: {gpus} GPUs each, but {len(visible)} are here; give fewer lanes")
    return shares([gpus] * count, visible)


def shares(counts: Sequence[int], visible: Sequence[str]) -> list[dict[str, str]]:
    """For runs side by side that take so many GPUs each, no more than there are, what the environment of each says."""
    # What a process would take of the CPU's cores if it were alone with its own.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // sum(counts)))
    rest = iter(visible)
    parts = [",".join(itertools.islice(rest, count)) for count in counts]
    return [{"CUDA_VISIBLE_DEVICES": part, "OMP_NUM_THREADS": threads} for part in parts]


def side_by_side(
    work: Callable[[Item, Mapping[str, str]], Outcome], items: Iterable[Item], lanes: Sequence[Mapping[str, str]]
) -> list[Outcome]:
    """`work(item, lane)` of every item, in the order of the items, as many at a time as there are lanes.

    Where one raises, or this process is interrupted or terminated, no further one begins and the commands of those
    that run are killed.
    """
    if len(lanes) == 1:
        return [work(item, lanes[0]) for item in items]
    free: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
    for lane in lanes:
        free.put(lane)

    def in_lane(item: Item) -> Outcome:
        lane = free.get()
        try:
            return work(item, lane)
        finally:
            free.put(lane)

    pool = ThreadPoolExecutor(len(lanes))
    futures = [pool.submit(in_lane, item) for item in items]
    with _termination_raises():
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures if future.done()]
        finally:
            # Only after an exception is any of them still to do.
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                for process in list(_RUNNING):
                    _kill_with_descendants(process)
                time.sleep(0.1)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def _termination_raises() -> Iterator[None]:
    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _kill_with_descendants(process: subprocess.Popen) -> None:
    """torchrun gives each worker a session, so the process group of the command is not all of it."""
    groups = []
    for pid in _with_descendants(process.pid):
        with suppress(ProcessLookupError):
            groups.append(os.getpgid(pid))
    for group in dict.fromkeys(groups):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    process.wait()


def _with_descendants(root: int) -> list[int]:
    """`root` and the processes below it, parents first."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = status.read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(status.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, from `metrics.jsonl` in its folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(lines: Sequence[Mapping[str, Any]], warm_up_steps: int) -> dict[str, Any]:
    """What a run is judged by: medians over the logged steps after the warm-up, memory and losses over all."""
    settled = [line for line in lines if line["step"] > warm_up_steps]
    found: dict[str, Any] = {}
    for key in ("tps", "tflops", "mfu"):
        values = [line[key] for line in settled if line[key] is not None]
        found[key] = statistics.median(values) if values else None
    rates = [line["tps"] for line in settled]
    found["tps_spread"] = (max(rates) - min(rates)) / found["tps"] if rates else None
    found["memory_gib"] = max(line["memory_gib"] for line in lines)
    found["first_loss"], found["last_loss"] = lines[0]["loss"], lines[-1]["loss"]
    return found


def last_error(log: Path) -> str:
    """The last line of a log that names an exception, or else the last line that says anything."""
    lines = [_RANK.sub("", line).rstrip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if re.search(r"\w", line)]
    # torchrun's summary comes last, and in it the failure that was the first in time.
    named = [line for line in lines if _EXCEPTION.match(line)]
    return (named or lines or ["nothing was printed"])[-1][:_LONGEST_ERROR]
