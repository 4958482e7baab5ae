"""Real processes with a real gloo group, for tests of distributed code.

    def _ranks_agree(rank: int, world_size: int, value: float) -> float:   # a top-level function of the test module
        ...

    def test_every_rank_returns_the_same_sum() -> None:
        results = run_distributed(_ranks_agree, 2, 1.5)     # [rank 0's return value, rank 1's]

Every rank calls `fn(rank, world_size, *args)` with `torch.distributed` initialized (gloo, FileStore). Arguments and
return values travel by pickle. The first traceback of any rank becomes the test's failure; a rank that hangs is ended
after `timeout_s`, and the failure says where its threads were.

Starting processes is what such tests cost, so the group of one world size is started once, from a fork server that
has torch imported, and runs the jobs one after the other. Between jobs it is stopped: each process group that it has
made is threads that look for messages a hundred times a second. Where these have become many, a new group runs the
next job. A failed or timed-out job ends the group; the next job
starts a new one. Where a rank crashes in native code or does not answer, in processes that have run hundreds of jobs,
the job runs once more in new ones, and the run's report says so at its end.

Jobs share their process: what sets a global (a seed, a torch config, an environment variable) sets it for the jobs
after it, unless it asks for `fresh=True`. `init=False` (implies fresh) leaves the process group to `fn` and sets what
torchrun would: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import faulthandler
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

MANY = 80
"""Process groups of a process, of which each costs a thousandth of a core."""
FIRST_TIMEOUT_S = 60.0
"""After which a job that may take 100 s, and mostly takes ten, is tried once more."""
RETRIES = "TITAN_FP8_TEST_RETRIES"
"""In this variable of the environment is the file for what was tried again."""
_COLLECTIVE_TIMEOUT_S = 60
_GRACE_S = 0.5  # after a first failure, for the failures of other ranks; after a question, for their answers
_PR_SET_PDEATHSIG = 1  # prctl(2)
_CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS}
_PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint.state_dict"]


class DistributedTestError(AssertionError):
    """A rank raised, died or hung; the message holds the first traceback."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 100.0,  # less than pytest allows, so that a hang tells where
    fresh: bool = False,
    init: bool = True,
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` in `world_size` processes and return their results, in rank order.

    Args:
        fn: a top-level function.
        timeout_s: seconds from now, start-up included, after which the ranks are ended and the call raises.
        fresh: use processes of this call's own.
        init: initialize gloo before the call; `False` leaves that to `fn`.

    Raises:
        DistributedTestError: a rank raised (with its traceback), died or did not answer in time.
    """
    if fresh or not init:
        group = _Group(world_size, init)
        try:
            return group.run(fn, args, timeout_s)
        finally:
            group.close()
    try:
        return _run_in_shared(
            fn, world_size, args, min(timeout_s, FIRST_TIMEOUT_S) if timeout_s <= 100.0 else timeout_s
        )
    except _LostError as lost:
        _note(f"{lost}\nIt ran once more, in new processes.\n")
    return _run_in_shared(fn, world_size, args, timeout_s)


def _note(text: str) -> None:
    """For the end of the whole run's report (`tests/conftest.py`): what is tried again shall not go unseen."""
    with open(os.environ[RETRIES], "a") as notes:
        notes.write(text)


def _run_in_shared(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
    group = _GROUPS.get(world_size)
    if group is None or not group.alive():
        group = _GROUPS[world_size] = _Group(world_size, init=True)
    try:
        result = group.run(fn, args, timeout_s)
    except BaseException:
        group.close()
        _GROUPS.pop(world_size, None)
        raise
    if group.process_groups > MANY:
        group.close()
        _GROUPS.pop(world_size, None)
    return result


class _LostError(DistributedTestError):
    """A rank was ended by a signal of its own doing, since native code has crashed; or it did not answer."""


@dataclass(frozen=True)
class _Answer:
    """What a rank sends back: its result, or why there is none; and how many process groups it has made."""

    time: float
    value: Any = None
    process_groups: int = 0
    failure: str | None = None
    crashed: bool = False


class _Group:
    """`world_size` worker processes, each with a pipe to this one.

    Attributes:
        process_groups: that the one with the most has made so far.
    """

    def __init__(self, world_size: int, init: bool) -> None:
        context = _fork_server()
        self.folder = Path(tempfile.mkdtemp(prefix="titan_fp8_ranks_"))
        port = _free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        self.process_groups = 0
        for rank in range(world_size):
            env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            env |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            env |= {"OMP_NUM_THREADS": "1"}
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, env, str(self.folder / "store"), init), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        self._send(signal.SIGCONT)
        try:
            return self._run(fn, args, timeout_s)
        finally:
            self._send(signal.SIGSTOP)

    def _send(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        target = (fn.__module__, inspect.getfile(inspect.unwrap(fn)), fn.__qualname__)
        for pipe in self.pipes:
            pipe.send((target, args))
        answers: dict[int, _Answer] = {}
        while len(answers) < len(self.pipes):
            missing = [rank for rank in range(len(self.pipes)) if rank not in answers]
            # A pipe may outlive its rank, in the hands of a process that the rank has started.
            watched = [each for rank in missing for each in (self.pipes[rank], self.processes[rank].sentinel)]
            ready = wait(watched, timeout=max(0.0, deadline - time.monotonic()))
            failed = any(answer.failure for answer in answers.values())
            if not ready and not failed:
                what = f"{fn.__qualname__}: no answer from ranks {missing} in {timeout_s:.0f} s"
                raise _LostError("\n".join([what, *self._stacks(missing)]))
            if not ready:
                break
            answers |= {
                rank: self._receive(rank)
                for rank in missing
                if self.pipes[rank] in ready or self.processes[rank].sentinel in ready
            }
            if any(answer.failure for answer in answers.values()):
                # The others fail in turn, in their next collective; the cause is whoever failed first.
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        failures = {rank: answer for rank, answer in answers.items() if answer.failure}
        if failures:
            first = min(failures, key=lambda rank: failures[rank].time)
            kind = _LostError if failures[first].crashed else DistributedTestError
            raise kind(f"{fn.__qualname__}: rank {first} {failures[first].failure}")
        self.process_groups = max(answer.process_groups for answer in answers.values())
        return [answers[rank].value for rank in range(len(self.pipes))]

    def _receive(self, rank: int) -> _Answer:
        with contextlib.suppress(EOFError):
            if self.pipes[rank].poll() or self.processes[rank].is_alive():
                return self.pipes[rank].recv()
        self.processes[rank].join(5)
        code = self.processes[rank].exitcode
        # When it died is not known, but a rank that raises does not die: whoever died is the cause.
        return _Answer(0.0, failure=f"died with exit code {code}\n{self._trace(rank)}", crashed=code in _CRASHES)

    def _stacks(self, ranks: list[int]) -> list[str]:
        """Where these ranks are."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(_GRACE_S)
        return [f"rank {rank}:\n{self._trace(rank)}" for rank in ranks]

    def _trace(self, rank: int) -> str:
        file = _trace_file(self.folder, rank)
        return file.read_text() if file.exists() else "it had not begun"

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


_GROUPS: dict[int, _Group] = {}


@atexit.register
def close_groups() -> None:
    """End the shared processes."""
    while _GROUPS:
        _GROUPS.popitem()[1].close()


def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _trace_file(folder: Path, rank: int) -> Path:
    """Where a rank that crashes, or is asked, leaves the stacks of its threads."""
    return folder / f"stacks.{rank}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


# ---- in the worker


def _worker(pipe: Connection, env: dict[str, str], store: str, init: bool) -> None:
    """Answer jobs until the parent closes its end of the pipe."""
    import torch
    import torch.distributed as dist

    _end_with_the_tests()
    os.environ.clear()
    os.environ.update(env)
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    torch.set_num_threads(1)
    trace = _trace_file(Path(store).parent, rank).open("w")
    faulthandler.enable(trace)
    faulthandler.register(signal.SIGUSR1, trace)
    try:
        if init:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world_size),
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=_COLLECTIVE_TIMEOUT_S),
            )
        for target, args in _jobs(pipe):
            value = _load(*target)(rank, world_size, *args)
            pipe.send(_Answer(time.time(), value, len(dist.distributed_c10d._world.pg_map)))
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send(_Answer(time.time(), failure="raised\n" + traceback.format_exc()))
    finally:
        # A peer that raised never joins a collective again, so nothing is torn down together: the process just ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _end_with_the_tests() -> None:
    """Be killed when the tests are: a stopped process would not notice. The system signals the fork server's end, which
    a file that is inherited would put off."""
    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _jobs(pipe: Connection) -> Iterator[tuple[tuple[str, str, str], tuple[Any, ...]]]:
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def _load(module_name: str, file: str, qualname: str) -> Callable[..., Any]:
    """The function by its module's name or, where pytest's import mode made that name up, by its file."""
    if module_name not in sys.modules:
        try:
            importlib.import_module(module_name)
        except ModuleNotFoundError:
            spec = importlib.util.spec_from_file_location(module_name, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            spec.loader.exec_module(module)
    return reduce(getattr, qualname.split("."), sys.modules[module_name])
