"""Bandwidth of the float8 kernels and speed of the scaled products at Llama 8B shapes, beside a plain copy and bf16.

    python scripts/bench_casts.py                 # T = 16384 tokens
    python scripts/bench_casts.py --sweep         # other block sizes of the tile kernel as well

Each figure is the median of `--repeats` timings with device events, after a warm-up, on random data larger than the
L2 cache. GB/s counts the bytes a kernel must move: each input read once per pass, each output written once.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_fp8.kernels import float8
from titan_fp8.kernels.float8 import E4M3, E5M2
from titan_fp8.quantization import ops

WEIGHTS = {"wq": (4096, 4096), "wk": (1024, 4096), "w1": (14336, 4096), "w2": (4096, 14336)}
"""Llama 8B: (out features N, in features K)."""


@dataclass(frozen=True)
class Timer:
    """Median time of a call on the device."""

    repeats: int

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds."""
        for _ in range(3):
            call()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(self.repeats)
        ]
        for start, end in events:
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
    yield "columns_from_rows (2)", 3 * n, lambda: ops.columns_from_rows(codes, scale)


def bench_casts(tokens: int, timer: Timer) -> None:
    """Print GB/s of each kernel and its share of a copy's."""
    shapes = [((tokens, 4096), torch.bfloat16), ((tokens, 14336), torch.bfloat16), ((14336, 4096), torch.float32)]
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


def sweep(tokens: int, timer: Timer) -> None:
    """Print the tile kernel's rate for other block sizes, one layout and both."""
    from titan_fp8.kernels.float8 import kernel

    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    bits = float8.amax(x)
    print("\ntile kernel on bf16, GB/s: both layouts / columns only / per row and column")
    for block_t, block_k, warps in itertools.product((64, 128, 256), (64, 128), (4, 8)):
        kernel.TILE_T, kernel.TILE_K, kernel.TILE_WARPS = block_t, block_k, warps
        both = 4 * x.numel() / timer(lambda: ops.cast_tensor_both(x, bits, E4M3)) / 1e9
        columns = 3 * x.numel() / timer(lambda: ops.cast_tensor_columns(x, bits, E4M3)) / 1e9
        groups = 6 * x.numel() / timer(lambda: ops.cast_rows_and_columns(x, E4M3)) / 1e9
        print(f"  {block_t:3} x {block_k:3}, {warps} warps: {both:5.0f} / {columns:5.0f} / {groups:5.0f}")


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
    bench_casts(arguments.tokens, timer)
    bench_products(arguments.tokens, timer)
    if arguments.sweep:
        sweep(arguments.tokens, timer)


if __name__ == "__main__":
    main()
