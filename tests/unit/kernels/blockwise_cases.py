"""Compares the block-scaled Triton kernels, and the transpose of codes, with their references bit for bit in Triton's
interpreter; run by test_blockwise_interpreter.py, as `interpreter_cases.py` is by its own.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.blockwise_cases OUT.json
"""

import torch
from torch import Tensor

from tests.unit.kernels import interpreter
from tests.unit.kernels.interpreter_cases import difference, poisoned_codes
from tests.unit.kernels.test_blockwise_reference import values
from titan_fp8.kernels.blockwise import kernel, reference
from titan_fp8.kernels.float8 import E4M3, E5M2, bits, transpose
from titan_fp8.kernels.float8 import reference as float8

Pairs = dict[str, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


def shrink_blocks() -> None:
    """Small blocks where a block is not given, and poisoned outputs."""
    kernel.ROWS_TILE = bits.Tile(32, 128, 4, 2)
    kernel.COLUMNS_TILE = kernel.BOTH_TILE = bits.Tile(128, 128, 4, 2)
    kernel.SCALE_BLOCK = 4
    transpose.TILE = bits.Tile(16, 32, 4, 2)
    bits.new_codes = poisoned_codes
    # New memory is filled with NaN.
    torch.use_deterministic_algorithms(True)


def differences(pairs: Pairs) -> str:
    """What differs in bits or strides."""
    texts = []
    for name, (results, expected) in pairs.items():
        text = difference(results, expected)
        if not text and [r.stride() for r in results] != [e.stride() for e in expected]:
            text = "strides"
        texts.append(f"{name}: {text}" if text else "")
    return "; ".join(filter(None, texts))


def compare_activation(x: Tensor, dtype: torch.dtype = E4M3, power_of_two: bool = False) -> str:
    """The 1x128 casts of x."""
    rows = reference.cast_block_rows(x, dtype, power_of_two)
    columns = reference.cast_block_columns(x, dtype, power_of_two)
    return differences(
        {
            "rows": (kernel.cast_block_rows(x, dtype, power_of_two), rows),
            "columns": (kernel.cast_block_columns(x, dtype, power_of_two), columns),
            "both": (kernel.cast_block_both(x, dtype, power_of_two), rows + columns),
        }
    )


def compare_weight(weight: Tensor, first: int, last: int, dtype: torch.dtype = E4M3, power_of_two: bool = False) -> str:
    """The 128x128 casts of a weight and of its rows `first` to `last`."""
    shard, rows = weight[first:last], weight.shape[0]
    amax = reference.block_amax(weight, 0, rows)
    scale = reference.block_scale(amax, dtype, power_of_two)
    codes = reference.cast_blocks_from_amax(shard, amax, dtype, power_of_two, first)
    return differences(
        {
            "whole": (
                kernel.cast_blocks(weight, dtype, power_of_two),
                reference.cast_blocks(weight, dtype, power_of_two),
            ),
            "amax": ((kernel.block_amax(shard, first, rows),), (reference.block_amax(shard, first, rows),)),
            "scale": ((kernel.block_scale(amax, dtype, power_of_two),), (scale,)),
            "shard": ((kernel.cast_blocks_from_amax(shard, amax, dtype, power_of_two, first),), (codes,)),
        }
    )


def compare_transposes(w: Tensor, dtype: torch.dtype) -> str:
    """Both ways from row codes of w to column codes."""
    codes, scale = float8.cast_rows(w, dtype)
    return differences(
        {
            "transpose": ((transpose.transpose_codes(codes),), (float8.transpose_codes(codes),)),
            "tensor columns": (
                transpose.tensor_columns_from_rows(codes, scale),
                float8.tensor_columns_from_rows(codes, scale),
            ),
            "of a transpose": ((transpose.transpose_codes(codes.t()),), (codes,)),
        }
    )


def case_activation() -> str:
    return compare_activation(values(200, 256)) + compare_activation(values(130, 384).bfloat16(), power_of_two=True)


def case_activation_of_few_tokens() -> str:
    return compare_activation(values(1, 128)) + compare_activation(values(128, 128).half())


def case_activation_in_e5m2() -> str:
    return compare_activation(values(100, 128), E5M2)


def case_activation_of_other_strides() -> str:
    base = values(256, 260)
    return "; ".join(
        filter(None, map(compare_activation, (base[:, :256].t(), base[::2, 2:258:2], base[:1, :128].expand(130, 128))))
    )


def case_activation_with_nan_and_inf() -> str:
    x = values(150, 256).bfloat16()
    x[3, 130], x[149, 7], x[20, 255] = -torch.nan, torch.inf, -torch.inf
    x.view(torch.int16)[140, 70] = 0x7F81
    return compare_activation(x)


def case_activation_of_zeros_and_extreme_magnitudes() -> str:
    x = values(150, 128)
    x[:, 3], x[0], x[1] = 0.0, 0.0, x[1] * 1e-30
    x[2] *= 1e37
    return compare_activation(x)


def case_weight() -> str:
    return compare_weight(values(384, 256), 77, 231) + compare_weight(values(256, 128).bfloat16(), 128, 256)


def case_weight_by_powers_of_two() -> str:
    return compare_weight(values(256, 128), 100, 120, power_of_two=True)


def case_weight_in_other_strides() -> str:
    return compare_weight(values(256, 384).t(), 5, 384, E5M2)


def case_weight_with_nan_inf_and_zeros() -> str:
    w = values(384, 256)
    w[:128, :128], w[200, 3], w[383, 255] = 0.0, torch.nan, -torch.inf
    w.view(torch.int32)[300, 9] = 0x7F800001  # a NaN of other bits
    return compare_weight(w, 130, 384)


def case_transposes() -> str:
    return compare_transposes(values(48, 80), E4M3) + compare_transposes(values(16, 48) * 1e3, E5M2)


def case_transposes_with_nan_and_zeros() -> str:
    w = values(32, 48)
    w[5] = 0.0
    text = compare_transposes(w, E4M3)
    w[7, 9] = torch.inf
    return text + compare_transposes(w, E4M3)


if __name__ == "__main__":
    interpreter.main(interpreter.cases_of(dict(globals())), shrink_blocks)
