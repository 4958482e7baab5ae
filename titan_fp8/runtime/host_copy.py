"""Numbers that a device computes, for the host, which waits for them and for nothing that was asked for later.

`.item()` waits for all that the device has been told by then. Who wants to know a step's loss after the optimizer's
update has been started would leave the device idle until the next step's first kernels are there.
"""

import torch
from torch import Tensor


class HostCopy:
    """A copy in host memory that is under way.

    Args:
        value: on any device; what it is on the current stream now.
    """

    def __init__(self, value: Tensor) -> None:
        self._made: torch.Event | None = None
        if not value.is_cuda:
            self._copy = value.detach().clone()
        else:
            # A copy from the device is only done in the background if the host's memory is page-locked.
            page_locked = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._copy = page_locked.copy_(value.detach(), non_blocking=True)
            self._made = torch.cuda.current_stream(value.device).record_event()

    def read(self) -> Tensor:
        """The value, on the CPU, as soon as it is there."""
        if self._made is not None:
            self._made.synchronize()
            self._made = None
        return self._copy.cpu()
