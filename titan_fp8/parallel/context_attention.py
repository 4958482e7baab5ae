"""Causal attention over sequences that are spread over ranks: the operators behind `parallel/context.py`.

Softmax attention can be computed in blocks of keys. A block gives an output `o` and the logarithm `l` of its softmax's
denominator, and two blocks make one:

    l = log(exp(l1) + exp(l2))        o = o1 exp(l1 - l) + o2 exp(l2 - l)

Backwards no merging is needed: with the final `o` and `l`, the probabilities `exp(q k - l)` of any block are those of
the whole, so the gradients of blocks just add up. Any fused kernel that returns `l` will do, and which queries meet
which keys is the only thing that ways of communicating differ in (the kernels are in `attention_blocks.py`):

    all-gather  every rank collects all keys and values, in natural order. Each of its chunks of queries meets all keys
                before it (a full block) and its own (a causal block). Llama 3, section 3.3.2 (arXiv 2407.21783).
    ring        keys and values of one rank at a time pass by, the next being on their way while the present ones are
                computed with. Blocks that lie after all queries are skipped. Ring Attention (arXiv 2310.01889).

Both keep only a rank's own part for the backward pass, and collect the keys and values a second time there: what
context parallelism is for is memory that does not grow with the sequence. Partial results and gradients are summed in
float32; between ranks the all-gather way sums gradients in the activations' dtype, the ring in float32.

The operators are opaque to the compiler, which therefore repeats neither communication nor its order.

Legend: B sequences, S tokens of a sequence, L = S / ranks those of a rank, H query heads, G key and value heads
(H is a multiple of G), D head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from titan_fp8.models.attention_backends import Backend
from titan_fp8.parallel.attention_blocks import block_kernels
from titan_fp8.runtime.collectives import Axis, all_gather, reduce_scatter
from titan_fp8.runtime.operators import register_operator

_SETTINGS = "str group_name, bool balanced"  # of every operator


@dataclass(frozen=True)
class Block:
    """A kernel call: which of a rank's queries meet which of the keys at hand. Causal: aligned at the last of both."""

    queries: slice
    keys: slice
    causal: bool


def held_chunks(rank: int, degree: int, balanced: bool) -> tuple[int, ...]:
    """The chunks of a sequence that `rank` of `degree` holds, ascending: `rank` of `degree` equal chunks or, balanced,
    the `rank`-th from the head and the `rank`-th from the tail of `2 * degree`."""
    return (rank, 2 * degree - 1 - rank) if balanced else (rank,)


def gathered_blocks(rank: int, degree: int, local_len: int, balanced: bool, rectangular: bool) -> list[Block]:
    """The blocks of a rank's queries with all keys in natural order.

    Args:
        local_len: L.
        rectangular: whether the kernel's causal blocks may have more keys than queries.
    """
    chunks = held_chunks(rank, degree, balanced)
    size = local_len // len(chunks)
    blocks = []
    for slot, chunk in enumerate(chunks):
        queries = slice(slot * size, (slot + 1) * size)
        start, end = chunk * size, (chunk + 1) * size
        if start and not rectangular:
            blocks.append(Block(queries, slice(0, start), causal=False))
        blocks.append(Block(queries, slice(0 if rectangular else start, end), causal=True))
    return blocks


def ring_blocks(rank: int, source: int, local_len: int, balanced: bool) -> list[Block]:
    """The blocks of `rank`'s queries with the L keys of `source`: one, or none where all keys come after all queries.

    Head and tail of `rank` enclose those of all higher ranks: its head sees nothing of them, its tail all. Of a lower
    rank both see the head and neither the tail.
    """
    whole, half = slice(0, local_len), local_len // 2
    if source == rank:
        return [Block(whole, whole, causal=True)]
    if source > rank:
        return [Block(slice(half, local_len), whole, causal=False)] if balanced else []
    return [Block(whole, slice(0, half) if balanced else whole, causal=False)]


# ---- communication; keys and values travel as one tensor [2, B, tokens, G, D]


class _Place:
    """This rank among those of its sequences."""

    def __init__(self, group_name: Any, balanced: bool):  # the name: a str, for which PyTorch has a type of its own
        self.group: dist.ProcessGroup = _resolve_process_group(group_name)
        self.axis = Axis.of(self.group)
        self.rank, self.degree, self.balanced = self.axis.rank, self.axis.size, balanced

    @property
    def order(self) -> list[int]:
        """All chunks, in the order of the ranks that hold them."""
        return [chunk for rank in range(self.degree) for chunk in held_chunks(rank, self.degree, self.balanced)]

    @property
    def slots(self) -> int:
        """Chunks of one rank."""
        return 2 if self.balanced else 1


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


def _pack(k: Tensor, v: Tensor) -> Tensor:
    return torch.stack((k.transpose(1, 2), v.transpose(1, 2)))


def _gather(local: Tensor, place: _Place) -> Tensor:
    """[2, B, L, G, D] of this rank to [2, B, S, G, D] in natural order."""
    parts = all_gather(local, place.axis).unflatten(0, (place.degree, 2))
    chunks = [chunk for part in parts.unbind() for chunk in part.chunk(place.slots, dim=2)]
    by_number = dict(zip(place.order, chunks, strict=True))
    return torch.cat([by_number[number] for number in range(len(chunks))], dim=2)


def _sum_to_owners(grad: Tensor, place: _Place) -> Tensor:
    """The transpose of `_gather`: [2, B, S, G, D] of every rank to the sums of this rank's [2, B, L, G, D]."""
    chunks = grad.chunk(place.degree * place.slots, dim=2)
    held = [held_chunks(rank, place.degree, place.balanced) for rank in range(place.degree)]
    parts = torch.cat([torch.cat([chunks[number] for number in numbers], dim=2) for numbers in held])
    return reduce_scatter(parts, place.axis)


def _pieces(local: Tensor, place: _Place, ring: bool, rectangular: bool) -> Iterator[tuple[list[Block], Tensor]]:
    """Keys and values as they become available, each with the blocks of this rank's queries."""
    length = local.shape[2]
    if not ring:
        yield gathered_blocks(place.rank, place.degree, length, place.balanced, rectangular), _gather(local, place)
        return
    for step in range(place.degree):
        transfer = _Transfer(local, place, tag=0) if step < place.degree - 1 else None
        yield ring_blocks(place.rank, (place.rank - step) % place.degree, length, place.balanced), local
        if transfer is not None:
            local = transfer.wait()


# ---- operators


def _attention(q: Tensor, k: Tensor, v: Tensor, group_name: str, balanced: bool, ring: bool, backend: str):
    place = _Place(group_name, balanced)
    kernels = block_kernels(backend, q.device)
    out, lse = _like_attention(q, torch.float32)
    out.zero_()
    lse.fill_(float("-inf"))
    for blocks, kv in _pieces(_pack(k, v), place, ring and place.degree > 1, kernels.rectangular):
        keys, values = kv.transpose(2, 3)
        for block in blocks:
            queries, seen = (slice(None), slice(None), block.queries), (slice(None), slice(None), block.keys)
            partial = kernels.forward(q[queries], keys[seen], values[seen], block.causal)
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
):
    place = _Place(group_name, balanced)
    ring = ring and place.degree > 1
    kernels = block_kernels(backend, q.device)
    grad_q = _like_attention(q, torch.float32)[0].zero_()
    arriving: _Transfer | None = None  # gradients of the keys and values at hand, from the ranks they passed before
    local = grad_kv = _pack(k, v)
    for blocks, kv in _pieces(local, place, ring, kernels.rectangular):
        keys, values = kv.transpose(2, 3)
        grad_kv = torch.zeros_like(kv, dtype=torch.float32)
        grad_keys, grad_values = grad_kv.transpose(2, 3)
        for block in blocks:
            queries, seen = (slice(None), slice(None), block.queries), (slice(None), slice(None), block.keys)
            dq, dk, dv = kernels.backward(
                grad[queries],
                q[queries],
                keys[seen],
                values[seen],
                out[queries],
                lse[queries].contiguous(),
                block.causal,
            )[:3]
            grad_q[queries] += dq
            grad_keys[seen] += dk
            grad_values[seen] += dv
        if ring:
            if arriving is not None:
                grad_kv += arriving.wait()
            arriving = _Transfer(grad_kv, place, tag=1)  # the last one brings them home
    grad_kv = _sum_to_owners(grad_kv.to(k.dtype), place) if arriving is None else arriving.wait().to(k.dtype)
    grad_k, grad_v = (part.clone() for part in grad_kv.unbind())
    return grad_q.to(q.dtype), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def _like_attention(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for an output, laid out as the projection after attention reads it, and a log-sum-exp."""
    rows, heads, length, width = q.shape
    out = q.new_empty((rows, length, heads, width), dtype=dtype).transpose(1, 2)
    return out, q.new_empty((rows, heads, length), dtype=torch.float32)


def _gather_op(k: Tensor, v: Tensor, group_name: str, balanced: bool) -> Tensor:
    return _gather(_pack(k, v), _Place(group_name, balanced))


def _sum_op(grad: Tensor, group_name: str, balanced: bool) -> Tensor:
    return _sum_to_owners(grad, _Place(group_name, balanced))


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_like_attention(x, x.dtype)[0] for x in (q, k, k))  # pyright: ignore[reportReturnType]


def _fake_gather(k: Tensor, v: Tensor, group_name: str, balanced: bool) -> Tensor:
    rows, heads, length, width = k.shape
    return k.new_empty((2, rows, length * _Place(group_name, balanced).degree, heads, width))


def _fake_sum(grad: Tensor, group_name: str, balanced: bool) -> Tensor:
    two, rows, length, heads, width = grad.shape
    return grad.new_empty((two, rows, length // _Place(group_name, balanced).degree, heads, width))


attention_op = register_operator(
    f"context_attention(Tensor q, Tensor k, Tensor v, {_SETTINGS}, bool ring, str backend) -> (Tensor, Tensor)",
    _attention,
    lambda q, *_: _like_attention(q, q.dtype),
)
"""`context_attention(q [B, H, L, D], k, v [B, G, L, D], ...)` -> output [B, H, L, D], log-sum-exp fp32 [B, H, L]. The
operator whose results selective checkpointing keeps."""

attention_backward_op = register_operator(
    "context_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SETTINGS}, bool ring, str backend) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake_backward,
)
"""The gradients of q, k and v."""

gather_op = register_operator(f"context_gather(Tensor k, Tensor v, {_SETTINGS}) -> Tensor", _gather_op, _fake_gather)
"""`context_gather(k, v [B, G, L, D], ...)` -> [2, B, S, G, D]."""

sum_op = register_operator(f"context_sum(Tensor grad, {_SETTINGS}) -> Tensor", _sum_op, _fake_sum)
"""`context_sum(grad [2, B, S, G, D], ...)` -> [2, B, L, G, D], summed over ranks."""


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
        return *gradients, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        ctx.settings = settings
        return gather_op(k, v, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = sum_op(grads[0], *ctx.settings)
        return grad[0].transpose(1, 2), grad[1].transpose(1, 2), None, None


def spread_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, group_name: str, balanced: bool, ring: bool, backend: Backend
) -> Tensor:
    """Causal attention in which a rank's queries meet the keys and values of all ranks. Every rank of the group calls
    it, and its backward pass, in the same order.

    Args:
        q: `[B, H, L, D]`, the rank's part of each sequence, of the positions that `held_chunks` says.
        k, v: `[B, G, L, D]`, of the same dtype.
        group_name: of the process group of the ranks with the other parts.
        balanced: whether chunks are dealt out from head and tail.
        ring: pass keys and values around instead of gathering them.
        backend: a resolved backend, not "flex".

    Returns:
        `[B, H, L, D]` in the dtype of q.
    """
    return _Attention.apply(q, k, v, group_name, balanced, ring, backend)


def gather_keys_values(k: Tensor, v: Tensor, *, group_name: str, balanced: bool) -> tuple[Tensor, Tensor]:
    """All keys and values `[B, G, S, D]` in natural order from each rank's `[B, G, L, D]`, in one collective. Their
    gradients are summed over the ranks, in their dtype, by a reduce-scatter."""
    kv = _Gather.apply(k, v, group_name, balanced)
    return kv[0].transpose(1, 2), kv[1].transpose(1, 2)
