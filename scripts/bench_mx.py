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

    # bf16 in pairs: a warp for each 32 tokens, which keeps blocks within warps, and some that do not.
    pairs = [Tile(*v, band) for v in ((128, 64, 4), (64, 64, 2), (128, 128, 4), (64, 128, 2)) for band in (1, 4)]
    pairs += [Tile(256, 64, 8, 1), Tile(128, 32, 4, 2), Tile(64, 64, 4, 1), Tile(128, 64, 8, 1)]
    rows = [Tile(*v, 1) for v in ((64, 256, 8), (32, 256, 4), (128, 64, 4), (64, 128, 2), (64, 128, 4), (64, 256, 4))]
    others = [Tile(*v, 1) for v in ((64, 64, 4), (32, 128, 4), (64, 128, 8), (128, 64, 8), (32, 64, 2), (128, 64, 4))]
    others += [Tile(128, 64, 4, 2, 128), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2, 64)]
    dequantized = [
        Tile(*v, 1) for v in ((32, 128, 4), (64, 128, 8), (64, 64, 4), (32, 256, 8), (32, 64, 2), (32, 64, 1))
    ]
    in_groups = [tile for tile in pairs if tile.band == 1]
    return {
        "rows": [{"ROWS_OF_PAIRS_TILE": tile} for tile in rows],
        "columns": [{"COLUMNS_OF_PAIRS_TILE": tile} for tile in pairs],
        "both": [{"BOTH_OF_PAIRS_TILE": tile} for tile in pairs],
        "groups both": [{"BOTH_OF_PAIRS_TILE": tile} for tile in in_groups],
        "fp32 columns": [{"COLUMNS_TILE": tile} for tile in others],
        "experts both": [{"BOTH_TILE": tile} for tile in others],
        "quantize-dequantize columns": [{"QUANTIZE_DEQUANTIZE_TILE": tile} for tile in dequantized],
        "quantize-dequantize both": [{"QUANTIZE_DEQUANTIZE_TILE": tile} for tile in dequantized],
    }


def sweep_calls(tokens: int) -> Iterator[tuple[str, str, Calls]]:
    """(what is cast, which of `configurations` fit, calls); each a few hundred MB, made when it is its turn."""
    for features in FEATURES:
        x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
        calls = list(dense_calls(x, ["triton"]))
        for name in ("rows", "columns", "both", "quantize-dequantize columns", "quantize-dequantize both"):
            yield f"{list(x.shape)} bf16", name, (call for call in calls if call[0].split(",")[0] == name)
    weight = torch.randn(14336, 4096, device="cuda")
    yield (
        "[14336, 4096] fp32",
        "fp32 columns",
        (c for c in dense_calls(weight, ["triton"]) if c[0].startswith("columns")),
    )
    for title, (experts, n, k) in EXPERTS.items():
        size = tokens // (experts * mx.BLOCK) * mx.BLOCK
        ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * size
        x = torch.randn(experts * size, k, device="cuda", dtype=torch.bfloat16)
        calls = group_calls(x, ends)
        yield f"{title}, {experts} groups", "groups both", (c for c in calls if c[0].startswith("groups both"))
        yield f"{title}, weights", "experts both", expert_calls(torch.randn(experts, n, k, device="cuda"))


def sweep(tokens: int, timer: Timer, only: list[str]) -> None:
    """Print each cast's rate with the present tile and with the best of `configurations`."""
    from titan_fp8.kernels.mx import kernel

    for title, name, calls in sweep_calls(tokens):
        if only and name not in only:
            continue
        for text, moved, call in calls:
            rates = [(moved / timer(call) / 1e12, "as it is")]
            for values in configurations()[name]:
                with constants(kernel, values):
                    tile = next(iter(values.values()))
                    rates.append((moved / timer(call) / 1e12, "x".join(map(str, tile))))
            if "PAIRS" in next(iter(configurations()[name][0])):
                with constants(kernel, {"IN_PAIRS": False}):
                    rates.append((moved / timer(call) / 1e12, "not in pairs"))
            best = ", ".join(f"{rate:.2f} {text}" for rate, text in sorted(rates, reverse=True)[:5])
            print(f"{title}, {text}: {rates[0][0]:.2f} TB/s as it is; best {best}", flush=True)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(configurations()), default=[], help="casts of the sweep")
    parser.add_argument("--kernels", nargs="+", choices=mx.DIM1_KERNELS, default=["triton", "cuda"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, T={arguments.tokens}")
    timer = Timer(arguments.repeats)
    if arguments.sweep:
        return sweep(arguments.tokens, timer, arguments.only)
    bench(arguments.tokens, arguments.kernels, timer)


if __name__ == "__main__":
    main()
