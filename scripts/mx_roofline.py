#!/usr/bin/env python3
"""What MXFP8 can gain on Blackwell, on paper: FLOPs and bytes of a step's kernels, and the time they take at best.

    python scripts/mx_roofline.py                     # the dense and the MoE job, B200 and GB200
    python scripts/mx_roofline.py --jobs dense --devices B200 --products      # each product of each linear of a layer

A kernel takes as long as the slower of its FLOPs and its bytes allow:

    t = max(FLOPs / (peak * EFFICIENCY), bytes / (bandwidth * EFFICIENCY))

Peaks and bandwidths are those of datasheets, dense. The efficiencies are what was measured on an H200, as parts of what
its datasheet says: products of Llama's shapes in bf16 at 660 to 715 of 989 TFLOP/s, in float8 at 1,318 to 1,347 of
1,979, a copy at 4.23 of 4.8 TB/s. T tokens of a GPU, a linear of N x K, b = 1 + 1/32 bytes of a code and its share of a
scale, R ranks that have a shard each:

    kernel                              FLOPs     bytes in bf16          bytes in MXFP8
    forward product                     2 T N K   2 (T K + N K + T N)    b (T K + N K) + 2 T N
    grad_input                          2 T N K   2 (T N + N K + T K)    b (T N + N K) + 2 T K
    grad_weight                         2 T N K   2 (T N + T K + N K)    b (T N + T K) + 2 N K
    cast of a weight                              6 N K / R              2 (4 + b) N K
    cast of an activation                                                (2 + 2 b) T K
    cast of a gradient                                                   (2 + 2 b) T N

In bf16 a rank casts its shard of fp32 before it is gathered. MXFP8 without an all-gather of codes gathers fp32, and
casts all of it in the forward and in the backward pass; a linear in high precision beside it, 6 N K. Activations and
gradients are cast in both orientations from one read, and linears that read one tensor share its codes. Experts, one on
each rank, keep no hidden: it is cast by rows in the forward pass, (2 + b) T K, and in the backward pass made again,
6 T K, and cast by columns, (2 + b) T K.

The same in both are, of a layer's width D, queries Q and keys KV wide, hidden H, vocabulary V, sequences of S:

    output layer and loss               6 T D V            6 (T D + D V + T V) and 4 T V
    attention, causal                   7 T S Q            12 T (Q + KV)
    norms and residuals, SwiGLU                            48 T D, 16 T H for each feed-forward of a token
    permutation of tokens to experts                       16 T D
    optimizer                                              28 a parameter, / R

What comes out is a bound: communication is taken to be hidden, no kernel to wait for another, and nothing to be
recomputed. Beside it stand two readings of the bf16 step that was published, which takes longer: that all of the
difference is the same in MXFP8, and that all of it is kernels that are slower than the bound by one factor; and the mix
of the two that gives the speedup which was published.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace

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
        expert_ranks: over which experts are dealt out, one each.
        high_precision: names of linears that stay in bf16.
        device: that of the published runs.
        published_tokens_s: of a GPU in bf16.
        published: speedups over bf16 by name.
    """

    family: str
    flavor: str
    tokens: int
    seq_len: int
    ranks: int
    expert_ranks: int
    high_precision: tuple[str, ...]
    device: str
    published_tokens_s: float
    published: dict[str, float]

    @property
    def dims(self) -> ModelDims:
        """Of its model."""
        return resolve_dims(self.family, self.flavor, {})


DENSE_PUBLISHED = {"mxfp8_cublas": 1.200, "mxfp8_cublas_rceil": 1.161}
JOBS = {
    "dense": Job("llama3", "8B", 8192, 8192, 8, 1, (), "B200", 8307.5, DENSE_PUBLISHED),
    "moe": Job(
        "llama4", "17bx16e", 10 * 8192, 8192, 256, 16, ("wk", "wv"), "GB200", 6169, {"experts and linears": 1.203}
    ),
}


@dataclass(frozen=True)
class Linear:
    """`count` linears of N x K that multiply `tokens` rows each in a step; of experts, those of one rank."""

    name: str
    tokens: int
    n: int
    k: int
    count: int
    in_mx: bool

    @property
    def is_expert(self) -> bool:
        """Whether its rows are sorted by expert."""
        return self.name.startswith("experts")

    @property
    def reads(self) -> str:
        """What its input is: wq, wk and wv have one, and so have w1 and w3."""
        return {"wk": "wq", "wv": "wq"}.get(self.name, self.name.replace("w3", "w1"))


@dataclass(frozen=True)
class Kernel:
    """`count` of a step: what one computes and moves, in bf16 and in MXFP8; `group` is its line in the table."""

    group: str
    name: str
    flops: float
    bytes_bf16: float
    bytes_mx: float
    count: int = 1
    in_mx: bool = False

    def seconds(self, device: Device, *, mx: bool) -> float:
        """All of them at best, on a device."""
        peak = device.mx * MX_EFFICIENCY if mx and self.in_mx else device.bf16 * BF16_EFFICIENCY
        moved = self.bytes_mx if mx else self.bytes_bf16
        return self.count * max(self.flops / peak, moved / (device.bandwidth * BANDWIDTH_EFFICIENCY))


def linears_of(job: Job) -> list[Linear]:
    """The kinds of linear of a step but for the output layer, experts included."""
    dims = job.dims
    q, kv = dims.n_heads * dims.head_width, dims.kv_heads * dims.head_width
    layers, tokens, dim = dims.n_layers, job.tokens, dims.dim
    found = [("wq", tokens, q, dim), ("wk", tokens, kv, dim), ("wv", tokens, kv, dim), ("wo", tokens, dim, q)]
    hidden, where = dims.ffn_hidden_dim, "feed_forward"
    if dims.n_experts is not None:
        assert all(dims.has_experts(layer) for layer in range(layers))
        assert dims.n_experts == job.expert_ranks, "a rank has one expert"
        hidden, where = dims.n_shared_experts * dims.expert_hidden_dim, "shared_experts"
    gated = (("w1", hidden, dim), ("w3", hidden, dim), ("w2", dim, hidden))
    found += [(f"{where}.{name}", tokens, n, k) for name, n, k in gated]
    if dims.n_experts is not None:
        # With loads that are even, a rank multiplies as many rows as its tokens have choices.
        rows, hidden = tokens * dims.top_k, dims.expert_hidden_dim
        gated = (("w1", hidden, dim), ("w3", hidden, dim), ("w2", dim, hidden))
        found += [(f"experts.{name}", rows, n, k) for name, n, k in gated]
    return [Linear(*each, layers, each[0] not in job.high_precision) for each in found]


def products_of(linear: Linear) -> Iterable[Kernel]:
    """The three products of a linear."""
    t, n, k = linear.tokens, linear.n, linear.k
    group = "products of experts" if linear.is_expert else "products of linears"
    for product, read, written in (
        ("forward", t * k + n * k, t * n),
        ("grad_input", t * n + n * k, t * k),
        ("grad_weight", t * n + t * k, n * k),
    ):
        yield Kernel(
            group if linear.in_mx else "products in bf16",
            f"{linear.name} {product}",
            2 * t * n * k,
            2 * (read + written),
            (CODE if linear.in_mx else 2) * read + 2 * written,
            linear.count,
            linear.in_mx,
        )


def casts_of(linear: Linear, job: Job) -> Iterable[Kernel]:
    """What is cast for a linear; of its input, if the linear is the first that reads it."""
    t, n, k, name, count = linear.tokens, linear.n, linear.k, linear.name, linear.count
    shards = job.ranks // job.expert_ranks if linear.is_expert else job.ranks
    of_mx = 2 * (4 + CODE) * n * k if linear.in_mx else 6 * n * k
    yield Kernel("casts of weights", name, 0, 6 * n * k / shards, of_mx, count)
    if not linear.in_mx:
        return
    yield Kernel("casts of gradients", name, 0, 0, (2 + 2 * CODE) * t * n, count)
    if name == "experts.w2":
        yield Kernel("casts of activations", name, 0, 0, 2 * (2 + CODE) * t * k, count)
        yield Kernel("hidden of experts made again", name, 0, 0, 6 * t * k, count)
    elif linear.reads == name:
        yield Kernel("casts of activations", name, 0, 0, (2 + 2 * CODE) * t * k, count)


def kernels_of(job: Job) -> list[Kernel]:
    """The kernels of a step of one GPU."""
    linears = linears_of(job)
    products = [kernel for linear in linears for kernel in products_of(linear)]
    casts = [kernel for linear in linears for kernel in casts_of(linear, job)]
    return [*products, *casts, *_others(job)]


def _others(job: Job) -> Iterable[Kernel]:
    """What is the same in bf16 and MXFP8."""
    dims = job.dims
    tokens, layers, dim, vocabulary = job.tokens, dims.n_layers, dims.dim, dims.vocab_size

    def same(group: str, flops: float, moved: float, count: int = 1) -> Kernel:
        return Kernel(group, group, flops, moved, moved, count)

    head = tokens * dim + dim * vocabulary + tokens * vocabulary
    yield same("casts of weights", 0, 6 * dim * vocabulary / job.ranks)
    yield same("output layer and loss", 2 * tokens * dim * vocabulary, 2 * head, 3)
    yield same("output layer and loss", 0, 4 * tokens * vocabulary)
    q, kv = dims.n_heads * dims.head_width, dims.kv_heads * dims.head_width
    # Causal: half of 2 products of S x S x heads forward, and of 5 backward. Forward reads q, k, v and writes the
    # output; backward reads these and the output's gradient, and writes three.
    yield same("attention", 2 * tokens * job.seq_len * q, 2 * tokens * (2 * q + 2 * kv), layers)
    yield same("attention", 5 * tokens * job.seq_len * q, 2 * tokens * (4 * q + 4 * kv), layers)
    # Norm and residual 5 reads and writes of the stream forward and 7 backward, twice; SwiGLU 3 and 5 of the hidden.
    is_moe = dims.n_experts is not None
    hidden = dims.expert_hidden_dim * (dims.n_shared_experts + dims.top_k) if is_moe else dims.ffn_hidden_dim
    permutation = 8 * dims.top_k * dim if is_moe else 0
    moved = 2 * tokens * (24 * dim + 8 * hidden + permutation)
    yield same("norms, SwiGLU, permutation", 0, moved, layers)
    yield same("optimizer", 0, 28 * count_parameters(dims) / job.ranks)


def milliseconds(job: Job, device: Device) -> tuple[float, float]:
    """A step at best, in bf16 and in MXFP8."""
    kernels = kernels_of(job)
    bf16, mx = (1e3 * sum(kernel.seconds(device, mx=mx) for kernel in kernels) for mx in (False, True))
    return bf16, mx


def _line(name: str, kernels: list[Kernel], device: Device, digits: int = 1) -> tuple[str, ...]:
    flops = sum(kernel.count * kernel.flops for kernel in kernels) / 1e12
    moved = (sum(each.count * getattr(each, key) for each in kernels) / 1e9 for key in ("bytes_bf16", "bytes_mx"))
    times = (1e3 * sum(kernel.seconds(device, mx=mx) for kernel in kernels) for mx in (False, True))
    tflop = f"{flops:,.{digits - 1}f}" if flops else ""
    return name, tflop, *(f"{number:,.{digits}f}" for number in (*moved, *times))


HEADER = ("TFLOP", "GB, bf16", "GB, MXFP8", "ms, bf16", "ms, MXFP8")


def table(job: Job, device: Device) -> str:
    """A line for each kind of kernel, and the sums."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels_of(job):
        groups.setdefault(kernel.group, []).append(kernel)
    lines = [_line(group, kernels, device) for group, kernels in groups.items()]
    lines.append(("**step**", "", "", "", *(f"**{each:.1f}**" for each in milliseconds(job, device))))
    return markdown_table(("a step of one GPU", *HEADER), lines)


def product_table(job: Job, device: Device) -> str:
    """A line for each product of each linear of a layer; linears of one shape have one line."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for linear in linears_of(job):
        shape = f"{linear.tokens:,} x {linear.n:,} x {linear.k:,}"
        for kernel in products_of(linear):
            _, product = kernel.name.split()
            _, *numbers = _line("", [replace(kernel, count=1)], device, 3)
            lines.setdefault((shape, product, *numbers), []).append(linear.name)
    rows = [(", ".join(names), *line) for line, names in lines.items()]
    return markdown_table(("linear", "T x N x K", "product", *HEADER), rows)


def summary(job: Job, device: Device) -> str:
    """Speedups: the bound, and what the published step in bf16 makes of it."""
    bf16, mx = milliseconds(job, device)
    published = 1e3 * job.tokens / job.published_tokens_s
    alike = published / (published - (bf16 - mx))
    lines = [
        f"Bound: {bf16 / mx:.2f}. Published step in bf16: {published:,.0f} ms, {published / bf16:.2f} times the bound.",
        f"If the rest is the same in both: {alike:.2f}. If kernels are slower by one factor: {bf16 / mx:.2f}.",
    ]
    for name, speedup in job.published.items():
        slower, rest = fitted(bf16, mx, published, speedup)
        lines.append(f"Published {speedup:.3f} ({name}): kernels slower by {slower:.2f}, and {rest:,.0f} ms besides.")
    return "\n".join(lines)


def fitted(bf16: float, mx: float, published: float, speedup: float) -> tuple[float, float]:
    """By what factor all kernels are slower than at best, and what a step takes besides, the same in both, if steps of
    `published` ms in bf16 and of `published / speedup` in MXFP8 take `bf16` and `mx` at best."""
    slower = (published - published / speedup) / (bf16 - mx)
    return slower, published - slower * bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS), help="comma-separated (default: all)")
    parser.add_argument("--devices", default=",".join(DEVICES), help="comma-separated (default: all)")
    parser.add_argument("--products", action="store_true", help="besides, each product of each linear of a layer")
    args = parser.parse_args()
    for name in args.jobs.split(","):
        for device in args.devices.split(","):
            job = JOBS[name]
            print(f"\n{name}: {job.family} {job.flavor} on {device}\n\n{table(job, DEVICES[device])}")
            if args.products:
                print(f"\n{product_table(job, DEVICES[device])}")
            print(f"\n{summary(job, DEVICES[device])}")


if __name__ == "__main__":
    main()
