"""Processes that know each other: start of the process group, its timeouts, sums over ranks, its end.

torchrun starts one process a GPU and tells each its number through the environment (RANK, WORLD_SIZE, LOCAL_RANK). A
process started without it is a world of one: it gets a process group all the same, so that no code after this asks
whether there is one.

Tensors on a GPU travel by NCCL, tensors on a CPU by gloo. A GPU job needs both: parameters kept in host memory and
asynchronous checkpoints talk about CPU tensors.
"""

import contextlib
import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import _set_pg_timeout

from titan_fp8.parallel.mesh import ParallelMesh
from titan_fp8.runtime.config import CommSection
from titan_fp8.runtime.errors import UserError

_SETTLE_S = 10.0
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def world_size_of_environment() -> int:
    """WORLD_SIZE as torchrun sets it, or 1: known before any process group exists."""
    return _integer_of_environment("WORLD_SIZE", 1)


def local_device(kind: str) -> torch.device:
    """The device of this process: the CPU, or the GPU whose number is LOCAL_RANK.

    Raises:
        UserError: there are fewer GPUs than processes on this machine.
    """
    if kind == "cpu":
        return torch.device("cpu")
    local_rank = _integer_of_environment("LOCAL_RANK", 0)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but this machine shows {torch.cuda.device_count()} GPUs to PyTorch; start at "
            "most one process a GPU (NGPU) or look at CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", local_rank)


def init_distributed(comm: CommSection, device: torch.device, dump_folder: str | Path) -> None:
    """Initialize the default process group and, on a GPU, make `device` the current one.

    Args:
        comm: timeouts and the flight recorder.
        device: this process' device, from `local_device`.
        dump_folder: the run's folder; NCCL's flight recorder writes below it when a collective times out.

    Raises:
        UserError: WORLD_SIZE is set without RANK.
    """
    world_size = world_size_of_environment()
    if world_size > 1 and "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE is {world_size}, but RANK is not set; start with torchrun or unset WORLD_SIZE")
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        _set_up_flight_recorder(comm, Path(dump_folder))
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(BACKENDS[device.type], timeout=timeout)
    else:
        dist.init_process_group(BACKENDS[device.type], store=HashStore(), rank=0, world_size=1, timeout=timeout)


def set_train_timeouts(comm: CommSection, mesh: ParallelMesh) -> None:
    """Shorten the timeout of every process group from start-up's to training's.

    Called after the first step, when compilation and the set-up of communicators are over. All ranks meet first: a rank
    that is still busy with its first step must not be timed out by one that is not.
    """
    barrier()
    timeout = timedelta(seconds=comm.train_timeout_seconds)
    for group in mesh.groups:
        _set_pg_timeout(timeout, group)


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum of `tensor` over the ranks of `group` (default: all), as a new tensor. NaN and Inf reach every rank."""
    total = tensor.detach().clone()
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return total


def any_rank(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether `flag` is true on any rank of `group` (default: all): how ranks take one decision."""
    return bool(all_reduce_sum(torch.tensor(int(flag)), group).item())


def barrier() -> None:
    """Wait until all ranks are here and this rank's GPU has done what was asked of it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1))  # a CPU tensor: dist.barrier would pick a GPU by itself


def destroy() -> None:
    """End the process group, if there is one, and wait until its threads have given up what they exchanged.

    PyTorch's caches keep groups, and so gloo's threads, to the end of the process. Such a thread needs Python's lock to
    give up a tensor, after whoever waited for the exchange goes on. Where the interpreter ends meanwhile, as it may
    where there are fewer cores than threads, the process is aborted: "terminate called without an active exception".
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        _wait_for_threads()


def _wait_for_threads() -> None:
    """Until no other thread of this process has anything to do, as Linux says. One that never rests is left behind."""
    deadline, quiet = time.monotonic() + _SETTLE_S, 0
    while quiet < 2 and time.monotonic() < deadline:
        time.sleep(0.001)  # gives up Python's lock, for which a thread that seems to sleep may wait
        quiet = 0 if threads_that_run() else quiet + 1


def threads_that_run() -> list[int]:
    """Native numbers of this process' other threads that run or could; none where there is no /proc."""
    running = []
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if state == "R" and int(task.name) != threading.get_native_id():
                running.append(int(task.name))
    return running


def _set_up_flight_recorder(comm: CommSection, dump_folder: Path) -> None:
    """Tell NCCL to remember its last collectives and to write them to a file when one times out.

    The recorder is configured by the environment only, read when the process group is made. What a user set there
    stays.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(comm.trace_buf_size))
    if comm.trace_buf_size == 0:
        return
    folder = dump_folder / comm.save_traces_folder
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / comm.save_traces_file_prefix))


def _integer_of_environment(name: str, default: int) -> int:
    value = os.environ.get(name, "").strip()
    if not value:
        return default
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} is {value!r}, but a whole number is expected; unset it")
    return int(value)
