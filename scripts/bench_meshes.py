#!/usr/bin/env python3
"""Train Llama 3 8B dims on two GPUs, on one mesh after the other, and print one table.

    python scripts/bench_meshes.py --data TOKENS --out RUNS --row-timeout 300
    python scripts/bench_meshes.py --data TOKENS --out RUNS --layers 8 --ac op --rows fsdp2,tp2 --modes compiled
    python scripts/bench_meshes.py --out RUNS --config train_configs/debug_model.toml --seq-len 64     # without GPUs

Each mesh trains in bf16 and in float8, eager and compiled; exchanges are overlapped in compiled code alone. Every row
is one `./run_train.sh` of its own. All rows see the same global batches of the same data from the same initial weights:
FSDP2 accumulates microbatches of one sequence a rank, a pipeline's microbatches are of one sequence, and tensor and
context parallelism work on one at a time. So losses compare, and differ by rounding: beside each stands its difference
to the FSDP2 row of the same precision and mode. Sharded parameters travel as float8 codes with scales computed ahead.

tok/s per GPU is the median over the steps after the warm-up, peak memory the highest reserved amount of any rank, and
`step 1` the seconds until the first step is done, compilation included. With `--resume`, rows that ended well before
with the same options are taken from `results.jsonl` instead of being run, so that several calls can fill one table.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bench_common import append_records, markdown_table
from bench_runs import REPO, TIMED_OUT, figures, last_error, read_metrics, run_command

GPUS = 2
MESHES: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2": ("FSDP2", {"data_parallel_shard_degree": 2}),
    "tp2": ("TP 2", {"data_parallel_shard_degree": 1, "tensor_parallel_degree": 2}),
    "tp2-async": (
        "TP 2, overlapped exchanges",
        {"data_parallel_shard_degree": 1, "tensor_parallel_degree": 2, "enable_async_tensor_parallel": True},
    ),
    "cp2": ("CP 2", {"data_parallel_shard_degree": 1, "context_parallel_degree": 2}),
    "pp2": ("PP 2", {"data_parallel_shard_degree": 1, "pipeline_parallel_degree": 2}),
}
SHARDED = ("fsdp2", "cp2")
"""Meshes over whose ranks FSDP shards parameters."""
COMPILED_ONLY = ("tp2-async",)
PRECISIONS = ("bf16", "float8")
MODES = ("eager", "compiled")
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise")
FLOAT8 = "quantize.linear.float8"
CHECKPOINTING = {
    "full": {"mode": "full"},
    "op": {"mode": "selective", "selective_ac_option": "op"},
    "none": {"mode": "none"},
    "every-2": {"mode": "selective", "selective_ac_option": "2"},
}
_LOGGED_PEAK = re.compile(r"rank (\d+) I step \d+/.* mem ([\d.]+) GiB")


@dataclass(frozen=True)
class Row:
    """One training."""

    mesh: str
    precision: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.mesh}-{self.precision}-{self.mode}"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the runs and for results.jsonl")
    add("--data", type=Path, help="token shards written by `titan-fp8 prepare` (default: synthetic text)")
    add("--rows", default=",".join(MESHES), help="comma-separated meshes (default: all: " + ", ".join(MESHES) + ")")
    add("--precisions", default=",".join(PRECISIONS), help="comma-separated (default: bf16,float8)")
    add("--modes", default=",".join(MODES), help="comma-separated (default: eager,compiled)")
    add("--recipe", default="tensorwise", choices=RECIPES, help="of the float8 rows (default: tensorwise)")
    add("--schedule", default="1F1B", help="of the pipeline (default: 1F1B)")
    add("--global-batch", type=int, default=4, help="sequences a step (default: 4)")
    add("--seq-len", type=int, default=8192, help="tokens of a sequence (default: 8192)")
    add("--layers", type=int, help="default: all of the model's")
    add("--ac", default="full", choices=CHECKPOINTING, help="activation checkpointing (default: full)")
    add("--steps", type=int, default=10)
    add("--warm-up", type=int, default=3, help="first steps, not counted in the speed (default: 3)")
    add("--lr", type=float, default=3e-5, help="low, so that losses of the first steps compare (default: 3e-5)")
    add("--row-timeout", type=float, default=120, help="seconds after which a row is ended (default: 120)")
    add("--resume", action="store_true", help="leave out rows that results.jsonl has with the same options")
    add("--config", type=Path, default=REPO / "train_configs" / "llama3_8b.toml")
    add("overrides", nargs="*", help="further trainer options for every row, after `--`; they come last")
    args = parser.parse_args(argv)
    for option, known in (("rows", MESHES), ("precisions", PRECISIONS), ("modes", MODES)):
        chosen = getattr(args, option).split(",")
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise SystemExit(f"--{option}: no such name: {', '.join(unknown)}; known: {', '.join(known)}")
        setattr(args, option, chosen)
    if args.global_batch < GPUS or args.global_batch % GPUS:
        raise SystemExit(f"--global-batch {args.global_batch} is no multiple of the {GPUS} ranks of FSDP2; change it")
    if args.warm_up >= args.steps:
        raise SystemExit(f"--warm-up {args.warm_up} leaves none of --steps {args.steps}; change one of them")
    args.out, args.config = args.out.resolve(), args.config.resolve()
    return args


def rows_of(args: argparse.Namespace) -> list[Row]:
    """The rows to run, those that are compared with each other together."""
    chosen = [Row(mesh, *kind) for kind in product(args.precisions, args.modes) for mesh in args.rows]
    return [row for row in chosen if row.mode == "compiled" or row.mesh not in COMPILED_ONLY]


def options_of(row: Row, args: argparse.Namespace) -> list[str]:
    """The trainer's options of one row."""
    options: dict[str, Any] = {
        "job.dump_folder": args.out / row.name,
        "training.dataset": "tokens" if args.data else "synthetic",
        "training.steps": args.steps,
        "training.seq_len": args.seq_len,
        "training.local_batch_size": args.global_batch if row.mesh == "pp2" else 1,
        "training.global_batch_size": args.global_batch,
        "optimizer.lr": args.lr,
        "compile.enable": row.mode == "compiled",
        "metrics.log_freq": 1,
        "metrics.disable_color_printing": True,
        "debug.seed": 0,
        "model.converters": FLOAT8 if row.precision == "float8" else "",
    }
    options |= {f"parallelism.{key}": value for key, value in MESHES[row.mesh][1].items()}
    options |= {f"activation_checkpoint.{key}": value for key, value in CHECKPOINTING[args.ac].items()}
    if args.data:
        options["training.dataset_path"] = args.data.resolve()
    if args.layers:
        options["model.overrides.n_layers"] = args.layers
    if row.mesh == "pp2":
        options["parallelism.pipeline_parallel_schedule"] = args.schedule
        options["parallelism.pipeline_parallel_microbatch_size"] = 1
    if row.precision == "float8":
        options |= {f"{FLOAT8}.filter_fqns": "output", f"{FLOAT8}.recipe_name": args.recipe}
        if row.mesh in SHARDED:
            options[f"{FLOAT8}.enable_fsdp_float8_all_gather"] = True
            options[f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp"] = True
    given = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]
    return [*given, *args.overrides]


def run_row(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """One run: its figures, or its exit code and what its log ends with."""
    log = args.out / f"{row.name}.log"
    settings = settings_of(row, args)
    environment = {**os.environ, "CONFIG_FILE": str(args.config), "NGPU": str(GPUS), "LOG_RANK": "0,1"}
    code, wall_s = run_command(settings["command"], log, environment, args.row_timeout)
    record = {"row": row.name, "mesh": row.mesh, "precision": row.precision, "mode": row.mode, **settings}
    record |= {"exit_code": code, "wall_s": round(wall_s, 1)}
    if code == 0:
        lines = read_metrics(args.out / row.name)
        record |= figures(lines, args.warm_up)
        record["losses"] = [line["loss"] for line in lines]
        record["step_1_s"] = lines[0]["step_time_s"]
        record["memory_gib_of_ranks"] = peaks_gib(log.read_text(errors="replace"))
    elif code == TIMED_OUT:
        record["error"] = f"ended after {args.row_timeout:g} s; last: {last_error(log)}"
    else:
        record["error"] = last_error(log)
    return record


def settings_of(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """What a row's figures depend on."""
    command = ["./run_train.sh", *options_of(row, args)]
    return {"command": command, "config": str(args.config), "warm_up": args.warm_up}


def peaks_gib(log: str) -> list[float]:
    """Highest reserved memory of each rank, from what it logged; `metrics.jsonl` has that of rank 0."""
    peaks: dict[int, float] = {}
    for rank, gib in _LOGGED_PEAK.findall(log):
        peaks[int(rank)] = max(peaks.get(int(rank), 0.0), float(gib))
    return [peaks[rank] for rank in sorted(peaks)]


def earlier_results(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What `results.jsonl` has of rows that ended well, by name; the last one of each."""
    file = args.out / "results.jsonl"
    if not args.resume or not file.exists():
        return {}
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {record["row"]: record for record in records if record["exit_code"] == 0}


def table(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one line a row, each compared with the FSDP2 row among `records`."""
    losses = {(r["mesh"], r["precision"], r["mode"]): r["losses"] for r in records if r["exit_code"] == 0}
    cells = []
    for r in records:
        kind = (r["precision"], r["mode"])
        label = (MESHES[r["mesh"]][0], *kind)
        if r["exit_code"] != 0:
            reason = r["error"].replace("|", "\\|")
            cells.append((*label, f"failed with exit code {r['exit_code']}: {reason}", *[""] * 5))
            continue
        is_reference = r["mesh"] == "fsdp2"
        last, largest = ("", "") if is_reference else differences(r["losses"], losses.get(("fsdp2", *kind)))
        memory_gib = max([r["memory_gib"], *r["memory_gib_of_ranks"]])
        loss = "n/a" if r["last_loss"] is None else f"{r['last_loss']:.4f}"
        cells.append((*label, f"{r['tps']:,.0f}", f"{memory_gib:.1f}", loss, last, largest, f"{r['step_1_s']:.1f}"))
    columns = ("mesh", "precision", "mode", "tok/s/GPU", "peak GiB", "loss")
    return markdown_table((*columns, "less FSDP2's", "largest of a step", "step 1, s"), cells)


def differences(losses: Sequence[float | None], reference: Sequence[float | None] | None) -> tuple[str, str]:
    """Of the last losses, and the largest absolute one over all steps; n/a without a reference or with a NaN."""
    if reference is None or None in losses or None in reference:
        return "n/a", "n/a"
    of_steps = [a - b for a, b in zip(losses, reference, strict=True) if a is not None and b is not None]
    return f"{of_steps[-1]:+.4f}", f"{max(map(abs, of_steps)):.4f}"


def main() -> int:
    args = arguments()
    earlier = earlier_results(args)
    records = []
    for row in rows_of(args):
        record = earlier.get(row.name)
        if record is None or not settings_of(row, args).items() <= record.items():
            record = run_row(row, args)
            append_records(args.out, [record])
        records.append(record)
        print(table(records).splitlines()[-1], f"[{record['wall_s']} s]", flush=True)
    print(f"\n{args.steps} steps of {args.global_batch} x {args.seq_len} tokens, float8 {args.recipe}\n")
    print(table(records))
    return int(any(record["exit_code"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
