"""Matrix products that overlap with the exchange before or after them, as custom operators.

What tensor parallelism gathers is at once multiplied, and what it sums and scatters has just been multiplied. Both
divide by rows, one part for each rank of the axis, so the exchange of one part can run while another is multiplied:

    gather_products    own rows are multiplied while the next rank's are fetched, and so on
    products_scatter   the rows of other ranks are multiplied first and fetched by them while the next are multiplied

On GPUs ranks read each other's memory (PyTorch's symmetric memory), which takes no multiprocessors from the products:
the ranks must be on one host, or in one NVLink domain. On CPUs the operators exchange first, or last, and overlap
nothing; the values are the same.

Only the compiler calls these operators (`overlap_pass.py`). T tokens, t ranks, K in features, N out features. Source:
arXiv 2205.05198 (the exchanges), arXiv 2105.05720 (overlapping them with the products).
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from titan_fp8.quantization import gemm
from titan_fp8.runtime.collectives import Axis
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.operators import register_operator

_ops = torch.ops._c10d_functional
_symm: Any = symmetric_memory


def check_direct_access(axis: Axis) -> None:
    """Reserve the memory through which the GPUs of `axis` read each other's parts. All its ranks call it.

    Raises:
        UserError: they cannot.
    """
    # A program that uses NVLink multicast claims a resource of the whole host; copies between two GPUs need none.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    try:
        _symm.get_symm_mem_workspace(axis.group_name, min_size=1 << 20)
    except RuntimeError as error:
        raise UserError(
            "parallelism.enable_async_tensor_parallel: the GPUs of one tensor-parallel group "
            f"(ranks {', '.join(map(str, axis.ranks))}) cannot read each other's memory ({_first_line(error)}); keep "
            "the group within one host with NVLink, or leave the key out"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _multiply(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    out: Tensor,
    *,
    blockwise: bool,
    fast_accum: bool,
    emulate: bool,
) -> None:
    """Write the product of a `[M, K]` to out `[M, N]`; b is `[K, N]`, or `[N, K]` where there are scales."""
    if scale_a is None or scale_b is None:
        torch.mm(a, b, out=out)
    elif blockwise:
        scale_a = scale_a.new_empty(scale_a.shape[::-1]).copy_(scale_a.t()).t()  # strides (1, M), of one block too
        out.copy_(gemm.scaled_mm_blockwise(a, b, scale_a, scale_b, None, out.dtype, fast_accum, emulate))
    else:
        gemm.scaled_mm(a, b, scale_a, scale_b, None, out.dtype, fast_accum, emulate, out=out)


def _rows(rank: int, length: int) -> slice:
    return slice(rank * length, (rank + 1) * length)


def _gather_products(
    x: Tensor,
    scale: Tensor | None,
    b: Sequence[Tensor],
    scale_b: Sequence[Tensor],
    out_dtype: torch.dtype,
    fast_accum: bool,
    emulate: bool,
    group_name: str,
    size: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    length = x.shape[0]
    gathered, scales, products = _gathered_and_products(x, scale, b, scale_b, out_dtype, size)
    per_row = scale is not None and scale.dim() > 0

    def consume(parts: list[Tensor], rank: int) -> None:
        part_scale = parts[1] if per_row else scale
        for i, product in enumerate(products):
            scale_i = scale_b[i] if scale_b else None
            _multiply(
                parts[0].view(x.dtype),
                b[i],
                part_scale,
                scale_i,
                product[_rows(rank, length)],
                blockwise=False,
                fast_accum=fast_accum,
                emulate=emulate,
            )

    parts = [_bytes(x.contiguous())]
    whole = [_bytes(gathered)]
    if per_row:
        assert scale is not None
        parts.append(scale.contiguous())
        whole.append(scales)
    if x.is_cuda:
        _symm._pipelined_multi_all_gather_and_consume(parts, consume, whole, group_name)
    else:
        for part, all_parts in zip(parts, whole, strict=True):
            all_parts.copy_(_ops.wait_tensor(_ops.all_gather_into_tensor(part, size, group_name)))
        for rank in range(size):
            consume([all_parts[_rows(rank, length)] for all_parts in whole], rank)
    return gathered, scales, products


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _gathered_and_products(
    x: Tensor,
    scale: Tensor | None,
    b: Sequence[Tensor],
    scale_b: Sequence[Tensor],
    out_dtype: torch.dtype,
    size: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What `gather_products` returns, without contents."""
    tokens = x.shape[0] * size
    per_row = scale is not None and scale.dim() > 0
    scales = x.new_empty((tokens, 1) if per_row else (0,), dtype=torch.float32)
    scale = scale_b[0] if scale_b else None
    products = [x.new_empty((tokens, _features(w, scale)), dtype=out_dtype) for w in b]
    return x.new_empty((tokens, x.shape[1])), scales, products


gather_products = register_operator(
    "gather_products(Tensor x, Tensor? scale, Tensor[] b, Tensor[] scale_b, ScalarType out_dtype, bool fast_accum, "
    "bool emulate, str group_name, int size) -> (Tensor, Tensor, Tensor[])",
    _gather_products,
    lambda x, scale, b, scale_b, out_dtype, fast_accum, emulate, group_name, size: _gathered_and_products(
        x, scale, b, scale_b, out_dtype, size
    ),
)
"""`gather_products(x [T / t, K], scale, b, scale_b, ...)` -> all ranks' x [T, K], their scales [T, 1], and the product
of all rows with each of b: [T, N] in `out_dtype`. With scales, x holds float8 codes, `scale` is [] or [T / t, 1], b are
codes [N, K]; without (`scale` None, `scale_b` empty), b are [K, N]. Scales [0] where there are none a row."""


class _Way(NamedTuple):
    """How one of several products is computed: its scales, None in high precision, and flags of `gemm.py`."""

    scale_a: Tensor | None
    scale_b: Tensor | None
    blockwise: bool
    fast_accum: bool


def _products_scatter(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale_a: Sequence[Tensor | None],
    scale_b: Sequence[Tensor | None],
    blockwise: Sequence[bool],
    fast_accum: Sequence[bool],
    emulate: bool,
    out_dtype: torch.dtype,
    group_name: str,
    size: int,
) -> Tensor:
    tokens, features = a[0].shape[0], _features(b[0], scale_b[0])
    length = tokens // size
    ways = list(map(_Way, scale_a, scale_b, blockwise, fast_accum))

    def produce(rank: int, out: Tensor) -> None:
        rows = _rows(rank, length)
        for i, way in enumerate(ways):
            part = out if i == 0 else torch.empty_like(out)
            scale = way.scale_a[rows] if way.scale_a is not None and way.scale_a.dim() else way.scale_a
            flags = {"blockwise": way.blockwise, "fast_accum": way.fast_accum, "emulate": emulate}
            _multiply(a[i][rows], b[i], scale, way.scale_b, part, **flags)
            if i:
                out.add_(part)

    parts = a[0].new_empty((tokens, features), dtype=out_dtype)
    if a[0].is_cuda:
        _symm._pipelined_produce_and_all2all(produce, parts, group_name)
        return parts.view(size, length, features).sum(0)
    for rank in range(size):
        produce(rank, parts[_rows(rank, length)])
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(parts, "sum", size, group_name))


def _features(b: Tensor, scale_b: Tensor | None) -> int:
    """N of a right operand, which is `[N, K]` with a scale and `[K, N]` without."""
    return b.shape[1] if scale_b is None else b.shape[0]


def _scattered(a, b, scale_a, scale_b, blockwise, fast_accum, emulate, out_dtype, group_name, size) -> Tensor:
    return a[0].new_empty((a[0].shape[0] // size, _features(b[0], scale_b[0])), dtype=out_dtype)


products_scatter = register_operator(
    "products_scatter(Tensor[] a, Tensor[] b, Tensor?[] scale_a, Tensor?[] scale_b, bool[] blockwise, "
    "bool[] fast_accum, bool emulate, ScalarType out_dtype, str group_name, int size) -> Tensor",
    _products_scatter,
    _scattered,
)
"""`products_scatter(a, b, scale_a, scale_b, ...)` -> this rank's [T / t, N] of the sum over the ranks of a0 b0 + a1 b1
+ ... in `out_dtype`. Of a product with scales, a is codes [T, K] and b [N, K]; without, a [T, K] and b [K, N]."""
