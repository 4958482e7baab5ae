"""Copies in host memory, so that the training can go on while its state is being written.

Without page-locked memory the copy is made at once and the caller waits for it.

With it, a GPU's tensors are copied by a stream of its own while forward and backward run. The copies are complete
before anything overwrites the originals because the computing stream is told to wait for them just before it does
(`hold_back_changes`): the GPU waits, the CPU does not. Page-locked memory is slow to get, so the buffers are kept from
one save to the next; they hold as much as the state that is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class HostCopies:
    """Makes copies of named tensors, plain or DTensor, in host memory.

    Args:
        pinned: use page-locked memory; needs a CUDA device.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._stream = torch.cuda.Stream() if pinned else None
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.Event | None = None

    @torch.no_grad()
    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, on the CPU, sharded as they were.

        The copies are valid after `wait`, and until the next call.
        """
        if self._stream is None:
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        copies: dict[str, Tensor] = {}
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                copies[name] = self._buffer(name, tensor)
                local(copies[name]).copy_(local(tensor), non_blocking=True)
            self._copied = self._stream.record_event()
        return copies

    def hold_back_changes(self) -> None:
        """What the current stream does from now on happens after the copies. Returns at once."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Wait until the copies are there; from any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        """A page-locked tensor like `tensor`, the one of the last save where that still fits."""
        kept = self._buffers.get(name)
        if kept is None or local(kept).shape != local(tensor).shape or kept.dtype != tensor.dtype:
            kept = tensor.detach().to("cpu", copy=True)
            if isinstance(kept, DTensor):
                kept._local_tensor = kept._local_tensor.pin_memory()
            else:
                kept = kept.pin_memory()
            self._buffers[name] = kept
        return kept


def local(tensor: Tensor) -> Tensor:
    """This rank's slice of a DTensor, a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
