"""Compares the kernels of grouped casts with the reference in Triton's interpreter; run by test_grouped_interpreter.py.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.grouped_cases OUT.json

bf16 inputs are rounded before they get here, and rounding to bf16 inside of the kernels is done with integers, so bits
are those of a GPU but for exponentials: SwiGLU is compared within a rounding of them.
"""

import torch
from torch import Tensor

from tests.unit.kernels import interpreter
from titan_fp8.kernels import moe
from titan_fp8.kernels.float8 import E4M3
from titan_fp8.kernels.float8.bits import Tile
from titan_fp8.kernels.grouped import experts_kernel, gather_kernel, kernel, reference, swiglu_kernel

ENDS = {
    "uneven": [16, 48, 48, 112],
    "behind the last nothing": [32, 80, 96, 128],
    "all in one": [0, 0, 128, 128],
    "none": [0, 0, 0, 0],
    "one group": [96],
    "five groups": [16, 16, 64, 64, 112],
}
ROWS = 128


def shrink_blocks() -> None:
    """Blocks so small that groups and rows come in several; and memory that shows what is not written."""
    kernel.AMAX_BLOCK_T, kernel.AMAX_BLOCK_K, kernel.AMAX_ROWS, kernel.AMAX_SPLITS = 16, 32, 32, 2
    kernel.TILE, kernel.SCALES_BLOCK = Tile(32, 32, 4, 2), 64
    experts_kernel.AMAX_BLOCK_N, experts_kernel.AMAX_BLOCK_K, experts_kernel.AMAX_STEPS = 16, 32, 2
    experts_kernel.TILE = Tile(32, 32, 4, 2)
    gather_kernel.AMAX_BLOCK_T, gather_kernel.AMAX_BLOCK_K = 16, 32
    gather_kernel.AMAX_ROWS, gather_kernel.AMAX_SPLITS, gather_kernel.TILE = 32, 2, Tile(32, 32, 4, 2)
    swiglu_kernel.AMAX_BLOCK_T, swiglu_kernel.AMAX_BLOCK_K = 16, 32
    swiglu_kernel.AMAX_ROWS, swiglu_kernel.AMAX_SPLITS, swiglu_kernel.TILE = 32, 2, Tile(32, 32, 4, 2)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def same(name: str, result: tuple[Tensor, ...], expected: tuple[Tensor, ...], rows: int | None = None) -> str:
    """ "" or what differs. rows: of codes and scales by rows, the first two, so many count."""
    wrong = []
    for number, (mine, theirs) in enumerate(zip(result, expected, strict=True)):
        if rows is not None and number < 2:
            mine, theirs = mine[:rows], theirs[:rows]
        one, other = (t.contiguous().view(torch.uint8) for t in (mine, theirs))
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape or not torch.equal(one, other):
            wrong.append(f"{name} {number}")
    return "; ".join(wrong)


def cast(x: Tensor, ends: list[int]) -> str:
    limits = torch.tensor(ends, dtype=torch.int32)
    columns = reference.cast_columns(x, limits, E4M3)
    both = (*reference.float8.cast_rows(x, E4M3), *columns)
    return "; ".join(
        filter(
            None,
            (
                same("both", kernel.cast(x, limits, E4M3, rows=True), both, ends[-1]),
                same("columns", kernel.cast(x, limits, E4M3, rows=False), columns),
            ),
        )
    )


def case_groups() -> str:
    return "; ".join(filter(None, (f"{n}: {w}" for n, e in ENDS.items() if (w := cast(random(ROWS, 48), e)))))


def case_widths() -> str:
    return "; ".join(filter(None, (cast(random(ROWS, k), ENDS["uneven"]) for k in (1, 16, 40, 80))))


def case_half_precision_and_strides() -> str:
    x = random(ROWS, 96).half()
    return "; ".join(filter(None, (cast(x, ENDS["uneven"]), cast(x[:, :40], ENDS["uneven"]))))


def case_nan_and_inf_stay_in_their_column_and_group() -> str:
    x = random(ROWS, 48)
    x[20, 3], x[60, 5], x[127, 7] = torch.nan, torch.inf, torch.nan  # the last is behind all groups
    return cast(x, ENDS["uneven"])


def case_garbage_behind_the_last_group() -> str:
    x = random(ROWS, 48)
    x[112:] = torch.nan
    return cast(x, ENDS["uneven"])


def experts(name: str, w: Tensor) -> str:
    """w: `[E, N, K]`."""
    codes, scale = reference.float8.cast_rows(w.view(-1, w.shape[2]), E4M3)
    codes, scale = codes.view(w.shape), scale.view(w.shape[:2])
    result = experts_kernel.columns_of_experts(codes, scale)
    return same(name, result, reference.columns_of_experts(codes, scale))


def case_experts() -> str:
    shapes = (3, 32, 48), (1, 16, 16), (5, 48, 80), (2, 112, 144), (2, 208, 16), (3, 16, 208)
    return "; ".join(filter(None, (experts(str(shape), random(*shape)) for shape in shapes)))


def case_rows_of_experts_of_any_magnitude() -> str:
    """What a row's scale and a column's come to may overflow where the codes between them are zeros."""
    w = random(3, 80, 48) * torch.exp2(torch.arange(80.0) % 7 * 11 - 33).unsqueeze(1)
    w[0, 5], w[0, 7, 1:], w[0, :, 9], w[2] = 1e30, 0, 1e-30, 0
    w[0, 7, 0], w[0, 5, 2:] = 1e-12, 0
    return experts("magnitudes", w)


def case_nan_and_inf_stay_in_their_expert() -> str:
    w = random(4, 48, 32)
    w[1, 20, 3], w[2, 47, 5] = torch.nan, torch.inf
    codes, scale = (t.view(3, 48, -1) for t in reference.float8.cast_rows(random(3, 48, 32).view(-1, 32), E4M3))
    # A code of NaN beside a scale that is a number, and the reverse: both signs of it.
    codes.view(torch.uint8)[0, 3, 4], codes.view(torch.uint8)[1, 5, 6] = 0x7F, 0xFF
    scale = scale.view(3, 48)
    scale[2, 9] = -torch.tensor(torch.nan)
    expected = reference.columns_of_experts(codes, scale)
    assert expected[1].isnan().sum(1).tolist() == [1, 1, 32]
    lone = same("lone NaN", experts_kernel.columns_of_experts(codes, scale), expected)
    return "; ".join(filter(None, (experts("NaN and Inf", w), lone)))


def case_gather() -> str:
    wrong = []
    for tokens, top_k, experts, features in ((50, 1, 4, 48), (33, 3, 8, 40), (3, 2, 32, 7)):
        choices = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens)).topk(top_k).indices
        _, ends, _, source = moe.plan(choices, experts, 16)
        x = random(tokens, 64)[:, :features]
        for scores in (None, random(tokens, top_k, seed=1)):
            rows = moe.reference.permute(x, source, scores, top_k)
            expected = (*reference.float8.cast_rows(rows, E4M3), *reference.cast_columns(rows, ends, E4M3))
            result = gather_kernel.gather(x, source, scores, top_k, ends, E4M3)
            wrong.append(same(f"{tokens} {scores is None}", result, expected, int(ends[-1])))
    return "; ".join(filter(None, wrong))


def case_swiglu_backward() -> str:
    wrong = []
    for name, ends in ENDS.items():
        limits = torch.tensor(ends, dtype=torch.int32)
        grad, gate, up = (random(ROWS, 48, seed=seed) for seed in range(3))
        result = swiglu_kernel.swiglu_backward(grad, gate, up, limits, E4M3)
        expected = reference.swiglu_backward(grad, gate, up, limits, E4M3)
        for number, (mine, theirs) in enumerate(zip(result, expected, strict=True)):
            wrong += [f"{name} {number}: {word}" for word in _apart(mine, theirs, limits)]
    return "; ".join(wrong)


def _apart(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...], ends: Tensor) -> list[str]:
    """Codes are compared as the numbers that they stand for: exponentials differ in their last bits."""
    values = []
    for parts in (mine, theirs):
        codes_t, scale_t = parts[-2:]
        group = reference.group_of_rows(ends, ROWS)
        per_row = torch.cat([scale_t, scale_t.new_ones(1, scale_t.shape[1])])[group]
        columns = reference.float8.to_float(codes_t).t() * per_row
        rows = reference.float8.to_float(parts[0]) * parts[1] if len(parts) == 4 else columns
        values.append((rows[: ends[-1]], columns))
    found = []
    for kind, one, other in zip(("rows", "columns"), *values, strict=True):
        step = other.abs() / 8 + 1e-6  # a code away
        if not bool(((one - other).abs() <= step).all()):
            found.append(f"{kind} differ by {(one - other).abs().max()}")
        if one.numel() and float((one != other).float().mean()) > 0.01:
            found.append(f"{kind}: too many differ")
    return found


if __name__ == "__main__":
    interpreter.main(interpreter.cases_of(globals()), shrink_blocks)
