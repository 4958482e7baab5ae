"""Peak memory of this process.

On a GPU two peaks matter. *Reserved* is what the caching allocator took from the device, and the buffers that GPUs read
from each other beside it: it decides whether a run fits and is the larger of the two. *Allocated* is what tensors of
the allocator occupied; a wide gap between them means fragmentation. On a CPU the peak is the resident set size that the
kernel keeps for the process.
"""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from titan_fp8.runtime import peer_memory

_GIB = 2**30


@dataclass(frozen=True)
class MemoryPeak:
    """Peaks in GiB; `allocated_gib` is None on a CPU."""

    reserved_gib: float
    allocated_gib: float | None


class PeakMemory:
    """Reads the peak of a stretch of training on `device` and starts the next stretch.

    On a CPU the kernel keeps one peak for the life of the process, so there the stretches do not start anew.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def take(self) -> MemoryPeak:
        """The peak since the last call (or since construction)."""
        if not self._is_cuda:
            return MemoryPeak(_peak_resident_bytes() / _GIB, None)
        reserved = torch.cuda.max_memory_reserved(self._device) + peer_memory.bytes_held()
        peak = MemoryPeak(reserved / _GIB, torch.cuda.max_memory_allocated(self._device) / _GIB)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def _peak_resident_bytes() -> int:
    # getrusage inherits the parent's peak across fork and exec (a test runner's, a launcher's); VmHWM does not.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
