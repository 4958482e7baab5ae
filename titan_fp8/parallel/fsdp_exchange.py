"""How FSDP's units exchange weights and gradients between the GPUs of one host: by copies between their memories.

`fully_shard` gathers and reduces a unit through two objects, which by default call NCCL (`AllGather`, `ReduceScatter`
of torch.distributed.fsdp). Those here move the same bytes with copy engines (`runtime/peer_memory.py`), while all
multiprocessors compute:

    gather    each rank writes its shard into its buffer; each reads the other shards into its own buffer
    reduce    each rank writes the gradients of the unit into its buffer; each reads its part of the others', and adds
              the parts up in fp32, in the order of the ranks

Gradients travel in the dtype in which they were computed, and the sums are in the reduce dtype: a sum of bf16 gradients
in fp32 is that of NCCL, for half the bytes. Any rank count works; sums are the same in every run.

Float8 codes of blocks that are cut into equal parts have buffers of their own (`gathered_codes.py`); what follows is
about all else.

Two buffers of a size take turns at gathers, so that a unit can be gathered while the one before is still read: FSDP
waits, before it gathers a unit, for what it has still to do with the unit before the last. Before it reduces a unit it
waits for the reduction of the last one, so that one buffer of a size will do. A unit whose exchanges do not follow one
another needs one, and if its gathers and its reductions are of one size, one for both. A buffer that is in use all the
same is an error. n elements of a shard.
"""

import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from titan_fp8.kernels.partial_sums import square_count, sum_parts
from titan_fp8.parallel.gathered_codes import UnitCodes
from titan_fp8.parallel.gradient_sums import GradientSums
from titan_fp8.runtime.known_squares import note_squares
from titan_fp8.runtime.peer_memory import PeerBuffer

TURNS = 2
"""So many buffers of a size take turns at gathers that follow one another."""
READ_AT_ONCE = 128 << 20
"""Bytes of other ranks' gradients that a rank reads before it adds them up."""
ALIGNED = 128
"""Numbers that a part of gradients is a multiple of: what is read and added begins at whole vectors."""


class _Place:
    """A buffer, and what it is used for."""

    def __init__(self, buffer: PeerBuffer) -> None:
        self.buffer = buffer
        self.given_out: weakref.ref[Tensor] | None = None
        self.was_read: torch.Event | None = None
        """By the sums of this rank's own part; None: the stream that writes now has waited for it."""

    @property
    def is_free(self) -> bool:
        """Whether nobody holds what was given out of it last."""
        return self.given_out is None or self.given_out() is None

    def give_out(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """All of it, to be written on the current stream."""
        if self.was_read is not None:
            torch.cuda.current_stream(device).wait_event(self.was_read)
            self.was_read = None
        tensor = self.buffer.begin().view(dtype)
        self.given_out = weakref.ref(tensor)
        return tensor


class Places:
    """`turns` peer buffers of each size, made when they are first needed, by all ranks of the group."""

    def __init__(self, group: dist.ProcessGroup, turns: int = TURNS) -> None:
        self.group = group
        self.turns = turns
        self._places: dict[int, list[_Place]] = {}

    def next(self, size: int, device: torch.device) -> _Place:
        """The one whose turn it is.

        Raises:
            RuntimeError: it is in use.
        """
        places = self._places.setdefault(size, [])
        if len(places) < self.turns:
            places.append(_Place(PeerBuffer(self.group, size, device)))
            return places[-1]
        places.append(places.pop(0))
        if not places[-1].is_free:
            raise RuntimeError(
                f"more is exchanged at a time than buffers in peer memory hold ({self.turns} of a size); set "
                "parallelism.fsdp_exchange to collectives"
            )
        return places[-1]


class PeerAllGather(AllGather):
    """Gathers shards `[n]` to `[ranks * n]` in a peer buffer.

    FSDP reads what was gathered on the stream on which it computes, and lets go of it when the streams of its gathers
    have been told to wait for that.

    Args:
        places: of the ranks that hold shards, for all units whose gathers follow one another; one of a size will do if
            a gather is over before the next begins.
        codes: of the unit, which are gathered with it; None: it has none that are apart.
    """

    def __init__(self, places: Places, codes: UnitCodes | None = None) -> None:
        self._places = places
        self._codes = codes
        self._in_use: dict[int, PeerBuffer] = {}

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Where to gather; on the stream that will write this rank's shard into it."""
        (numel,) = size
        if self._codes is not None:
            self._codes.begin(device)
        place = self._places.next(int(numel) * dtype.itemsize, device)
        output = place.give_out(dtype, device)
        if self._codes is not None:
            self._codes.awaited(output)
        self._in_use[output.data_ptr()] = place.buffer
        return output

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill `output_tensor [ranks * n]`, which holds `input_tensor [n]` in this rank's place already."""
        _refuse_async(async_op)
        if self._codes is not None:
            self._codes.fetch(output_tensor.device)
        buffer = self._in_use.pop(output_tensor.data_ptr())
        buffer.publish()
        data = output_tensor.view(torch.uint8)
        length = data.numel() // group.size()
        for peer in buffer.peers:
            buffer.read(peer, peer * length, data[peer * length : (peer + 1) * length])
        buffer.end()


def _refuse_async(async_op: bool) -> None:
    if async_op:
        raise RuntimeError(
            "peer memory knows no unshard(async_op=True), which pipelines call: its gathers wait for nothing on the "
            "host as it is; leave async_op out, or set parallelism.fsdp_exchange to collectives"
        )


class PeerReduceScatter(ReduceScatter):
    """Sums `[ranks * n]` over ranks and leaves each its `[n]`, read from peer buffers.

    Without `kept` one object serves all units of one group, whose reductions follow one another.

    Args:
        places: as for `PeerAllGather`, and the same for all units whose reductions follow one another. They may be
            those of the gathers of a unit that is gathered once a forward pass: FSDP lets go of what was gathered last
            at the end of it, and its gradients come later.
        sum_dtype: dtype of the sums.
        kept: where the sums of a unit's microbatches lie; None: FSDP adds them up.
        squares: the sums are also squared, for the norm of gradients (`runtime/known_squares.py`). Not if somebody else
            adds to them without telling their version counter, as a collective does.
        sums_stay: nobody lets go of sums before the backward pass has ended, when the stream of the gradients has been
            told to wait for them. Otherwise their memory is free only when the device has computed them, and a host
            that is ahead of it takes more.
    """

    def __init__(
        self,
        places: Places,
        sum_dtype: torch.dtype,
        kept: GradientSums | None = None,
        *,
        squares: bool = False,
        sums_stay: bool = False,
    ) -> None:
        self._places = places
        self._squares = squares
        self._sums_stay = sums_stay
        self._ranks = places.group.size()
        self._sum_dtype = sum_dtype
        self._kept = kept
        self._adds = False
        self._place: _Place | None = None
        self._of_gradients: torch.cuda.Stream | None = None
        self._output_numel: int | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """First where the gradients are to be written, then, for the same reduction, where the sums will be."""
        numel = int(size[0])
        if self._output_numel is not None:
            assert numel == self._output_numel
            self._output_numel = None
            kept = None if self._kept is None else self._kept.take(numel)
            sums, self._adds = kept or (self._new(numel, self._sum_dtype, device), False)
            return sums
        self._output_numel = numel // self._ranks
        self._of_gradients = torch.cuda.current_stream(device)
        self._place = self._places.next(numel * dtype.itemsize, device)
        return self._place.give_out(dtype, device)

    def _new(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for sums, which live until the optimizer's step.

        Of the memory of the stream on which they are computed nothing else would be made in between; that of the
        gradients' stream serves the activations as well. It may be taken, for the stream of the sums has just waited
        for all that was computed there so far; and it is given back when the sums are computed, which the stream of the
        gradients is told to wait for at the end of the backward pass.
        """
        stream = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._of_gradients):
            sums = torch.empty(numel, dtype=dtype, device=device)
        if not self._sums_stay:
            sums.record_stream(stream)
        return sums

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """`output_tensor [n]` becomes the sum of the ranks' parts of `input_tensor [ranks * n]`, or of that and of what
        was in it."""
        _refuse_async(async_op)
        assert op == dist.ReduceOp.SUM
        place = self._place
        assert place is not None
        buffer = place.buffer
        buffer.publish()
        numel, rank = output_tensor.numel(), buffer.rank
        mine = input_tensor[rank * numel : (rank + 1) * numel]
        at_once = READ_AT_ONCE // ((self._ranks - 1) * mine.element_size())
        at_once = max(ALIGNED, at_once // ALIGNED * ALIGNED)
        parts = [slice(start, min(start + at_once, numel)) for start in range(0, numel, at_once)]
        counts = [square_count(part.stop - part.start) for part in parts]
        all_squares = self._new(sum(counts), torch.float32, output_tensor.device) if self._squares else None
        squares = [None] * len(parts) if all_squares is None else all_squares.split(counts)
        for part, part_squares in zip(parts, squares, strict=True):
            others = _read_part(buffer, mine, part)
            if part.stop == numel:
                buffer.end()
            sum_parts(mine[part], others, rank, output_tensor[part], adds=self._adds, squares=part_squares)
            del others  # before the next part has its own
        place.was_read = torch.cuda.current_stream(input_tensor.device).record_event()
        if all_squares is not None:
            note_squares(output_tensor, all_squares)


def _read_part(buffer: PeerBuffer, mine: Tensor, part: slice) -> Tensor:
    """A part of the other ranks' gradients `[ranks - 1, length]`, of which `mine [n]` is this rank's."""
    numel, rank, size = mine.numel(), buffer.rank, mine.element_size()
    others = mine.new_empty(len(buffer.peers), part.stop - part.start)
    for peer in buffer.peers:
        into = others[peer - (peer > rank)].view(torch.uint8)
        buffer.read(peer, (rank * numel + part.start) * size, into)
    return others
