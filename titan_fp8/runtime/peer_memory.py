"""Memory that the GPUs of one host read from each other, and the flags by which they say when.

A collective of NCCL is a kernel: it holds multiprocessors, and a matrix product that finds some of them taken waits for
the last of its tiles. Between GPUs of one host a copy engine can move the bytes as well, which takes none. What is left
to do is to say when: here by 32-bit flags that the stream itself writes into the other GPU's memory and waits for.

    buffer = PeerBuffer(group, bytes)          every rank, in the same order
    memory = buffer.begin()                    when all have read what lay here before: write to it
    ...
    buffer.publish()                           after the writes, on the stream that read the others' parts
    buffer.read(peer, start, into)             copies a part of what `peer` has published; or `wait`, and copy from `of`
    buffer.end()                               after the last read: now they may write again

Each round of these four calls is made by all ranks. No call makes the host wait.

Source: CUDA driver API, "Stream memory operations".
"""

import ctypes
import functools
import os
import weakref
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from titan_fp8.runtime.errors import UserError

_FLAG_BYTES = 128
"""Apart by a cache line, since different GPUs write them."""
_WAIT_UNTIL_AT_LEAST = 0
"""CU_STREAM_WAIT_VALUE_GEQ: compares cyclically, so that counts may overflow."""
_symm: Any = symmetric_memory


class _Held:
    bytes = 0


_held = _Held()


def bytes_held() -> int:
    """What the buffers of this process take of its GPU's memory, which PyTorch's allocator does not count."""
    return _held.bytes


def _give_back(size: int) -> None:
    _held.bytes -= size


class PeerBuffer:
    """`size` bytes on each GPU of a group, which all can read. Every rank of the group makes it, at the same time.

    Args:
        group: of ranks on one host, with `check_peer_memory` passed.
        size: bytes.
        device: of this rank.
    """

    @torch.inference_mode(False)  # which may be on when the first unit is gathered: its memory serves trainings, too
    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device) -> None:
        self.rank, ranks = group.rank(), group.size()
        start = -(-size // _FLAG_BYTES) * _FLAG_BYTES
        _held.bytes += start
        weakref.finalize(self, _give_back, start)
        self._memory = _symm.empty(start + 2 * ranks * _FLAG_BYTES, dtype=torch.uint8, device=device)
        self._memory[start:].zero_()
        self._handle = _symm.rendezvous(self._memory, group.group_name)
        shape = (self._memory.numel(),)
        whole = [self._handle.get_buffer(peer, shape, torch.uint8) for peer in range(ranks)]
        self._parts = [memory[:size] for memory in whole]
        self.peers = [(self.rank + distance) % ranks for distance in range(1, ranks)]
        """All other ranks, in the order in which to read them: each rank begins with another."""
        addresses = [memory.data_ptr() + start for memory in whole]
        mine, to = addresses[self.rank], self.rank * _FLAG_BYTES
        done = ranks * _FLAG_BYTES
        self._ready_of = {peer: mine + peer * _FLAG_BYTES for peer in self.peers}
        self._done_of = {peer: mine + done + peer * _FLAG_BYTES for peer in self.peers}
        self._ready_at = [addresses[peer] + to for peer in self.peers]
        self._done_at = [addresses[peer] + done + to for peer in self.peers]
        self._round = 0
        torch.cuda.synchronize(device)  # the flags are zero before a peer writes to them
        dist.barrier(group)

    def begin(self) -> Tensor:
        """This rank's bytes, to be written on the current stream."""
        for peer in self.peers:
            _wait(self._done_of[peer], self._round)
        self._round += 1
        return self._parts[self.rank]

    def publish(self) -> None:
        """What the current stream has seen written may be read."""
        for address in self._ready_at:
            _write(address, self._round)

    def of(self, peer: int) -> Tensor:
        """The bytes of a rank, which always lie there: to be read after `wait`."""
        return self._parts[peer]

    def wait(self, peer: int) -> None:
        """Hold the current stream until `peer` has published."""
        _wait(self._ready_of[peer], self._round)

    def read(self, peer: int, start: int, into: Tensor) -> None:
        """Copy the bytes from `start` on of what `peer` has published to `into`, uint8 and contiguous."""
        self.wait(peer)
        into.copy_(self._parts[peer][start : start + into.numel()])

    def end(self) -> None:
        """This rank has read all that it will of the round."""
        for address in self._done_at:
            _write(address, self._round)


def check_peer_memory(group: dist.ProcessGroup, device: torch.device, key: str) -> None:
    """Make sure that the GPUs of `group` can read each other's memory. All its ranks call it.

    Args:
        key: what asks for it, for the message.

    Raises:
        UserError: they cannot.
    """
    # A program that uses NVLink multicast claims a resource of the whole host; copies between two GPUs need none.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    try:
        probe = PeerBuffer(group, _FLAG_BYTES, device)
        memory = probe.begin()
        memory.fill_(probe.rank + 1)
        probe.publish()
        found = torch.empty_like(memory)
        for peer in probe.peers:
            probe.read(peer, 0, found)
            if not bool((found == peer + 1).all()):
                raise RuntimeError(f"rank {peer}'s memory shows other bytes than it has written")
        probe.end()
    except (RuntimeError, OSError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        ranks = ", ".join(map(str, dist.get_process_group_ranks(group)))
        raise UserError(
            f"{key}: the GPUs of the group of ranks {ranks} cannot read each other's memory ({reason}); keep the group "
            "within one host whose GPUs have peer access, or choose another value"
        ) from error


def has_peer_access(ranks: list[int], ranks_per_host: int) -> bool:
    """Whether all of these ranks are GPUs of one host that can read each other's memory, by what is known without
    asking them. Each host has `ranks_per_host` consecutive ranks, GPU i for the i-th."""
    if len({rank // ranks_per_host for rank in ranks}) > 1 or torch.cuda.device_count() < ranks_per_host:
        return False
    gpus = [rank % ranks_per_host for rank in ranks]
    return all(torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b)


@functools.cache
def _driver() -> Any:
    """The CUDA driver's library."""
    library = ctypes.CDLL("libcuda.so.1")
    for name in ("cuStreamWaitValue32_v2", "cuStreamWriteValue32_v2"):
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        function.restype = ctypes.c_int
    return library


def _wait(address: int, value: int) -> None:
    """Hold the current stream until the flag at `address` has reached `value`."""
    stream = torch.cuda.current_stream().cuda_stream
    _check(_driver().cuStreamWaitValue32_v2(stream, address, value & 0xFFFFFFFF, _WAIT_UNTIL_AT_LEAST))


def _write(address: int, value: int) -> None:
    """Set the flag at `address` when all that the current stream holds is done and visible to other GPUs."""
    stream = torch.cuda.current_stream().cuda_stream
    _check(_driver().cuStreamWriteValue32_v2(stream, address, value & 0xFFFFFFFF, 0))


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"the CUDA driver refused an operation on a stream's memory (error {code})")
