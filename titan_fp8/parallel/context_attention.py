"""Causal attention over sequences that are spread over ranks: the operators behind `parallel/context.py`.

Softmax attention can be computed in blocks of keys. A block gives an output `o` and the logarithm `l` of its softmax's
denominator, and two blocks make one:

    l = log(exp(l1) + exp(l2))        o = o1 exp(l1 - l) + o2 exp(l2 - l)

Backwards no merging is needed: with the final `o` and `l`, the probabilities `exp(q k - l)` of any block are those of
the whole, so the gradients of blocks just add up. Any fused kernel that returns `l` will do, and which queries meet
which keys is the only thing that ways of communicating differ in (who meets whom is worked out in `context_blocks.py`,
the kernels are in `attention_blocks.py`):

    all-gather  every rank collects all keys and values, in natural order. Each of its chunks of queries meets all keys
                before it (a full block) and its own (a causal block). Llama 3, section 3.3.2 (arXiv 2407.21783).
    ring        keys and values of one rank at a time pass by, the next being on their way while the present ones are
                computed with. Blocks that lie after all queries are skipped. Ring Attention (arXiv 2310.01889).

Where no rank needs another's keys (`context_blocks.py` says when) they stay where they are.

Both ways keep only a rank's own part for the backward pass, and collect the keys and values a second time there: what
context parallelism is for is memory that does not grow with the sequence. Partial results and gradients are summed in
float32; between ranks the all-gather way sums gradients in the activations' dtype, the ring in float32.

The operators are opaque to the compiler, which therefore repeats neither communication nor its order.

Keys and values of latent attention travel as the heads that `wkv_b` made of them, H (D + D') numbers a token. The
latent vector and the rotated key, from which every rank could make them, are far fewer: 576 for 40,960 in DeepSeek-V3,
and the products that each rank would repeat, `2 kv_lora_rank H (P + V)` = 34 MFLOP for a token in forward, take a fifth
of the time of 80 KB by NVLink (0.06 us at 600 TFLOP/s, 0.27 us at 300 GB/s). But then the heads of all S tokens would
be results of a layer, kept for the backward pass on every rank: memory that grows with the sequence. Here they are made
once, L tokens a rank are kept, and how `wkv_b` multiplies is nobody's business.

Legend: B sequences, S tokens of a sequence, L = S / ranks those of a rank, H query heads, G key and value heads
(H is a multiple of G), D head width of queries and keys, D' that of values.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from titan_fp8.models.attention_backends import Backend
from titan_fp8.parallel.attention_blocks import block_kernels
from titan_fp8.parallel.context_blocks import (
    Block,
    gathered_blocks,
    held_chunks,
    is_seen_by_its_holder_alone,
    ring_blocks,
)
from titan_fp8.runtime.collectives import Axis, all_gather, reduce_scatter
from titan_fp8.runtime.operators import register_operator

Way = Literal["stay", "gather", "ring"]
"""How queries and keys meet."""
_SETTINGS = "str group_name, bool balanced"  # of every operator
_OF_ATTENTION = f"{_SETTINGS}, bool ring, str backend, float? scale, int? window"


# ---- communication: keys and values travel as one vector, [B, tokens, G, D] before [B, tokens, G, D']


class _Place:
    """This rank among those of its sequences."""

    def __init__(self, group_name: Any, balanced: bool):  # the name: a str, for which PyTorch has a type of its own
        self.group: dist.ProcessGroup = _resolve_process_group(group_name)
        self.axis = Axis.of(self.group)
        self.rank, self.degree, self.balanced = self.axis.rank, self.axis.size, balanced

    @property
    def held(self) -> list[tuple[int, ...]]:
        """The chunks of each rank."""
        return [held_chunks(rank, self.degree, self.balanced) for rank in range(self.degree)]


class _Transfer:
    """A tensor on its way to the next rank of the ring, while another one comes from the previous rank."""

    def __init__(self, sent: Tensor, place: _Place, tag: int):
        self.sent, self.received = sent, torch.empty_like(sent)
        to, of = (place.rank + 1) % place.degree, (place.rank - 1) % place.degree
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=place.group, tag=tag, group_peer=to),
                dist.P2POp(dist.irecv, self.received, group=place.group, tag=tag, group_peer=of),
            ]
        )

    def wait(self) -> Tensor:
        """What came."""
        for work in self.works:
            work.wait()
        return self.received


def _views(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys [B, G, tokens, D] and values [B, G, tokens, D'] in a vector, of any number of tokens and otherwise the
    sizes of k and v."""
    rows, heads, _, key_width = k.shape
    widths = (key_width, v.shape[-1])
    unit = packed.numel() // sum(widths)
    keys, values = (
        part.view(rows, -1, heads, width).transpose(1, 2)
        for part, width in zip(packed.split([unit * width for width in widths]), widths, strict=True)
    )
    return keys, values


def _pack(k: Tensor, v: Tensor) -> Tensor:
    packed = k.new_empty(k.numel() + v.numel())
    for view, x in zip(_views(packed, k, v), (k, v), strict=True):
        view.copy_(x)
    return packed


def _gather(k: Tensor, v: Tensor, place: _Place) -> tuple[Tensor, Tensor]:
    """This rank's k [B, G, L, D] and v [B, G, L, D'] to those of all tokens in natural order, stored by token."""
    parts = [_views(part, k, v) for part in all_gather(_pack(k, v), place.axis).chunk(place.degree)]
    whole = []
    for of_ranks in zip(*parts, strict=True):  # keys, then values
        by_number: dict[int, Tensor] = {}
        for held, part in zip(place.held, of_ranks, strict=True):
            by_number.update(zip(held, part.transpose(1, 2).chunk(len(held), dim=1), strict=True))
        whole.append(torch.cat([by_number[number] for number in sorted(by_number)], dim=1).transpose(1, 2))
    keys, values = whole
    return keys, values


def _sum_to_owners(grad_k: Tensor, grad_v: Tensor, place: _Place) -> tuple[Tensor, Tensor]:
    """The transpose of `_gather`: gradients of all S tokens on every rank to the sums for this rank's L tokens."""
    n_chunks = sum(map(len, place.held))
    chunks = [grad.transpose(1, 2).chunk(n_chunks, dim=1) for grad in (grad_k, grad_v)]
    parts = [torch.cat([of[number] for number in held], dim=1).flatten() for held in place.held for of in chunks]
    return _views(reduce_scatter(torch.cat(parts), place.axis), grad_k, grad_v)


def _way(place: _Place, local_len: int, ring: bool, window: int | None) -> Way:
    if is_seen_by_its_holder_alone(place.degree, local_len, place.balanced, window):
        return "stay"
    return "ring" if ring else "gather"


def _arrivals(
    k: Tensor, v: Tensor, place: _Place, way: Way, rectangular: bool, window: int | None
) -> Iterator[tuple[list[Block], Tensor, Tensor]]:
    """Keys and values as they become available, each with the blocks of this rank's queries."""
    sizes = (place.degree, k.shape[2], place.balanced)
    if way == "stay":
        yield ring_blocks(place.rank, place.rank, *sizes, window), k, v
        return
    if way == "gather":
        yield gathered_blocks(place.rank, *sizes, rectangular, window), *_gather(k, v, place)
        return
    packed = _pack(k, v)
    for step in range(place.degree):
        transfer = _Transfer(packed, place, tag=0) if step < place.degree - 1 else None
        yield ring_blocks(place.rank, (place.rank - step) % place.degree, *sizes, window), *_views(packed, k, v)
        if transfer is not None:
            packed = transfer.wait()


# ---- operators


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_name: str,
    balanced: bool,
    ring: bool,
    backend: str,
    scale: float | None,
    window: int | None,
):
    place, kernels = _Place(group_name, balanced), block_kernels(backend, q.device)
    way = _way(place, q.shape[2], ring, window)
    out, lse = _like_attention(q, v, torch.float32)
    out.zero_()
    lse.fill_(float("-inf"))
    for blocks, keys, values in _arrivals(k, v, place, way, kernels.rectangular, window):
        for block in blocks:
            queries, seen = (slice(None), slice(None), block.queries), (slice(None), slice(None), block.keys)
            partial = kernels.forward(q[queries], keys[seen], values[seen], block.causal, scale)
            _merge(out[queries], lse[queries], *partial)
    return out.to(q.dtype), lse


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add a block's output and log-sum-exp to those so far, in place."""
    total = torch.logaddexp(lse, block_lse)
    out.mul_((lse - total).exp().unsqueeze(-1)).add_(block_out * (block_lse - total).exp().unsqueeze(-1))
    lse.copy_(total)


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group_name: str,
    balanced: bool,
    ring: bool,
    backend: str,
    scale: float | None,
    window: int | None,
):
    place, kernels = _Place(group_name, balanced), block_kernels(backend, q.device)
    way = _way(place, q.shape[2], ring, window)
    grad_q = _like_attention(q, q, torch.float32)[0].zero_()
    arriving: _Transfer | None = None  # gradients of the keys and values at hand, from the ranks they passed before
    grad_k, grad_v = k, v
    for blocks, keys, values in _arrivals(k, v, place, way, kernels.rectangular, window):
        packed = torch.zeros(keys.numel() + values.numel(), dtype=torch.float32, device=q.device)
        grad_k, grad_v = _views(packed, k, v)
        for block in blocks:
            queries, seen = (slice(None), slice(None), block.queries), (slice(None), slice(None), block.keys)
            of_softmax = (out[queries], lse[queries].contiguous())
            dq, dk, dv = kernels.backward(
                grad[queries], q[queries], keys[seen], values[seen], *of_softmax, block.causal, scale
            )[:3]
            grad_q[queries] += dq
            grad_k[seen] += dk
            grad_v[seen] += dv
        if way == "ring":
            if arriving is not None:
                packed += arriving.wait()
            arriving = _Transfer(packed, place, tag=1)  # the last one brings them home
    if arriving is not None:
        grad_k, grad_v = _views(arriving.wait(), k, v)
    elif way == "gather":
        grad_k, grad_v = _sum_to_owners(grad_k.to(k.dtype), grad_v.to(v.dtype), place)
    return grad_q.to(q.dtype), grad_k.to(k.dtype, copy=True), grad_v.to(v.dtype, copy=True)


def _like_attention(q: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for an output as wide as v, laid out as the projection after attention reads it, and a log-sum-exp."""
    rows, heads, length, _ = q.shape
    out = q.new_empty((rows, length, heads, v.shape[-1]), dtype=dtype).transpose(1, 2)
    return out, q.new_empty((rows, heads, length), dtype=torch.float32)


def _gather_op(k: Tensor, v: Tensor, group_name: str, balanced: bool) -> tuple[Tensor, Tensor]:
    return _gather(k, v, _Place(group_name, balanced))


def _sum_op(grad_k: Tensor, grad_v: Tensor, group_name: str, balanced: bool) -> tuple[Tensor, Tensor]:
    sum_k, sum_v = _sum_to_owners(grad_k, grad_v, _Place(group_name, balanced))
    return sum_k.clone(), sum_v.clone()  # results of an operator share no memory


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_by_token(x, x.shape[2]) for x in (q, k, v))  # pyright: ignore[reportReturnType]


def _fake_gather(k: Tensor, v: Tensor, group_name: str, balanced: bool) -> tuple[Tensor, Tensor]:
    degree = _Place(group_name, balanced).degree
    return _by_token(k, k.shape[2] * degree), _by_token(v, v.shape[2] * degree)


def _fake_sum(grad_k: Tensor, grad_v: Tensor, group_name: str, balanced: bool) -> tuple[Tensor, Tensor]:
    degree = _Place(group_name, balanced).degree
    return _by_token(grad_k, grad_k.shape[2] // degree), _by_token(grad_v, grad_v.shape[2] // degree)


def _by_token(x: Tensor, tokens: int) -> Tensor:
    """Memory like x [B, G, any, D] for so many tokens, stored as [B, tokens, G, D]."""
    rows, heads, _, width = x.shape
    return x.new_empty((rows, tokens, heads, width)).transpose(1, 2)


attention_op = register_operator(
    f"context_attention(Tensor q, Tensor k, Tensor v, {_OF_ATTENTION}) -> (Tensor, Tensor)",
    _attention,
    lambda q, k, v, *_: _like_attention(q, v, q.dtype),
)
"""`context_attention(q [B, H, L, D], k [B, G, L, D], v [B, G, L, D'], ...)` -> output [B, H, L, D'], log-sum-exp fp32
[B, H, L]. The operator whose results selective checkpointing keeps."""

attention_backward_op = register_operator(
    "context_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OF_ATTENTION}) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake_backward,
)
"""The gradients of q, k and v."""

gather_op = register_operator(
    f"context_gather(Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)", _gather_op, _fake_gather
)
"""`context_gather(k [B, G, L, D], v [B, G, L, D'], ...)` -> those of S tokens."""

sum_op = register_operator(
    f"context_sum(Tensor grad_k, Tensor grad_v, {_SETTINGS}) -> (Tensor, Tensor)", _sum_op, _fake_sum
)
"""`context_sum(grad_k [B, G, S, D], grad_v [B, G, S, D'], ...)` -> those of L tokens, summed over ranks."""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        out, lse = attention_op(q, k, v, *settings)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        gradients = attention_backward_op(grads[0], q, k, v, out, lse, *ctx.settings)
        return *gradients, *(None for _ in ctx.settings)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        ctx.settings = settings
        return gather_op(k, v, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *sum_op(*grads, *ctx.settings), None, None


def spread_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_name: str,
    balanced: bool,
    ring: bool,
    backend: Backend,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention in which a rank's queries meet the keys and values of all ranks. Every rank of the group calls
    it, and its backward pass, in the same order.

    Args:
        q: `[B, H, L, D]`, the rank's part of each sequence, of the positions that `held_chunks` says.
        k, v: `[B, G, L, D]` and `[B, G, L, D']`, of the same dtype.
        group_name: of the process group of the ranks with the other parts.
        balanced: whether chunks are dealt out from head and tail.
        ring: pass keys and values around instead of gathering them.
        backend: a resolved backend, not "flex".
        scale: factor on the products of queries and keys; None: `1 / sqrt(D)`.
        window: a token sees those from the last multiple of so many positions on; None: all before it.

    Returns:
        `[B, H, L, D']` in the dtype of q.
    """
    return _Attention.apply(q, k, v, group_name, balanced, ring, backend, scale, window)


def gather_keys_values(k: Tensor, v: Tensor, *, group_name: str, balanced: bool) -> tuple[Tensor, Tensor]:
    """All keys `[B, G, S, D]` and values `[B, G, S, D']` in natural order from each rank's of L tokens, in one
    collective. Their gradients are summed over the ranks, in their dtype, by a reduce-scatter."""
    return _Gather.apply(k, v, group_name, balanced)
