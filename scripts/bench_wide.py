#!/usr/bin/env python3
"""One float8 product for linears that share their input, beside one each; and the rotary embedding in place.

    python scripts/bench_wide.py                          # Llama 8B, T = 16384, some ten seconds
    python scripts/bench_wide.py --device cpu --tiny      # shows that everything runs

w1 and w3 as one weight of N = 28672, and wq, wk and wv as one of N = 6144, in the three products of a layer:

    output       [T, N]    = x [T, K] @ w.T        w stacked along N
    grad_input   [T, K]    = g [T, N] @ w          g and w stacked along N, which is summed over
    grad_weight  [N, K]    = g.T @ x               g stacked along N

Stacked along N each weight keeps a scale of its own if the product takes a scale a row; along the summed dimension it
cannot, so there all parts share the scale of the tensor, and rowwise the scale of a row. `parts` is one product a
weight; `wide, a scale a row` and `wide, one scale` are one for all. What `parts` of grad_input leave to be added, T K
values each, is not timed: the backward of a norm reads them as they are. The share is the time gained, of that of all
products of a layer, wo and w2 among them, as the recipe has them in parts. Outputs have fast accumulation, gradients
have not; weights' gradients come out in fp32. Times are medians.

The rotary embedding turns queries and keys of 2 x 8192 tokens. In a model it writes to new tensors, since selective
recomputation keeps the outputs of products, which must not be turned twice; `in place` tells what that costs. `strided`
are queries and keys that lie in one wide output.

T tokens, K in features, N out features.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from bench_common import Contestant, Times, markdown_table, pick_device, take_turns, versions
from torch import Tensor

from titan_fp8.kernels.float8 import E4M3, E5M2
from titan_fp8.kernels.rope import rotate
from titan_fp8.quantization.gemm import scaled_mm

K = 4096
GROUPS = {"w1, w3": (14336, 14336), "wq, wk, wv": (4096, 1024, 1024)}
"""N of linears that read the same."""
ALONE = {"wo": (4096, 4096), "w2": (14336, 4096)}
"""(K, N) of the others of a layer."""
TINY_K, TINY_GROUPS, TINY_ALONE = 64, {"w1, w3": (64, 64), "wq, wk, wv": (64, 32, 32)}, {"wo": (64, 64)}
GRAD_FORMATS = {"tensorwise": E5M2, "rowwise": E4M3}
"""Recipe -> format of gradients."""
PRODUCTS = ("output", "grad_input", "grad_weight")
PARTS, ROWS, ONE = "parts", "wide, a scale a row", "wide, one scale"
Call: TypeAlias = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Factor:
    """Codes `[rows, summed]` and their scale, [] or `[rows, 1]`."""

    codes: Tensor
    scale: Tensor

    def by_rows(self) -> "Factor":
        """The same with a scale a row."""
        return Factor(self.codes, self.scale.expand(self.codes.shape[0], 1).contiguous())


def stacked(factors: Sequence[Factor]) -> Factor:
    """One after the other, each with its own scales."""
    rows = [factor.by_rows() for factor in factors]
    return Factor(torch.cat([f.codes for f in rows]), torch.cat([f.scale for f in rows]))


def side_by_side(factors: Sequence[Factor]) -> Factor:
    """Along the summed dimension, with the first one's scales."""
    return Factor(torch.cat([f.codes for f in factors], dim=1), factors[0].scale)


class Operands:
    """Of linears that share their input, in a recipe: random codes, and scales of about 1/100.

    Attributes:
        x, x_t: `[T, K]` and `[K, T]`.
        w, w_t, g, g_t: of each linear `[N, K]`, `[K, N]`, `[T, N]` and `[N, T]`.
    """

    def __init__(self, recipe: str, tokens: int, k: int, sizes: Sequence[int], device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(0)
        self._by_rows, self._device = recipe == "rowwise", device
        of_grad = GRAD_FORMATS[recipe]
        self.x, self.x_t = self._factor(tokens, k, E4M3), self._factor(k, tokens, E4M3)
        self.w = [self._factor(n, k, E4M3) for n in sizes]
        self.w_t = [self._factor(k, n, E4M3) for n in sizes]
        self.g = [self._factor(tokens, n, of_grad) for n in sizes]
        self.g_t = [self._factor(n, tokens, of_grad) for n in sizes]

    def _factor(self, rows: int, summed: int, dtype: torch.dtype) -> Factor:
        shape, kind = (rows, summed), {"device": self._device, "generator": self._generator}
        codes = torch.randn(shape, dtype=torch.bfloat16, **kind).to(dtype)
        scale = torch.rand((rows, 1) if self._by_rows else (), **kind).add_(1).mul_(0.01)
        return Factor(codes, scale)


def product(a: Factor, b: Factor, kind: str) -> Tensor:
    """`a @ b.T` as the product called `kind` is computed."""
    dtype = torch.float32 if kind == "grad_weight" else torch.bfloat16
    emulate = not a.codes.is_cuda
    return scaled_mm(a.codes, b.codes, a.scale, b.scale, None, dtype, kind == "output", emulate)


def calls(o: Operands, recipe: str, kind: str) -> dict[str, Call]:
    """What is timed of one product."""
    if kind == "grad_input":
        g, w_t = side_by_side(o.g), side_by_side(o.w_t)
        return {
            PARTS: lambda: [product(a, b, kind) for a, b in zip(o.g, o.w_t, strict=True)],
            ROWS if recipe == "rowwise" else ONE: lambda: [product(g, w_t, kind)],
        }
    if kind == "output":
        pairs, wide = [(o.x, w) for w in o.w], (o.x.by_rows(), stacked(o.w))
    else:
        pairs, wide = [(g_t, o.x_t) for g_t in o.g_t], (stacked(o.g_t), o.x_t.by_rows())
    found: dict[str, Call] = {
        PARTS: lambda: [product(a, b, kind) for a, b in pairs],
        ROWS: lambda: [product(*wide, kind)],
    }
    if recipe == "tensorwise":
        one = [Factor(factor.codes, pairs[0][number].scale) for number, factor in enumerate(wide)]
        found[ONE] = lambda: [product(*one, kind)]
    return found


def measured(found: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, Times]:
    """Their times, of those that run; why others do not is printed."""
    contestants = {}
    for name, call in found.items():
        try:
            call()
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            continue
        contestants[name] = Contestant(lambda: None, call)
    return take_turns(contestants, device, rounds=rounds, iterations=8 if device.type == "cuda" else 1)


def products(recipe: str, args: argparse.Namespace) -> list[tuple[str, ...]]:
    """Lines of the table for a recipe."""
    times: dict[tuple[str, str], dict[str, Times]] = {}
    for group, sizes in args.groups.items():
        operands = Operands(recipe, args.tokens, args.k, sizes, args.device)
        for kind in PRODUCTS:
            times[group, kind] = measured(calls(operands, recipe, kind), args.device, args.rounds)
        del operands
    layer_ms = sum(each[PARTS].median_ms for each in times.values())
    for k, n in args.alone.values():
        operands = Operands(recipe, args.tokens, k, [n], args.device)
        for kind in PRODUCTS:
            parts = {PARTS: calls(operands, recipe, kind)[PARTS]}
            layer_ms += measured(parts, args.device, args.rounds)[PARTS].median_ms
        del operands
    lines = []
    for (group, kind), each in times.items():
        parts_ms = each[PARTS].median_ms
        for name in (name for name in each if name != PARTS):
            gain_ms = parts_ms - each[name].median_ms
            gains = f"{gain_ms:+.3f}", f"{100 * gain_ms / layer_ms:+.2f} %"
            lines.append((recipe, group, kind, f"{parts_ms:.3f}", name, f"{each[name].median_ms:.3f}", *gains))
    return [*lines, (recipe, "a layer", "all in parts", f"{layer_ms:.3f}", "", "", "", "")]


def rope_calls(sequences: int, seq_len: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The rotary embedding of 32 query and 8 key heads."""
    heads, kv_heads, width = 32, 8, 128
    wide = torch.randn(sequences, seq_len, heads + 2 * kv_heads, width, device=device, dtype=torch.bfloat16)
    strided = list(wide.split([heads, kv_heads, kv_heads], dim=2)[:2])
    dense = [x.contiguous() for x in strided]
    angles = torch.rand(seq_len, width // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    found: dict[str, Callable[[], object]] = {
        "new tensors": lambda: rotate(dense, cos, sin),
        "new tensors, strided": lambda: rotate(strided, cos, sin),
    }
    if device.type == "cuda":
        from titan_fp8.kernels.rope import kernel

        shapes, strides = tuple(x.shape for x in dense), tuple(x.stride() for x in dense)
        blocks = kernel.VALUES, kernel.VALUES_PER_WARP
        # A program has read all of a token before it writes.
        pointers = (*dense, cos, sin, *dense)
        found["in place"] = lambda: kernel._launch(pointers, shapes, strides, dense[0].dtype, False, *blocks)
    return found


def rope(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """Lines of its table."""
    sequences, seq_len = (1, 16) if args.tiny else (2, 8192)
    times = measured(rope_calls(sequences, seq_len, args.device), args.device, args.rounds)
    moved = 2 * sequences * seq_len * 40 * 128 * 2
    return [(name, f"{each.median_ms:.4f}", f"{moved / each.median_ms / 1e6:,.0f}") for name, each in times.items()]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipes", default=",".join(GRAD_FORMATS), help="comma-separated (default: all)")
    add("--tokens", type=int, help="T (default: 16384)")
    add("--rounds", type=int, default=4, help="blocks of eight timed iterations for each")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="a CPU emulates float8")
    add("--tiny", action="store_true", help="small shapes")
    args = parser.parse_args(argv)
    args.recipes = args.recipes.split(",")
    unknown = [recipe for recipe in args.recipes if recipe not in GRAD_FORMATS]
    if unknown:
        raise SystemExit(f"--recipes: no such recipe here: {', '.join(unknown)}; known: {', '.join(GRAD_FORMATS)}")
    args.device = pick_device(args.device)
    args.tokens = args.tokens or (32 if args.tiny else 16384)
    args.k, args.groups, args.alone = (TINY_K, TINY_GROUPS, TINY_ALONE) if args.tiny else (K, GROUPS, ALONE)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    print(", ".join(f"{key} {value}" for key, value in versions(args.device).items()))
    lines = list(itertools.chain.from_iterable(products(recipe, args) for recipe in args.recipes))
    columns = ("recipe", "linears", "product", "parts, ms", "in one", "ms", "gain, ms", "share of the layer's products")
    print(f"\nT = {args.tokens}, K = {args.k}\n\n{markdown_table(columns, lines)}")
    print(f"\n{markdown_table(('rotary embedding', 'ms', 'GB/s'), rope(args))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
