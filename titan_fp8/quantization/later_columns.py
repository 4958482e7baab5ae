"""The codes of a norm's output by columns, made in backward in place of being kept from forward.

The gradient of a weight multiplies its input's codes by columns, 8 bits a value. Of an input that is a norm's output
they follow from what the norm keeps for its own backward, so a function that multiplies with them can keep nothing
further: it saves `LaterColumns.tensors`, and calls `made` when it has a gradient.

T tokens, K features.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from titan_fp8.kernels.producers import Cast
from titan_fp8.kernels.producers.reference import columns_alone
from titan_fp8.quantization import producer_ops
from titan_fp8.quantization.casts import Codes


class LaterColumns(NamedTuple):
    """What the columns of a norm's output are made of.

    Attributes:
        x: what was normed, `[T, K]`.
        weight: the norm's, `[K]`.
        rstd: fp32 `[T]`.
        amax: what their scales are computed from, int32 `[]` or `[K]`, or None.
        cast: how.
    """

    x: Tensor
    weight: Tensor
    rstd: Tensor
    amax: Tensor | None
    cast: Cast

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What to save for backward, four of them."""
        return self[:4]


def made(tensors: Sequence[Tensor | None], cast: Cast, after: Tensor) -> Codes:
    """The columns `[K, padded(T)]`, of the bits that the norm would have given.

    Args:
        tensors: `LaterColumns.tensors`.
        cast: of the same.
        after: a gradient, before which the compiler makes nothing of it.
    """
    x, weight, rstd, amax = tensors
    assert x is not None
    assert weight is not None
    assert rstd is not None
    results = iter(producer_ops.norm_columns(x, weight, rstd, amax, after, *cast))
    columns = producer_ops.forms(results, columns_alone(cast)).columns
    assert columns is not None
    return columns
