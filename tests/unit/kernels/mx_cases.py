"""Compares the MXFP8 kernels with the reference bit for bit in Triton's interpreter; run by test_mx_interpreter.py, as
`interpreter_cases.py` is by its own.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.mx_cases OUT.json
"""

import torch
from torch import Tensor

from tests.unit.kernels import interpreter
from tests.unit.kernels.interpreter_cases import difference, poisoned_codes
from tests.unit.kernels.test_mx_reference import values
from titan_fp8.kernels import mx
from titan_fp8.kernels.float8 import bits
from titan_fp8.kernels.mx import kernel, reference

ENDS = {
    "uneven, and rows behind": [32, 160, 160, 224],
    "to the end": [96, 256],
    "empty first": [0, 0, 64, 256],
    "none": [0, 0, 0],
    "one group": [192],
    "five groups": [32, 64, 96, 128, 256],
    "as much padding as there can be, and rows behind": [32, 64],
}
ENDS_OF_EVERY_KIND = ("uneven, and rows behind", "to the end", "as much padding as there can be, and rows behind")
"""With an empty group, without rows behind, and with padding in each."""
ROWS = 256
LAYOUTS = (True, False), (False, True), (True, True)
"""By rows, by columns, both."""


def shrink_blocks() -> None:
    """Tiles so small that an operand takes several, and poisoned outputs."""
    narrow, wide = bits.Tile(64, 32, 4, 2), bits.Tile(64, 64, 4, 2)
    kernel.ROWS_TILE = kernel.COLUMNS_TILE = narrow
    kernel.ROWS_OF_PAIRS_TILE = kernel.COLUMNS_OF_PAIRS_TILE = kernel.COLUMNS_OF_GROUPS_TILE = narrow
    kernel.BOTH_TILE = kernel.BOTH_OF_EXPERTS_TILE = kernel.BOTH_OF_GROUPS_TILE = wide
    kernel.BOTH_OF_PAIRS_TILE = kernel.BOTH_PLAIN_OF_PAIRS_TILE = wide
    kernel.QUANTIZE_DEQUANTIZE_TILE = kernel.QUANTIZE_DEQUANTIZE_PAIRS_TILE = wide
    bits.new_codes = poisoned_codes
    # Other new memory is filled with NaN.
    torch.use_deterministic_algorithms(True)


def as_integers(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """bf16 as the upper halves of int32, which `difference` compares."""
    return tuple(t if t is None or t.element_size() == 1 else t.view(torch.int16).int() for t in tensors)


def named(texts: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in texts.items() if text)


def compare(x: Tensor, mode: str = "rceil", single: bool = False, dequantize: bool = True, swizzle: bool = True) -> str:
    """Casts of x `[T, K]`; with `single` those that write one layout too, with `dequantize` what they stand for, and
    with `swizzle` scales in that order beside plain ones."""
    texts, of, layouts = {}, kernel.dense(x), LAYOUTS if single else LAYOUTS[-1:]
    for swizzled in (False, True) if swizzle else (False,):
        expected = mx.cast_both(x, mode, swizzled=swizzled)
        for rows, columns in layouts:
            results = kernel.cast(x, of, None, mode, rows=rows, columns=columns, swizzled=swizzled)
            wanted = expected[0 if rows else 2 : 4 if columns else 2]
            texts[f"swizzled={swizzled} rows={rows} columns={columns}"] = difference(results, wanted)
    if not dequantize:
        return named(texts)
    both = reference.quantize_dequantize(x, mode)
    for rows, columns in layouts:
        results = kernel.quantize_dequantize(x, of, None, mode, rows=rows, columns=columns)
        wanted = both[0 if rows else 1 : 2 if columns else 1]
        name = f"quantize_dequantize rows={rows} columns={columns}"
        texts[name] = difference(as_integers(results), as_integers(wanted))
    return named(texts)


def compare_groups(x: Tensor, ends: list[int], mode: str = "rceil", single: bool = False) -> str:
    """Casts of x `[M, K]` in groups; with `single` those that write one layout too."""
    limits, texts = torch.tensor(ends, dtype=torch.int32), {}
    of = kernel.Rows(kernel.GROUPS, x.shape[0], len(ends))
    for swizzled in (False, True):
        expected = mx.cast_group_both(x, limits, mode, swizzled=swizzled)
        for rows, columns in LAYOUTS if single else LAYOUTS[-1:]:
            results = kernel.cast(x, of, limits, mode, rows=rows, columns=columns, swizzled=swizzled)
            wanted = expected[0 if rows else 2 : 4 if columns else 2]
            texts[f"swizzled={swizzled} rows={rows} columns={columns}"] = difference(results, wanted)
    results = kernel.quantize_dequantize(x, of, limits, mode, rows=True, columns=True)
    wanted = mx.quantize_dequantize_groups(x, limits, mode)
    texts["quantize_dequantize"] = difference(as_integers(results), as_integers(wanted))
    return named(texts)


def compare_experts(weight: Tensor, mode: str = "rceil") -> str:
    """Every cast of weights `[E, N, K]`."""
    texts, (_, n, k) = {}, weight.shape
    of = kernel.Rows(kernel.EXPERTS, n)
    for swizzled in (False, True):
        codes, scale, codes_t, scale_t = mx.cast_experts(weight, mode, swizzled=swizzled)
        expected = codes.view(-1, k), scale if swizzled else scale.view(-1, k // 32), codes_t, scale_t
        results = kernel.cast(weight.reshape(-1, k), of, None, mode, rows=True, columns=True, swizzled=swizzled)
        texts[f"swizzled={swizzled}"] = difference(results, expected)
        for rows in (True, False):
            one = kernel.cast(weight.reshape(-1, k), of, None, mode, rows=rows, columns=not rows, swizzled=swizzled)
            texts[f"swizzled={swizzled} rows={rows}"] = difference(one, expected[:2] if rows else expected[2:])
    return named(texts)


def case_modes() -> str:
    inputs = values(33, 64), values(33, 64).bfloat16()
    return named({f"{mode} {x.dtype}": compare(x, mode) for mode in mx.MODES for x in inputs})


def case_bfloat16_of_more_than_a_tile_of_scales() -> str:
    return compare(values(150, 160).bfloat16(), single=True, dequantize=False)


def case_float16() -> str:
    return compare(values(64, 32).half(), "even", single=True)


def case_few_tokens() -> str:
    return named({str(tokens): compare(values(tokens, 64), "floor", tokens == 33) for tokens in (1, 2, 31, 33)})


def case_several_squares_of_a_warp_and_tiles_that_fit() -> str:
    """Tiles of two pieces along K, of which some operands are whole numbers, in one direction or in both."""
    names = "BOTH_TILE", "BOTH_OF_EXPERTS_TILE", "BOTH_OF_PAIRS_TILE", "BOTH_OF_GROUPS_TILE"
    names += "BOTH_PLAIN_OF_PAIRS_TILE", "QUANTIZE_DEQUANTIZE_PAIRS_TILE"
    before = {name: getattr(kernel, name) for name in names}
    for name in names:
        setattr(kernel, name, bits.Tile(128, 128, 4, 1))
    texts = {}
    for shape in ((256, 128), (256, 160), (250, 256)):
        x = values(*shape)
        x[shape[0] - 1, 3], x[5, 70] = torch.nan, -torch.inf
        texts |= {f"{shape} {x.dtype}": compare(x) for x in (x, x.bfloat16())}
    x = values(ROWS, 128).bfloat16()
    texts |= {name: compare_groups(x, ENDS[name]) for name in ENDS_OF_EVERY_KIND}
    texts |= {f"experts of {n}": compare_experts(values(2, n, 128)) for n in (128, 160)}
    for name, tile in before.items():
        setattr(kernel, name, tile)
    return named(texts)


def case_strides() -> str:
    base = values(96, 140)
    inputs = base[:, :64].t(), base[::2, 3:131:2], base[:1, :64].expand(40, 64)
    narrow = base.bfloat16()
    inputs += narrow[:, :64].t(), narrow[::2, 2:130], narrow[:, 1:65], narrow[:1, :64].expand(40, 64)
    return named({str(x.stride()): compare(x) for x in inputs})


def case_every_scale_there_is() -> str:
    """Each exponent with the largest mantissas and with those where modes step; codes of all sizes below."""
    exponents = torch.arange(255, dtype=torch.int32) << 23
    mantissas = torch.tensor([0, 1, 0x600000, 0x600001, 0x6FFFFF, 0x700000, 0x77FFFF, 0x780000, 0x7FFFFF])
    amax = (exponents.unsqueeze(1) + mantissas.int()).flatten()
    rows = amax[: len(amax) // 32 * 32].view(-1, 32)
    blocks = amax.view(torch.float32).unsqueeze(1) * 2.0 ** -torch.arange(32)
    blocks[:, 1::2] *= -1  # each lower exponent, in codes
    x = torch.cat([rows.view(torch.float32), blocks])[::7]
    texts = {mode: compare(x, mode, swizzle=False) for mode in ("rceil", "ceil")}
    # In bf16, with mantissas of which the last bit decides.
    amax = (exponents.unsqueeze(1) + torch.tensor([0, 1, 0x60, 0x61, 0x77, 0x78, 0x7F]).int() * 0x10000).flatten()
    blocks = (amax.view(torch.float32).unsqueeze(1) * 2.0 ** -torch.arange(32))[::5].bfloat16()
    # Triton's interpreter makes other numbers of subnormal ones in bf16, but not of words.
    texts |= {f"{mode}, bf16": compare(blocks, mode, dequantize=False, swizzle=False) for mode in mx.MODES}
    return named(texts)


def case_nan_and_inf() -> str:
    x = values(70, 96).bfloat16()
    x[3, 40], x[69, 7], x[20, 95] = -torch.nan, torch.inf, -torch.inf
    x.view(torch.int16)[45, 70] = 0x7F81
    y = values(33, 32)
    y[32, 0] = torch.nan  # in a block that is padding but for it
    return compare(x, single=True) + compare(x, "floor") + compare(y, "ceil", single=True)


def case_zeros_and_extreme_magnitudes() -> str:
    x = values(70, 96)
    x[0], x[1], x[:, 9] = 0.0, x[1] * 1e-38, 0.0
    x[2] = torch.finfo(torch.float32).max
    x[3:40] *= 1e-44
    return compare(x, "floor") + compare(x) + compare(x.bfloat16(), dequantize=False)


def case_groups() -> str:
    return named({name: compare_groups(values(ROWS, 64), ENDS[name]) for name in ENDS_OF_EVERY_KIND})


def case_groups_of_bfloat16() -> str:
    return named({name: compare_groups(values(ROWS, 64).bfloat16(), ends) for name, ends in ENDS.items()})


def case_groups_with_garbage_behind_the_last() -> str:
    x = values(ROWS, 160).bfloat16()
    x[224:] = torch.nan
    return compare_groups(x, ENDS["uneven, and rows behind"], "floor")


def case_groups_with_nan_and_inf() -> str:
    x = values(ROWS, 96)
    x[31, 3], x[160, 40] = torch.nan, -torch.inf
    return compare_groups(x, ENDS["five groups"], single=True)


def case_experts() -> str:
    shapes = (3, 64, 96), (1, 32, 32), (2, 128, 160)
    return named({str(shape): compare_experts(values(*shape)) for shape in shapes})


def case_experts_of_bfloat16() -> str:
    return compare_experts(values(3, 64, 96).bfloat16()) + compare_experts(values(2, 96, 160).bfloat16())


def case_experts_with_nan() -> str:
    weight = values(2, 96, 64)
    weight[1, 0, 63] = torch.nan
    return compare_experts(weight, "even")


def case_plain_scales_by_columns_lie_as_x_does() -> str:
    x, weight, ends = values(96, 64), values(2, 96, 64), torch.tensor([32, 96], dtype=torch.int32)
    both = {"rows": True, "columns": True, "swizzled": False}
    made = {
        "dense": kernel.cast(x, kernel.dense(x), None, "rceil", **both),
        "groups": kernel.cast(x, kernel.Rows(kernel.GROUPS, 96, 2), ends, "rceil", **both),
        "experts": kernel.cast(weight.view(-1, 64), kernel.Rows(kernel.EXPERTS, 96), None, "rceil", **both),
    }
    references = mx.cast_both(x, "rceil"), mx.cast_group_both(x, ends, "rceil"), mx.cast_experts(weight, "rceil")
    return named(
        {
            name: "" if results[3].stride() == expected[3].stride() and results[3].stride(-2) == 1 else "lies otherwise"
            for (name, results), expected in zip(made.items(), references, strict=True)
        }
    )


if __name__ == "__main__":
    interpreter.main(interpreter.cases_of(dict(globals())), shrink_blocks)
