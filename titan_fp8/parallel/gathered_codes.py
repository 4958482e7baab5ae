"""Codes of weights, gathered between the GPUs of one host to where products read them.

FSDP gathers a unit's shards side by side, rank after rank, and then copies each parameter's parts together. For codes
that copy is left out: each rank reads the others' parts of a weight to where the whole weight lies, in memory that all
can read. FSDP itself gathers 16 bytes of each rank in place of a weight's codes (`quantization/sharded_weight.py`), and
when it frees what it has made of these, the weight is no longer gathered:

    FSDP                              here
    asks each weight what to send     notes the codes of this rank's shard
    allocates, copies in              writes them to where they belong, when nothing reads there any more (`begin`)
    gathers                           reads the other ranks' parts (`fetch`)
    asks what to make of it           the codes of the whole weight (`received`)

Two buffers are enough for units that are freed before the next but one is gathered; a unit that stays gathered has its
own. Codes never move: what autograd keeps of a weight for the backward pass is its codes, which are gathered to the
same place again, and if they are not, autograd's version counters tell (but where hooks keep what is saved, which
autograd does not check). Whoever gathers more units at a time gets an error.
"""

import weakref
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from titan_fp8.quantization.fsdp_weight import states_of
from titan_fp8.quantization.weight_state import Float8WeightState
from titan_fp8.runtime.peer_memory import PeerBuffer

ALIGNED = 256
"""Bytes of which the place of each weight's codes is a multiple."""
VECTOR = 16
"""Bytes of which each rank's part is a multiple: products and copies read whole vectors."""
STAND_IN = 16
"""Bytes that FSDP gathers of each rank in place of a weight's codes."""


class CodeBuffer:
    """Memory in which the codes of one unit are gathered at a time, the same on all ranks of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = 0
        """Bytes that the largest unit needs."""
        self._buffer: PeerBuffer | None = None
        self._held: list[Tensor] = []
        self._awaited: weakref.ref[Tensor] | None = None
        self._stand_in: Tensor | None = None
        self._fetched: torch.Event | None = None
        self._reads_on: torch.cuda.Stream | None = None

    def peers(self, device: torch.device) -> PeerBuffer:
        """The memory, which all ranks make when they first gather a unit."""
        if self._buffer is None:
            self._buffer = PeerBuffer(self.group, self.size, device)
        return self._buffer

    def take(self, device: torch.device) -> Tensor:
        """All of it, to be written on the current stream.

        Raises:
            RuntimeError: a unit is gathered in it.
        """
        # A gather that FSDP has begun ahead of need may come to nothing, and then FSDP lets go of its output.
        is_awaited = self._awaited is not None and self._awaited() is not None
        if is_awaited or (self._stand_in is not None and self._stand_in.untyped_storage().size() > 0):
            raise RuntimeError(
                "more blocks are gathered at a time than there are buffers for codes in peer memory, by unshard() or "
                "set_reshard_after_backward(False), or since a pass was broken off, after which reset_iter_state() "
                "frees them; set parallelism.fsdp_reshard_after_forward to never, or parallelism.fsdp_exchange to "
                "collectives"
            )
        stream = torch.cuda.current_stream(device)
        if self._reads_on is not None:
            stream.wait_stream(self._reads_on)  # where all that reads what lies here has been queued by now
        if self._fetched is not None:
            stream.wait_event(self._fetched)  # for which nobody has waited
        self._awaited = self._stand_in = self._fetched = None
        return self.peers(device).begin()

    def awaited(self, output: Tensor) -> None:
        """What was taken belongs to the unit that FSDP gathers in `output`."""
        self._awaited = weakref.ref(output)

    def hold(self, codes: list[Tensor]) -> None:
        """What lies here from now on is `codes`. A backward pass that still needs what lay here before is an error of
        autograd, until that has been gathered again."""
        if codes is not self._held:
            _set_versions(self._held, 1)
            _set_versions(codes, 0)
        self._held = codes

    def fetched(self, device: torch.device) -> None:
        """All of a unit has been read from peers, on the current stream."""
        self._fetched = torch.cuda.current_stream(device).record_event()

    def received(self, stand_in: Tensor) -> None:
        """What was gathered is read on the current stream, until `stand_in`, which FSDP has gathered, is freed."""
        self._awaited, self._fetched, self._stand_in = None, None, stand_in
        self._reads_on = torch.cuda.current_stream(stand_in.device)


class UnitCodes:
    """The codes of one unit.

    Args:
        buffer: where they are gathered.
        weights: state -> bytes of a rank's part, a multiple of `VECTOR`, of the unit's weights.
    """

    def __init__(self, buffer: CodeBuffer, weights: Mapping[Float8WeightState, int]) -> None:
        self._buffer = buffer
        self._places: list[tuple[int, int]] = []
        ranks, end = buffer.group.size(), 0
        for number, (state, size) in enumerate(weights.items()):
            assert size % VECTOR == 0
            self._places.append((end, size))
            end += -(-ranks * size // ALIGNED) * ALIGNED
            state.exchange = WeightCodes(self, number)
        buffer.size = max(buffer.size, end)
        self._own: dict[int, Tensor] = {}
        self._whole: list[Tensor] = []
        self._mine: list[Tensor] = []
        self._copies: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def send(self, number: int, codes: Tensor) -> None:
        """Note this rank's codes of a weight for the gather that begins, contiguous bytes."""
        self._own[number] = codes.view(-1).view(torch.int32)  # a kernel copies wider elements faster

    @torch.inference_mode(False)
    def begin(self, device: torch.device) -> None:
        """Write this rank's codes, of all weights, to where they belong, on the current stream."""
        memory = self._buffer.take(device)
        if not self._whole:
            self._find_parts(memory, self._buffer.peers(device))
        self._buffer.hold(self._whole)
        own = [self._own[number] for number in range(len(self._mine))]
        torch._foreach_copy_(self._mine, own)  # pyright: ignore[reportPrivateImportUsage]
        self._own.clear()

    def awaited(self, output: Tensor) -> None:
        """What began is the gather of `output`."""
        self._buffer.awaited(output)

    def fetch(self, device: torch.device) -> None:
        """Read the other ranks' codes to where they belong, on the current stream."""
        buffer = self._buffer.peers(device)
        buffer.publish()
        for peer in buffer.peers:
            buffer.wait(peer)
            for target, source in self._copies[peer]:
                target.copy_(source)
        buffer.end()
        self._buffer.fetched(device)

    def received(self, number: int, stand_in: Tensor) -> Tensor:
        """The codes of a weight, bytes of all ranks, on the stream that reads them; they stay until `stand_in` is
        freed. Each time the same tensor."""
        self._buffer.received(stand_in)
        return self._whole[number]

    def _find_parts(self, memory: Tensor, buffer: PeerBuffer) -> None:
        """Tensors of all that is copied and read: it always lies in the same memory."""

        def part(of: Tensor, number: int, rank: int) -> Tensor:
            start, size = self._places[number]
            return of[start + rank * size :][:size]

        numbers, ranks = range(len(self._places)), self._buffer.group.size()
        # Not views, which would tell autograd of every copy.
        self._whole = [memory[start : start + ranks * size].data for start, size in self._places]
        self._mine = [part(memory, number, buffer.rank).view(torch.int32) for number in numbers]
        for peer in buffer.peers:
            theirs = buffer.of(peer)
            self._copies[peer] = [(part(memory, number, peer), part(theirs, number, peer)) for number in numbers]


class WeightCodes:
    """The codes of one weight: a `CodeExchange`."""

    def __init__(self, unit: UnitCodes, number: int) -> None:
        self._unit, self._number = unit, number
        self._stand_in: Tensor | None = None

    @torch.inference_mode(False)
    def send(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """See `CodeExchange`."""
        self._unit.send(self._number, codes)
        if self._stand_in is None or self._stand_in.device != codes.device:
            self._stand_in = codes.new_zeros(STAND_IN)
        return self._stand_in.view(dtype)

    def received(self, stand_in: Tensor) -> Tensor:
        """See `CodeExchange`."""
        return self._unit.received(self._number, stand_in)


def codes_of(modules: Sequence[nn.Module], buffer: CodeBuffer) -> UnitCodes | None:
    """Have the float8 codes of a sharded unit gathered in `buffer`: of weights that are cut by rows, or by experts,
    into equal parts, and along no other axis of a mesh. None if there are none.

    Args:
        modules: that hold the unit's parameters themselves.
    """
    weights: dict[Float8WeightState, int] = {}
    for module in modules:
        for name, state in states_of(module):
            parameter = getattr(module, name)
            if isinstance(state, Float8WeightState) and _is_cut_evenly(parameter):
                weights[state] = parameter.numel() // parameter.device_mesh.size()
    return UnitCodes(buffer, weights) if weights else None


def _set_versions(tensors: Sequence[Tensor], version: int) -> None:
    """Of tensors and all views of them: autograd compares it when a backward pass reads what a forward pass kept."""
    torch._C._autograd._unsafe_set_version_counter(tuple(tensors), (version,) * len(tensors))  # pyright: ignore


def _is_cut_evenly(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor) or list(parameter.placements) != [Shard(0)]:
        return False
    ranks = parameter.device_mesh.size()
    return parameter.shape[0] % ranks == 0 and parameter.numel() // ranks % VECTOR == 0
