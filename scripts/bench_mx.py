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
EXPERTS = {"Llama 4 Scout": (16, 8192, 5120, 1), "Qwen3-30B-A3B": (128, 768, 2048, 8)}
"""(experts E, out features N, in features K, experts that a token chooses)."""
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


def rows_in_groups(rows: int, experts: int, features: int) -> tuple[Tensor, Tensor]:
    """Rows `[M, K]` in groups of the same size, M not above `rows`, and their ends."""
    size = rows // (experts * mx.BLOCK) * mx.BLOCK
    ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * size
    return torch.randn(experts * size, features, device="cuda", dtype=torch.bfloat16), ends


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
    for name, (experts, n, k, choices) in EXPERTS.items():
        x, ends = rows_in_groups(tokens * choices, experts, k)
        report(f"{name}: {experts} groups of {list(x.shape)}", x, group_calls(x, ends), timer)
        weight = torch.randn(experts, n, k, device="cuda")
        report(f"{name}: weights [{experts}, {n}, {k}]", weight, expert_calls(weight), timer)


def configurations() -> dict[str, list[dict[str, Any]]]:
    """What the sweep tries: for each cast, values for constants of `kernels/mx/kernel.py`."""
    from titan_fp8.kernels.float8.bits import Tile

    def tiles(*values: tuple[int, ...], of: tuple[str, ...]) -> list[dict[str, Any]]:
        return [dict.fromkeys(of, Tile(*value)) for value in values]

    wide = (256, 128, 8, 1, 128), (128, 256, 8, 1, 128), (128, 128, 8, 1), (256, 128, 8, 2, 128)
    dequantized = tiles((32, 128, 2, 1), (32, 256, 4, 1), (64, 128, 4, 1), of=("QUANTIZE_DEQUANTIZE_PAIRS_TILE",))
    plain = ("BOTH_PLAIN_OF_PAIRS_TILE",)
    return {
        "rows": tiles((64, 256, 8, 1), (32, 256, 4, 1), of=("ROWS_OF_PAIRS_TILE",)),
        "columns": tiles((256, 64, 8, 1), (128, 64, 4, 1), (128, 128, 8, 1), of=("COLUMNS_OF_PAIRS_TILE",)),
        "both": tiles(*wide, of=("BOTH_OF_PAIRS_TILE", *plain)),
        "groups both": [
            *tiles((128, 128, 8, 1), (128, 128, 4, 1), (128, 64, 4, 1), of=("BOTH_OF_GROUPS_TILE",)),
            *tiles(*wide, of=plain),
        ],
        "fp32 columns": tiles((128, 64, 4, 2), (128, 64, 4, 1), (64, 128, 4, 2), of=("COLUMNS_TILE",)),
        "fp32 both": tiles((128, 64, 4, 1), (128, 64, 4, 2, 128), (64, 128, 4, 1, 128), of=("BOTH_TILE",)),
        "experts both": tiles((128, 128, 8, 1, 128), (64, 128, 4, 1, 128), of=("BOTH_OF_EXPERTS_TILE",)),
        "quantize-dequantize rows": dequantized,
        "quantize-dequantize columns": dequantized,
        "quantize-dequantize both": dequantized,
    }


def sweep_calls(tokens: int) -> Iterator[tuple[str, str, Tensor, Calls]]:
    """(what is cast, which of `configurations` fit, what is read, calls); each a few hundred MB, made when it is its
    turn."""
    of_bf16 = ["rows", "columns", "both"] + [f"quantize-dequantize {layout}" for layout in ("rows", "columns", "both")]
    for features in FEATURES:
        x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
        calls = list(dense_calls(x, ["triton"]))
        for name in of_bf16:
            yield f"{list(x.shape)} bf16", name, x, (call for call in calls if call[0].split(",")[0] == name)
    weight = torch.randn(14336, 4096, device="cuda")
    calls = list(dense_calls(weight, ["triton"]))
    for name in ("columns", "both"):
        yield "[14336, 4096] fp32", f"fp32 {name}", weight, (c for c in calls if c[0].split(",")[0] == name)
    for title, (experts, n, k, choices) in EXPERTS.items():
        x, ends = rows_in_groups(tokens * choices, experts, k)
        calls = group_calls(x, ends)
        what = f"{title}, {experts} groups of {list(x.shape)}"
        yield what, "groups both", x, (call for call in calls if call[0].startswith("groups both"))
        weight = torch.randn(experts, n, k, device="cuda")
        yield f"{title}, weights", "experts both", weight, expert_calls(weight)


def sweep(tokens: int, timer: Timer, only: list[str], part: tuple[int, int]) -> None:
    """Print each cast's share of a copy's rate with the present tile and with each of `configurations`."""
    from titan_fp8.kernels.mx import kernel

    index, parts = part
    for title, name, source, calls in sweep_calls(tokens):
        if only and name not in only:
            continue
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / timer(lambda to=target, x=source: to.copy_(x))
        for text, moved, call in calls:
            shares = [(100 * moved / timer(call) / copy, "as it is")]
            for values in configurations()[name][index::parts]:
                tile = "x".join(str(number) for number in next(iter(values.values())) if number is not None)
                try:
                    with constants(kernel, values):
                        shares.append((100 * moved / timer(call) / copy, tile))
                except Exception as error:  # one that a GPU cannot launch says so, and the others go on
                    print(f"{title}, {text}: {tile}: {error!r:.200}", flush=True)
            best = ", ".join(f"{share:.1f} {tile}" for share, tile in sorted(shares, reverse=True))
            print(f"{title}, {text} (copy {copy / 1e9:.0f} GB/s), %: {best}", flush=True)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(configurations()), default=[], help="casts of the sweep")
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="each Nth of the sweep")
    parser.add_argument("--kernels", nargs="+", choices=mx.DIM1_KERNELS, default=["triton", "cuda"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, T={arguments.tokens}")
    timer = Timer(arguments.repeats)
    if arguments.sweep:
        return sweep(arguments.tokens, timer, arguments.only, arguments.part)
    bench(arguments.tokens, arguments.kernels, timer)


if __name__ == "__main__":
    main()
