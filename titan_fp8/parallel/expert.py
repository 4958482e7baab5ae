"""Expert parallelism: the experts of a layer dealt out to the ranks of the `ep` axis.

Each rank has E / ep of a layer's experts, and its own tokens. A token travels to the ranks of its experts and
back, in two exchanges of all ranks with all:

    sort      each rank sorts its tokens by expert, so that what goes to one rank lies together
    counts    ranks tell each other how many tokens come for each expert; the CPU waits for these numbers, and where
              a whole layer is recomputed it has them already
    dispatch  tokens travel
    regroup   what has come, by rank and expert, is sorted by expert, with the alignment that the products want
    combine   the experts' outputs travel back, and are summed for each token

`ep` takes its ranks from the axes `dp_shard`, `cp` and, where experts are whole (`expert_tensor.py`), `tp`, neighbours
first. So ranks of `ep` have different tokens, an expert's gradient sums over all of them by itself, and what is left of
these axes, `expert_shards`, shards the experts further. Source: arXiv 2006.16668.

T tokens of a rank, k choices of each, E experts, D features, R rows that have come to a rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan_fp8.kernels.moe.functions import Permute, Rows, Unpermute, plan
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dispatch import Groups, UnderWay
from titan_fp8.models.moe import Experts, MoE
from titan_fp8.parallel.expert_tensor import divide_experts
from titan_fp8.parallel.mesh import EP, ParallelMesh
from titan_fp8.quantization import mx_ops
from titan_fp8.quantization.fsdp_weight import states_of
from titan_fp8.quantization.mx_recipes import GROUPED_RECIPE
from titan_fp8.quantization.ops import cast_rows
from titan_fp8.quantization.tensor_parallel import local_tensor
from titan_fp8.runtime.collectives import Axis, exchange_equally, exchange_rows, wait_for
from titan_fp8.runtime.recomputation import recalled

ACTIVATIONS = "activations"


class _Codes(NamedTuple):
    """A format in which rows travel: how they are cast, and what numbers their codes and scales are in a dtype."""

    cast: Callable[[Tensor], tuple[Tensor, Tensor]]
    values: Callable[[Tensor, Tensor, torch.dtype], Tensor]


def _row_values(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype).copy_(codes).mul_(scale)


_CODES = {
    "float8": _Codes(lambda x: cast_rows(x, torch.float8_e4m3fn), _row_values),
    "mxfp8": _Codes(
        lambda x: mx_ops.plain_rows(x, GROUPED_RECIPE.mode),
        lambda codes, scale, dtype: mx_ops.values_of_plain(codes, scale.view(torch.float8_e8m0fnu), dtype),
    ),
}


def apply_expert_parallel(model: Decoder, mesh: ParallelMesh, *, payload: str = ACTIVATIONS) -> None:
    """Deal the experts of `model` out over the `ep` axis of `mesh`, in place, and divide each over `tp` where they
    are to be divided (`expert_tensor.py`); nothing happens where each rank has all of them whole.

    Args:
        model: converted, not yet compiled or sharded; its number of experts divides (`family_rules.py`).
        mesh: from `build_mesh`.
        payload: as what tokens travel to experts (`ExchangeDispatcher`).
    """
    if mesh.degrees.expert == mesh.degrees.expert_tensor == 1:
        return
    for module in model.modules():
        if not isinstance(module, MoE):
            continue
        divide_experts(module.experts, mesh)
        for name, state in states_of(module.experts):
            divided = getattr(module.experts, name).device_mesh
            state.parts = tuple(Axis.of(divided.get_group(number)) for number in range(divided.ndim))
        module.experts.weights = partial(_local_weights, module.experts)
        if mesh.degrees.expert > 1:
            module.dispatcher = ExchangeDispatcher(
                module.dispatcher.n_experts,
                mesh.expert_mesh.get_group(EP),
                module.dispatcher.alignment,
                payload=payload,
            )


def _local_weights(experts: Experts) -> tuple[Tensor, Tensor, Tensor]:
    return local_tensor(experts.w1), local_tensor(experts.w3), local_tensor(experts.w2)


@dataclass(frozen=True)
class _WayBack:
    """What brings rows back.

    Attributes:
        position, source: of this rank's tokens, sorted by expert (`kernels.moe.plan`).
        factors: of what comes back, fp32 `[T, k]`, or None.
        sent, came: rows for and from each rank.
    """

    position: Tensor
    source: Tensor
    factors: Tensor | None
    sent: list[int]
    came: list[int]


class ExchangeDispatcher:
    """The experts are spread over the ranks of a group; see `titan_fp8.models.dispatch.Dispatcher`.

    Args:
        n_experts: E, a multiple of the group's size.
        group: its ranks have the experts in order.
        alignment: rows that each group is a multiple of.
        payload: as what goes to experts travels, rows forward and their gradients backward: `ACTIVATIONS`, as it is,
            or a format of `_CODES`.

    Attributes:
        hand_over: called whenever an exchange of tokens, or of their gradients, has begun: the time for something else
            (`pipeline_overlap.py`).
    """

    def __init__(self, n_experts: int, group: dist.ProcessGroup, alignment: int, *, payload: str = ACTIVATIONS):
        self.hand_over: Callable[[], None] = _go_on
        self.n_experts = n_experts
        self.alignment = alignment
        self._axis = Axis.of(group)
        self._payload = payload

    def dispatch(
        self, x: Tensor, experts: Tensor, scores: Tensor | None, factors: Tensor | None = None
    ) -> UnderWay[Groups]:
        """See `Dispatcher`."""
        counts, _, position, source = plan(experts, self.n_experts, 1)
        sent, came, from_ranks = recalled(lambda: self._announce(counts))
        exchange = Exchange(sent, came, self._axis, forward=self._payload, hand_over=self.hand_over)
        rows = Send.apply(Permute.apply(x, scores, position, source), exchange)
        _, ends, place, origin = plan(_experts_of(from_ranks, sum(came)), from_ranks.shape[1], self.alignment)

        def arrive(rows: Tensor) -> Groups:
            grouped = Rows(Arrive.apply(rows, exchange), None, place, origin)
            return Groups(grouped, ends, _WayBack(position, source, factors, sent, came))

        return UnderWay(rows, arrive)

    def _announce(self, counts: Tensor) -> tuple[list[int], list[int], Tensor]:
        """How many rows go to each rank and come from each, and for which experts these are, `[ranks, experts here]`;
        counts `[E]`, the tokens of each expert here."""
        by_rank = counts.view(self._axis.size, -1)
        from_ranks = exchange_equally(by_rank, self._axis)
        # The one thing that the CPU has to know.
        sent, came = torch.stack([by_rank, from_ranks]).sum(-1).tolist()
        return sent, came, from_ranks

    def combine(self, y: Tensor, groups: Groups) -> UnderWay[Tensor]:
        """See `Dispatcher`; y `[R, D]`, in the order in which rows came."""
        way: _WayBack = groups.way_back
        exchange = Exchange(way.came, way.sent, self._axis, backward=self._payload, hand_over=self.hand_over)

        def arrive(returned: Tensor) -> Tensor:
            return Unpermute.apply(Arrive.apply(returned, exchange), way.factors, way.position, way.source)

        return UnderWay(Send.apply(y, exchange), arrive)


def _go_on() -> None:
    pass


def _experts_of(counts: Tensor, rows: int) -> Tensor:
    """The expert, of those here, of each row that came, `[R, 1]`; counts `[ranks, experts here]`, in their order."""
    group = torch.repeat_interleave(counts.flatten(), output_size=rows)  # a rank's rows of an expert
    return (group % counts.shape[1]).unsqueeze(1)


class Exchange:
    """Rows on their way between all ranks, and their gradients on their way back.

    As codes, a row travels as one byte a value and scales: e4m3 with a power of two for each row, as experts in float8
    cast it, or for each 32 of its values, as those in MXFP8 do. The numbers that these stand for are exact in bf16 and
    fp32, and to cast them by rows again changes none.

    What was begun has to be finished: until then the process group keeps its memory.

    Args:
        sent, came: rows for and from each rank.
        axis: the ranks.
        forward, backward: the payload in each direction.
        hand_over: called when rows are on their way.
    """

    def __init__(
        self,
        sent: list[int],
        came: list[int],
        axis: Axis,
        *,
        forward: str = ACTIVATIONS,
        backward: str = ACTIVATIONS,
        hand_over: Callable[[], None] = _go_on,
    ):
        self._counts, self._axis, self._hand_over = (sent, came), axis, hand_over
        self._payload = {False: forward, True: backward}
        self._pending: tuple[Tensor, tuple[Tensor, ...] | None, str] | None = None

    def start(self, x: Tensor, *, back: bool) -> Tensor:
        """Send rows x `[sum(sent), D]`, in the order of the ranks that they go to: memory for those that come,
        `[sum(came), D]`, in the order of the ranks that they are from. back: the other way round."""
        sent, came = self._counts[::-1] if back else self._counts
        payload, parts = self._payload[back], None
        if payload == ACTIVATIONS:
            result = exchange_rows(x, sent, came, self._axis)
        else:
            codes, scale = _CODES[payload].cast(x)
            scale = scale if scale.dtype == torch.float32 else scale.view(torch.uint8)
            parts = tuple(exchange_rows(each, sent, came, self._axis) for each in (codes.view(torch.uint8), scale))
            result = x.new_empty(()).expand(sum(came), *x.shape[1:])  # stands in, for autograd; it takes no memory
        self._pending = result, parts, payload
        self._hand_over()
        return result

    def finish(self) -> Tensor:
        """What was started last: it has come, for whatever this stream does next."""
        assert self._pending is not None
        (result, parts, payload), self._pending = self._pending, None
        if parts is None:
            return wait_for(result)
        codes, scale = (wait_for(each) for each in parts)
        return _CODES[payload].values(codes.view(torch.float8_e4m3fn), scale, result.dtype)


class Send(torch.autograd.Function):
    """Rows `[sum(sent), D]` -> those that will have come, `[sum(came), D]`, once `Arrive` had them.

    Two functions rather than one: what runs between them forward, such as a shared expert, autograd runs between them
    backward too, while gradients are on their way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(x, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish(), None


class Arrive(torch.autograd.Function):
    """Rows of `Send` that are under way -> the same, here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        rows = exchange.finish()
        # An input may not be an output.
        return x.view_as(x) if rows.data_ptr() == x.data_ptr() else rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start(grad, back=True)
        return grad, None  # of the shape that is asked for; nobody reads it
