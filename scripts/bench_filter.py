#!/usr/bin/env python3
"""From which size on a linear layer gains by float8: layer norm -> linear -> sigmoid, over a grid of sizes.

    python scripts/bench_filter.py --out DIR                       # eager
    python scripts/bench_filter.py --out DIR --mode compiled --sizes 1024,2048,4096,8192
    python scripts/bench_filter.py --out DIR --device cpu --tiny   # shows that everything runs

The neighbours are there because a layer's input and gradient come out of kernels and, compiled, are fused with them.
Both sides have fp32 master weights, which change before each iteration outside of what is timed: bf16 casts them to
bf16, float8 to its codes. With `--weight-dtype bfloat16` bf16 multiplies the weights as they are.

Forward and backward are timed. For each recipe it prints a table of bf16's time over float8's, and a suggestion for
`titan_fp8/converters/size_rule.py`, the rule `auto_filter_small_kn`: corners (largest K, largest N) of the sizes to
leave in bf16, covering each size of the grid at which float8 gains less than `--margin`. A corner at the grid's end
is open in that direction (None).

K in features, N out features.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_common import (
    Contestant,
    append_records,
    compiler_settings,
    markdown_table,
    pick_device,
    reset_compiler,
    take_turns,
    versions,
)
from torch import Tensor, nn

import titan_fp8
from titan_fp8.models.linear import Linear

SIZES = (512, 1024, 2048, 4096, 8192, 14336)
TINY_SIZES = (128, 256)
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise")
Size = tuple[int, int]
"""(K, N)."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for results.jsonl")
    add("--sizes", help="comma-separated values of K and of N (default: " + ",".join(map(str, SIZES)) + ")")
    add("--recipes", default=",".join(RECIPES), help="comma-separated")
    add("--mode", choices=("eager", "compiled"), default="eager", help="of both sides")
    add("--tokens", type=int, help="default: 16384")
    add("--weight-dtype", choices=("float32", "bfloat16"), default="float32")
    add("--margin", type=float, default=0.02, help="least gain that counts as one, above the noise")
    add("--rounds", type=int, default=3)
    add("--iterations", type=int, default=4)
    add("--device", choices=("cuda", "cpu"), default="cuda", help="a CPU emulates float8")
    add("--tiny", action="store_true", help="a grid of two by two, few iterations")
    return parser.parse_args()


def contestant(recipe: str | None, size: Size, x: Tensor, grad_output: Tensor, args: argparse.Namespace) -> Contestant:
    """The three layers at one size; None is bf16."""
    k, n = size
    device = x.device
    model = nn.Sequential(
        nn.LayerNorm(k, device=device, dtype=torch.bfloat16),
        Linear(k, n, bias=False, device=device, dtype=getattr(torch, args.weight_dtype)),
        nn.Sigmoid(),
    )
    if recipe is not None:
        titan_fp8.convert_to_float8_training(model, recipe_name=recipe, emulate=device.type != "cuda")
    if args.mode == "compiled":
        model.forward = torch.compile(model.forward, **compiler_settings(device))
    parameters = list(model.parameters())
    weight = model[1].weight
    factors = _alternating(1.0 + 2**-6)

    @torch.no_grad()
    def change() -> None:
        weight.mul_(next(factors))
        for tensor in (x, *parameters):
            tensor.grad = None

    return Contestant(change, lambda: model(x).backward(grad_output))


def _alternating(factor: float) -> Iterator[float]:
    while True:
        yield factor
        yield 1 / factor


def bench_size(recipes: Sequence[str], size: Size, tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for bf16 and for each recipe at one size."""
    k, n = size
    device = pick_device(args.device)
    reset_compiler()
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16).requires_grad_()
    grad_output = torch.randn(tokens, n, device=device, dtype=torch.bfloat16)
    contestants = {row: contestant(None if row == "bf16" else row, size, x, grad_output, args) for row in recipes}
    times = take_turns(contestants, device, rounds=args.rounds, iterations=args.iterations)
    bf16 = times["bf16"].median_ms
    return [
        {
            **{"k": k, "n": n, "tokens": tokens, "mode": args.mode, "weight_dtype": args.weight_dtype, "row": row},
            **{"median_ms": round(each.median_ms, 4), "spread": round(each.spread, 4)},
            **{"host_ms": round(each.median_host_ms, 4), "gain": round(bf16 / each.median_ms, 4)},
        }
        for row, each in times.items()
    ]


def corners(gains: Mapping[Size, float], margin: float) -> list[tuple[int | None, int | None]]:
    """The fewest (largest K, largest N) that cover every size that gains less than `margin`; None is open.

    Each is a size that does not gain and that no other such size exceeds in both directions.
    """
    slow = [size for size, gain in gains.items() if gain < 1 + margin]
    end_k, end_n = (max(size[dim] for size in gains) for dim in (0, 1))
    largest = [
        (k, n) for k, n in slow if not any((other != (k, n)) and other[0] >= k and other[1] >= n for other in slow)
    ]
    return [(None if k == end_k else k, None if n == end_n else n) for k, n in sorted(largest)]


def covered(size: Size, found: Sequence[tuple[int | None, int | None]]) -> bool:
    """Whether `size` lies within a corner."""
    return any((k is None or size[0] <= k) and (n is None or size[1] <= n) for k, n in found)


def grid_table(gains: Mapping[Size, float]) -> str:
    """bf16's time over float8's: K downwards, N to the right."""
    ks, ns = (sorted({size[dim] for size in gains}) for dim in (0, 1))
    return markdown_table(
        ["K \\ N", *ns], [[k, *(f"{gains[k, n]:.2f}" if (k, n) in gains else "" for n in ns)] for k in ks]
    )


def suggestion(recipe: str, gains: Mapping[Size, float], margin: float) -> str:
    """The table and the rule of one recipe, with what the rule costs."""
    found = corners(gains, margin)
    rule = f"corners = ({''.join(f'{corner}, ' for corner in found).strip()})"
    lost = [f"{k}x{n} {gain:.2f}" for (k, n), gain in gains.items() if gain >= 1 + margin and covered((k, n), found)]
    text = f"\n{recipe}: time of bf16 over ours\n{grid_table(gains)}\nsuggestion: {rule}"
    return text + (f"\n  which also leaves these faster ones (KxN gain): {', '.join(lost)}" if lost else "")


def main() -> int:
    args = arguments()
    device = pick_device(args.device)
    if args.tiny:
        args.rounds, args.iterations = 1, 2
    sizes = [int(size) for size in args.sizes.split(",")] if args.sizes else TINY_SIZES if args.tiny else SIZES
    tokens = args.tokens or (64 if args.tiny else 16384)
    recipes = args.recipes.split(",")
    unknown = set(recipes) - set(RECIPES)
    if unknown:
        raise SystemExit(f"no such recipe: {', '.join(sorted(unknown))}; known: {', '.join(RECIPES)}")
    common = versions(device)
    print(", ".join(f"{key} {value}" for key, value in common.items()))
    print(f"T={tokens}, {args.mode}, {args.weight_dtype} weights; gains below {args.margin:.0%} do not count")
    gains: dict[str, dict[Size, float]] = {recipe: {} for recipe in recipes}
    begin = time.perf_counter()
    for k in sizes:
        for n in sizes:
            records = bench_size(["bf16", *recipes], (k, n), tokens, args)
            append_records(args.out, [{**common, **record} for record in records])
            for record in records[1:]:
                gains[record["row"]][k, n] = record["gain"]
            gc.collect()
    print(f"{time.perf_counter() - begin:.0f} s")
    for recipe in recipes:
        print(suggestion(recipe, gains[recipe], args.margin))
    return 0


if __name__ == "__main__":
    sys.exit(main())
