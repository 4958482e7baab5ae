"""A local batch in parts that take turns in layers with experts: while the tokens of one part travel, another one's are
computed with.

    attention of a   tokens of a go -> attention of b   tokens of b go -> experts of a   results of a go ->
        experts of b   results of b go -> shared experts of both   results of a and b are there

Every exchange has something beside it that does not need it, and so has every exchange of gradients: autograd runs all
this backwards in the reverse order. Only where there are no shared experts the last results have nothing beside them,
nor have their gradients, which come first. Known as two-batch overlap.

The parts are sequences of the batch. Matrix products are smaller, and weights of experts are gathered once for all. The
gradients that a weight gets from the parts are added in the dtype in which it is gathered, and in float8 what has one
scale for all rows, such as a column of an operand, has one for a part's.

B sequences of a local batch, S tokens of each, D features of the stream.
"""

import functools

import torch
from torch import Tensor

from titan_fp8.models.attention_backends import Mask
from titan_fp8.models.decoder import Decoder, TransformerBlock
from titan_fp8.models.moe import MoE, Sent
from titan_fp8.models.rope import RopeTables


def overlap_batches(model: Decoder, parts: int) -> None:
    """Have the layers of `model` with experts take a batch in `parts`, in place; a batch that these do not divide, as
    one of validation may be, they take whole.

    Args:
        model: with its parallelism, before activation checkpointing and compilation.
        parts: 1 changes nothing.
    """
    if parts == 1:
        return
    for block in model.layers.values():
        if isinstance(block, TransformerBlock) and block.moe is not None:
            block.forward = functools.partial(_forward_in_parts, block, block.moe, parts)


def _forward_in_parts(
    block: TransformerBlock, moe: MoE, parts: int, x: Tensor, rope: RopeTables, mask: Mask = None
) -> Tensor:
    """`TransformerBlock.forward` of x `[B, S, D]`."""
    if x.shape[0] % parts:
        return TransformerBlock.forward(block, x, rope, mask)
    streams, sent = [], []
    for part in x.chunk(parts):
        stream, normed = block.attend_and_norm(part, rope, mask)
        streams.append(stream)
        sent.append(moe.send(normed))
    returned = [_Returned(moe, each) for each in sent]
    under_way = moe.experts.in_turn([each.rows.tensor for each in sent], [each.compute for each in returned])
    shared = [moe.share(each) for each in sent]
    results = [each.wait(rows) for each, rows in zip(returned, under_way, strict=True)]
    joined = map(moe.join, sent, results, shared)
    return torch.cat([stream + each for stream, each in zip(streams, joined, strict=True)])


class _Returned:
    """What experts make of one part."""

    def __init__(self, moe: MoE, sent: Sent):
        self._moe, self._sent = moe, sent

    def compute(self, rows: Tensor) -> Tensor:
        """Wait for the tokens, let the experts have them, and send back what they give: a tensor that travels."""
        groups = self._sent.rows.arrive(rows)
        # Not the module: FSDP has gathered its weights for all parts.
        y = self._moe.experts.forward(groups.rows, groups.ends)
        under_way = self._moe.dispatcher.combine(y, groups)
        self.wait = under_way.arrive
        return under_way.tensor
