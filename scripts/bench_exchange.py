"""FSDP's exchanges of one Llama 8B block between the GPUs of a host: through peer memory, and by NCCL's collectives.

    torchrun --nproc_per_node 2 scripts/bench_exchange.py

Gathered are float8 codes, a byte a parameter; reduced are gradients, in bf16 through peer memory, where they are added
up in fp32, and in fp32 by NCCL, without the copy into the buffer on either side. Both must give the same bits. Then
each is measured alone, and what it does to a float8 product of [8192, 4096] x [14336, 4096] that runs beside it.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_fp8.parallel.fsdp_exchange import PeerAllGather, PeerReduceScatter, Places
from titan_fp8.runtime.peer_memory import check_peer_memory

PARAMETERS = 218_103_808
PRODUCTS = 20


def per_call(call: Callable[[], Any], calls: int = PRODUCTS, beside: Callable[[], Any] | None = None) -> float:
    """Milliseconds a call, on a warm device; with `beside` running six times on another stream."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    side = torch.cuda.Stream()
    if beside is not None:
        with torch.cuda.stream(side):
            for _ in range(6):
                beside()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def exchanges_of(group: dist.ProcessGroup) -> tuple[PeerAllGather, PeerReduceScatter]:
    """What FSDP gives its blocks."""
    return PeerAllGather(Places(group)), PeerReduceScatter(Places(group, turns=1), torch.float32)


def main() -> None:
    """Compare, measure, print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("LOCAL_RANK is not set: start it with torchrun, a process for each GPU")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # read when CUDA starts
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    group = dist.group.WORLD
    assert group is not None
    check_peer_memory(group, device, "bench_exchange.py")
    ranks, rank = group.size(), group.rank()
    gather, reduce = exchanges_of(group)
    shard = PARAMETERS // 2 // ranks  # as bf16, two codes an element
    torch.manual_seed(rank)
    codes = torch.randn(shard, device=device).bfloat16()
    grads = torch.randn(PARAMETERS, device=device).bfloat16()
    wide, gathered = grads.float(), torch.empty(shard * ranks, dtype=torch.bfloat16, device=device)
    summed = torch.empty(PARAMETERS // ranks, device=device)

    def gather_by_peers() -> Tensor:
        output = gather.allocate((shard * ranks,), dtype=torch.bfloat16, device=device)
        own = output[rank * shard : (rank + 1) * shard]
        own.copy_(codes)
        gather(output, own, group)
        return output

    def reduce_by_peers(*, check: bool = False) -> Tensor:
        buffer = reduce.allocate((PARAMETERS,), dtype=torch.bfloat16, device=device)
        if check:
            buffer.copy_(grads)
        output = reduce.allocate((PARAMETERS // ranks,), dtype=torch.bfloat16, device=device)
        reduce(output, buffer, group, dist.ReduceOp.SUM)
        return output

    exchanges = {
        "gather by peers": gather_by_peers,
        "gather by NCCL": lambda: dist.all_gather_into_tensor(gathered, codes),
        "reduce by peers": reduce_by_peers,
        "reduce by NCCL": lambda: dist.reduce_scatter_tensor(summed, wide),
    }
    for name, exchange in exchanges.items():
        exchange()
        if name.endswith("NCCL") and ranks == 2:  # of more, sums depend on the order
            ours, theirs = (gather_by_peers(), gathered) if "gather" in name else (reduce_by_peers(check=True), summed)
            assert torch.equal(ours, theirs), name
    a, b = (torch.randn(rows, 4096, device=device).to(torch.float8_e4m3fn) for rows in (8192, 14336))
    one = torch.ones((), device=device)

    def product() -> Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    lines = [f"product alone: {per_call(product):.3f} ms"]
    for name, exchange in exchanges.items():
        lines.append(f"{name}: {per_call(exchange):.3f} ms alone; product {per_call(product, beside=exchange):.3f} ms")
    if rank == 0:
        print(f"{ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}", *lines, sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
