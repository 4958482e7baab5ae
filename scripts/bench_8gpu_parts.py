"""The trainings of `bench_8gpu.py`: what runs in each of its parts, on how many GPUs, and in which order."""

import argparse
import math
from collections.abc import Iterator
from typing import TypeAlias

from peer.jobs import OURS, ROWS, SCOUT, THEIRS, Job, Row, Run

BOTH = (OURS, THEIRS)
BF16_EAGER = Row("bf16-eager", sides=BOTH)
BLOCKWISE = Row("blockwise-compiled", "blockwise", True)
WHOLE_WEIGHTS = Row("tensorwise-weights-gathered-whole", "tensorwise", True, BOTH, gathers=False)
KEPT = Row("tensorwise-nothing-recomputed", "tensorwise", True, extra=("--activation_checkpoint.mode", "none"))
FASTEST = Row(
    "float8-head-states-nothing-recomputed",
    "tensorwise",
    True,
    extra=(*KEPT.extra, *ROWS["float8-head-states"].extra),
)
HEADLINE = (
    ROWS["tensorwise-compiled"],
    ROWS["bf16-compiled"],
    BF16_EAGER,
    ROWS["tensorwise-eager"],
    ROWS["rowwise-compiled"],
    BLOCKWISE,
    WHOLE_WEIGHTS,
    KEPT,
    FASTEST,
)
SHORT = (Row("bf16-eager"), ROWS["tensorwise-eager"], Row("tensorwise-compiled", "tensorwise", True))
CHECKPOINTING = ("none", "every-2", "full")
"""Of the short sequences, in the order of the tables."""
FIRST = {
    "headline/tensorwise-compiled": BOTH,
    "headline/bf16-compiled": BOTH,
    "headline/bf16-eager": BOTH,
    "headline/tensorwise-eager": (OURS,),
    "scaling/tensorwise-compiled": (OURS,),
    "short/bf16-eager": (OURS,),
    "short/tensorwise-eager": (OURS,),
    "experts/grouped-rowwise-compiled": (OURS,),
    "large/tensorwise-compiled": (OURS,),
}
"""part/row -> sides of the runs that come first; of short sequences those without recomputation."""
GIB_BESIDE_STATE = 38
"""Memory of a device that weights, gradients and moments of the large model leave to what does not grow with the number
of its layers: logits, gathered layers and the gradients of one, the tensors of a layer; to codes of shards; to NCCL."""
STATE_BYTES = 16
"""Of a parameter: weight, gradient and two moments in fp32."""
LARGE_LAYERS = 80
"""Of Llama 3 70B."""
LAYER_PARAMETERS, TABLE_PARAMETERS = 855_654_400, 2 * 128_256 * 8192
"""Of one of these layers, and of embedding with output layer."""
ROOMY_GIB = 120
"""Memory of a GPU that 16 layers of Llama 3 8B fit, and the activations of four sequences of Scout."""
Wave: TypeAlias = list[Run]
"""Trainings side by side."""


def headline(gpus: int, args: argparse.Namespace) -> Iterator[Wave]:
    """All of Llama 3 8B; the communication of bf16 and of tensorwise float8, compiled, is looked at."""
    job = Job("headline", gpus=gpus, layers=32, local_batch=1, global_batch=gpus, same_ac=True)
    for row in HEADLINE:
        for side in row.sides:
            yield [Run(job, row, side, 1, traced=row.name in ("tensorwise-compiled", "bf16-compiled"))]


def scaling(gpus: int, args: argparse.Namespace) -> Iterator[Wave]:
    """The same on ever fewer GPUs. On a half, a quarter and so on of them together, runs are side by side."""
    layers = 16 if args.gib >= ROOMY_GIB else 8
    counts = [gpus >> halvings for halvings in range(gpus.bit_length()) if gpus % (1 << halvings) == 0]
    for row in (ROWS["tensorwise-compiled"], ROWS["bf16-compiled"]):
        jobs = [
            Job(f"scaling-{count}", gpus=count, layers=layers, local_batch=1, global_batch=count, same_ac=True)
            for count in counts
        ]
        runs = [Run(job, row, OURS, 1, traced=True) for job in jobs]
        yield runs[:1]
        yield runs[1:]


def short(gpus: int, args: argparse.Namespace) -> Iterator[Wave]:
    """Llama 3 8B at 4096 tokens, eager and compiled."""
    for ac in CHECKPOINTING:
        job = Job(
            f"short-{ac}", gpus=gpus, layers=32, local_batch=1, global_batch=gpus, seq_len=4096, ac=ac, same_ac=True
        )
        for row in SHORT:
            yield [Run(job, row, OURS, 1)]


def experts(gpus: int, args: argparse.Namespace) -> Iterator[Wave]:
    """Llama 4 Scout with its 16 experts dealt out to as many of the GPUs as divide them. Within a few steps at this
    learning rate our routers send most tokens to a few experts: it would be the speed of that."""
    sizes = {**SCOUT, "experts": math.gcd(16, gpus)}
    batch = 4 if args.gib >= ROOMY_GIB else 1
    job = Job("experts", gpus=gpus, layers=4, local_batch=batch, global_batch=batch * gpus, balanced=True, **sizes)
    for row in (ROWS["grouped-rowwise-compiled"], ROWS["bf16-compiled"]):
        for side in row.sides:
            yield [Run(job, row, side, 1, traced=True)]


def large(gpus: int, args: argparse.Namespace) -> Iterator[Wave]:
    """Llama 3 70B; two GPUs share a sequence. Where there are no more of them nothing is sharded, and then the peer
    multiplies in fp32."""
    layers = args.large_layers or fitting_layers(gpus, args.gib)
    job = Job(
        "large",
        gpus=gpus,
        layers=layers,
        local_batch=1,
        global_batch=gpus // 2,
        model="llama3/70B",
        ac="full",
        same_ac=True,
        tensor=2,
    )
    for row in (ROWS["tensorwise-compiled"], ROWS["bf16-compiled"]):
        for side in row.sides if gpus > job.tensor else (OURS,):
            yield [Run(job, row, side, 1)]


PARTS = {part.__name__: part for part in (headline, scaling, short, experts, large)}


def all_waves(gpus: int, args: argparse.Namespace) -> list[Wave]:
    """The trainings of the parts that are asked for, in the order in which they are to run."""
    found = [wave for name in args.parts for wave in PARTS[name](gpus, args) if wave]
    if args.ours_only:
        found = [wave for wave in found if wave[0].side == OURS]
    return sorted(found, key=lambda wave: not all(map(_comes_first, wave)))


def _comes_first(run: Run) -> bool:
    is_recomputed = run.job.name in (f"short-{ac}" for ac in CHECKPOINTING[1:])
    return not is_recomputed and run.side in FIRST.get(f"{part_of(run)}/{run.row.name}", ())


def fitting_layers(gpus: int, gib: float) -> int:
    """Layers of Llama 3 70B whose training fits GPUs with so much memory each, sharded over all of them.

    Raises:
        SystemExit: not one does.
    """
    parameters = (gib - GIB_BESIDE_STATE) * 2**30 * gpus / STATE_BYTES
    layers = min(LARGE_LAYERS, int((parameters - TABLE_PARAMETERS) / LAYER_PARAMETERS))
    if layers < 1:
        raise SystemExit(f"no layer of Llama 3 70B fits {gpus} GPUs of {gib:.0f} GiB; leave `large` out of --parts")
    return layers


def part_of(run: Run) -> str:
    """The name of the part that a run is of."""
    return run.job.name.partition("-")[0]
