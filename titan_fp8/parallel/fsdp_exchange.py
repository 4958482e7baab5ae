"""How FSDP's units exchange weights and gradients between the GPUs of one host: by copies between their memories.

`fully_shard` gathers and reduces a unit through two objects, which by default call NCCL (`AllGather`, `ReduceScatter`
of torch.distributed.fsdp). Those here move the same bytes with copy engines (`runtime/peer_memory.py`), while all
multiprocessors compute:

    gather    each rank writes its shard into its buffer; each reads the other shards into its own buffer
    reduce    each rank writes the gradients of the unit into its buffer; each reads its part of the others', and adds
              the parts up in fp32, in the order of the ranks

Gradients travel in the dtype in which they were computed, and the sums are in the reduce dtype: a sum of bf16 gradients
in fp32 is that of NCCL, for half the bytes. Any rank count works; sums are the same in every run.

Two buffers take turns, so that a unit's exchange can begin while the one before is still read. n elements of a shard.
"""

import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from titan_fp8.kernels.partial_sums import sum_parts
from titan_fp8.runtime.peer_memory import PeerBuffer

_BUFFERS = 2


class _Turns:
    """Peer buffers of one size that take turns, made when they are first needed, by all ranks of the group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._buffers: dict[int, list[PeerBuffer]] = {}
        self._turn = 0

    def next(self, size: int, device: torch.device) -> PeerBuffer:
        """The buffer whose turn it is."""
        buffers = self._buffers.setdefault(size, [])
        self._turn = (self._turn + 1) % _BUFFERS
        if len(buffers) < _BUFFERS:
            buffers.append(PeerBuffer(self.group, size, device))
            return buffers[-1]
        buffers.append(buffers.pop(0))
        return buffers[-1]


class PeerAllGather(AllGather):
    """Gathers shards `[n]` to `[ranks * n]` in a peer buffer.

    One object serves all units of one group, whose gathers follow one another. FSDP reads what was gathered on the
    stream on which it computes, and lets go of it before the gather after the next.

    Args:
        group: the ranks that hold shards.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._turns = _Turns(group)
        self._outstanding: list[weakref.ref[Tensor]] = []
        self._in_use: dict[int, PeerBuffer] = {}
        self._was_read: torch.Event | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Where to gather; on the stream that will write this rank's shard into it."""
        self._outstanding = [ref for ref in self._outstanding if ref() is not None]
        if len(self._outstanding) >= _BUFFERS:
            raise RuntimeError(
                f"{_BUFFERS + 1} units were gathered before the first was used, and {_BUFFERS} buffers hold them; set "
                "parallelism.fsdp_exchange to collectives"
            )
        stream = torch.cuda.current_stream()
        if self._was_read is not None:  # by the computation: what lay in this buffer
            stream.wait_event(self._was_read)
        self._was_read = torch.cuda.default_stream(device).record_event()
        (numel,) = size
        buffer = self._turns.next(int(numel) * dtype.itemsize, device)
        output = buffer.begin().view(dtype)
        self._outstanding.append(weakref.ref(output))
        self._in_use[output.data_ptr()] = buffer
        return output

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill `output_tensor [ranks * n]`, which holds `input_tensor [n]` in this rank's place already."""
        assert not async_op
        buffer = self._in_use.pop(output_tensor.data_ptr())
        buffer.publish()
        data = output_tensor.view(torch.uint8)
        length = data.numel() // group.size()
        for peer in buffer.peers:
            buffer.read(peer, peer * length, data[peer * length : (peer + 1) * length])
        buffer.end()


class PeerReduceScatter(ReduceScatter):
    """Sums `[ranks * n]` over ranks and leaves each its `[n]`, read from peer buffers.

    One object serves all units of one group, whose reductions follow one another.

    Args:
        group: the ranks that hold shards.
        sum_dtype: dtype of the sums.
    """

    def __init__(self, group: dist.ProcessGroup, sum_dtype: torch.dtype) -> None:
        self._turns = _Turns(group)
        self._ranks = group.size()
        self._sum_dtype = sum_dtype
        self._buffer: PeerBuffer | None = None
        self._output_numel: int | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """First where the gradients are to be written, then, for the same reduction, where the sums will be."""
        numel = int(size[0])
        if self._output_numel is not None:
            assert numel == self._output_numel
            self._output_numel = None
            # The sums live until the optimizer's step. Of the memory of the stream on which they are computed nothing
            # else would be made in between; that of the computation serves its activations as well. It may be taken,
            # for this stream has just waited for all that was computed so far; and given back when it is done.
            stream = torch.cuda.current_stream(device)
            with torch.cuda.stream(torch.cuda.default_stream(device)):
                sums = torch.empty(numel, dtype=self._sum_dtype, device=device)
            sums.record_stream(stream)
            return sums
        self._output_numel = numel // self._ranks
        self._buffer = self._turns.next(numel * dtype.itemsize, device)
        return self._buffer.begin().view(dtype)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """`output_tensor [n]` becomes the sum of the ranks' parts of `input_tensor [ranks * n]`."""
        assert not async_op
        assert op == dist.ReduceOp.SUM
        buffer = self._buffer
        assert buffer is not None
        buffer.publish()
        numel, rank = output_tensor.numel(), buffer.rank
        others = torch.empty(self._ranks - 1, numel, dtype=input_tensor.dtype, device=input_tensor.device)
        for peer in buffer.peers:
            into = others[peer - (peer > rank)].view(torch.uint8)
            buffer.read(peer, rank * into.numel(), into)
        buffer.end()
        sum_parts(input_tensor[rank * numel : (rank + 1) * numel], others, rank, output_tensor)
