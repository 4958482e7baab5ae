"""A program that test_parallel_world.py starts: pairs of processes that exchange a tensor and end as Python does.

    python -m tests.distributed.leaving FOLDER PAIRS

Threads of gloo get what nobody else wants of one core, so that they still hold the tensor when the process ends, and
the process group is kept from its end, as caches of DTensor keep it. Prints how each process ended.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from titan_fp8.parallel.distributed import destroy

KEPT: list[dist.ProcessGroup | None] = []


def exchange(rank: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    KEPT.append(dist.group.WORLD)
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), {min(os.sched_getaffinity(0))})
        if "gloo" in (task / "comm").read_text():
            os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    for _ in range(3):
        dist.all_reduce(torch.ones(1000))
    destroy()


def main(folder: str, pairs: str) -> None:
    for pair in range(int(pairs)):
        ranks = []
        for rank in range(2):
            process = os.fork()
            if process == 0:
                exchange(rank, f"{folder}/{pair}")
                return
            ranks.append(process)
        print(*(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
