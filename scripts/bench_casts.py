"""Bandwidth of the float8 kernels and speed of the scaled products at Llama 8B shapes, beside a plain copy and bf16.

    python scripts/bench_casts.py                 # T = 16384 tokens
    python scripts/bench_casts.py --sweep         # only: which block sizes are best on this GPU, in two minutes

Each figure is the median of `--repeats` timings with device events, after a warm-up, on random data larger than the
L2 cache. GB/s counts the bytes a kernel must move: each input read once per pass, each output written once.
"""

import argparse
import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from titan_fp8.kernels.float8 import E4M3, E5M2
from titan_fp8.quantization import ops

WEIGHTS = {"wq": (4096, 4096), "wk": (1024, 4096), "w1": (14336, 4096), "w2": (4096, 14336)}
"""Llama 8B: (out features N, in features K)."""


AHEAD_CYCLES = 1_000_000
"""The device waits so long, about half a millisecond, before each timed call, while the CPU issues all of its kernels:
otherwise a call of small kernels shows the CPU's time."""


@dataclass(frozen=True)
class Timer:
    """Median time of a call on the device, the gaps of a slow CPU left out."""

    repeats: int

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds."""
        for _ in range(3):
            call()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(self.repeats)
        ]
        for start, end in events:
            torch.cuda._sleep(AHEAD_CYCLES)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def cast_calls(x: Tensor) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(name, bytes moved, call) of every kernel on x."""
    n, read = x.numel(), x.numel() * x.element_size()
    bits = ops.amax(x)
    codes, scale = ops.cast_rows(x, E4M3)
    yield "amax", read, lambda: ops.amax(x)
    yield "cast_tensor", read + n, lambda: ops.cast_tensor(x, bits, E4M3)
    yield "cast_tensor_columns", read + n, lambda: ops.cast_tensor_columns(x, bits, E4M3)
    yield "cast_tensor_both", read + 2 * n, lambda: ops.cast_tensor_both(x, bits, E4M3)
    yield "cast_tensor_both e5m2", read + 2 * n, lambda: ops.cast_tensor_both(x, bits, E5M2)
    yield "cast_rows", read + n, lambda: ops.cast_rows(x, E4M3)
    yield "cast_columns (2 passes)", 2 * read + n, lambda: ops.cast_columns(x, E4M3)
    yield "cast_rows_and_columns (2)", 2 * read + 2 * n, lambda: ops.cast_rows_and_columns(x, E4M3)
    yield "cast_block_rows", read + n, lambda: ops.cast_block_rows(x, E4M3, False)
    yield "cast_block_columns", read + n, lambda: ops.cast_block_columns(x, E4M3, False)
    yield "cast_block_both", read + 2 * n, lambda: ops.cast_block_both(x, E4M3, False)
    yield "columns_from_rows (2)", 3 * n, lambda: ops.columns_from_rows(codes, scale)
    yield "transpose_codes", 2 * n, lambda: ops.transpose_codes(codes)


def bench_casts(tokens: int, timer: Timer) -> None:
    """Print GB/s of each kernel and its share of a copy's."""
    shapes = [((tokens, features), torch.bfloat16) for features in (4096, 14336, 28672)] + [
        ((14336, 4096), torch.float32)
    ]
    for shape, dtype in shapes:
        x = torch.randn(shape, device="cuda", dtype=dtype)
        target = torch.empty_like(x)
        copy = 2 * x.nbytes / timer(lambda source=x, target=target: target.copy_(source)) / 1e9
        print(f"\n{list(shape)} {dtype}: copy {copy:.0f} GB/s")
        for name, moved, call in cast_calls(x):
            seconds = timer(call)
            rate = moved / seconds / 1e9
            print(f"  {name:26} {1e6 * seconds:8.1f} us {rate:7.0f} GB/s {100 * rate / copy:5.0f} % of copy")


def bench_products(tokens: int, timer: Timer) -> None:
    """Print TFLOP/s of a linear's three products, in float8 and in bf16."""
    recipes = ("tensorwise", "rowwise")
    print(f"\nproducts at T={tokens}, TFLOP/s: output (fast accumulation) / grad_input / grad_weight (exact, bf16)")
    for name, (n, k) in WEIGHTS.items():
        sizes = {"output": (tokens, n, k), "grad_input": (tokens, k, n), "grad_weight": (n, k, tokens)}
        rates: dict[str, list[str]] = {recipe: [] for recipe in (*recipes, "bf16")}
        for product, (m, columns, inner) in sizes.items():
            a, b = (torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16) for rows in (m, columns))
            flops = 2 * m * columns * inner
            rates["bf16"].append(f"{flops / timer(lambda a=a, b=b: a @ b.t()) / 1e12:.0f}")
            for recipe in recipes:
                left_dtype = E5M2 if recipe == "tensorwise" and product != "output" else E4M3
                (a8, sa), (b8, sb) = (
                    ops.cast_rows(x, dtype) if recipe == "rowwise" else ops.cast_tensor(x, ops.amax(x), dtype)
                    for x, dtype in ((a, left_dtype), (b, E4M3))
                )
                arguments = (a8, b8, sa, sb, None, torch.bfloat16, product == "output", False)
                rates[recipe].append(f"{flops / timer(lambda args=arguments: ops.scaled_mm(*args)) / 1e12:.0f}")
        print(f"  {name} [{n}, {k}]: " + "; ".join(f"{recipe} {' / '.join(r)}" for recipe, r in rates.items()))


def configurations() -> dict[str, list[dict[str, Any]]]:
    """What the sweep tries: for each cast, sets of values for constants of `kernels/float8/kernel.py` and
    `kernels/blockwise/kernel.py`."""
    from titan_fp8.kernels.float8.bits import Tile

    shapes = [(64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 64, 4), (256, 64, 8), (64, 256, 4), (64, 256, 8)]
    tiles = [Tile(*shape, band) for shape in shapes for band in (1, 2, 4)]
    wide = [Tile(*shape, 1) for shape in ((64, 128, 4), (32, 256, 4), (32, 512, 8), (128, 128, 8))]
    blocks = [Tile(128, 128, *v) for v in itertools.product((4, 8), (1, 2, 4), (None, 96, 128))]
    amax_names = ("AMAX_BLOCK", "AMAX_STEPS", "AMAX_WARPS")
    column_names = ("COLUMN_AMAX_BLOCK_T", "COLUMN_AMAX_BLOCK_K", "COLUMN_AMAX_STEPS", "COLUMN_AMAX_WARPS")
    row_names = ("ROW_VALUES", "ROW_VALUES_PER_WARP")
    amax = [(4096, 8, 8), (4096, 4, 8), (8192, 4, 8), (8192, 8, 16), (2048, 8, 4), (4096, 16, 8)]
    columns = [(32, 128, 16, 4), (16, 256, 16, 4), (64, 128, 8, 8), (32, 128, 8, 4), (32, 256, 16, 8), (16, 512, 16, 8)]
    columns += [(64, 128, 8, 4), (128, 128, 4, 4), (64, 256, 8, 4), (64, 256, 16, 8), (32, 512, 8, 8), (128, 128, 8, 8)]
    columns += [(64, 128, 4, 4), (64, 128, 16, 4), (64, 64, 8, 4), (64, 64, 16, 2), (128, 64, 8, 4), (128, 128, 8, 4)]
    rows = [(4096, 1024), (8192, 1024), (4096, 2048), (4096, 512), (8192, 512)]
    column_amax = [dict(zip(column_names, values, strict=True)) for values in columns]
    return {
        "amax": [dict(zip(amax_names, values, strict=True)) for values in amax],
        "tensor rows": [{"ROWS_TILE": tile} for tile in wide],
        "tensor columns": [{"COLUMNS_TILE": tile} for tile in tiles],
        "tensor both": [{"BOTH_TILE": tile} for tile in tiles],
        "rows": [dict(zip(row_names, values, strict=True)) for values in rows],
        "amax of columns": column_amax,
        "amax of columns of codes": [
            {("CODES_" if name == "COLUMN_AMAX_STEPS" else "") + name: value for name, value in config.items()}
            for config in column_amax
        ],
        "columns": [{"COLUMNS_TILE": tile} for tile in tiles],
        "columns from codes": [{"COLUMNS_TILE": tile} for tile in tiles],
        "amax of rows and columns": column_amax,
        "rows and columns": [{"BOTH_TILE": tile} for tile in tiles],
        "block columns": [{"COLUMNS_TILE": tile} for tile in blocks],
        "block both": [{"BOTH_TILE": tile} for tile in blocks],
    }


def sweep_calls(x: Tensor) -> dict[str, tuple[int, Callable[[], Any]]]:
    """(bytes moved, call) of entries of `configurations`, one kernel each."""
    from titan_fp8.kernels.float8 import kernel

    n, read = x.numel(), x.numel() * x.element_size()
    bits, (codes, scale) = kernel.amax(x), kernel.cast_rows(x, E4M3)
    row_amax, column_amax = (torch.zeros(size, dtype=torch.int32, device=x.device) for size in x.shape)
    return {
        "amax": (read, lambda: kernel.amax(x)),
        "tensor rows": (read + n, lambda: kernel.cast_tensor(x, bits, E4M3, rows=True, columns=False)),
        "tensor columns": (read + n, lambda: kernel.cast_tensor(x, bits, E4M3, rows=False, columns=True)),
        "tensor both": (read + 2 * n, lambda: kernel.cast_tensor(x, bits, E4M3, rows=True, columns=True)),
        "rows": (read + n, lambda: kernel.cast_rows(x, E4M3)),
        "amax of columns": (read, lambda: kernel._column_amax(x, x, None)),
        "amax of columns of codes": (n, lambda: kernel._column_amax(codes, scale, None)),
        "columns": (read + n, lambda: kernel._cast_columns(x, x, column_amax, E4M3)),
        "columns from codes": (2 * n, lambda: kernel._cast_columns(codes, scale, column_amax, E4M3)),
        "amax of rows and columns": (read, lambda: kernel._column_amax(x, x, row_amax)),
        "rows and columns": (read + 2 * n, lambda: kernel._cast_both(x, row_amax, column_amax, E4M3)),
        "block columns": (read + n, lambda: ops.cast_block_columns(x, E4M3, False)),
        "block both": (read + 2 * n, lambda: ops.cast_block_both(x, E4M3, False)),
    }


@contextlib.contextmanager
def constants(module: ModuleType, values: dict[str, Any]) -> Iterator[None]:
    """Other values for constants of a kernels' module, inside."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def sweep(tokens: int, timer: Timer) -> None:
    """Print each kernel's rate with the present constants and with the best of `configurations`."""
    for features in (14336, 4096):
        x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
        print(f"\n{list(x.shape)} bf16")
        for name, (moved, call) in sweep_calls(x).items():
            _sweep_one(name, moved, call, timer)


def _sweep_one(name: str, moved: int, call: Callable[[], Any], timer: Timer) -> None:
    from titan_fp8.kernels.blockwise import kernel as blockwise_kernel
    from titan_fp8.kernels.float8 import kernel as float8_kernel

    module = blockwise_kernel if name.startswith("block") else float8_kernel
    rates = [(moved / timer(call) / 1e12, "as it is")]
    for config in configurations()[name]:
        with constants(module, config):
            rates.append((moved / timer(call) / 1e12, ", ".join(f"{k} {_short(v)}" for k, v in config.items())))
    print(f"  {name}: {rates[0][0]:.2f} TB/s as it is; best:")
    for rate, text in sorted(rates, reverse=True)[:5]:
        print(f"    {rate:.2f}  {text}", flush=True)


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, T={arguments.tokens}")
    timer = Timer(arguments.repeats)
    if arguments.sweep:
        return sweep(arguments.tokens, timer)
    bench_casts(arguments.tokens, timer)
    bench_products(arguments.tokens, timer)


if __name__ == "__main__":
    main()
