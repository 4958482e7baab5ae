"""The products of `grouped_product.py` in MXFP8: blocks of 32 along what is summed over, in groups of whole blocks.

    product        left operand, blocks along       right operand, blocks along
    output         x        [M, K]   K              w       [E, N, K]   K
    grad_input     grad     [M, N]   N              w       [E, N, K]   N
    grad_weight    grad     [M, N]   M              x       [M, K]      M

Every operand is quantized from high precision; of a weight the second one in backward, as in `mx_grouped.py`.

M rows of the groups, K in features, N out features, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titan_fp8.kernels.moe.functions import Rows, permute
from titan_fp8.kernels.mx import BLOCK
from titan_fp8.quantization import mx_grouped_ops as ops
from titan_fp8.quantization.grouped_product import Cast, Operand
from titan_fp8.quantization.mx_grouped import MXGroupedConfig
from titan_fp8.quantization.mx_weight import Made, column_operand, row_operand


@dataclass(frozen=True)
class MXProducts:
    """Grouped products in MXFP8; see `grouped_product.GroupedFormat`."""

    config: MXGroupedConfig
    name: str = "MXFP8"
    alignment: int = BLOCK

    def cast(self, x: Tensor | Rows, ends: Tensor, *, rows: bool, columns: bool) -> Cast:
        """What is asked for, from one read; rows are brought together before that."""
        made = x if isinstance(x, Tensor) else permute(x.x, x.source, x.scores, x.position.shape[1])
        mode, emulate = self.config.mode, self.config.emulate
        if rows and columns:
            if not emulate:
                return ops.group_both(made, ends, mode)
            by_rows, by_columns = ops.values(made, ends, mode)
            return by_rows, None, by_columns, None
        if rows:
            return (
                *((ops.row_values(made, ends, mode), None) if emulate else ops.group_rows(made, ends, mode)),
                None,
                None,
            )
        if emulate:
            return None, None, ops.column_values(made, ends, mode), None
        return None, None, *ops.group_columns(made, ends, mode)

    def weight_rows(self, weight: Tensor) -> Operand:
        """By blocks along K; `[E, K, N]` if it is what codes stand for."""
        codes, scale = row_operand(weight.contiguous(), Made(), self.config.weight_cast)
        return (codes.transpose(1, 2), None) if scale is None else (codes, scale)

    def kept_weight(self, weight: Tensor, rows: Operand) -> Operand:
        """The weight: its blocks along N do not follow from those along K."""
        return weight, None

    def weight_columns(self, kept: Operand, after: Tensor) -> Operand:
        """By blocks along N."""
        return column_operand(kept[0].contiguous(), Made(), self.config.weight_cast, after)

    def by_rows(self, a: Operand, w: Operand, ends: Tensor, dtype: torch.dtype, *, forward: bool) -> Tensor:
        """On tensor cores that multiply blocks, or of what codes stand for."""
        if self.config.emulate:
            return ops.multiply_rows(a[0], w[0], ends, dtype)
        return ops.scaled_mm_rows(a[0], w[0], a[1], w[1], ends, dtype)

    def by_columns(self, a: Operand, b: Operand, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """Likewise."""
        if self.config.emulate:
            return ops.multiply_columns(a[0], b[0], ends, dtype)
        return ops.scaled_mm_columns(a[0], b[0], a[1], b[1], ends, dtype)
