#!/usr/bin/env python3
"""Experts forward and backward, in bf16 and in float8 with all casts: where does float8 pay?

    python scripts/bench_grouped.py             # the shapes of Llama 4 Scout, DeepSeek-V2-Lite and Qwen3-30B-A3B
    python scripts/bench_grouped.py --grid      # over a grid of sizes, and which of them gain nothing
    python scripts/bench_grouped.py --device cpu --tiny

Rows are sorted by expert already. What is timed is the whole feed-forward of all experts: three grouped products
forward, six backward, SwiGLU between them and, in float8, every cast of activations and gradients. Codes of the weights
are made before, as they are once an optimizer step; `weights` times that. `balanced` gives each expert as many rows,
`skewed` a quarter of them to one expert and nothing to a quarter of the experts.

`--grid` ends with a table of bf16's time over float8's and a suggestion of corners (largest features, largest hidden
features) of the experts to leave in bf16, as `bench_filter.py` does it for linears.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench_common import Contestant, append_records, markdown_table, pick_device, take_turns
from bench_filter import suggestion
from torch import Tensor

from titan_fp8.kernels.grouped import ALIGNMENT
from titan_fp8.models.moe import Experts
from titan_fp8.quantization.grouped import Float8GroupedConfig, cast_experts, grouped_feed_forward

SHAPES = {
    "Llama 4 Scout": (16, 5120, 8192, 32768),
    "DeepSeek-V2-Lite": (64, 2048, 1408, 98304),
    "Qwen3-30B-A3B": (128, 2048, 768, 131072),
}
"""Experts, features, hidden features, rows."""
TINY = {"tiny": (4, 64, 32, 256)}
LOADS = ("balanced", "skewed")
GRID = (512, 768, 1408, 2048, 4096, 8192)
"""Features, and hidden features."""
GRID_EXPERTS, GRID_ROWS = 32, 65536
TINY_GRID = (32, 64)
MARGIN = 0.02
"""Least gain that counts as one, above the noise."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="folder for results.jsonl")
    add("--device", default="cuda")
    add("--tiny", action="store_true", help="small shapes, which show that everything runs")
    add("--grid", action="store_true", help=f"{GRID_EXPERTS} experts of all sizes of a grid, with balanced loads")
    add("--rounds", type=int, default=5)
    add("--iterations", type=int, default=5, help="of each contestant in a round")
    return parser.parse_args()


def counts_of(load: str, experts: int, rows: int) -> list[int]:
    """Rows of each expert, multiples of the alignment, about `rows` in all."""
    if load == "balanced":
        shares = [1.0] * experts
    else:
        shares = [0.0] * (experts // 4) + [1.0] * (experts - experts // 4)
        shares[-1] = sum(shares[:-1]) / 3
    total = sum(shares)
    return [int(rows * share / total) // ALIGNMENT * ALIGNMENT for share in shares]


def contestants(experts: int, dim: int, hidden: int, counts: list[int], device: torch.device) -> dict[str, Contestant]:
    """bf16, float8, and the cast of the weights."""
    module = Experts(experts, dim, hidden, 0.02).to(device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02)
    weights = [parameter.detach().bfloat16().requires_grad_() for parameter in (module.w1, module.w3, module.w2)]
    ends = torch.tensor(counts, device=device).cumsum(0).int()
    x = torch.randn(sum(counts), dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    codes = [cast_experts(parameter) for parameter in (module.w1, module.w3, module.w2)]
    config = Float8GroupedConfig(emulate=device.type == "cpu")
    module.weights = lambda: tuple(weights)

    def clear() -> None:
        for tensor in (x, *weights):
            tensor.grad = None

    def backward(y: Tensor) -> Any:
        y.backward(grad)

    return {
        "bf16": Contestant(clear, lambda: backward(module(x, ends))),
        "float8": Contestant(clear, lambda: backward(grouped_feed_forward(x, weights, codes, ends, config))),
        "weights": Contestant(clear, lambda: [cast_experts(w) for w in (module.w1, module.w3, module.w2)]),
    }


def shapes_of(args: argparse.Namespace) -> list[tuple[str, int, int, int, int]]:
    """What is measured: name, experts, features, hidden features, rows."""
    if not args.grid:
        return [(name, *shape) for name, shape in (TINY if args.tiny else SHAPES).items()]
    sizes, experts, rows = (TINY_GRID, 4, 256) if args.tiny else (GRID, GRID_EXPERTS, GRID_ROWS)
    return [("grid", experts, dim, hidden, rows) for dim, hidden in product(sizes, sizes)]


def main() -> int:
    args = arguments()
    device = pick_device(args.device)
    lines, records = [], []
    gains: dict[tuple[int, int], float] = {}
    for name, experts, dim, hidden, rows in shapes_of(args):
        for load in LOADS[:1] if args.grid else LOADS:
            counts = counts_of(load, experts, rows)
            timed = take_turns(
                contestants(experts, dim, hidden, counts, device),
                device,
                rounds=args.rounds,
                iterations=args.iterations,
            )
            ms = {contestant: times.median_ms for contestant, times in timed.items()}
            flops = 9 * 2 * sum(counts) * dim * hidden
            rates = [flops / ms[kind] / 1e9 for kind in ("bf16", "float8")]
            spread = max(times.spread for times in timed.values())
            lines.append(
                (
                    name, f"{experts} x ({dim}, {hidden})", load, f"{ms['bf16']:.2f}", f"{ms['float8']:.2f}",
                    f"{ms['bf16'] / ms['float8']:.2f}x", *(f"{rate:.0f}" for rate in rates), f"{ms['weights']:.2f}",
                    f"{100 * spread:.1f} %",
                )
            )  # fmt: skip
            records.append({"model": name, "load": load, "counts": counts, "dim": dim, "hidden": hidden, "ms": ms})
            gains[dim, hidden] = ms["bf16"] / ms["float8"]
            print(json.dumps(records[-1]), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        append_records(args.out, records)
    columns = ("experts of", "shape", "load", "bf16, ms", "float8, ms", "ratio", "bf16, TFLOP/s", "float8, TFLOP/s")
    print(f"\n{markdown_table((*columns, 'weights, ms', 'spread'), lines)}")
    if args.grid:
        print(suggestion("float8, features downwards and hidden features to the right", gains, MARGIN))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
