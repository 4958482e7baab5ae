#!/usr/bin/env python3
"""One linear layer, forward and backward, in bf16, in our float8 and in torchao's, eager and compiled: one table.

    python scripts/bench_linear.py --out DIR
    python scripts/bench_linear.py --out DIR --shapes 4096x4096 --rows ours-rowwise,torchao-rowwise-compiled --kernels
    python scripts/bench_linear.py --out DIR --device cpu --tiny          # shows that everything runs

An iteration is what a training step asks of the layer: `y = linear(x); y.backward(g)` with gradients for x and for
the weight, random bf16 x `[T, K]` and g `[T, N]`, and a weight `[N, K]` **that has changed since the last iteration**:
an in-place update before each one, on all sides alike, outside of what is timed. What the change costs a contestant
(casting the weight, refreshing a cache) is inside. Weights are fp32 masters (`--weight-dtypes float32`: the bf16
contestant casts the weight to bf16 and its gradient back) or bf16 (`bfloat16`: nobody casts to bf16).

`ours-*-cached` is a layer with `cache_weights=True`: the codes that forward casts stay for backward, in both layouts.
With one forward and backward a step, as here, that is all it saves; with more microbatches it saves their casts too.

Before timing, the results of every contestant are compared with those of bf16. One that fails is left out, said so,
and makes the exit code 1. Compiled contestants get a fresh compiler at each shape, and hitting its recompile limit is
an error: torchao's compiled layer would go on in eager mode, which flatters others.

T tokens, K in features, N out features.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_common import (
    Contestant,
    Times,
    append_records,
    choose_rows,
    compiler_settings,
    kernel_table,
    markdown_table,
    pick_device,
    reset_compiler,
    sqnr_db,
    take_turns,
    versions,
)
from torch import Tensor, nn

import titan_fp8
from titan_fp8.models.linear import Linear

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 28672))
"""(K, N)."""
TINY_SHAPES = ((256, 128),)
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise")
PEER_RECIPES = RECIPES[:3]
LEAST_SQNR_DB = 20.0
"""Below this against bf16 a result is wrong, not rounded."""


def rows_known() -> tuple[str, ...]:
    """Every row: side, recipe, mode."""
    ours = [f"ours-{recipe}{mode}" for recipe in RECIPES for mode in ("", "-cached", "-compiled")]
    theirs = [f"torchao-{recipe}{mode}" for recipe in PEER_RECIPES for mode in ("-compiled", "")]
    return "bf16", "bf16-compiled", *ours, *theirs, "torchao-nocompile", "torchao-blockwise"


DEFAULT_ROWS = (
    "bf16",
    *(f"ours-{recipe}{mode}" for recipe in RECIPES for mode in ("", "-cached")),
    *("ours-tensorwise-compiled", "ours-rowwise-compiled", "torchao-tensorwise-compiled", "torchao-rowwise-compiled"),
    *("torchao-tensorwise", "torchao-rowwise", "torchao-nocompile"),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for results.jsonl")
    add("--shapes", help="comma-separated KxN (default: " + ",".join(f"{k}x{n}" for k, n in SHAPES) + ")")
    add("--rows", help="comma-separated; known: " + ", ".join(rows_known()))
    add("--weight-dtypes", default="float32", help="float32, bfloat16, or both with a comma")
    add("--tokens", type=int, help="T (default: 16384)")
    add("--rounds", type=int, default=6, help="blocks for each contestant")
    add("--iterations", type=int, default=4, help="timed iterations in a block")
    add("--kernels", action="store_true", help="print the device time of each contestant's kernels as well")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="a CPU emulates float8")
    add("--tiny", action="store_true", help="one small shape, few iterations")
    return parser.parse_args()


def build(row: str, linear: nn.Linear, device: torch.device) -> nn.Module:
    """The contestant `row` around `linear`, whose parameter it keeps."""
    side, _, rest = row.partition("-")
    recipe = rest.removesuffix("-compiled").removesuffix("-cached")
    model = nn.Sequential(linear)
    emulate = device.type != "cuda"
    if side == "ours":
        options = {"cache_weights": True} if rest.endswith("-cached") else {}
        titan_fp8.convert_to_float8_training(model, recipe_name=recipe, emulate=emulate, **options)
    elif side == "torchao":
        model = _peer(recipe, model, emulate)
    if row.endswith("-compiled"):
        # The layer's own forward, as the trainer compiles a block's: hooks of the model stay outside.
        model[0].forward = torch.compile(model[0].forward, **compiler_settings(device))
    return model


def _peer(recipe: str, model: nn.Module, emulate: bool) -> nn.Module:
    if recipe == "nocompile":
        from torchao.prototype.float8nocompile.float8nocompile_linear_utils import convert_to_float8_nocompile_training

        return convert_to_float8_nocompile_training(model)
    if recipe == "blockwise":
        from torchao.prototype.blockwise_fp8_training.linear import Float8BlockwiseLinear

        return nn.Sequential(Float8BlockwiseLinear.from_float(model[0]))
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    return convert_to_float8_training(model, config=config)


def contestant(model: nn.Module, x: Tensor, grad_output: Tensor) -> Contestant:
    """Forward and backward of `model`, whose weight changes before each iteration."""
    weight: nn.Parameter = model[0].weight
    factors = alternating(1.0 + 2**-6)

    @torch.no_grad()
    def change() -> None:
        weight.mul_(next(factors))
        weight.grad = x.grad = None

    def run() -> Tensor:
        output = model(x)
        output.backward(grad_output)
        return output

    return Contestant(change, run)


def alternating(factor: float) -> Iterator[float]:
    """`factor`, its reciprocal, and so on: numbers change and stay in range."""
    while True:
        yield factor
        yield 1 / factor


def checked(run: Callable[[], Tensor], model: nn.Module, x: Tensor, exact: list[Tensor]) -> list[Tensor]:
    """Output and both gradients of one iteration on the unchanged weight, if they are near `exact` (or it is empty)."""
    x.grad = model[0].weight.grad = None
    results = [run().detach(), x.grad, model[0].weight.grad]
    for what, reference, result in zip(("output", "grad_input", "grad_weight"), exact, results, strict=False):
        ratio = sqnr_db(reference, result)
        if not ratio > LEAST_SQNR_DB:
            raise RuntimeError(f"{what} is {ratio:.1f} dB from bf16's: it is wrong, so its time means nothing")
    return results


def enter(
    rows: list[str], tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants of `rows` at one shape, compiled and compared with bf16; and why others could not take part."""
    k, n = shape
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16, generator=generator).requires_grad_()
    grad_output = torch.randn(tokens, n, device=device, dtype=torch.bfloat16, generator=generator)
    weight = torch.randn(n, k, device=device, generator=generator).mul_(k**-0.5).to(dtype)
    contestants: dict[str, Contestant] = {}
    failures: dict[str, str] = {}
    exact: list[Tensor] = []
    for row in ["bf16", *(row for row in rows if row != "bf16")]:
        linear = Linear(k, n, bias=False, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(weight.clone())
        begin = time.perf_counter()
        try:
            model = build(row, linear, device)
            candidate = contestant(model, x, grad_output)
            results = checked(candidate.run, model, x, exact)
        except Exception as error:  # one contestant's trouble must not cost the others their run
            failures[row] = f"{type(error).__name__}: {str(error)[:400]}"
            print(f"  {row} failed: {failures[row]}", flush=True)
            continue
        contestants[row] = candidate
        exact = exact or results
        if (seconds := time.perf_counter() - begin) > 10:
            print(f"  {row}: first iteration took {seconds:.0f} s", flush=True)
    return contestants, failures


def bench_shape(
    rows: list[str], tokens: int, shape: tuple[int, int], dtype: torch.dtype, args: argparse.Namespace
) -> tuple[dict[str, Times], dict[str, str]]:
    """Times of all rows at one shape, and why others have none."""
    device = pick_device(args.device)
    reset_compiler()
    contestants, failures = enter(rows, tokens, shape, dtype, device)
    contestants = {row: contestants[row] for row in rows if row in contestants}
    times = take_turns(contestants, device, rounds=args.rounds, iterations=args.iterations) if contestants else {}
    if args.kernels:
        for row, each in contestants.items():
            print(f"  {row}\n{kernel_table(each)}")
    return times, failures


def records_of(
    times: dict[str, Times], tokens: int, shape: tuple[int, int], dtype: str, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """One record a row."""
    k, n = shape
    bf16 = times.get("bf16")
    return [
        {
            **common,
            **{"tokens": tokens, "k": k, "n": n, "weight_dtype": dtype, "row": row},
            "median_ms": round(each.median_ms, 4),
            "spread": round(each.spread, 4),
            "host_ms": round(each.median_host_ms, 4),
            "tflops": round(6 * tokens * k * n / each.median_ms / 1e9, 1),
            "speedup_over_bf16": round(bf16.median_ms / each.median_ms, 3) if bf16 else None,
        }
        for row, each in times.items()
    ]


def table(records: list[dict[str, Any]]) -> str:
    """All figures."""
    columns = ("K", "N", "weight", "row", "ms", "spread", "CPU ms", "TFLOP/s", "over bf16")
    cells = [
        (
            *(r["k"], r["n"], r["weight_dtype"], r["row"], f"{r['median_ms']:.3f}", f"{100 * r['spread']:.1f} %"),
            *(f"{r['host_ms']:.3f}", f"{r['tflops']:.0f}", f"{r['speedup_over_bf16'] or float('nan'):.2f}x"),
        )
        for r in records
    ]
    return markdown_table(columns, cells)


def verdict(records: list[dict[str, Any]]) -> str:
    """Our eager mode against torchao's compiled one, recipe by recipe, at every shape."""
    found = {(r["k"], r["n"], r["weight_dtype"], r["row"]): r["median_ms"] for r in records}
    cells = []
    for (k, n, dtype, row), theirs in found.items():
        if not row.startswith("torchao-") or not row.endswith("-compiled"):
            continue
        recipe = row.removeprefix("torchao-").removesuffix("-compiled")
        for mode in ("", "-cached", "-compiled"):
            ours = found.get((k, n, dtype, f"ours-{recipe}{mode}"))
            if ours is not None:
                judged = "yes" if ours <= theirs else "no"
                cells.append((k, n, dtype, f"ours-{recipe}{mode}", f"{theirs / ours:.2f}x", judged))
    if not cells:
        return ""
    columns = ("K", "N", "weight", "row", "speed over torchao compiled", "at or below its time")
    return "\n\n" + markdown_table(columns, cells)


def main() -> int:
    args = arguments()
    device = pick_device(args.device)
    if args.tiny:
        args.rounds, args.iterations = min(args.rounds, 2), min(args.iterations, 2)
    rows = choose_rows(args.rows, rows_known(), DEFAULT_ROWS)
    if device.type != "cuda":  # Triton kernels, which a CPU cannot run
        rows = [row for row in rows if row not in ("torchao-nocompile", "torchao-blockwise") or args.rows]
        if args.kernels:
            raise SystemExit("--kernels needs a GPU")
    tokens = args.tokens or (128 if args.tiny else 16384)
    shapes = TINY_SHAPES if args.tiny else SHAPES
    if args.shapes:
        shapes = tuple((int(k), int(n)) for k, n in (shape.split("x") for shape in args.shapes.split(",")))
    common = versions(device)
    print(", ".join(f"{key} {value}" for key, value in common.items()), f"T={tokens}")
    records: list[dict[str, Any]] = []
    failed = False
    for dtype in args.weight_dtypes.split(","):
        for shape in shapes:
            begin = time.perf_counter()
            times, failures = bench_shape(rows, tokens, shape, getattr(torch, dtype), args)
            failed |= bool(failures)
            new = records_of(times, tokens, shape, dtype, common)
            append_records(args.out, new)
            records += new
            print(f"K={shape[0]} N={shape[1]} {dtype}: {time.perf_counter() - begin:.0f} s", flush=True)
            gc.collect()  # hooks and modules hold on to each other
    print("\n" + table(records) + verdict(records))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
