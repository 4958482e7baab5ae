"""Codes of weights, gathered between the GPUs of one host to where products read them.

FSDP gathers a unit's shards side by side, rank after rank, and then copies each parameter's parts together. For codes
that copy is left out: each rank reads the others' parts of a weight to where the whole weight lies, in memory that all
can read. FSDP itself exchanges 16 bytes in place of a weight's codes (`quantization/sharded_weight.py`), and when it
frees what it has made of these, the weight is no longer gathered:

    FSDP                              here
    asks each weight what to send     notes the codes of this rank's shard
    allocates, copies in              writes them to their places, when nothing reads these any more (`begin`)
    gathers                           reads the other ranks' parts to theirs (`fetch`)
    asks what to make of it           the codes of the whole weight (`received`)

The places of two units are enough where each is freed before the next but one is gathered; a unit that stays gathered
has its own. They never move: what autograd keeps of a weight for the backward pass is its codes, which are gathered to
the same place again. Whoever gathers more units at a time gets an error.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from titan_fp8.quantization.fsdp_weight import states_of
from titan_fp8.quantization.weight_state import Float8WeightState
from titan_fp8.runtime.peer_memory import PeerBuffer

ALIGNED = 256
"""Bytes of which each weight's place is a multiple: products and copies read whole vectors."""


class Turn:
    """Memory in which one unit is gathered at a time. All ranks of the group make the same ones, in the same order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = 0
        """Bytes that the largest unit needs."""
        self._buffer: PeerBuffer | None = None
        self._unit: UnitCodes | None = None
        self._stand_in: Tensor | None = None
        self._readers: torch.cuda.Stream | None = None

    def buffer(self, device: torch.device) -> PeerBuffer:
        """Its memory, made by all ranks when they first gather a unit."""
        if self._buffer is None:
            self._buffer = PeerBuffer(self.group, self.size, device)
        return self._buffer

    def take(self, unit: "UnitCodes", device: torch.device) -> Tensor:
        """All of it, to be written on the current stream.

        Raises:
            RuntimeError: another unit is in it.
        """
        received = self._stand_in is not None and self._stand_in.untyped_storage().size() > 0
        if received or (self._unit is not None and self._unit is not unit):
            raise RuntimeError(
                "more units are gathered at a time than places for their codes; set parallelism.fsdp_exchange to "
                "collectives"
            )
        self._unit, self._stand_in = unit, None
        if self._readers is not None:
            # All that read what lies here has been queued there by now.
            torch.cuda.current_stream(device).wait_stream(self._readers)
        return self.buffer(device).begin()

    def received(self, stand_in: Tensor, device: torch.device) -> None:
        """What was gathered is read on the current stream, until `stand_in`, which FSDP has gathered, is freed."""
        self._unit, self._stand_in = None, stand_in
        self._readers = torch.cuda.current_stream(device)


class UnitCodes:
    """The codes of one unit.

    Args:
        turn: where they are gathered.
        weights: state -> bytes of a rank's part, of the unit's weights.
    """

    def __init__(self, turn: Turn, weights: dict[Float8WeightState, int]) -> None:
        self._turn = turn
        self._bytes = list(weights.values())
        ranks = turn.group.size()
        self._starts, end = [], 0
        for number, (state, size) in enumerate(weights.items()):
            self._starts.append(end)
            end += -(-ranks * size // ALIGNED) * ALIGNED
            state.place = CodePlace(self, number)
        turn.size = max(turn.size, end)
        self._own: dict[int, Tensor] = {}
        self._whole: list[Tensor] | None = None

    def send(self, number: int, codes: Tensor) -> None:
        """Note this rank's codes of a weight for the next gather, contiguous bytes."""
        self._own[number] = codes.view(-1)

    @torch.inference_mode(False)
    def begin(self, device: torch.device) -> None:
        """Write this rank's codes to their places, on the current stream."""
        memory, rank = self._turn.take(self, device), self._turn.group.rank()
        own = [self._part(memory, number, rank) for number in self._own]
        torch._foreach_copy_(own, list(self._own.values()))  # pyright: ignore[reportPrivateImportUsage]
        if self._whole is None:
            ranks = self._turn.group.size()
            whole = zip(self._starts, self._bytes, strict=True)
            # Not views: copies between memories are no writes that autograd should know of.
            self._whole = [memory[start : start + ranks * size].data for start, size in whole]

    def fetch(self, device: torch.device) -> None:
        """Read the other ranks' codes to their places, on the current stream."""
        buffer = self._turn.buffer(device)
        buffer.publish()
        memory = buffer.memory
        for peer in buffer.peers:
            for number in self._own:
                part = self._part(memory, number, peer)
                buffer.read(peer, self._starts[number] + peer * self._bytes[number], part)
        buffer.end()
        self._own.clear()

    def received(self, number: int, stand_in: Tensor) -> Tensor:
        """The codes of a weight `[ranks * bytes]`, on the stream that reads them; they stay until `stand_in` is freed.
        Each time the same tensor."""
        assert self._whole is not None
        self._turn.received(stand_in, stand_in.device)
        return self._whole[number]

    def _part(self, memory: Tensor, number: int, rank: int) -> Tensor:
        """Where a rank's codes of a weight lie."""
        start = self._starts[number] + rank * self._bytes[number]
        return memory[start : start + self._bytes[number]]


class CodePlace:
    """The place of one weight's codes: what its state knows of all this."""

    def __init__(self, unit: UnitCodes, number: int) -> None:
        self._unit, self._number = unit, number
        self._stand_in: Tensor | None = None

    @torch.inference_mode(False)
    def send(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Take this rank's codes; 16 bytes of `dtype` that FSDP is to gather in their place."""
        self._unit.send(self._number, codes)
        if self._stand_in is None or self._stand_in.device != codes.device:
            self._stand_in = codes.new_zeros(16)
        return self._stand_in.view(dtype)

    def received(self, stand_in: Tensor) -> Tensor:
        """All ranks' codes, bytes, when FSDP has gathered what `send` gave to it."""
        return self._unit.received(self._number, stand_in)


def codes_of(modules: Sequence[nn.Module], turn: Turn) -> UnitCodes | None:
    """Have the codes of a sharded unit gathered in `turn`; None if it has none that can be: float8 codes of weights
    that are cut by rows, or by experts, into equal parts, along no other axis of a mesh.

    Args:
        modules: that hold the unit's parameters themselves.
    """
    weights: dict[Float8WeightState, int] = {}
    for module in modules:
        for name, state in states_of(module):
            parameter = getattr(module, name)
            if isinstance(state, Float8WeightState) and _is_cut_evenly(parameter):
                weights[state] = parameter.numel() // parameter.device_mesh.size()
    return UnitCodes(turn, weights) if weights else None


def _is_cut_evenly(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor) or list(parameter.placements) != [Shard(0)]:
        return False
    return parameter.shape[0] % parameter.device_mesh.size() == 0
