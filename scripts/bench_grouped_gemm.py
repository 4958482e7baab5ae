#!/usr/bin/env python3
"""Grouped products of float8 codes alone: PyTorch's with and without fast accumulation, ours, and bf16's.

    python scripts/bench_grouped_gemm.py             # at the shapes of bench_grouped.py
    python scripts/bench_grouped_gemm.py --sweep     # ours with other tiles
    python scripts/bench_grouped_gemm.py --loads skewed

By rows is a product of tokens with their experts' weights, `[M, K] x [E, N, K]`, with the hidden features as N; by
columns that for gradients of weights, with a result in bf16 and, ours, in fp32. TFLOP/s are of medians; `issue` is what
the CPU takes to start one.
"""

import argparse
from collections.abc import Iterator

import torch
from bench_common import Contestant, markdown_table, take_turns
from bench_grouped import LOADS, SHAPES, counts_of
from torch import Tensor

from titan_fp8.kernels.grouped import gemm_kernel
from titan_fp8.kernels.grouped.gemm_kernel import GemmTile
from titan_fp8.quantization import grouped_gemm

KINDS = ("rows", "columns")
BLOCKS = (
    (128, 128, 128, 8, 3), (128, 128, 128, 8, 4), (64, 128, 128, 4, 3), (64, 128, 128, 4, 4), (64, 256, 128, 8, 3),
    (128, 64, 128, 4, 3), (256, 64, 128, 8, 3), (256, 128, 128, 8, 3), (256, 128, 128, 8, 4), (128, 128, 256, 8, 2),
)  # fmt: skip
TILES = (
    *(GemmTile(*blocks) for blocks in BLOCKS),
    GemmTile(128, 128, 128, 8, 3, registers=128),
    GemmTile(128, 128, 128, 8, 3, band=8),
    GemmTile(128, 128, 128, 8, 3, band=64),
)


class Operands:
    """Codes and scales of a product by rows and of one by columns."""

    def __init__(self, shape: tuple[int, int, int, int], load: str) -> None:
        experts, self.k, self.n, rows = shape
        counts = counts_of(load, experts, rows)
        self.ends = torch.tensor(counts, device="cuda").cumsum(0).int()
        self.m = sum(counts)
        self.x, self.w = self._codes(self.m, self.k), self._codes(experts, self.n, self.k)
        self.g_t, self.x_t = self._codes(self.n, self.m), self._codes(self.k, self.m)
        ones = [(self.m, 1), (experts, self.n), (experts, self.n), (experts, self.k)]
        self.x_scale, self.w_scale, self.g_scale, self.xt_scale = (torch.ones(s, device="cuda") for s in ones)

    def _codes(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)

    def rows(self) -> tuple[Tensor, ...]:
        return self.x, self.w, self.x_scale, self.w_scale, self.ends

    def columns(self) -> tuple[Tensor, ...]:
        return self.g_t, self.x_t, self.g_scale, self.xt_scale, self.ends


def of_torch(o: Operands, kind: str, fast: bool) -> Tensor:
    """PyTorch's product."""
    a, b, scale_a, scale_b, ends = getattr(o, kind)()
    scale_b = scale_b.flatten() if kind == "columns" else scale_b
    result = {"offs": ends, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
    return grouped_gemm._scaled_grouped_mm(a, b.transpose(-2, -1), scale_a.flatten(), scale_b, **result)


def ours(o: Operands, kind: str, fast: bool, dtype: torch.dtype, tile: GemmTile | None = None) -> Tensor:
    """Our product; tile: in place of the static one."""
    name = "COLUMNS_TILE" if kind == "columns" else "FAST_ROWS_TILE" if fast else "ROWS_TILE"
    kept = getattr(gemm_kernel, name)
    setattr(gemm_kernel, name, tile or kept)
    try:
        a, b, scale_a, scale_b, ends = getattr(o, kind)()
        if kind == "columns":
            return gemm_kernel.grouped_mm_columns(a, b, scale_a, scale_b, ends, dtype)
        return gemm_kernel.grouped_mm_rows(a, b, scale_a, scale_b, ends, dtype, fast)
    finally:
        setattr(gemm_kernel, name, kept)


def contestants(o: Operands, kind: str, sweep: bool) -> Iterator[tuple[str, Contestant]]:
    """What is timed."""

    def nothing() -> None:
        pass

    if sweep:
        for tile in TILES:
            for fast in (False, True)[: 1 + (kind == "rows")]:
                name = f"{'fast' if fast else 'exact'} {tuple(tile)}"
                yield name, Contestant(nothing, lambda t=tile, f=fast: ours(o, kind, f, torch.bfloat16, t))
        return
    x, w = o.x.bfloat16(), o.w.bfloat16().transpose(-2, -1)
    g_t, x = (o.g_t.bfloat16(), o.x_t.bfloat16().t()) if kind == "columns" else (x, w)
    yield "bf16", Contestant(nothing, lambda: torch.nn.functional.grouped_mm(g_t, x, offs=o.ends))
    for fast in (True, False):
        name = "fast" if fast else "exact"
        yield f"PyTorch's, {name}", Contestant(nothing, lambda f=fast: of_torch(o, kind, f))
        if kind == "rows" or not fast:
            yield f"ours, {name}", Contestant(nothing, lambda f=fast: ours(o, kind, f, torch.bfloat16))
    yield "ours, exact, result in fp32", Contestant(nothing, lambda: ours(o, kind, False, torch.float32))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="ours with other tiles")
    parser.add_argument("--loads", default="balanced", help="comma-separated: " + ", ".join(LOADS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, shape in SHAPES.items():
        for load in args.loads.split(","):
            o = Operands(shape, load)
            for kind in KINDS:
                tried = dict(contestants(o, kind, args.sweep))
                for key in [key for key, each in tried.items() if not runs(key, each)]:
                    del tried[key]
                times = take_turns(tried, torch.device("cuda"), rounds=args.rounds, iterations=4)
                flops = 2 * o.m * o.n * o.k
                lines = [
                    (key, f"{t.median_ms:.3f}", f"{flops / t.median_ms / 1e9:.0f}", f"{t.median_host_ms:.3f}")
                    for key, t in sorted(times.items(), key=lambda item: item[1].median_ms)
                ]
                print(f"\n{name}, {kind}, {load}\n\n{markdown_table(('product', 'ms', 'TFLOP/s', 'issue, ms'), lines)}")
            torch.cuda.empty_cache()
    return 0


def runs(name: str, contestant: Contestant) -> bool:
    """Whether it does, and how it fails otherwise: a tile may need more than the device has."""
    try:
        contestant.run()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
