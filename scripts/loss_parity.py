#!/usr/bin/env python3
"""Train a model in bf16 and in every float8 recipe, and compare the losses.

    python scripts/loss_parity.py --data TOKENS --out RUNS -- --model.hf_assets_path TOKENIZER
    python scripts/loss_parity.py --data TOKENS --out RUNS --size 375m --steps 1500 --validate --lanes 4 -- ...
    python scripts/loss_parity.py --data TOKENS --out RUNS --size experts --steps 1000 --rows bf16,experts -- ...
    python scripts/loss_parity.py --data TOKENS --out RUNS --gpus 1,2 --rows bf16,tensorwise,rowwise,blockwise -- ...
    python scripts/loss_parity.py --out RUNS --tiny --emulate          # on a CPU: shows that everything runs

Every row is one `./run_train.sh` of its own. Float8 rows have seed 0: the same initial weights and the same data in the
same order as `bf16`. How much two losses may differ without meaning anything is what `bf16-seed1` and `bf16-seed2` are
for, whose weights and data differ: the spread of the three bf16 losses stands beside each difference.

Rows `*-fast`, `*-lean`, `*-head` and `*-states` train with the options that `bench_peers.py` measures speed with, but
for the number of tokens whose loss is computed at a time; these options change where gradients and the loss are
rounded. The others have the defaults.

With `--gpus 1,2` each row runs on one GPU and then on two, with FSDP2 and, for float8, FP8 all-gather with scales
computed in advance. The microbatch of a rank is the same in both, so on one GPU gradients accumulate over what two GPUs
do at once: the steps see the same sequences in the same number.

With `--lanes 4` four rows run at a time, each on GPUs of its own, in processes that see no others; with `--share 3`
three at a time on the same ones.

The loss of a run is the mean over its last `--average` logged steps; with `--validate` there is also the loss on all
validation tokens, ten times in a run and at its end, by which rows are then compared. `--data` is a folder written by
`titan-fp8 prepare`; without it the built-in synthetic text is used. A run in `--out` that has finished already is not
run again.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_common import append_records, markdown_table
from bench_runs import REPO, lanes_of, run_command, side_by_side, visible_gpus

SEEDS = ("bf16", "bf16-seed1", "bf16-seed2")
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise")
MX = "quantize.linear.mx"
MX_ROWS = ("mxfp8_cublas", "mxfp8_cublas_rceil")
"""Emulated where the device has no products of blocks."""
HEAD = "tensorwise-head"
"""Tensorwise, the output layer too."""
STATES = f"{HEAD}-states"
"""As `tensorwise-head`, and the optimizer's running means are kept in bf16."""
LEAN = ("tensorwise-lean", "rowwise-lean", f"{HEAD}-lean")
"""As `*-fast` and `tensorwise-head`, and what w1 and w3 give is kept as codes."""
FAST = {"tensorwise-fast": "tensorwise", "rowwise-fast": "rowwise", HEAD: "tensorwise", STATES: "tensorwise"}
FAST |= {row: row.partition("-")[0] for row in LEAN}
"""Rows that train as those of `bench_peers.py` do, and their recipes: the loss is computed a part of the tokens at a
time and, on one GPU, gradients leave their products in fp32 and weights are kept by rows alone."""
CHUNKS = 4
"""Parts of a microbatch's tokens in these rows: as many as 2 x 8192 tokens have in `bench_peers.py`."""
PAYLOAD = "experts-payload"
EXPERTS = {"experts": None, "experts-rowwise": "rowwise", PAYLOAD: None}
"""Experts in float8 and the recipe of the linears; `experts-payload`: tokens travel to their experts as codes too."""
ROWS = (*SEEDS, *RECIPES, *FAST, *MX_ROWS, *EXPERTS)
FLOAT8 = "quantize.linear.float8"
GROUPED = "quantize.grouped_mm.float8"
MODELS = {
    "110m": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "ffn_dim": 2048, "vocab_size": 16384},
    "375m": {"dim": 1024, "n_layers": 24, "n_heads": 16, "n_kv_heads": 16, "ffn_dim": 2816, "vocab_size": 32768},
}
"""By the number of parameters, with both tables; every dimension is a multiple of 128."""
MOE = "experts"
MODELS[MOE] = {
    "dim": 768, "n_layers": 8, "n_heads": 12, "n_kv_heads": 4, "head_dim": 64, "n_experts": 16, "top_k": 4,
    "moe_ffn_dim": 768, "vocab_size": 32768,
}  # fmt: skip
"""Of the family qwen3_moe: 290M parameters, of which a token uses 120M."""
TINY_MODEL = {
    "dim": 128,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "ffn_dim": 256,
    "vocab_size": 512,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the runs and for results.jsonl")
    add("--data", type=Path, help="token shards written by `titan-fp8 prepare`")
    add("--rows", help="comma-separated (default: all of the size: " + ", ".join(ROWS) + ")")
    add("--gpus", default="1", help="comma-separated numbers of processes, each with every row")
    add("--lanes", type=int, default=1, help="rows that run at a time, each on GPUs of its own")
    add("--share", type=int, default=1, help="rows that run at a time on the same GPUs; their speeds mean nothing then")
    add("--size", choices=MODELS, default="110m", help="model (default: 110m)")
    add("--steps", type=int, help="default: 220")
    add("--validate", action="store_true", help="measure the loss on the validation tokens too")
    add("--log-every", type=int, default=1, help="steps between two losses that are logged")
    add("--average", type=int, help="last logged steps that a run's loss is the mean of (default: 20)")
    add("--global-batch", type=int, default=16, help="sequences a step")
    add("--microbatch", type=int, default=8, help="sequences of a rank in one microbatch")
    add("--seq-len", type=int, help="default: 2048")
    add("--compile", action="store_true", help="compile all rows")
    add("--emulate", action="store_true", help="multiply float8 codes in fp32, on any device")
    add("--no-all-gather", action="store_true", help="several GPUs gather high-precision weights in float8 rows too")
    add("--config", type=Path, default=REPO / "train_configs" / "llama3_8b.toml")
    add("--tiny", action="store_true", help="a toy model and six steps")
    add("overrides", nargs="*", help="further trainer options for every row, after `--`; they come last")
    return parser.parse_args()


def settle(args: argparse.Namespace) -> None:
    """Fill in what depends on `--tiny`, and refuse what cannot be."""
    args.model = TINY_MODEL if args.tiny else MODELS[args.size]
    if args.tiny and args.size == MOE:
        args.model = {**TINY_MODEL, "head_dim": 32, "n_experts": 4, "top_k": 2, "moe_ffn_dim": 64}
    args.steps = args.steps or (6 if args.tiny else 220)
    args.average = args.average or (2 if args.tiny else 20)
    args.seq_len = args.seq_len or (64 if args.tiny else 2048)
    args.worlds = [int(gpus) for gpus in args.gpus.split(",")]
    known = rows_of(args.size, args.worlds)
    args.rows = args.rows.split(",") if args.rows else known
    unknown = set(args.rows) - set(known)
    if unknown:
        raise SystemExit(
            f"no such row of --size {args.size} --gpus {args.gpus}: {', '.join(sorted(unknown))}; "
            f"known: {', '.join(known)}"
        )
    if not set(SEEDS).issuperset(args.rows) and "bf16" not in args.rows:
        raise SystemExit("float8 rows are compared with bf16; add it to --rows")
    for gpus in args.worlds:
        if args.global_batch % (args.microbatch * gpus):
            raise SystemExit(
                f"--global-batch {args.global_batch} is no multiple of {gpus} ranks times --microbatch "
                f"{args.microbatch}; change one of them"
            )
    if args.share < 1:
        raise SystemExit(f"--share {args.share}: at least one row must run at a time")
    args.lanes_of = {gpus: lanes_of(args.lanes, gpus, visible_gpus()) * args.share for gpus in args.worlds}
    if args.average * args.log_every > args.steps:
        raise SystemExit(
            f"--average {args.average} times --log-every {args.log_every} is more than --steps {args.steps}"
        )


def rows_of(size: str, worlds: Sequence[int]) -> list[str]:
    """The rows that a model of this size has on these numbers of GPUs; on one GPU no token travels."""
    if size != MOE:
        return [*SEEDS, *RECIPES, *FAST, *MX_ROWS]
    return [row for row in (*SEEDS, *EXPERTS) if row != PAYLOAD or min(worlds) > 1]


def options_of(row: str, gpus: int, args: argparse.Namespace, folder: Path) -> list[str]:
    """The trainer's options of one run."""
    seed = SEEDS.index(row) if row in SEEDS else 0
    options = {
        "job.dump_folder": folder,
        "training.dataset": "tokens" if args.data else "synthetic",
        "training.steps": args.steps,
        "training.seq_len": args.seq_len,
        "training.local_batch_size": args.microbatch,
        "training.global_batch_size": args.global_batch,
        # Low enough that no run's loss spikes: where one does, two runs of one seed end far apart in bf16 too.
        "optimizer.lr": 3e-4,
        "lr_scheduler.warmup_steps": max(1, args.steps // 5),
        "activation_checkpoint.mode": "none",
        "metrics.log_freq": args.log_every,
        "debug.seed": seed,
        **{f"model.overrides.{key}": value for key, value in args.model.items()},
    }
    if args.data:
        options["training.dataset_path"] = args.data
    flags = ["compile.enable"] if args.compile else []
    if args.validate:
        flags.append("validation.enable")
        options |= {
            "validation.freq": max(1, args.steps // 10),
            "validation.steps": -1 if args.data else 2,
            "validation.seq_len": args.seq_len,
            "validation.local_batch_size": args.microbatch,
        }
    if args.size == MOE:
        options |= {"model.name": "qwen3_moe", "model.flavor": "debugmodel", "parallelism.expert_parallel_degree": gpus}
    recipe = {**EXPERTS, **FAST}.get(row, None if row in SEEDS else row)
    filtered = "" if row.startswith(HEAD) else "output"
    options["model.converters"] = ",".join([FLOAT8] * bool(recipe) + [GROUPED] * (row in EXPERTS))
    if row in MX_ROWS:
        options |= {"model.converters": MX, f"{MX}.recipe_name": recipe, f"{MX}.filter_fqns": filtered}
        options[f"{MX}.emulate"] = "auto"
    elif recipe:
        options |= {f"{FLOAT8}.recipe_name": recipe, f"{FLOAT8}.filter_fqns": filtered}
        if gpus > 1 and not args.no_all_gather:
            flags.append(f"{FLOAT8}.enable_fsdp_float8_all_gather")
            flags.append(f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp")
    if row in FAST:
        options["training.loss_chunk_tokens"] = args.microbatch * args.seq_len // CHUNKS
        if gpus == 1:
            options[f"{FLOAT8}.grad_weight_dtype"] = "float32"
            flags.append(f"{FLOAT8}.force_recompute_fp8_weight_in_bwd")
    if row in LEAN:
        flags.append(f"{FLOAT8}.keep_gate_up_in_float8")
    if row == STATES:
        options["optimizer.state_dtype"] = "bfloat16"
    if row in EXPERTS:
        options[f"{GROUPED}.fqns"] = "experts"
    if row == PAYLOAD:
        options["parallelism.expert_parallel_payload"] = "float8"
    if args.emulate:
        options |= {f"{name}.emulate": "true" for name in str(options["model.converters"]).split(",") if name}
    given = [f"--{key}={value}" for key, value in options.items()]
    return [*given, *(f"--{flag}" for flag in flags), *args.overrides]


def run(row: str, gpus: int, args: argparse.Namespace, lane: Mapping[str, str]) -> dict[str, Any]:
    """One run, on the GPUs of a lane: its losses by step, or its exit code and the end of its log."""
    name = f"{row}-{gpus}gpu"
    folder = args.out / name
    command = ["./run_train.sh", *options_of(row, gpus, args, folder.resolve())]
    finished = folder / "finished.json"
    if finished.exists() and (record := json.loads(finished.read_text()))["command"] == command:
        return record
    environment = {**os.environ, **lane, "CONFIG_FILE": str(args.config.resolve()), "NGPU": str(gpus)}
    folder.mkdir(parents=True, exist_ok=True)
    code, wall_s = run_command(command, args.out / f"{name}.log", environment)
    record = {"row": row, "gpus": gpus, "exit_code": code, "wall_s": round(wall_s, 1)}
    record["command"] = command
    if code == 0:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines]
        record["losses"] = losses
        record["final_loss"] = statistics.fmean(losses[-args.average :])
        record["tps"] = statistics.median(line["tps"] for line in lines[len(lines) // 2 :])
        if args.validate:
            validations = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
            record["validations"] = [(line["step"], line["validation_loss"]) for line in validations]
            record["validation_loss"] = validations[-1]["validation_loss"]
        finished.write_text(json.dumps(record))
    else:
        print("\n".join((args.out / f"{name}.log").read_text().splitlines()[-15:]))
    return record


def table(records: list[dict[str, Any]], average: int) -> str:
    """Final loss of each run, its difference to bf16 of the same seed and world, and what differences mean nothing."""
    final = {(r["row"], r["gpus"]): r["final_loss"] for r in records if r["exit_code"] == 0}
    losses = {(r["row"], r["gpus"]): r["losses"] for r in records if r["exit_code"] == 0}
    worlds = sorted({r["gpus"] for r in records})
    lines = []
    for r in records:
        key = r["row"], r["gpus"]
        if key not in final:
            lines.append((r["row"], r["gpus"], f"failed with exit code {r['exit_code']}", "", "", "", ""))
            continue
        spread = spread_of_seeds(final, r["gpus"]) or spread_of_seeds(final, worlds[0])
        lines.append(
            (
                *(r["row"], r["gpus"], f"{final[key]:.4f}"),
                "" if r["row"] in SEEDS else difference(final, losses, key, ("bf16", r["gpus"]), average),
                "n/a" if spread is None else f"{spread:.4f}",
                "" if r["gpus"] == worlds[0] else difference(final, losses, key, (r["row"], worlds[0]), average),
                f"{r['tps']:,.0f}",
            )
        )
    columns = ("row", "GPUs", "final loss", "less bf16's (largest of a step)", "spread of bf16 seeds")
    return markdown_table((*columns, f"less that on {worlds[0]} GPU (largest of a step)", "tok/s/GPU"), lines)


def validation_table(records: list[dict[str, Any]]) -> str:
    """Validation loss of each run at its end, and how far it is from that of bf16 with the same seed and GPUs, in per
    cent; for bf16 that of the other seeds."""
    final = {(r["row"], r["gpus"]): r["validation_loss"] for r in records if r["exit_code"] == 0}
    lines = []
    for (row, gpus), loss in final.items():
        base = final.get(("bf16", gpus))
        apart = "" if row == "bf16" or base is None else f"{100 * (loss / base - 1):+.3f} %"
        lines.append((row, gpus, f"{loss:.4f}", apart))
    return markdown_table(("row", "GPUs", "validation loss", "from bf16's"), lines)


def spread_of_seeds(final: dict[tuple[str, int], float], gpus: int) -> float | None:
    """Largest minus smallest final loss of the bf16 seeds; None with fewer than two of them."""
    seeds = [final[row, gpus] for row in SEEDS if (row, gpus) in final]
    return max(seeds) - min(seeds) if len(seeds) > 1 else None


def difference(final: dict, losses: dict, key: tuple[str, int], other: tuple[str, int], average: int) -> str:
    """`+0.0012 (0.0100)`: of the final losses, and the largest of one step among those averaged."""
    if other not in final:
        return "n/a"
    pairs = zip(losses[key][-average:], losses[other][-average:], strict=True)
    return f"{final[key] - final[other]:+.4f} ({max(abs(a - b) for a, b in pairs):.4f})"


def main() -> int:
    args = arguments()
    settle(args)
    records = []
    for gpus in args.worlds:

        def recorded(row: str, lane: Mapping[str, str], gpus: int = gpus) -> dict[str, Any]:
            record = run(row, gpus, args, lane)
            append_records(args.out, [record])
            loss = f"{record['final_loss']:.4f}" if record["exit_code"] == 0 else "failed"
            print(f"{row} on {gpus}: {loss} [{record['wall_s']} s]", flush=True)
            return record

        records += side_by_side(recorded, args.rows, args.lanes_of[gpus])
    print(
        f"\n{args.steps} steps of {args.global_batch} x {args.seq_len} tokens; mean of the last {args.average} logged\n"
    )
    print(table(records, args.average))
    if args.validate:
        print(f"\n{validation_table(records)}")
    return int(any(record["exit_code"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
