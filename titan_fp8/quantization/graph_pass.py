"""A pass of the compiler: of a cast that writes two layouts, only what is read remains.

A linear casts its input once into both layouts: rows for the output, columns for the weight's gradient. Under
activation checkpointing the compiler moves the second use into the backward graph, together with a copy of the cast,
and leaves a cast in the forward graph whose columns nobody reads; an operator cannot be cut in two by a compiler that
does not look into it. This pass knows the operators, and replaces such a cast by the one that writes a single layout.
"""

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload

from titan_fp8.quantization import ops, producer_pass
from titan_fp8.quantization.producer_pass import drop_unused_columns

_ONE_LAYOUT: dict[OpOverload, tuple[tuple[OpOverload, dict[int, int]], ...]] = {
    ops.cast_tensor_both: ((ops.cast_tensor, {0: 0, 2: 1}), (ops.cast_tensor_columns, {1: 0, 2: 1})),
    ops.cast_rows_and_columns: ((ops.cast_rows, {0: 0, 1: 1}), (ops.cast_columns, {2: 0, 3: 1})),
    ops.cast_block_both: ((ops.cast_block_rows, {0: 0, 1: 1}), (ops.cast_block_columns, {2: 0, 3: 1})),
}
"""Operator -> those that write one layout, with the places in its result: {place in both: place in one}."""


class InOrder(CustomGraphPass):
    """Several passes as one, since Inductor takes one."""

    def __init__(self, *passes: CustomGraphPass):
        self.passes = passes

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Run them on `graph`, in order."""
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> Any:
        """Identifies the passes in the compiler's cache."""
        return [graph_pass.uuid() for graph_pass in self.passes]


class DropUnusedLayouts(CustomGraphPass):
    """The pass, for Inductor's `post_grad_custom_pre_pass`."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Rewrite `graph` in place."""
        for node in list(graph.nodes):
            for replacement, places in _ONE_LAYOUT.get(node.target, ()):
                if all(user.target is getitem for user in node.users) and _places_read(node) <= places.keys():
                    _replace(graph, node, replacement, places)
                    break
        drop_unused_columns(graph)

    def uuid(self) -> bytes:
        """Identifies the pass in the compiler's cache."""
        return get_hash_for_files((__file__, producer_pass.__file__))


def _places_read(node: torch.fx.Node) -> set[int]:
    return {int(user.args[1]) for user in node.users if user.users}  # pyright: ignore[reportArgumentType]


def _replace(graph: torch.fx.Graph, node: torch.fx.Node, op: Callable, places: dict[int, int]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(op, node.args, node.kwargs)
    new.meta = {key: value for key, value in node.meta.items() if key != "val"}
    values = node.meta.get("val")
    if values is not None:
        new.meta["val"] = tuple(values[old] for old in sorted(places, key=places.__getitem__))
    for user in list(node.users):
        place = int(user.args[1])  # pyright: ignore[reportArgumentType]
        if place in places:
            user.args = (new, places[place])
        else:
            graph.erase_node(user)
    graph.erase_node(node)
