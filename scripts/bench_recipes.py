#!/usr/bin/env python3
"""Train Llama 3 8B dims in bf16 and float8, compiled and eager, on pre-tokenized text, and print one table.

    python scripts/bench_recipes.py --data DIR --out DIR                      # one GPU: 8 of 32 layers, batch 2
    python scripts/bench_recipes.py --data DIR --out DIR --gpus 2             # two GPUs: all 32 layers, FSDP2, batch 1

`--data` is a folder written by `titan-fp8 prepare`. Every row is one `./run_train.sh` of its own, so what is measured
is what a user gets: tok/s per GPU and MFU are medians over the logged steps after the warm-up, peak memory is the
allocator's highest reserved amount, the loss is that of the last step. `--rows` picks rows.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from bench_runs import REPO, figures, read_metrics, run_command

FLOAT8 = ["--model.converters", "quantize.linear.float8", "--quantize.linear.float8.filter_fqns", "output"]
ROWS: dict[str, list[str]] = {
    "bf16-compile": ["--compile.enable"],
    "tensorwise-compile": [*FLOAT8, "--quantize.linear.float8.recipe_name", "tensorwise", "--compile.enable"],
    "rowwise-compile": [*FLOAT8, "--quantize.linear.float8.recipe_name", "rowwise", "--compile.enable"],
    "bf16-eager": [],
    "tensorwise-eager": [*FLOAT8, "--quantize.linear.float8.recipe_name", "tensorwise"],
    "rowwise-eager": [*FLOAT8, "--quantize.linear.float8.recipe_name", "rowwise"],
}
LONG_ROWS = ("bf16-compile", "tensorwise-compile")
WARM_UP_STEPS = 10


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="token shards written by `titan-fp8 prepare`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and for results.jsonl")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated rows: " + ", ".join(ROWS))
    parser.add_argument("--long-steps", type=int, default=300, help=f"steps of {' and '.join(LONG_ROWS)}")
    parser.add_argument("--short-steps", type=int, default=30, help="steps of the other rows")
    parser.add_argument("--full-recomputation", action="store_true", help="of blocks, where memory is short")
    parser.add_argument("--config", type=Path, default=REPO / "train_configs" / "llama3_8b.toml")
    parser.add_argument("overrides", nargs="*", help="further trainer options for every row, after `--`")
    return parser.parse_args()


def command_of(row: str, args: argparse.Namespace, steps: int, folder: Path) -> list[str]:
    """The trainer's options of one row."""
    layers = [] if args.gpus > 1 else ["--model.overrides.n_layers", "8"]
    batch = "1" if args.gpus > 1 else "2"
    by_operation = ["selective", "--activation_checkpoint.selective_ac_option", "op"]
    return [
        "./run_train.sh",
        *("--job.dump_folder", str(folder)),
        *("--training.dataset", "tokens", "--training.dataset_path", str(args.data)),
        *("--training.steps", str(steps), "--training.local_batch_size", batch, "--training.seq_len", "8192"),
        *("--activation_checkpoint.mode", *(["full"] if args.full_recomputation else by_operation)),
        *("--metrics.log_freq", "5", "--debug.seed", "0"),
        *layers,
        *ROWS[row],
        *args.overrides,
    ]


def run_row(row: str, args: argparse.Namespace) -> dict:
    """Run one row and read its metrics; a failed run keeps its log and is reported as failed."""
    steps = args.long_steps if row in LONG_ROWS else args.short_steps
    folder = args.out / row
    command = command_of(row, args, steps, folder)
    environment = {**os.environ, "CONFIG_FILE": str(args.config), "NGPU": str(args.gpus)}
    code, wall_s = run_command(command, args.out / f"{row}.log", environment)
    result = {"row": row, "gpus": args.gpus, "steps": steps, "command": " ".join(command), "exit_code": code}
    result["wall_s"] = round(wall_s, 1)
    if code == 0 and (folder / "metrics.jsonl").exists():
        result |= figures(read_metrics(folder), WARM_UP_STEPS)
    return result


def table(results: list[dict]) -> str:
    """A Markdown table, one line a row."""
    columns = ("row", "GPUs", "steps", "tok/s/GPU", "TFLOP/s/GPU", "MFU", "peak GiB", "loss, first -> last")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in results:
        if r.get("tps") is None:
            lines.append(
                f"| {r['row']} | {r['gpus']} | {r['steps']} | failed with exit code {r['exit_code']} | | | | |"
            )
            continue
        mfu = "n/a" if r["mfu"] is None else f"{r['mfu']:.1f} %"
        lines.append(
            f"| {r['row']} | {r['gpus']} | {r['steps']} | {r['tps']:,.0f} | {r['tflops']:.0f} | {mfu} "
            f"| {r['memory_gib']:.1f} | {r['first_loss']:.3f} -> {r['last_loss']:.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    args = arguments()
    results = []
    for row in args.rows.split(","):
        results.append(run_row(row, args))
        with open(args.out / "results.jsonl", "a") as out:
            out.write(json.dumps(results[-1]) + "\n")
        print(table(results[-1:]).splitlines()[-1], f"[{results[-1]['wall_s']} s]", flush=True)
    print(table(results))
    return int(any(r["exit_code"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
