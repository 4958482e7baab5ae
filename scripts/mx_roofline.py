#!/usr/bin/env python3
"""What MXFP8 can gain on Blackwell, on paper: FLOPs and bytes of a step's kernels, and the time they take at best.

    python scripts/mx_roofline.py                     # the dense and the MoE job, B200 and GB200
    python scripts/mx_roofline.py --jobs dense --devices B200

A kernel takes as long as the slower of its FLOPs and its bytes allow:

    t = max(FLOPs / (peak * EFFICIENCY), bytes / (bandwidth * EFFICIENCY))

Peaks and bandwidths are those of datasheets, dense. The efficiencies are what was reached on an H200
(docs/performance.md): 0.70 of the peak in bf16 products, 0.68 in 8-bit ones, 0.88 of the bandwidth. T tokens of a GPU,
a linear of N x K, b = 1 + 1/32 bytes of a code and its share of a scale:

    product in bf16, MXFP8        2 T N K FLOPs, three of them; 2 (T K + N K + T N) bytes, b (T K + N K) + 2 T N
    cast of an activation         2 T K read, 2 b T K written: both orientations from one read
    cast of a gradient            2 T N read, 2 b T N written
    cast of a weight              4 N K read, b N K written, in the forward and in the backward pass

In bf16 a weight of fp32 is cast too: 4 N K read, 2 N K written, once. Attention, norms, SwiGLU, the loss and the
optimizer are the same in both. What comes out is a bound: communication is taken to be hidden, no kernel to wait for
another, nothing to be recomputed, and linears that read one tensor to share its codes.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from bench_common import markdown_table

from titan_fp8.models.arithmetic import count_parameters
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.flavors import resolve_dims

BF16_EFFICIENCY, MX_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.70, 0.68, 0.88
CODE = 1 + 1 / 32
"""Bytes of a code with its share of a scale."""


@dataclass(frozen=True)
class Device:
    """Dense peaks in FLOP/s and bandwidth in bytes a second, from the vendor's datasheet."""

    bf16: float
    mx: float
    bandwidth: float


DEVICES = {"B200": Device(2.25e15, 4.5e15, 8e12), "GB200": Device(2.5e15, 5e15, 8e12)}


@dataclass(frozen=True)
class Job:
    """A training, of which `tokens` are a GPU's in a step, and states are divided over `ranks`.

    Attributes:
        high_precision: names of linears that stay in bf16.
        published: speedups over bf16 that were published, in words.
    """

    family: str
    flavor: str
    tokens: int
    seq_len: int
    ranks: int
    high_precision: tuple[str, ...]
    published: str


JOBS = {
    "dense": Job("llama3", "8B", 8192, 8192, 8, (), "1.20 (mxfp8_cublas), 1.16 (mxfp8_cublas_rceil)"),
    "moe": Job("llama4", "17bx16e", 10 * 8192, 8192, 256, ("wk", "wv"), "1.203 (experts and linears)"),
}


@dataclass(frozen=True)
class Kernel:
    """Of a step: what it computes and moves, in bf16 and in MXFP8; `rate` is the tensor cores' of its operands."""

    name: str
    flops: float
    bytes_bf16: float
    bytes_mx: float
    in_mx: bool = False

    def seconds(self, device: Device, *, mx: bool) -> float:
        """At best, on a device."""
        peak = device.mx * MX_EFFICIENCY if mx and self.in_mx else device.bf16 * BF16_EFFICIENCY
        moved = self.bytes_mx if mx else self.bytes_bf16
        return max(self.flops / peak, moved / (device.bandwidth * BANDWIDTH_EFFICIENCY))


def linears_of(dims: ModelDims, job: Job) -> list[tuple[str, int, int, int, int]]:
    """(name, tokens, N, K, how many weights) of each kind of linear of a step, experts included."""
    q, kv = dims.n_heads * dims.head_width, dims.kv_heads * dims.head_width
    layers, tokens, dim = dims.n_layers, job.tokens, dims.dim
    found = [
        ("wq", tokens, q, dim, layers),
        ("wk", tokens, kv, dim, layers),
        ("wv", tokens, kv, dim, layers),
        ("wo", tokens, dim, q, layers),
    ]
    hidden = dims.ffn_hidden_dim if dims.n_experts is None else dims.moe_ffn_dim or dims.ffn_hidden_dim
    shared = "feed_forward" if dims.n_experts is None else "shared_experts"
    for name, n, k in (("w1", hidden, dim), ("w3", hidden, dim), ("w2", dim, hidden)):
        found.append((f"{shared}.{name}", tokens, n, k, layers))
        if dims.n_experts is not None:
            # With experts dealt out, a rank multiplies as many rows as it has choices, by the experts that it has.
            found.append((f"experts.{name}", tokens * dims.top_k, n, k, layers))
    return found


def kernels_of(job: Job) -> list[Kernel]:
    """The kernels of a step of one GPU, alike ones together."""
    dims = resolve_dims(job.family, job.flavor, {})
    found: dict[str, Kernel] = {}

    def add(kernel: Kernel) -> None:
        before = found.get(kernel.name, Kernel(kernel.name, 0, 0, 0, kernel.in_mx))
        found[kernel.name] = Kernel(
            kernel.name,
            before.flops + kernel.flops,
            before.bytes_bf16 + kernel.bytes_bf16,
            before.bytes_mx + kernel.bytes_mx,
            kernel.in_mx,
        )

    cast_inputs: set[str] = set()
    for name, t, n, k, count in linears_of(dims, job):
        in_mx = name not in job.high_precision
        operands = t * k + n * k
        what = "products of experts" if name.startswith("experts") else "products of linears"
        add(
            Kernel(
                what if in_mx else "products in bf16",
                count * 6 * t * n * k,
                count * 3 * 2 * (operands + t * n),
                count * 3 * ((CODE if in_mx else 2) * operands + 2 * t * n),
                in_mx,
            )
        )
        weights = 4 * n * k + 2 * n * k, (2 * (4 * n * k + CODE * n * k) if in_mx else 6 * n * k)
        add(Kernel("casts of weights", 0, count * weights[0], count * weights[1]))
        if not in_mx:
            continue
        add(Kernel("casts of gradients", 0, 0, count * (2 + 2 * CODE) * t * n))
        # wq, wk, wv have one input, and w1, w3.
        source = {"wk": "wq", "wv": "wq"}.get(name, name.replace("w3", "w1"))
        if source not in cast_inputs:
            cast_inputs.add(source)
            add(Kernel("casts of activations", 0, 0, count * (2 + 2 * CODE) * t * k))
    for kernel in _others(dims, job):
        add(kernel)
    return list(found.values())


def _others(dims: ModelDims, job: Job) -> Iterable[Kernel]:
    """What is the same in bf16 and MXFP8."""
    tokens, layers, dim = job.tokens, dims.n_layers, dims.dim
    hidden = dims.moe_ffn_dim or dims.ffn_hidden_dim
    head = tokens * dim * dims.vocab_size
    yield Kernel("output layer and loss", 6 * head, 6 * tokens * dims.vocab_size, 6 * tokens * dims.vocab_size)
    # Causal: half of 2 products of S x S x heads forward, and of 5 backward.
    attention = layers * 7 * tokens * job.seq_len * dims.n_heads * dims.head_width
    yield Kernel("attention", attention, 0, 0)
    routed = dims.top_k if dims.n_experts is not None else 0
    feed_forwards = 1 + routed
    # Norm and residual 5 reads and writes of the stream forward and 7 backward, twice; SwiGLU 3 and 5 of the hidden.
    elementwise = layers * tokens * 2 * (24 * dim + 8 * feed_forwards * hidden)
    permutation = layers * tokens * routed * dim * 2 * 8
    moved = elementwise + permutation
    yield Kernel("norms, SwiGLU, permutation", 0, moved, moved)
    states = 28 * count_parameters(dims) / job.ranks
    yield Kernel("optimizer", 0, states, states)


def table(job: Job, device: Device) -> str:
    """A line a kernel, and the sums."""
    lines, sums = [], [0.0, 0.0]
    for kernel in kernels_of(job):
        times = [1e3 * kernel.seconds(device, mx=mx) for mx in (False, True)]
        sums = [total + time for total, time in zip(sums, times, strict=True)]
        lines.append(
            (
                kernel.name,
                f"{kernel.flops / 1e12:,.0f}" if kernel.flops else "",
                f"{kernel.bytes_bf16 / 1e9:,.1f}",
                f"{kernel.bytes_mx / 1e9:,.1f}",
                *(f"{time:.1f}" for time in times),
            )
        )
    lines.append(("**step**", "", "", "", *(f"**{total:.1f}**" for total in sums)))
    header = ("a step of one GPU", "TFLOP", "GB, bf16", "GB, MXFP8", "ms, bf16", "ms, MXFP8")
    return f"{markdown_table(header, lines)}\n\nPredicted {sums[0] / sums[1]:.2f}; published {job.published}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS), help="comma-separated (default: all)")
    parser.add_argument("--devices", default=",".join(DEVICES), help="comma-separated (default: all)")
    args = parser.parse_args()
    for name in args.jobs.split(","):
        for device in args.devices.split(","):
            job = JOBS[name]
            print(f"\n{name}: {job.family} {job.flavor} on {device}\n\n{table(job, DEVICES[device])}")


if __name__ == "__main__":
    main()
