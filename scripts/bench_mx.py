"""Bandwidth of the MXFP8 casts at Llama 8B and mixture-of-experts shapes, beside a plain copy on the same GPU.

    python scripts/bench_mx.py                    # T = 16384 tokens
    python scripts/bench_mx.py --sweep            # only: which tiles are best on this GPU
    python scripts/bench_mx.py --kernels triton   # without the CUDA kernel, where nvcc is missing

Each figure is the median of `--repeats` timings with device events, after a warm-up, on random data larger than the
L2 cache. GB/s counts the bytes a cast must move: the input read once, codes or bf16 numbers and scales written once.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_casts import Timer, constants
from torch import Tensor

from titan_fp8.kernels import mx

FEATURES = (4096, 14336)
"""Llama 8B: of a block, and hidden in its feed-forward."""
EXPERTS = {"Llama 4 Scout": (16, 8192, 5120), "Qwen3-30B-A3B": (128, 768, 2048)}
"""(experts E, out features N, in features K)."""
MODE = "rceil"

Calls = Iterator[tuple[str, int, Callable[[], Any]]]
"""(name, bytes moved, call)."""


def dense_calls(x: Tensor, kernels: list[str]) -> Calls:
    """Casts of tokens `[T, K]`."""
    read, codes, scales, bf16 = x.nbytes, x.numel(), x.numel() // mx.BLOCK, 2 * x.numel()
    for swizzled in (False, True):
        layout = "swizzled" if swizzled else "plain"
        yield f"rows, {layout}", read + codes + scales, lambda s=swizzled: mx.cast_rows(x, MODE, swizzled=s)
        for kernel in kernels:
            yield (
                f"columns, {layout}, {kernel}",
                read + codes + scales,
                lambda s=swizzled, k=kernel: mx.cast_columns(x, MODE, swizzled=s, kernel=k),
            )
        yield f"both, {layout}", read + 2 * (codes + scales), lambda s=swizzled: mx.cast_both(x, MODE, swizzled=s)
    yield "quantize-dequantize rows", read + bf16, lambda: mx.quantize_dequantize(x, MODE, columns=False)
    yield "quantize-dequantize columns", read + bf16, lambda: mx.quantize_dequantize(x, MODE, rows=False)
    yield "quantize-dequantize both", read + 2 * bf16, lambda: mx.quantize_dequantize(x, MODE)


def group_calls(x: Tensor, ends: Tensor) -> Calls:
    """Casts of rows `[M, K]` in groups."""
    written = x.numel() + x.numel() // mx.BLOCK
    for swizzled in (False, True):
        layout = "swizzled" if swizzled else "plain"
        arguments = x, ends, MODE
        yield (
            f"groups both, {layout}",
            x.nbytes + 2 * written,
            lambda s=swizzled, a=arguments: mx.cast_group_both(*a, swizzled=s),
        )
    yield (
        "groups quantize-dequantize both",
        x.nbytes + 4 * x.numel(),
        lambda: mx.quantize_dequantize_groups(x, ends, MODE),
    )


def expert_calls(weight: Tensor) -> Calls:
    """Casts of weights `[E, N, K]`."""
    written = weight.numel() + weight.numel() // mx.BLOCK
    for swizzled in (False, True):
        layout = "swizzled" if swizzled else "plain"
        moved = weight.nbytes + 2 * written
        yield f"experts both, {layout}", moved, lambda s=swizzled: mx.cast_experts(weight, MODE, swizzled=s)


def report(title: str, source: Tensor, calls: Calls, timer: Timer) -> None:
    """Print GB/s of each call and its share of a copy's of `source`."""
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / timer(lambda: target.copy_(source)) / 1e9
    print(f"\n{title} {source.dtype}: copy {copy:.0f} GB/s")
    for name, moved, call in calls:
        seconds = timer(call)
        rate = moved / seconds / 1e9
        print(f"  {name:32} {1e6 * seconds:8.1f} us {rate:7.0f} GB/s {100 * rate / copy:5.0f} % of copy", flush=True)


def bench(tokens: int, kernels: list[str], timer: Timer) -> None:
    """Print all tables."""
    for features in FEATURES:
        x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
        report(f"[{tokens}, {features}]", x, dense_calls(x, kernels), timer)
    weight = torch.randn(14336, 4096, device="cuda")
    report("[14336, 4096]", weight, dense_calls(weight, kernels), timer)
    for name, (experts, n, k) in EXPERTS.items():
        rows = tokens // (experts * mx.BLOCK) * experts * mx.BLOCK
        ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (rows // experts)
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        report(f"{name}: {experts} groups of [{rows}, {k}]", x, group_calls(x, ends), timer)
        weight = torch.randn(experts, n, k, device="cuda")
        report(f"{name}: weights [{experts}, {n}, {k}]", weight, expert_calls(weight), timer)


def configurations() -> dict[str, list[dict[str, Any]]]:
    """What the sweep tries: for each cast, values for constants of `kernels/mx/kernel.py`."""
    from titan_fp8.kernels.float8.bits import Tile

    shapes = [(32, 128, 4), (32, 256, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 4), (128, 128, 8)]
    shapes += [(128, 128, 16), (64, 256, 8)]
    tiles = [Tile(*shape, band, registers) for shape in shapes for band in (1, 2) for registers in (None, 128)]
    single = [tile for tile in tiles if tile.registers is None]
    return {
        "rows": [{"ROWS_TILE": tile} for tile in single],
        "columns": [{"COLUMNS_TILE": tile} for tile in tiles],
        "both": [{"BOTH_TILE": tile} for tile in tiles],
        "quantize-dequantize": [{"QUANTIZE_DEQUANTIZE_TILE": tile} for tile in single],
    }


def sweep(tokens: int, timer: Timer) -> None:
    """Print each cast's rate with the present tile and with the best of `configurations`."""
    from titan_fp8.kernels.mx import kernel

    for features in FEATURES:
        x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
        written = x.numel() + x.numel() // mx.BLOCK
        calls: dict[str, tuple[int, Callable[[], Any]]] = {
            "rows": (x.nbytes + written, lambda x=x: mx.cast_rows(x, MODE, swizzled=True)),
            "columns": (x.nbytes + written, lambda x=x: mx.cast_columns(x, MODE, swizzled=True)),
            "both": (x.nbytes + 2 * written, lambda x=x: mx.cast_both(x, MODE, swizzled=True)),
            "quantize-dequantize": (x.nbytes + 4 * x.numel(), lambda x=x: mx.quantize_dequantize(x, MODE)),
        }
        print(f"\n{list(x.shape)} bf16")
        for name, (moved, call) in calls.items():
            rates = [(moved / timer(call) / 1e12, "as it is")]
            for values in configurations()[name]:
                with constants(kernel, values):
                    tile = next(iter(values.values()))
                    rates.append((moved / timer(call) / 1e12, "x".join(map(str, tile))))
            print(f"  {name}: {rates[0][0]:.2f} TB/s as it is; best:")
            for rate, text in sorted(rates, reverse=True)[:5]:
                print(f"    {rate:.2f}  {text}", flush=True)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--kernels", nargs="+", choices=mx.DIM1_KERNELS, default=["triton", "cuda"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, T={arguments.tokens}")
    timer = Timer(arguments.repeats)
    if arguments.sweep:
        return sweep(arguments.tokens, timer)
    bench(arguments.tokens, arguments.kernels, timer)


if __name__ == "__main__":
    main()
