"""Context parallelism: every sequence is cut along its tokens and spread over the ranks of the mesh axis `cp`.

Everything in a decoder but attention treats tokens one by one, so a rank computes its tokens as if there were no
others, with the rotary tables of their positions. Attention alone needs keys and values of other ranks; how they come
is `context_attention.py`. Losses and gradients of a rank are those of its tokens, and are summed over `cp` as they are
over data-parallel ranks.

Causal attention makes late tokens dearer than early ones: token p looks at p + 1 keys. Cut into as many parts as there
are ranks, the last rank would compute nearly twice the mean while others wait. `headtail` cuts into twice as many
chunks and pairs the cheapest with the dearest (section 3.3.2 of the Llama 3 paper, arXiv 2407.21783):

    4 ranks, 8 chunks    rank 0: 0 7    rank 1: 1 6    rank 2: 2 5    rank 3: 3 4

All ranks of a `cp` axis read the same whole batch, document numbers included, and each takes its part:

    context = ContextParallel.over(mesh.device_mesh["cp"], load_balancer="headtail", rotate_method="allgather")
    apply_context_parallel(model, context)  # before activation checkpointing and compilation
    logits = model(context.shard(tokens), document_ids, seq_len=S, positions=context.positions(S, device))
    loss = cross_entropy_sum(logits, context.shard(labels))

Layers whose tokens see a chunk of the sequence alone (`attention_chunk` of the model's dimensions) are said to have
windows here, where a chunk is what a rank holds.

Legend: B sequences, S tokens of a sequence, L = S / ranks those of a rank, H query heads, G key and value heads,
D head width of queries and keys, D' that of values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from titan_fp8.models.attention_backends import Backend, Mask, causal_attention, documents_in_chunks
from titan_fp8.models.decoder import Decoder
from titan_fp8.parallel.config import ParallelismSection
from titan_fp8.parallel.context_attention import gather_keys_values, spread_causal_attention
from titan_fp8.parallel.context_blocks import held_chunks
from titan_fp8.parallel.context_rules import check_load_balancer, check_rotate_method, check_sequence
from titan_fp8.parallel.mesh import CP, ParallelMesh
from titan_fp8.runtime.errors import UserError

LoadBalancer = Literal["headtail"] | None
RotateMethod = Literal["allgather", "alltoall"]


@dataclass(frozen=True)
class ContextParallel:
    """Sequences spread over the ranks of a process group, seen from this rank. Built by `over`.

    It names the process group instead of holding it, so that compiled code can refer to it as a constant.

    Attributes:
        rank: this rank's number in the group.
        degree: ranks of the group.
        group_name: the process group's name.
        load_balancer: "headtail", or None for one contiguous part a rank.
        rotate_method: "allgather" collects all keys and values at once, which is fast and takes memory for them while
            an attention runs; "alltoall" passes one rank's at a time around.
    """

    rank: int
    degree: int
    group_name: str
    load_balancer: LoadBalancer = "headtail"
    rotate_method: RotateMethod = "allgather"

    @classmethod
    def over(
        cls, ranks: dist.ProcessGroup | DeviceMesh, *, load_balancer: str | None, rotate_method: str
    ) -> "ContextParallel":
        """Sequences spread over `ranks`, a process group or one axis of a mesh.

        Raises:
            UserError: no such load balancer or rotate method.
        """
        group = ranks.get_group() if isinstance(ranks, DeviceMesh) else ranks
        _raise_if(check_load_balancer(load_balancer))
        _raise_if(check_rotate_method(rotate_method, "flash", document_masking=False))
        balancer: Any = load_balancer
        method: Any = rotate_method
        return cls(dist.get_rank(group), dist.get_world_size(group), group.group_name, balancer, method)

    def positions(self, seq_len: int, device: torch.device | None = None) -> Tensor:
        """The positions that this rank computes, ascending: int64 `[L]`.

        Args:
            seq_len: S.

        Raises:
            UserError: S cannot be cut into equal chunks.
        """
        _raise_if(check_sequence(seq_len, self.degree, self.load_balancer))
        held = held_chunks(self.rank, self.degree, self._is_balanced)
        size = seq_len // (self.degree * len(held))
        return torch.cat([torch.arange(chunk * size, (chunk + 1) * size, device=device) for chunk in held])

    def shard(self, batch: Tensor) -> Tensor:
        """This rank's columns of a batch `[B, S]` of tokens or labels: `[B, L]`.

        Raises:
            UserError: S cannot be cut into equal chunks.
        """
        return batch.index_select(1, self.positions(batch.shape[1], batch.device))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        *,
        backend: Backend,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """What `Attention.attend` computes, on whole sequences, for this rank's queries.

        Every rank of the group has to call it, and run its backward pass, in the same order.

        Args:
            q: `[B, H, L, D]`.
            k, v: `[B, G, L, D]` and `[B, G, L, D']`.
            mask: what `mask` returned, for this window if there is one.
            backend: a resolved attention backend.
            scale: factor on the products of queries and keys; None: `1 / sqrt(D)`.
            window: a token sees those from the last multiple of so many positions on; None: all before it.

        Returns:
            `[B, H, L, D']` in the dtype of q.
        """
        if mask is None:
            return spread_causal_attention(
                q,
                k,
                v,
                group_name=self.group_name,
                balanced=self._is_balanced,
                ring=self.rotate_method == "alltoall",
                backend=backend,
                scale=scale,
                window=window if window is not None and window < q.shape[2] * self.degree else None,
            )
        k, v = gather_keys_values(k, v, group_name=self.group_name, balanced=self._is_balanced)
        return causal_attention(q, k, v, backend=backend, mask=mask, scale=scale)

    def mask(
        self,
        seq_len: int,
        device: torch.device,
        document_ids: Tensor | None,
        window: int | None = None,
        *,
        backend: Backend,
    ) -> Mask:
        """What this rank's queries may see of all keys in natural order, in place of `Decoder.mask`.

        Args:
            seq_len: L.
            device: where the mask will be.
            document_ids: of whole sequences, `[B, S]` integers, equal within a document; None: one document a row.
            window: of the layers that the mask is for, if they have one.
            backend: a resolved attention backend.

        Returns:
            None for causal attention without documents, whose windows `attend` knows, a bool `[B, 1, L, S]` that is
            True where a query may look or, for flex attention, a block mask of that shape.

        Raises:
            UserError: the rotate method cannot do it.
            ValueError: `document_ids` are not those of whole sequences.
        """
        _raise_if(check_rotate_method(self.rotate_method, backend, document_ids is not None))
        whole = seq_len * self.degree
        if document_ids is not None and document_ids.shape[1] != whole:
            raise ValueError(
                f"document_ids has {document_ids.shape[1]} columns, but context parallelism needs those of whole "
                f"sequences: {whole}, for {seq_len} tokens on each of {self.degree} ranks"
            )
        if document_ids is None and backend != "flex":
            return None
        if window is not None:
            document_ids = documents_in_chunks(document_ids, whole, window, device)
        if backend == "flex":
            return _flex_mask(self.positions(whole, device), whole, document_ids)
        assert document_ids is not None
        positions = self.positions(whole, device)
        same = document_ids[:, None, positions, None] == document_ids[:, None, None, :]  # [B, 1, L, S]
        return same & (positions[:, None] >= torch.arange(whole, device=device))

    @property
    def _is_balanced(self) -> bool:
        return self.load_balancer == "headtail"


def context_parallel(mesh: ParallelMesh, parallelism: ParallelismSection) -> ContextParallel | None:
    """How sequences are spread over the `cp` axis of `mesh`; None where its length is 1."""
    if mesh.degrees.context == 1:
        return None
    return ContextParallel.over(
        mesh.device_mesh[CP],
        load_balancer=parallelism.context_parallel_load_balancer,
        rotate_method=parallelism.context_parallel_rotate_method,
    )


def apply_context_parallel(model: Decoder, context: ContextParallel) -> None:
    """Replace attention and mask of `model`, in place, by those of sequences spread over ranks. Before activation
    checkpointing and compilation, which then take them in.

    Raises:
        UserError: the rotate method cannot do what the model needs.
    """
    _raise_if(check_rotate_method(context.rotate_method, model.attention_backend, model.document_masking))
    for block in model.layers.values():
        attention: Any = block.attention
        settings = {"backend": attention.backend, "scale": attention.scale, "window": attention.chunk}
        attention.attend = partial(context.attend, **settings)
    decoder: Any = model
    decoder.mask = partial(context.mask, backend=model.attention_backend)


def _flex_mask(positions: Tensor, seq_len: int, document_ids: Tensor | None) -> BlockMask:
    """Block mask of L x S; compiled, so that the dense mask is never in memory."""
    rows = None if document_ids is None else document_ids.shape[0]

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return positions[query] >= key

    def causal_in_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert document_ids is not None
        position = positions[query]
        return (position >= key) & (document_ids[b, position] == document_ids[b, key])

    rule = causal if document_ids is None else causal_in_document
    return _block_mask_maker()(rule, rows, None, len(positions), seq_len, device=str(positions.device))


@cache
def _block_mask_maker() -> Callable[..., Any]:
    return torch.compile(create_block_mask, dynamic=False)


def _raise_if(problem: str | None) -> None:
    if problem is not None:
        raise UserError(problem)
