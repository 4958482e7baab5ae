"""Compares the Triton kernels with the reference bit for bit in Triton's interpreter; run by
test_float8_interpreter.py.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.interpreter_cases OUT.json

Triton decides at import whether it interprets, so this is a process of its own. It writes {case: "" or what differs}.
Blocks are made tiny so that tiny inputs need several programs, partial blocks and several steps of each loop.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.unit.kernels import interpreter
from tests.unit.kernels.test_float8_reference import UNIT_AMAX, awkward_values
from titan_fp8.kernels.float8 import E4M3, E5M2, bits, kernel, reference


def poisoned_codes(*shape: int, device: torch.device, dtype: torch.dtype = torch.uint8) -> Tensor:
    """In place of `bits.new_codes`: an unwritten code shows as NaN."""
    return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype)


def shrink_blocks() -> None:
    """Tiny blocks and poisoned outputs."""
    kernel.AMAX_BLOCK, kernel.AMAX_STEPS = 64, 2
    kernel.COLUMN_AMAX_BLOCK_T, kernel.COLUMN_AMAX_BLOCK_K, kernel.COLUMN_AMAX_STEPS = 8, 16, 2
    kernel.ROWS_TILE = kernel.COLUMNS_TILE = kernel.BOTH_TILE = bits.Tile(16, 16, 4, 2)
    kernel.CODES_COLUMN_AMAX_STEPS = 2
    kernel.ROW_BLOCK_MAX, kernel.ROW_VALUES, kernel.LONG_ROW_BLOCK = 32, 64, 16
    bits.new_codes = poisoned_codes
    # Other new memory is filled with NaN.
    torch.use_deterministic_algorithms(True)


def difference(results: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> str:
    """What differs, bit by bit, or the empty string."""
    for position, (result, reference_result) in enumerate(zip(results, expected, strict=True)):
        if result is None or reference_result is None:
            if result is not reference_result:
                return f"output {position}: one is None"
            continue
        if result.shape != reference_result.shape or result.dtype != reference_result.dtype:
            return (
                f"output {position}: {result.dtype} {result.shape}, {reference_result.dtype} {reference_result.shape}"
            )
        as_int = torch.uint8 if result.element_size() == 1 else torch.int32
        wrong = result.contiguous().view(as_int) != reference_result.contiguous().view(as_int)
        if wrong.any():
            return f"output {position}: {int(wrong.sum())} of {wrong.numel()} differ, at {wrong.nonzero()[0].tolist()}"
    return ""


def compare_all(x: Tensor, dtype: torch.dtype) -> str:
    """Every cast of x against the reference."""
    amax = reference.amax_bits(x)
    rows = reference.cast_rows(x, dtype)
    columns = reference.cast_columns(x, dtype)
    pairs = {
        "amax": ((kernel.amax(x),), (amax,)),
        "cast_rows": (kernel.cast_rows(x, dtype), rows),
        "cast_columns": (kernel.cast_columns(x, dtype), columns),
        "cast_rows_and_columns": (kernel.cast_rows_and_columns(x, dtype), rows + columns),
        "columns_from_rows": (kernel.columns_from_rows(*rows), reference.columns_from_rows(*rows)),
    }
    for layouts in (
        {"rows": True, "columns": False},
        {"rows": False, "columns": True},
        {"rows": True, "columns": True},
    ):
        pairs[f"cast_tensor {layouts}"] = (
            kernel.cast_tensor(x, amax, dtype, **layouts),
            reference.cast_tensor(x, amax, dtype, **layouts),
        )
    return "; ".join(f"{name}: {text}" for name, pair in pairs.items() if (text := difference(*pair)))


def case_rounding() -> str:
    """Every code, every midpoint and their neighbours, with a scale of one."""
    texts = []
    for dtype in (E4M3, E5M2):
        special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 1e-40, -1e-40])
        x = torch.cat([awkward_values(dtype).flatten(), special]).unsqueeze(0)
        texts.append(
            difference(
                kernel.cast_tensor(x, UNIT_AMAX[dtype], dtype, rows=True, columns=False),
                reference.cast_tensor(x, UNIT_AMAX[dtype], dtype, rows=True, columns=False),
            )
        )
    return "".join(texts)


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp()


def case_float32() -> str:
    return compare_all(_random(33, 48), E4M3)


def case_bfloat16_e5m2() -> str:
    return compare_all(_random(17, 64).bfloat16(), E5M2)


def case_float16_odd_sizes() -> str:
    return compare_all(_random(19, 23).half(), E4M3)


def case_one_row() -> str:
    return compare_all(_random(1, 16), E4M3)


def case_transposed_input() -> str:
    return compare_all(_random(32, 20).bfloat16().t(), E4M3)


def case_strided_input() -> str:
    return compare_all(_random(40, 64)[::2, ::2], E5M2)


def case_broadcast_input() -> str:
    return compare_all(_random(1, 32).expand(18, 32), E4M3)


def case_nan() -> str:
    x = _random(18, 32)
    x[7, 9] = -torch.nan
    return compare_all(x, E4M3)


def case_nan_of_other_bits() -> str:
    x = _random(18, 32).bfloat16()
    x.view(torch.int16)[7, 9] = 0x7FFF
    x.view(torch.int16)[3, 2] = 0x7F81
    return compare_all(x, E4M3)


def case_inf() -> str:
    x = _random(18, 32).bfloat16()
    x[0, 31] = -torch.inf
    return compare_all(x, E5M2)


@triton.jit
def _scales_kernel(amax_ptr, inv_scale_ptr, scale_ptr, E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr, N: tl.constexpr):
    index = tl.program_id(0) * N + tl.arange(0, N)
    inv_scale, scale = bits._scales(tl.load(amax_ptr + index), E5M2, POWER_OF_TWO)
    tl.store(inv_scale_ptr + index, inv_scale)
    tl.store(scale_ptr + index, scale)


def compare_scales(amax: Tensor, *, power_of_two: bool) -> str:
    """Scales of amax bits, whose number is a power of two, against the reference."""
    texts = []
    for dtype in (E4M3, E5M2):
        results = torch.empty(amax.shape), torch.empty(amax.shape)
        programs = -(-amax.numel() // 2**20)  # as many values as a block may have
        count = amax.numel() // programs
        _scales_kernel[(programs,)](amax, *results, E5M2=dtype == E5M2, POWER_OF_TWO=power_of_two, N=count)
        texts.append(difference(results, reference.scales(amax, dtype, power_of_two=power_of_two)))
    return "".join(texts)


def case_power_of_two_scales_of_every_mantissa() -> str:
    return compare_scales(torch.arange(1 << 23, dtype=torch.int32) + (130 << 23), power_of_two=True)


def case_scales_of_every_exponent() -> str:
    mantissas = torch.tensor([0, 1, 0x400000, 0x5FFFFF, 0x600000, 0x600001, 0x7FFFFF, 0x123456], dtype=torch.int32)
    amax = ((torch.arange(256, dtype=torch.int32) << 23)[:, None] + mantissas).flatten()
    return compare_scales(amax, power_of_two=True) + compare_scales(amax, power_of_two=False)


def case_zeros() -> str:
    return compare_all(torch.zeros(16, 32), E4M3)


def case_extreme_magnitudes() -> str:
    x = _random(16, 32)
    x[0] *= 1e-30
    x[1] *= 1e37
    x[:, 3] *= 1e-20
    return compare_all(x, E4M3)


if __name__ == "__main__":
    interpreter.main(interpreter.cases_of(dict(globals())), shrink_blocks)
