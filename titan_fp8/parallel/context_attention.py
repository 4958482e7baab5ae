"""Causal attention over sequences that are spread over ranks: the operators behind `parallel/context.py`.

Softmax attention can be computed in blocks of keys. A block gives an output `o` and the logarithm `l` of its softmax's
denominator, and two blocks make one:

    l = log(exp(l1) + exp(l2))        o = o1 exp(l1 - l) + o2 exp(l2 - l)

Backwards no merging is needed: with the final `o` and `l`, the probabilities `exp(q k - l)` of any block are those of
the whole, so the gradients of blocks just add up. Any fused kernel that returns `l` will do, and which queries meet
which keys is the only thing that ways of communicating differ in:

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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch._ops import OpOverload

from titan_fp8.models.attention_backends import Backend

_aten = torch.ops.aten
# The functional collectives have one name in all versions of PyTorch; their counterparts in `torch.distributed` do not.
_c10d = torch.ops._c10d_functional
_LIBRARY = torch.library.Library("titan_fp8", "FRAGMENT")
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


# ---- kernels of one block: (q, k, v, causal) -> output, log-sum-exp [B, H, queries];
#      (grad_output, q, k, v, output, log-sum-exp, causal) -> grad_q, grad_k, grad_v

Forward = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]


def _kernels(backend: str, device: torch.device) -> tuple[Forward, Backward, bool]:
    """Forward and backward kernel of a resolved backend, and whether their causal blocks may be rectangular."""
    if backend == "flash":
        on_gpu = device.type == "cuda"
        return (_flash, _flash_backward, True) if on_gpu else (_cpu_flash, _cpu_flash_backward, False)
    if backend == "cudnn":
        return _cudnn, _cudnn_backward, False
    if backend == "efficient":
        return _efficient, _efficient_backward, False
    assert backend == "math", f"{backend} attention has no kernel for blocks"
    return _math, _math_backward, True


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool):
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal)


def _cpu_flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool):
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool):
    return _aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal)[:2]


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool):
    lengths = (None, None, q.shape[2], k.shape[2])
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
    return _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, causal, seed, seed
    )


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool):
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, is_causal=causal)
    return out, lse.reshape(out.shape[:3])


def _cudnn_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool):
    lengths = (None, None, q.shape[2], k.shape[2])
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
    return _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.unsqueeze(-1), seed, seed, None, *lengths, 0.0, causal
    )


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool):
    k, v = _repeat(k, q), _repeat(v, q)
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, is_causal=causal)
    return out, lse[..., : q.shape[2]]  # the kernel rounds the length up


def _efficient_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool):
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
    wanted = [True, True, True, False]
    grad_q, grad_k, grad_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, _repeat(k, q), _repeat(v, q), None, out, lse, seed, seed, 0.0, wanted, causal
    )
    return grad_q, _sum_repeats(grad_k, k), _sum_repeats(grad_v, v)


def _math(q: Tensor, k: Tensor, v: Tensor, causal: bool):
    scores = _scores(q, k, causal)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ _repeat(v, q).float()).to(q.dtype), lse


def _math_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool):
    probabilities = (_scores(q, k, causal) - lse.unsqueeze(-1)).exp()
    grad = grad.float()
    grad_probabilities = grad @ _repeat(v, q).float().mT
    grad_scores = probabilities * (grad_probabilities - (grad * out.float()).sum(-1, keepdim=True))
    grad_scores *= q.shape[-1] ** -0.5
    grad_q = grad_scores @ _repeat(k, q).float()
    return grad_q, _sum_repeats(grad_scores.mT @ q.float(), k), _sum_repeats(probabilities.mT @ grad, v)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = q.float() @ _repeat(k, q).float().mT * q.shape[-1] ** -0.5
    if not causal:
        return scores
    queries, keys = scores.shape[-2:]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return scores.masked_fill(~visible, float("-inf"))


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """[B, G, T, D] to the heads of q."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _sum_repeats(grad: Tensor, x: Tensor) -> Tensor:
    """[B, H, T, D] to the heads of x."""
    return grad.unflatten(1, (x.shape[1], -1)).sum(2)


# ---- communication; keys and values travel as one tensor [2, B, tokens, G, D]


class _Place:
    """This rank among those of its sequences."""

    def __init__(self, group_name: Any, balanced: bool):  # the name: a str, for which PyTorch has a type of its own
        self.group_name = group_name
        self.group: dist.ProcessGroup = _resolve_process_group(group_name)
        self.rank, self.degree = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.balanced = balanced

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
    parts = _c10d.wait_tensor(_c10d.all_gather_into_tensor(local, place.degree, place.group_name))
    parts = parts.unflatten(0, (place.degree, 2))
    chunks = [chunk for part in parts.unbind() for chunk in part.chunk(place.slots, dim=2)]
    by_number = dict(zip(place.order, chunks, strict=True))
    return torch.cat([by_number[number] for number in range(len(chunks))], dim=2)


def _sum_to_owners(grad: Tensor, place: _Place) -> Tensor:
    """The transpose of `_gather`: [2, B, S, G, D] of every rank to the sums of this rank's [2, B, L, G, D]."""
    chunks = grad.chunk(place.degree * place.slots, dim=2)
    held = [held_chunks(rank, place.degree, place.balanced) for rank in range(place.degree)]
    parts = torch.cat([torch.cat([chunks[number] for number in numbers], dim=2) for numbers in held])
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(parts, "sum", place.degree, place.group_name))


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
    forward, _, rectangular = _kernels(backend, q.device)
    out, lse = _like_attention(q, torch.float32)
    out.zero_()
    lse.fill_(float("-inf"))
    for blocks, kv in _pieces(_pack(k, v), place, ring and place.degree > 1, rectangular):
        keys, values = kv.transpose(2, 3)
        for block in blocks:
            partial = forward(q[:, :, block.queries], keys[:, :, block.keys], values[:, :, block.keys], block.causal)
            _merge(out[:, :, block.queries], lse[:, :, block.queries], *partial)
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
    _, backward, rectangular = _kernels(backend, q.device)
    grad_q = _like_attention(q, torch.float32)[0].zero_()
    arriving: _Transfer | None = None  # gradients of the keys and values at hand, from the ranks they passed before
    local = grad_kv = _pack(k, v)
    for blocks, kv in _pieces(local, place, ring, rectangular):
        keys, values = kv.transpose(2, 3)
        grad_kv = torch.zeros_like(kv, dtype=torch.float32)
        grad_keys, grad_values = grad_kv.transpose(2, 3)
        for block in blocks:
            queries, seen = (slice(None), slice(None), block.queries), (slice(None), slice(None), block.keys)
            dq, dk, dv = backward(
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


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    # Without this each call would pass through autograd's "not implemented" kernel first.
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"titan_fp8::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.titan_fp8, name).default


attention_op = _register(
    f"context_attention(Tensor q, Tensor k, Tensor v, {_SETTINGS}, bool ring, str backend) -> (Tensor, Tensor)",
    _attention,
    lambda q, *_: _like_attention(q, q.dtype),
)
"""`context_attention(q [B, H, L, D], k, v [B, G, L, D], ...)` -> output [B, H, L, D], log-sum-exp fp32 [B, H, L]. The
operator whose results selective checkpointing keeps."""

attention_backward_op = _register(
    "context_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SETTINGS}, bool ring, str backend) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    _fake_backward,
)
"""The gradients of q, k and v."""

gather_op = _register(f"context_gather(Tensor k, Tensor v, {_SETTINGS}) -> Tensor", _gather_op, _fake_gather)
"""`context_gather(k, v [B, G, L, D], ...)` -> [2, B, S, G, D]."""

sum_op = _register(f"context_sum(Tensor grad, {_SETTINGS}) -> Tensor", _sum_op, _fake_sum)
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
