"""A pass of the compiler for the fused producers: of their codes by columns, only what is read is made.

See `graph_pass.py` for why a compiled forward graph makes columns that nobody reads. A producer is told what to make by
arguments, so here nothing is replaced; the argument is changed.
"""

import functools
from operator import getitem

import torch
from torch._ops import OpOverload

from titan_fp8.kernels.producers import TENSOR
from titan_fp8.quantization import producer_ops

_PRODUCERS = frozenset({producer_ops.rms_norm_cast, producer_ops.add_rms_norm_cast, producer_ops.swiglu_cast})


def drop_unused_columns(graph: torch.fx.Graph) -> None:
    """Let each producer in `graph` whose columns nobody reads not make them."""
    for node in graph.nodes:
        if node.target not in _PRODUCERS or "val" not in node.meta:
            continue
        granularity, columns = (_place(node.target, name) for name in ("granularity", "columns"))
        if node.args[columns] is not True:
            continue
        values = node.meta["val"]
        # Columns come last, with a scale of their own unless there is one for the tensor.
        kept = len(values) - (1 if node.args[granularity] == TENSOR else 2)
        users = list(node.users)
        if any(user.target is not getitem or (user.args[1] >= kept and user.users) for user in users):
            continue
        for user in users:
            if user.args[1] >= kept:
                graph.erase_node(user)
        node.args = (*node.args[:columns], False, *node.args[columns + 1 :])
        node.meta["val"] = values[:kept]


@functools.cache
def _place(op: OpOverload, name: str) -> int:
    """Where an operator takes the argument `name`."""
    return [argument.name for argument in op._schema.arguments].index(name)
