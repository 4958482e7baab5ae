"""What is compared: jobs, rows, and the options that make a run of ours and one of the peer the same training."""

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench_meshes import CHECKPOINTING
from bench_runs import REPO
from peer.launch import FLAVOR

OURS, THEIRS = "ours", "peer"
LAUNCHER = REPO / "scripts" / "peer" / "launch.py"
FLOAT8 = "quantize.linear.float8"
GROUPED = "quantize.grouped_mm.float8"
SEQ_LEN = 8192
LOG_FREQ = 5
_GATHERS_CODES = (f"{FLOAT8}.enable_fsdp_float8_all_gather", f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp")
PROFILE = "profile"
"""In place of a repeat's number: the run that is traced."""
SAME: dict[str, Any] = {
    "model.name": "llama3",
    "optimizer.name": "AdamW",
    "optimizer.implementation": "fused",
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.95,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.1,
    "training.max_norm": 1.0,
    "training.dtype": "float32",
    "training.mixed_precision_param": "bfloat16",
    "training.mixed_precision_reduce": "float32",
    "training.gc_freq": 50,
    "parallelism.data_parallel_shard_degree": -1,
    "compile.components": "model,loss",
    "metrics.log_freq": LOG_FREQ,
    "metrics.disable_color_printing": True,
    "debug.seed": 0,
}
"""What all runs of both sides have in common."""
_AS_THEIRS: dict[str, dict[str, Any]] = {
    # Its layers all have rotary positions, and no norm of queries and keys.
    "llama4": {"model.overrides.qk_norm": "none", "model.overrides.nope_interval": 1000},
    "qwen3_moe": {"model.overrides.aux_loss_weight": 0.0},
}
"""What makes our model of a family the peer's, where curves are compared closely."""


@dataclass(frozen=True)
class Job:
    """A model on a number of GPUs. Batches are in sequences of `seq_len` tokens.

    Attributes:
        name: of its folder and in records.
        model: FAMILY/FLAVOR.
        vocab_size: rows of embedding and head; None: as the command line says.
        ac: activation checkpointing of both sides; None: as the command line says.
        same_ac: ours recomputes what the peer does in float8 too, where otherwise it recomputes nothing.
        tensor: ranks of tensor parallelism.
        experts: ranks that experts are dealt out to; 0: the model has none.
        balanced: experts get tokens in turns, whatever the routers say, so that a speed is no matter of luck.
        peer_family: the peer's name of the family; None: as ours.
    """

    name: str
    gpus: int
    layers: int
    local_batch: int
    global_batch: int
    seq_len: int = SEQ_LEN
    model: str = "llama3/8B"
    vocab_size: int | None = None
    ac: str | None = None
    same_ac: bool = False
    tensor: int = 1
    experts: int = 0
    balanced: bool = False
    peer_family: str | None = None

    def model_of(self, side: str) -> tuple[str, str]:
        """Family and flavor, by the names that a side has for them."""
        family, _, flavor = self.model.partition("/")
        return (self.peer_family or family) if side == THEIRS else family, flavor


SCOUT: dict[str, Any] = {"model": "llama4/17bx16e", "vocab_size": 202048, "ac": "full", "experts": 2}
_QWEN3: dict[str, Any] = {"model": "qwen3_moe/30B-A3B", "vocab_size": 151936, "ac": "full", "experts": 1}
JOBS = {
    job.name: job
    for job in (
        Job("one-gpu", gpus=1, layers=8, local_batch=2, global_batch=2),
        Job("two-gpus", gpus=2, layers=32, local_batch=1, global_batch=2),
        Job("two-gpus-accumulating", gpus=2, layers=32, local_batch=1, global_batch=16),
        Job("experts", gpus=2, layers=4, local_batch=4, global_batch=8, **SCOUT),
        Job("experts-batch-1", gpus=2, layers=4, local_batch=1, global_batch=2, **SCOUT),
        Job("small-experts", gpus=1, layers=12, local_batch=2, global_batch=2, peer_family="qwen3", **_QWEN3),
    )
}


@dataclass(frozen=True)
class Row:
    """A configuration: a recipe of linears (None: bf16), compiled or not, of one side or both, with further options of
    ours; `grouped`: experts in float8, which only jobs with experts have; `gathers`: weights travel as codes, on the
    sides and in the recipes that have this; `base`: the row whose options it has before its own."""

    name: str
    recipe: str | None = None
    compiled: bool = False
    sides: tuple[str, ...] = (OURS,)
    extra: tuple[str, ...] = ()
    grouped: bool = False
    gathers: bool = True
    base: str | None = None

    def is_for(self, job: Job) -> bool:
        """Whether a job has this row: with experts bf16, those with float8 experts, and further ones."""
        if not job.experts:
            return not self.grouped
        return self.grouped or self.recipe is None or self.name not in ROWS


ROWS = {
    row.name: row
    for row in (
        Row("bf16-compiled", None, True, (OURS, THEIRS)),
        Row("tensorwise-compiled", "tensorwise", True, (OURS, THEIRS)),
        Row("rowwise-compiled", "rowwise", True, (OURS, THEIRS)),
        Row("tensorwise-eager", "tensorwise", False),
        Row("float8-head", "tensorwise", True, (OURS,), (f"--{FLOAT8}.filter_fqns=",)),
        Row(
            "float8-head-states",
            "tensorwise",
            True,
            (OURS,),
            (f"--{FLOAT8}.filter_fqns=", "--optimizer.state_dtype=bfloat16"),
        ),
        Row("grouped-compiled", None, True, (OURS, THEIRS), grouped=True),
        Row("grouped-rowwise-compiled", "rowwise", True, (OURS, THEIRS), grouped=True),
    )
}


_CODES = {f"{FLOAT8}.keep_gate_up_in_float8": True}
_LEAN: dict[tuple[str, str], dict[str, Any]] = {
    ("one-gpu", "rowwise-compiled"): _CODES,
    ("one-gpu", "tensorwise-eager"): _CODES,
    ("one-gpu", "float8-head"): _CODES,
    ("two-gpus", "float8-head"): {"training.loss_chunk_tokens": 2048},
    # Means in bf16 leave room for the loss of all tokens at once, and so for one sum of the output layer's gradient.
    ("one-gpu", "float8-head-states"): {"training.loss_chunk_tokens": 16384},
    ("two-gpus", "float8-head-states"): {"training.loss_chunk_tokens": 8192},
    ("two-gpus-accumulating", "tensorwise-compiled"): _CODES
    | {
        f"{FLOAT8}.keep_fp8_weight_shards": False,
        "training.loss_chunk_tokens": 2048,
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "16",
    },
}
"""(job, row) -> what keeps ours within the peer's memory where it would otherwise take more, or uses what is left."""


@dataclass(frozen=True)
class Run:
    """One training; `traced`: its last step is, and the last `LOG_FREQ` steps do not count."""

    job: Job
    row: Row
    side: str
    repeat: int | str
    traced: bool = False

    @property
    def name(self) -> str:
        return f"{self.job.name}/{self.row.name}/{self.side}-{self.repeat}"


def extra_row(text: str) -> Row:
    """The row that `NAME=OPTIONS` or `NAME=@ROW OPTIONS` means."""
    name, separator, options = text.partition("=")
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise SystemExit(f"--ours-extra {text!r}: {error}") from None
    if not (name and separator and words) or "/" in name:
        raise SystemExit(f"--ours-extra {text!r}: expected 'NAME=--key value ...', and no slash in the name")
    if not words[0].startswith("@"):
        return Row(name, extra=tuple(words))
    base = ROWS.get(words[0][1:])
    if base is None:
        raise SystemExit(f"--ours-extra {text!r}: no row {words[0][1:]}; known: {', '.join(ROWS)}")
    own = tuple(words[1:])
    given = _keys_of(own)
    kept = tuple(word for word in base.extra if _keys_of([word]).isdisjoint(given))  # a list given twice would collect
    return Row(name, base.recipe, base.compiled, extra=(*kept, *own), grouped=base.grouped, base=base.name)


def _keys_of(words: Iterable[str]) -> set[str]:
    """The keys that options of a command line name."""
    return {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}


def turns(job: Job, rows: Sequence[Row], repeats: int) -> Iterator[Run]:
    """The runs of a job in their order: row after row, the sides in turns; who is first changes with the repeat."""
    for row in (row for row in rows if row.is_for(job)):
        for repeat in range(1, repeats + 1):
            for side in row.sides if repeat % 2 else row.sides[::-1]:
                yield Run(job, row, side, repeat)


def traces_device_alone(run: Run) -> bool:
    """Whether a run's trace has no operators of the CPU: recording them makes the GPUs wait where there are several."""
    return run.job.gpus > 1 and (run.traced or run.repeat == PROFILE)


def gathers_codes(run: Run) -> bool:
    """Whether weights of ours travel between GPUs as codes; the peer's in the tensorwise recipe alone."""
    return run.row.recipe is not None and run.row.gathers and run.job.gpus > run.job.tensor


def shared_options(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Options that both sides know by the same name and in the same meaning."""
    job = run.job
    options: dict[str, Any] = {
        **SAME,
        "job.dump_folder": args.out / run.name,
        "optimizer.lr": args.lr,
        "lr_scheduler.warmup_steps": args.steps,
        "training.steps": args.steps,
        "training.seq_len": job.seq_len,
        "training.local_batch_size": job.local_batch,
        "training.global_batch_size": job.global_batch,
        "compile.enable": run.row.compiled,
    }
    options["model.name"], _ = job.model_of(run.side)
    options |= {f"activation_checkpoint.{key}": value for key, value in CHECKPOINTING[job.ac or args.ac].items()}
    if job.experts:
        options["parallelism.expert_parallel_degree"] = job.experts
    if job.balanced:
        options["debug.moe_force_load_balance"] = True
    if job.tensor > 1:
        options["parallelism.tensor_parallel_degree"] = job.tensor
    converters = [FLOAT8] * bool(run.row.recipe) + [GROUPED] * run.row.grouped
    if converters:
        options["model.converters"] = ",".join(converters)
    if run.row.grouped:
        options[f"{GROUPED}.fqns"] = "experts"
    if run.row.recipe:
        # Ours leaves the router alone by itself.
        options[f"{FLOAT8}.filter_fqns"] = "output,router.gate" if job.experts else "output"
        if run.row.recipe == "tensorwise" and gathers_codes(run):
            options |= dict.fromkeys(_GATHERS_CODES, True)
    if args.same_start:
        options["metrics.log_freq"] = 1
    if run.traced or run.repeat == PROFILE:
        options |= {"profiling.enable_profiling": True, "profiling.profile_freq": args.steps}
    return options


def our_options(run: Run, args: argparse.Namespace) -> list[str]:
    """The trainer's options of a run of ours."""
    job = run.job
    options = shared_options(run, args) | {
        "model.flavor": job.model_of(OURS)[1],
        "model.hf_assets_path": args.tokenizer,
        "model.overrides.n_layers": job.layers,
        "model.overrides.vocab_size": job.vocab_size or args.vocab_size,
        "model.overrides.max_seq_len": job.seq_len,
        "training.dataset": "tokens",
        "training.dataset_path": args.data,
        "training.shuffle": False,
    }
    if run.row.recipe:
        options[f"{FLOAT8}.recipe_name"] = run.row.recipe
    elif not run.row.grouped:
        options["model.converters"] = ""
    if traces_device_alone(run):
        options["profiling.trace_cpu"] = False
    options |= _own_options(run)
    if args.same_start:
        options |= _AS_THEIRS.get(job.model_of(OURS)[0], {})
    for key in _keys_of(run.row.extra):
        options.pop(key, None)
        if key == "activation_checkpoint.mode":
            # Given beside another mode it would be refused.
            options.pop("activation_checkpoint.selective_ac_option", None)
    given = [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in options.items()
        if value is not None
    ]
    return [*given, *run.row.extra]


def _own_options(run: Run) -> dict[str, Any]:
    """What ours has and the peer has not: the loss some tokens at a time and, since float8 layers keep less, no
    recomputation. On one GPU gradients leave their products in fp32, and weights are kept by rows alone. Some rows keep
    less (`_LEAN`)."""
    job = run.job
    # Tensor parallelism divides the logits already.
    options: dict[str, Any] = {"training.loss_chunk_tokens": 4096} if job.tensor == 1 else {}
    if gathers_codes(run):
        options |= dict.fromkeys(_GATHERS_CODES, True)  # with any recipe
    if run.row.recipe and not job.experts:
        if not job.same_ac:
            options |= {"activation_checkpoint.mode": "none", "activation_checkpoint.selective_ac_option": None}
        options |= _LEAN.get((job.name, run.row.base or run.row.name), {})
        if job.gpus == 1:
            options |= {f"{FLOAT8}.grad_weight_dtype": "float32", f"{FLOAT8}.force_recompute_fp8_weight_in_bwd": True}
    return options


def peer_options(run: Run, args: argparse.Namespace) -> list[str]:
    """The trainer's options of a run of the peer, whose switches are flags, and off without them."""
    options = shared_options(run, args) | {
        "model.flavor": FLAVOR,
        "model.hf_assets_path": args.tokenizer if args.same_start else args.out / run.job.name / "tokenizer",
        "training.dataset": "c4_test",
        "training.dataset_path": args.out / run.job.name / "text",
    }
    # Without a recipe it is tensorwise, and only then may codes be gathered.
    if run.row.recipe not in (None, "tensorwise"):
        options[f"{FLOAT8}.recipe_name"] = run.row.recipe
    flags = [f"--{key}" for key, value in options.items() if value is True]
    given = [f"--{key}={value}" for key, value in options.items() if not isinstance(value, bool)]
    return [*given, *flags, *args.peer_options]


def command_of(run: Run, args: argparse.Namespace) -> list[str]:
    """What starts a run."""
    if run.side == OURS:
        return ["./run_train.sh", *our_options(run, args)]
    job = run.job
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(job.gpus)]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--local-ranks-filter", "0"]
    launcher += ["--role", "rank", "--tee", "3", "--log_dir", str(args.out / run.name / "torchrun")]
    vocab_size = job.vocab_size or args.vocab_size
    model = ["--model", "/".join(job.model_of(THEIRS)), "--layers", str(job.layers), "--vocab-size", str(vocab_size)]
    if traces_device_alone(run):
        model.append("--device-trace")
    if args.same_start:
        model += ["--same-start", job.model, "--seed", str(SAME["debug.seed"])]
        model += ["--data", str(args.data), "--tokenizer", str(args.tokenizer)]
    return [*launcher, str(LAUNCHER), *model, "--", *peer_options(run, args)]
