"""Seeds, and algorithms that give the same bits again.

One seed serves all ranks: sharded initial weights and the order of the data are derived from it and from what is
being drawn, not from the rank. Without `debug.seed`, rank 0 draws one and all ranks use it, so that the log of every
run names a number that repeats it.

`debug.deterministic` further asks PyTorch for deterministic algorithms only. Each of its parts closes one way in
which two runs on the same GPUs differ: atomics in scatter-like kernels, cuDNN's choice of algorithms by timing,
cuBLAS' workspaces shared between streams, memory read before it is written, the compiler's choice of a reduction
order by timing.
"""

import os
import random

import torch
import torch.distributed as dist

from titan_fp8.runtime.config import DebugSection


def set_seed(debug: DebugSection, device: torch.device) -> int:
    """Seed every generator of this process.

    With more than one rank, call it after the process group is there.

    Args:
        debug: the seed.
        device: this process' device.

    Returns:
        The seed in use, the same on every rank.
    """
    seed = _agreed_seed(device) if debug.seed is None else debug.seed
    random.seed(seed)
    torch.manual_seed(seed)  # the CPU and every GPU
    return seed


def use_deterministic_algorithms(debug: DebugSection) -> None:
    """Apply `debug.deterministic`, if it is set.

    Call it before the model is built, whose attention kernel depends on it, and before the first CUDA matrix product,
    since cuBLAS reads its workspace setting once.
    """
    if not debug.deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=debug.deterministic_warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # The compiler reads this when it is first imported, which takes seconds that only a compiled job should pay.
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")


def _agreed_seed(device: torch.device) -> int:
    """A random seed below 2**31, rank 0's on every rank."""
    seed = torch.tensor(random.SystemRandom().randrange(2**31), device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(seed, src=0)
    return int(seed.item())
