"""Bandwidth of the fused producers (RMSNorm, add + RMSNorm, SwiGLU, its backward -> float8) at Llama 8B shapes, and of
the backward of RMSNorm, which writes no float8, without and with the gradient of the residual stream.

    python scripts/bench_producers.py             # T = 16384 tokens, every scale granularity
    python scripts/bench_producers.py --sweep     # which block sizes are best on this GPU

Each figure is the median of `--repeats` timings with device events on random data larger than the L2 cache. GB/s counts
the bytes that the passes of a producer must move: each input once per pass, each output once. Beside it stands the time
of the way that is not fused: PyTorch's operator in bf16 and the plain cast of its result.
"""

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_casts import Timer
from torch import Tensor

from titan_fp8.kernels import producers
from titan_fp8.kernels.float8 import E4M3, E5M2
from titan_fp8.kernels.producers import BLOCK, GRANULARITIES, ROW, TENSOR, Cast, reference

DIM, HIDDEN = 4096, 14336


class Case(NamedTuple):
    """One producer in one form; `values` times the bytes a value is what it moves."""

    name: str
    granularity: str
    bytes_a_value: int
    values: int
    call: Callable[[], Any]
    unfused: Callable[[], Any]


def cases(tokens: int) -> Iterator[Case]:
    """Every producer in every granularity, by rows and in both layouts."""

    def random(features: int) -> Tensor:
        return torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)

    x, branch, weight = random(DIM), random(DIM), torch.ones(DIM, device="cuda")
    grad, gate, up = random(HIDDEN), random(HIDDEN), random(HIDDEN)

    def eager_norm(total: Tensor) -> Tensor:
        return F.rms_norm(total, (DIM,), weight.bfloat16(), 1e-5)

    def eager_backward(cast: Cast) -> Any:
        silu = F.silu(gate)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return reference.quantize(grad_gate, cast), reference.quantize(grad * silu, cast)

    _, rstd, _ = producers.rms_norm(x, None, weight, 1e-5, Cast(ROW, E4M3))

    def eager_norm_backward(grad: Tensor, residual: Tensor | None) -> Any:
        backward = torch.ops.aten._fused_rms_norm_backward.default
        grad_x, grad_weight = backward(grad, x, [DIM], rstd[:, None], weight.bfloat16(), [True, True])
        return grad_x if residual is None else grad_x + residual, grad_weight.float()

    for residual in (None, random(DIM)):
        yield Case(
            "norm backward" if residual is None else "norm backward + residual", "none", 6 if residual is None else 8,
            x.numel(),
            lambda r=residual: producers.rms_norm_backward(branch, x, weight, rstd, r),
            lambda r=residual: eager_norm_backward(branch, r),
        )  # fmt: skip
    for granularity, columns in itertools.product(GRANULARITIES, (False, True)):
        cast = Cast(granularity, E4M3, columns=columns)
        grad_cast = cast._replace(dtype=E5M2 if granularity == TENSOR else E4M3)
        layout = "rows and columns" if columns else "rows"
        norm = 6 if columns else 5 if granularity == TENSOR else 3
        swiglu = {(TENSOR, False): 9, (BLOCK, True): 6}.get((granularity, columns), 10 if columns else 5)
        yield Case(
            f"norm {layout}", granularity, norm, x.numel(),
            lambda c=cast: producers.rms_norm(x, None, weight, 1e-5, c),
            lambda c=cast: reference.quantize(eager_norm(x), c),
        )  # fmt: skip
        yield Case(
            f"add + norm {layout}", granularity, norm + 4, x.numel(),
            lambda c=cast: producers.rms_norm(x, branch, weight, 1e-5, c),
            lambda c=cast: reference.quantize(eager_norm(x + branch), c),
        )  # fmt: skip
        yield Case(
            f"swiglu {layout}", granularity, swiglu, gate.numel(),
            lambda c=cast: producers.swiglu(gate, up, c),
            lambda c=cast: reference.quantize(F.silu(gate) * up, c),
        )  # fmt: skip
        if columns:
            yield Case(
                f"swiglu backward {layout}", granularity, 10 if granularity == BLOCK else 16, gate.numel(),
                lambda c=grad_cast: producers.swiglu_backward(grad, gate, up, c),
                lambda c=grad_cast: eager_backward(c),
            )  # fmt: skip


def copy_rate(tokens: int, timer: Timer) -> float:
    """GB/s of a device copy."""
    source = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source)) / 1e9


def report(tokens: int, timer: Timer) -> None:
    """Print the table."""
    copy = copy_rate(tokens, timer)
    print(f"copy {copy:.0f} GB/s")
    for case in cases(tokens):
        seconds, unfused = timer(case.call), timer(case.unfused)
        rate = case.bytes_a_value * case.values / seconds / 1e9
        bandwidth = f"{1e6 * seconds:8.1f} us {rate:6.0f} GB/s {100 * rate / copy:4.0f} % of copy"
        print(f"  {case.granularity:7} {case.name:33} {bandwidth}; not fused {1e6 * unfused:8.1f} us")


def configurations() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(beginning of a case's name, granularity) -> values to try for the constants of the kernels' modules."""
    from titan_fp8.kernels.float8.bits import Tile
    from titan_fp8.kernels.producers.norm_backward_kernel import Walk
    from titan_fp8.kernels.producers.swiglu_amax_kernel import Amax

    shapes = [(64, 128, 4, None), (64, 128, 8, None), (128, 128, 8, 128), (64, 256, 8, 128), (32, 256, 4, None)]
    shapes += [(64, 64, 4, None), (64, 64, 4, 96), (32, 128, 4, None), (32, 128, 4, 96), (32, 128, 8, None)]
    shapes += [(64, 64, 8, None), (64, 128, 8, 96), (128, 64, 8, None)]
    tiles = [Tile(*shape[:3], band, shape[3]) for shape in shapes for band in (2, 4)]
    blocks = [
        Tile(128, 128, warps, 4, registers)
        for warps, registers in ((4, None), (8, None), (8, 128), (16, None), (16, 64))
    ]
    amaxes = [Amax(16, 128, 16, 4, 2), Amax(32, 128, 16, 4, 2), Amax(16, 256, 16, 4, 2), Amax(16, 256, 16, 8, 3)]
    walks = [
        {"ROW_VALUES_PER_WARP": values, "AMAX_PROGRAMS": programs, "AMAX_STAGES": stages}
        for values, programs, stages in itertools.product((512, 1024), (264, 528, 1056), (1, 2, 3))
    ]
    rows = [
        {"ROW_VALUES_PER_WARP": per_warp, "PROGRAMS": programs, "STAGES": stages}
        for per_warp, programs, stages in itertools.product((512, 1024, 2048), (528, 1056, 2112, 16384), (1, 2, 3))
    ]
    swiglu_rows = [
        {"ROW_VALUES_PER_WARP": per_warp, "ROW_REGISTERS": registers}
        for per_warp, registers in itertools.product((1024, 2048), (None, 48, 64, 80, 96, 128))
    ]
    backward = [
        {"SHORT_ROWS": Walk(programs, warps, stages), "REGISTERS": 65536 // (32 * warps * residents)}
        for (programs, warps, residents), stages in itertools.product(
            ((132, 8, 1), (264, 8, 2), (528, 8, 2), (1056, 8, 2), (396, 8, 3), (132, 16, 1), (264, 16, 2), (528, 4, 4)),
            (1, 2, 3, 4),
        )
    ]
    return {
        ("norm backward", "none"): backward,
        ("norm backward + residual", "none"): backward,
        ("norm rows", ROW): rows,
        ("norm rows", BLOCK): rows,
        ("norm rows", TENSOR): walks,
        ("norm rows and", ROW): [*walks, *({"COLUMNS_TILE": tile} for tile in tiles)],
        ("norm rows and", TENSOR): [{"BOTH_TILE": tile} for tile in tiles],
        ("norm rows and", BLOCK): [{"BLOCK_TILE": tile} for tile in blocks],
        ("swiglu rows", ROW): swiglu_rows,
        ("swiglu rows and", TENSOR): [{"FORWARD_TILE": tile} for tile in tiles],
        ("swiglu rows and", ROW): [
            *({"FORWARD_TILE": tile} for tile in tiles),
            *({"FORWARD_AMAX": amax} for amax in amaxes),
        ],
        ("swiglu rows and", BLOCK): [{"FORWARD_BLOCK_TILE": tile} for tile in blocks],
        ("swiglu backward", TENSOR): [
            *({"BACKWARD_TILE": tile} for tile in tiles),
            *({"BACKWARD_AMAX": amax} for amax in amaxes),
        ],
        ("swiglu backward", ROW): [
            *({"BACKWARD_ROW_TILE": tile} for tile in tiles),
            *({"BACKWARD_AMAX": amax} for amax in amaxes),
        ],
        ("swiglu backward", BLOCK): [{"BACKWARD_BLOCK_TILE": tile} for tile in blocks],
    }


@contextlib.contextmanager
def constants(**values: Any) -> Iterator[None]:
    """Other values for constants of the producers' kernels, inside; `ROW_VALUES_PER_WARP` in both files."""
    from titan_fp8.kernels.producers import norm_backward_kernel, norm_kernel, swiglu_amax_kernel, swiglu_kernel

    modules = norm_backward_kernel, norm_kernel, swiglu_kernel, swiglu_amax_kernel
    owners = [(m, name) for name in values for m in modules if hasattr(m, name)]
    before = [(module, name, getattr(module, name)) for module, name in owners]
    try:
        for module, name in owners:
            setattr(module, name, values[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def sweep(tokens: int, timer: Timer) -> None:
    """Print the best block sizes of each case that has a choice."""
    every = list(cases(tokens))
    for (beginning, granularity), configs in configurations().items():
        case = next(c for c in every if c.granularity == granularity and c.name.startswith(beginning))
        moved = case.bytes_a_value * case.values / 1e12
        rates = [(moved / timer(case.call), "as it is")]
        for config in configs:
            with constants(**config):
                text = ", ".join(f"{name} {value}" for name, value in config.items())
                rates.append((moved / timer(case.call), text))
        print(f"  {granularity} {case.name}: {rates[0][0]:.2f} TB/s as it is; best:")
        for rate, text in sorted(rates, reverse=True)[:4]:
            print(f"    {rate:.2f}  {text}")


def main() -> None:
    """Print the table, or the best block sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, T={arguments.tokens}")
    (sweep if arguments.sweep else report)(arguments.tokens, Timer(arguments.repeats))


if __name__ == "__main__":
    main()
