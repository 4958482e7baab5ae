"""The token embedding under FSDP without gathering its table: rows of tokens travel in its place.

FSDP gathers a unit's parameters before it runs. For the table `[V, D]` that is the wrong thing to move twice over: a
rank needs no rows but those of its own tokens, and the embedding runs first and last, so there is nothing to overlap
the exchange with. Here each rank keeps its rows, as it would under FSDP, and looks them up for everybody:

    forward     codes of all ranks' tokens [W T]  ->  rows that are here, zeros for the others [W T, D]
                ->  summed and scattered: this rank's tokens [T, D]
    backward    gradients of all ranks' tokens [W T, D]  ->  added up in the rows that are here: the shard's gradient

One rank alone adds something other than zero to a token's row, so the sum is exact in any dtype, and rows travel in the
dtype of the activations. Gradients travel in that dtype, too, as they come out of the first block, and are added up in
fp32, those of all ranks in one sum: there are no sums of ranks to be reduced. A code outside the vocabulary is the
error that it is for `nn.Embedding`, on every rank.

The parameter is the DTensor that FSDP would have made of it, of the same name and in the same shards, so nobody who
looks at parameters, gradients or checkpoints can tell.

W ranks, T tokens of a rank, V rows of the table, D features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from titan_fp8.models.decoder import Decoder
from titan_fp8.parallel.mesh import ParallelMesh
from titan_fp8.quantization.tensor_parallel import local_tensor
from titan_fp8.runtime.collectives import Axis, all_gather, reduce_scatter

_FORWARD_TOKENS, _BACKWARD_ELEMENTS = 1 << 13, 1 << 27
"""Rows exist in the table's dtype for so many tokens at a time, gradients in fp32 for so many elements."""


def exchanges_rows(model: Decoder, mesh: ParallelMesh, *, batch_tokens: int | None, cpu_offload: bool) -> bool:
    """Whether the rows of the tokens are less to move than the table, and can be moved; every rank finds the same.

    Args:
        model: not yet sharded.
        batch_tokens: tokens that a rank embeds while FSDP would gather the table once; None: not known.
        cpu_offload: parameters are kept in host memory.
    """
    embedding, degrees, ranks = model.tok_embeddings, mesh.degrees, mesh.shards.size()
    if batch_tokens is None or type(embedding) is not nn.Embedding or is_tied(model):
        return False
    if cpu_offload or ranks == 1 or degrees.tensor > 1 or degrees.data_parallel_replicate > 1:
        return False
    table = embedding.weight
    row_itemsize = (model.compute_dtype or table.dtype).itemsize
    return ranks * batch_tokens * row_itemsize < table.shape[0] * table.dtype.itemsize


def is_tied(model: Decoder) -> bool:
    """Whether embedding and head, both here, share a parameter."""
    embedding, output = model.tok_embeddings, model.output
    return embedding is not None and output is not None and output.weight is embedding.weight


class ShardedEmbedding(nn.Embedding):
    """Some rows of the table on each rank: token codes `[B, S]` -> `[B, S, D]` in the compute dtype.

    All ranks of the axis call it together, forward and backward, with codes of one shape.
    """

    axis: Axis
    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        """Codes `[B, S]`, int64 -> `[B, S, D]`."""
        return _ExchangeRows.apply(local_tensor(self.weight), input, self.num_embeddings, self.compute_dtype, self.axis)


def shard_embedding(
    embedding: nn.Embedding, mesh: DeviceMesh, axis: Axis, compute_dtype: torch.dtype | None
) -> nn.Parameter:
    """Make a `ShardedEmbedding` of `embedding`, in place, and return its parameter.

    Args:
        embedding: on any device, the meta device included.
        mesh: of one axis, whose ranks the rows are divided over as FSDP divides them.
        axis: the same ranks in the same order.
        compute_dtype: dtype of the result; None: the table's.
    """
    whole = embedding.weight
    first, rows = _rows_of(whole.shape[0], axis)
    # A copy, which keeps no other rows alive.
    local = whole.detach().narrow(0, first, rows).clone()
    shard = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
    embedding.weight = nn.Parameter(shard, requires_grad=whole.requires_grad)
    embedding.__class__ = ShardedEmbedding  # whoever holds it finds it changed
    assert isinstance(embedding, ShardedEmbedding)
    embedding.axis, embedding.compute_dtype = axis, compute_dtype or whole.dtype
    return embedding.weight


def _rows_of(rows: int, axis: Axis) -> tuple[int, int]:
    """The first row of this rank and how many it has, as `torch.chunk` divides them: the last ranks may have none."""
    most = -(-rows // axis.size)
    first = min(axis.rank * most, rows)
    return first, min(most, rows - first)


class _ExchangeRows(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, codes: Tensor, vocab_size: int, compute_dtype: torch.dtype, axis: Axis
    ) -> Tensor:
        """table `[this rank's rows, D]`, codes `[B, S]` -> `[B, S, D]`."""
        codes = all_gather(codes, axis)  # [W B, S]
        index, elsewhere = _places(codes.flatten(), vocab_size, axis)
        ctx.save_for_backward(index, elsewhere)
        ctx.rows, ctx.dtype, ctx.axis = table.shape[0], table.dtype, axis
        nowhere = ((codes < 0) | (codes >= vocab_size)).flatten()
        wanted = index.masked_fill(nowhere, -1)  # an error where the row is looked up
        if not ctx.rows:
            table = table.new_zeros(1, table.shape[1])
        found = table.new_empty(len(index), table.shape[1], dtype=compute_dtype)
        for part, places in zip(found.split(_FORWARD_TOKENS), wanted.split(_FORWARD_TOKENS), strict=True):
            part.copy_(F.embedding(places, table))
        found.masked_fill_(elsewhere.unsqueeze(-1), 0.0)
        return reduce_scatter(found.view(*codes.shape, table.shape[1]), axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient of this rank's rows, for that of its tokens `[B, S, D]`."""
        index, elsewhere = ctx.saved_tensors
        grads = all_gather(grad, ctx.axis).flatten(0, -2)  # [W T, D]
        if not ctx.rows:
            return grads.new_zeros(0, grads.shape[1], dtype=ctx.dtype), None, None, None, None
        columns = max(1, _BACKWARD_ELEMENTS // max(1, len(grads)))
        sums = [_sum_by_row(part, index, elsewhere, ctx.rows).to(ctx.dtype) for part in grads.split(columns, dim=1)]
        return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1), None, None, None, None


def _places(codes: Tensor, vocab_size: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Of each code `[W T]`, the row of this rank's shard, and whether another rank has it.

    Then any row will do; not one for all, where gradients, zeros though they are, would be added up one by one.
    """
    first, rows = _rows_of(vocab_size, axis)
    index = codes - first
    elsewhere = (index < 0) | (index >= rows)
    return index.remainder(max(rows, 1)), elsewhere


def _sum_by_row(grads: Tensor, index: Tensor, elsewhere: Tensor, rows: int) -> Tensor:
    """The sum of `grads` `[W T, d]` by row of this shard, `[rows, d]`, fp32 at least."""
    mine = grads.to(torch.promote_types(grads.dtype, torch.float32), copy=True)
    mine.masked_fill_(elsewhere.unsqueeze(-1), 0.0)
    return torch.ops.aten.embedding_dense_backward(mine, index, rows, -1, False)
