"""Garbage collection at fixed steps.

Python's cyclic garbage collector runs whenever enough objects were made, so each rank of a job pauses at a step of
its own and all others wait for it. With the collector off and called at the same steps on every rank, they pause
together.

Memory that no cycle holds is freed by reference counts as always; what waits for the next collection is what hangs on a
cycle. A GPU tensor in a cycle is memory that stays taken for up to `freq` steps: `debug` finds such tensors.
"""

import gc

import torch

from titan_fp8.runtime.logging import logger


class GarbageCollector:
    """Turns the automatic collector off and collects every `freq` steps until `close`.

    Args:
        freq: steps between collections (training.gc_freq).
        debug: collect at every step and report tensors that only a reference cycle kept alive (training.gc_debug).
    """

    def __init__(self, freq: int, debug: bool = False) -> None:
        if freq < 1:
            raise ValueError(f"training.gc_freq = {freq}: expected at least 1")
        self.freq, self.debug = freq, debug
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()  # what is there now lives as long as the run; later collections need not walk it

    def run(self, step: int) -> None:
        """Collect if `step` (1, 2, ...) is one of the fixed ones."""
        if self.debug:
            _report_tensors_in_cycles(step)
        elif step % self.freq == 0:
            gc.collect()

    def close(self) -> None:
        """Give the collector back as it was found."""
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()


def _report_tensors_in_cycles(step: int) -> None:
    """Collect everything, with a line on the tensors that nothing but cycles referred to."""
    flags = gc.get_debug()
    gc.set_debug(gc.DEBUG_SAVEALL)  # unreachable objects go to gc.garbage instead of being freed
    try:
        gc.collect()
        # type() and not isinstance(): the latter asks an object for __class__, which some proxies answer with code.
        tensors = [entry for entry in gc.garbage if issubclass(type(entry), torch.Tensor)]
        if tensors:
            size_mib = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
            largest = max(tensors, key=lambda tensor: tensor.numel())
            logger.warning(
                f"step {step}: {len(tensors)} tensors ({size_mib:.2f} MiB) were held by reference cycles only, the "
                f"largest of shape {tuple(largest.shape)}, {largest.dtype} on {largest.device}"
            )
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        gc.collect()
