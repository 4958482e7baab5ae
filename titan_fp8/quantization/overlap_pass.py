"""A pass of the compiler: the exchanges of tensor parallelism overlap with the products beside them.

In a block's graphs, forward and backward, it looks for what one axis of the mesh gathers and multiplies, and for what
is multiplied and then summed and scattered over it:

    codes -> all-gather -> scaled_mm of wq, wk, wv           becomes  gather_products(codes, [wq, wk, wv])
    scaled_mm -> reduce-scatter                              becomes  products_scatter([a], [b])
    scaled_mm + scaled_mm + ... -> reduce-scatter            becomes  products_scatter([a0, a1, ...], [b0, b1, ...])

Products in high precision are found likewise, and those of a sum may be of several kinds. What is cast after its gather
(`blockwise`, `rowwise_with_gw_hp`, or where a reader is left in high precision) has no product beside it, and stays.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

from titan_fp8.quantization import ops, overlap_ops
from titan_fp8.quantization.overlap_ops import gather_products, products_scatter
from titan_fp8.runtime.collectives import Axis

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_PLAIN, _SCALED, _BLOCKWISE = _aten.mm.default, ops.scaled_mm, ops.scaled_mm_blockwise
log = logging.getLogger(__name__)


class OverlapExchanges(CustomGraphPass):
    """The pass, for Inductor's `post_grad_custom_pre_pass`; `axis` is that of tensor parallelism."""

    def __init__(self, axis: Axis):
        self.axis = axis

    def __call__(self, graph: Graph) -> None:
        """Rewrite `graph` in place."""
        gathers = list(_gathers(graph, self.axis))
        scatters = [node for node in graph.nodes if _is_scatter(node, self.axis)]
        overlapped = sum(_overlap_gather(graph, gather, self.axis) for gather in gathers)
        overlapped += sum(_overlap_scatter(graph, scatter, self.axis) for scatter in scatters)
        if not (gathers or scatters):
            return
        stable_topological_sort(graph)
        graph.lint()
        log.info(
            "async tensor parallelism: %d of the %d exchanges of a compiled graph overlap with products",
            overlapped,
            len(gathers) + len(scatters),
        )

    def uuid(self) -> Any:
        """Identifies the pass in the compiler's cache."""
        return get_hash_for_files((__file__, overlap_ops.__file__)), self.axis


@dataclass(frozen=True)
class _Gather:
    """What is gathered: `local` [T / t, ...] on each rank, `whole` [T, ...]; the nodes between them, users first."""

    local: Node
    whole: Node
    between: tuple[Node, ...]


def _gathers(graph: Graph, axis: Axis) -> Iterator[_Gather]:
    """All gathers over `axis` of matrices, without those of scales."""
    for node in graph.nodes:
        gather = _as_gather(node, axis)
        if gather is not None and _shape(gather.whole)[-1] != 1:
            yield gather


def _as_gather(wait: Any, axis: Axis) -> _Gather | None:
    """The gather that `wait` waits for; float8 travels as bytes, so there the result is seen as codes again."""
    if not isinstance(wait, Node) or wait.target is not _c10d.wait_tensor.default:
        return None
    gather = _node(wait.args[0])
    if gather.target is not _c10d.all_gather_into_tensor.default or gather.args[2] != axis.group_name:
        return None
    if len(gather.users) > 1:  # somebody else waits for it too
        return None
    local = _node(gather.args[0])
    if local.target is _aten.view.dtype and len(wait.users) == 1:
        (codes,) = wait.users
        if codes.target is _aten.view.dtype and codes.args[1] == _value(_node(local.args[0])).dtype:
            return _Gather(_node(local.args[0]), codes, (wait, gather, local))
    return _Gather(local, wait, (gather,))


def _overlap_gather(graph: Graph, gather: _Gather, axis: Axis) -> bool:
    """Multiply with a gathered tensor while it is being gathered, if products read it."""
    products = [node for node in _readers(gather.whole) if _multiplies(node, gather.whole, axis)]
    # One operator multiplies in one way.
    products = [node for node in products if _way(node) == _way(products[0])]
    if not products:
        return False
    scales: _Gather | None = None
    scale: Node | None = None
    weights = [_node(node.args[1]) for node in products]
    scales_b: list[Node] = []
    if products[0].target is _SCALED:
        scale = _node(products[0].args[2])
        scales = _as_gather(scale, axis)
        scales_b = [_node(node.args[3]) for node in products]
    out_dtype, fast_accum, emulate = _way(products[0])[-3:]
    with graph.inserting_before(products[0]):
        local_scale = scales.local if scales is not None else scale
        fused = graph.call_function(
            gather_products,
            (gather.local, local_scale, weights, scales_b, out_dtype, fast_accum, emulate, *_place(axis)),
        )
        results = [graph.call_function(getitem, (fused, i)) for i in range(3)]
        outputs = [graph.call_function(getitem, (results[2], i)) for i in range(len(products))]
    whole = _value(gather.whole)
    all_scales = whole.new_empty((0,), dtype=torch.float32) if scales is None else _value(scales.whole)
    _give_values(fused, results, (whole, all_scales, [_value(node) for node in products]))
    for output, product in zip(outputs, products, strict=True):
        output.meta["val"] = _value(product)
        _replace(product, output)
    for part, result in ((gather, results[0]), (scales, results[1])):
        if part is not None:
            _replace(part.whole, result)
            _erase(graph, part.between)
    return True


def _multiplies(node: Node, gathered: Node, axis: Axis) -> bool:
    """Whether node is a product of the rows of `gathered` with something that does not come from it."""
    if node.target is _PLAIN:
        operands = node.args[1:2]
    elif node.target is _SCALED and node.args[4] is None:
        scale = _node(node.args[2])
        if _value(scale).dim() and _as_gather(scale, axis) is None:
            return False
        operands = node.args[1:4]
    else:
        return False
    is_left = _behind_views(_node(node.args[0])) is gathered
    own_scale = node.args[2] if node.target is _SCALED else None
    return is_left and not any(_comes_from(_node(x), gathered) for x in operands if x is not own_scale)


def _readers(node: Node) -> Iterator[Node]:
    """The users of a matrix, those of its views as `[1, T, K]` included."""
    for user in node.users:
        if user.target in _VIEWS and _shape(user)[-1] == _shape(node)[-1]:
            yield from _readers(user)
        else:
            yield user


def _way(product: Node) -> tuple[Any, ...]:
    """How a product multiplies: its operator, its left scale, type of the result, fast accumulation, emulation."""
    if product.target is _PLAIN:
        return product.target, None, _value(product).dtype, False, False
    return product.target, product.args[2], *product.args[5:8]


def _is_scatter(node: Node, axis: Axis) -> bool:
    return (
        node.target is _c10d.wait_tensor.default
        and _node(node.args[0]).target is _c10d.reduce_scatter_tensor.default
        and _node(node.args[0]).args[3] == axis.group_name
    )


def _overlap_scatter(graph: Graph, wait: Node, axis: Axis) -> bool:
    """Multiply while what has been multiplied is being summed and scattered, if it is a sum of products."""
    scatter = _node(wait.args[0])
    between = [scatter]
    products = _summands(_node(scatter.args[0]), between)
    if not products:
        return False
    if len({_value(node).dtype for node in products}) > 1:
        return False
    left, right = ([node.args[i] for node in products] for i in (0, 1))
    scales_a, scales_b = ([None if node.target is _PLAIN else node.args[i] for node in products] for i in (2, 3))
    blockwise = [node.target is _BLOCKWISE for node in products]
    fast_accum = [node.target is not _PLAIN and node.args[6] for node in products]
    emulate = any(node.target is not _PLAIN and node.args[7] for node in products)
    options = (blockwise, fast_accum, emulate, _value(products[0]).dtype, *_place(axis))
    with graph.inserting_before(wait):
        fused = graph.call_function(products_scatter, (left, right, scales_a, scales_b, *options))
    fused.meta["val"] = _value(wait)
    _replace(wait, fused)
    scatter.replace_all_uses_with(fused)  # the backward pass may keep it
    _erase(graph, between)
    return True


def _summands(node: Node, between: list[Node]) -> list[Node]:
    """The products that a node adds up, in the order of the addition; none if anything else is added, or if somebody
    else reads them. What lies between is added to `between`, users first."""
    if len(node.users) != 1:
        return []
    between.append(node)
    if node.target in _VIEWS and _shape(node)[-1] == _shape(_node(node.args[0]))[-1]:
        return _summands(_node(node.args[0]), between)
    if node.target is _aten.add.Tensor and not node.kwargs and isinstance(node.args[1], Node):
        first, second = _summands(_node(node.args[0]), between), _summands(_node(node.args[1]), between)
        # Sums are rounded one after the other, so only what is added to a single product keeps its order.
        if first and len(second) == 1:
            return [*first, *second]
        return [*second, *first] if second and len(first) == 1 else []
    is_product = node.target is _PLAIN or (node.target in (_SCALED, _BLOCKWISE) and node.args[4] is None)
    return [node] if is_product else []


def _behind_views(node: Node) -> Node:
    while node.target in _VIEWS and _shape(node)[-1] == _shape(_node(node.args[0]))[-1]:
        node = _node(node.args[0])
    return node


def _comes_from(node: Node, ancestor: Node) -> bool:
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current is ancestor:
            return True
        if current not in seen:
            seen.add(current)
            waiting.extend(current.all_input_nodes)
    return False


def _place(axis: Axis) -> tuple[str, int]:
    return axis.group_name, axis.size


def _give_values(fused: Node, results: list[Node], values: tuple[Any, ...]) -> None:
    fused.meta["val"] = values
    for result, value in zip(results, values, strict=True):
        result.meta["val"] = value


def _replace(old: Node, new: Node) -> None:
    """Let `new` be read in place of `old`, which goes."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _erase(graph: Graph, nodes: Iterable[Node]) -> None:
    """Erase what nobody reads any more, users first."""
    for node in nodes:
        if not node.users:
            graph.erase_node(node)


def _node(argument: Any) -> Node:
    assert isinstance(argument, Node), f"{argument} is no tensor"
    return argument


def _value(node: Node) -> torch.Tensor:
    return node.meta["val"]


def _shape(node: Node) -> torch.Size:
    return _value(node).shape
