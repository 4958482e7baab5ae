#!/usr/bin/env python3
"""Train Llama 3 8B dims with this project and with torchtitan 0.2.2 + torchao 0.17.0 in turns, and print tables.

    scripts/bench_peers.sh --data TOKENS --tokenizer DIR --out RUNS            installs the peer, then runs this script
    ... --jobs one-gpu --rows bf16-compiled --repeats 1 --resume               a part of it; calls fill one table
    ... --ours-extra 'no AC=@tensorwise-compiled --activation_checkpoint.mode none'

| job | GPUs | layers | sequences of 8192 a step |
|---|---|---|---|
| one-gpu | 1 | 8 of 32 | 2 |
| two-gpus | 2, FSDP2 | 32 | 2, one a GPU |
| two-gpus-accumulating | 2, FSDP2 | 32 | 16, one a GPU and microbatch |
| experts | 2, FSDP2, EP | 4 of 48 of Llama 4 Scout | 8, four a GPU |
| experts-batch-1 | 2, FSDP2, EP | 4 of 48 of Llama 4 Scout | 2, one a GPU |
| small-experts | 1 | 12 of 48 of Qwen3-30B-A3B | 2 |

Ours computes the loss some tokens at a time and, in float8, recomputes nothing (`peer/jobs.py`); the table shows what
memory each side takes. On two GPUs weights are gathered as codes with scales computed ahead: ours in every recipe, the
peer's in the one that it has this for, tensorwise. A row is run ours, peer, peer, ours, ours, peer
and so on, so that a device that slows down with time does so for both. With `--lanes 3` three of these runs are under
way at a time, each on GPUs of its own. Eager rows are ours alone. A row that
`--ours-extra NAME=OPTIONS` adds has the job's options (bf16, eager) or, with `@ROW` first, those of that row, and then
its own.

Both sides have the same dimensions (their numbers of parameters are compared), optimizer, schedule (the learning rate
rises over the whole run), checkpointing, seed and text. `peer/text.py` writes the text for the peer: a step covers the
same stretch of it on both sides, cut into sequences at other places. Initial weights have the same distributions, but
come from other generators. The peer tokenizes in its training process while the GPU works, as it does for its users;
ours reads tokens. That is what speeds are measured with.

With `--same-start` losses are what counts: the peer begins with our weights to the bit and reads our token shards, each
rank of it at each step the sequences that this rank of ours reads (`peer/same_start.py`), and every step is logged. Our
models with experts leave out what the peer's lack. Its first losses then differ by how each side rounds, and its curve
lies on ours as far as the recipes are the same: `peer_curves.py` draws them. Take another folder for these runs.

Each run's folder has its logged steps in `metrics.jsonl`, the peer's too, so `titan-fp8 plot` draws both sides.

tok/s per GPU is the median over a run's logged steps after the warm-up, and in the table the median over the repeats,
with their largest minus their smallest as the spread. Peak memory is the highest reserved amount of rank 0; losses are
those of the first repeat. The first step is the time from the command to its log line, of the first repeat and, after a
stroke, the median of the others, which without lanes find the compiler's caches. A side that fails in a row is not run
again there. With `--resume`, runs that ended well before, with the same options, versions and device, are taken from
`results.jsonl`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import profile_table
from bench_common import append_records
from bench_meshes import CHECKPOINTING
from bench_runs import (
    REPO,
    TIMED_OUT,
    FirstMatch,
    figures,
    lanes_of,
    last_error,
    read_metrics,
    run_command,
    side_by_side,
    visible_gpus,
)
from peer.install import PEER, REQUIREMENTS
from peer.jobs import (
    JOBS,
    LAUNCHER,
    LOG_FREQ,
    OURS,
    PROFILE,
    ROWS,
    Job,
    Run,
    command_of,
    extra_row,
    turns,
)
from peer.log import FIRST_STEP, read_parameters, read_steps
from peer.table import table
from peer.text import write_peer_text

from titan_fp8.models.arithmetic import count_parameters
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.observability.json_lines import METRICS_FILE

CONFIG = REPO / "train_configs" / "llama3_8b.toml"


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser of what each benchmark beside the peer is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="token shards written by `titan-fp8 prepare`")
    add("--tokenizer", type=Path, required=True, help="folder of the tokenizer that they were written with")
    add("--out", type=Path, required=True, help="folder for runs, logs and results.jsonl")
    add("--site", type=Path, help="folder that the peer is installed in (default: OUT/peer_site)")
    return parser


def settle(args: argparse.Namespace, **known: Collection[str]) -> None:
    """Split the lists of names among what `parser_of` and its caller asked for, and make the paths absolute.

    Raises:
        SystemExit: a name of a list is not known.
    """
    for option, names in known.items():
        chosen = [name for name in getattr(args, option).split(",") if name]
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise SystemExit(f"--{option}: no such name: {', '.join(unknown)}; known: {', '.join(names)}")
        setattr(args, option, chosen)
    args.site = args.site or args.out / "peer_site"
    for name in ("data", "tokenizer", "out", "site"):
        setattr(args, name, getattr(args, name).expanduser().resolve())


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--jobs", default=",".join(JOBS), help="comma-separated (default: all: " + ", ".join(JOBS) + ")")
    add("--rows", default=",".join(ROWS), help="comma-separated, may be empty (default: all: " + ", ".join(ROWS) + ")")
    add("--ours-extra", action="append", default=[], metavar="NAME=OPTIONS", help="further row of ours; repeatable")
    add("--peer-options", type=shlex.split, default=[], help="further options for every run of the peer")
    add("--repeats", type=int, default=3, help="runs of each side (default: 3)")
    add("--lanes", type=int, default=1, help="runs at a time, each on GPUs of its own (default: 1)")
    add("--steps", type=int, default=20, help=f"a multiple of {LOG_FREQ} (default: 20)")
    add("--warm-up", type=int, default=10, help="first steps, not counted in the speed; likewise (default: 10)")
    add("--lr", type=float, default=3e-4, help="learning rate of the last step (default: 3e-4)")
    add("--ac", default="op", choices=CHECKPOINTING, help="activation checkpointing of both sides (default: op)")
    add("--vocab-size", type=int, default=128256, help="rows of embedding and head on both sides (default: 128256)")
    add("--row-timeout", type=float, default=600, help="seconds after which a run is ended (default: 600)")
    add("--same-start", action="store_true", help="the peer starts with our weights and reads our sequences, see above")
    add("--resume", action="store_true", help="leave out runs that results.jsonl has with the same options")
    add("--profile", action="store_true", help="one more run of each side and row, whose last step is traced")
    args = parser.parse_args(argv)
    settle(args, jobs=JOBS, rows=ROWS)
    args.rows = [ROWS[name] for name in args.rows] + [extra_row(text) for text in args.ours_extra]
    if len({row.name for row in args.rows}) < len(args.rows):
        raise SystemExit("--rows and --ours-extra: a name stands twice; choose another one")
    if args.repeats < 1 and not args.profile:
        raise SystemExit(f"--repeats {args.repeats}: nothing would run; take 1 or more, or --profile")
    if args.steps % LOG_FREQ or args.warm_up % LOG_FREQ or not 0 <= args.warm_up < args.steps:
        raise SystemExit(
            f"--steps {args.steps} --warm-up {args.warm_up}: both must be multiples of {LOG_FREQ}, after so many steps "
            "each side logs, and the warm-up the smaller one"
        )
    return args


def peer_environment(site: Path, out: Path, gpus: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment with the peer's packages before all others; the caches of its data are in `out`."""
    environment = dict(environment)
    # What ./run_train.sh sets for ours; the allocator's segments grow in the peer's own run_train.sh too.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    segments = environment.get("PYTORCH_CUDA_ALLOC_CONF") or "expandable_segments:True"
    environment["PYTORCH_ALLOC_CONF"] = environment.get("PYTORCH_ALLOC_CONF") or segments
    path = [str(site), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {
        "PYTHONPATH": os.pathsep.join(path),
        # The launcher's folder is none to import from.
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(out / "peer_cache"),
    }


def inspect_peer(site: Path, out: Path) -> dict[str, Any]:
    """`{"versions": {name: version}, "devices": [name of each GPU]}`, as a process of the peer sees them.

    Raises:
        SystemExit: it cannot be imported, or is of other versions.
    """
    log = out / "peer_check.log"
    environment = peer_environment(site, out, 1)
    code, _ = run_command([sys.executable, str(LAUNCHER), "--check"], log, environment)
    if code:
        raise SystemExit(
            f"the peer cannot be imported from {site}: {last_error(log)}\n"
            f"The whole message is in {log}. scripts/bench_peers.sh installs {' and '.join(REQUIREMENTS)} there"
        )
    # Libraries that end with the process may say something after the answer.
    found = json.loads([line for line in log.read_text().splitlines() if line.startswith("{")][-1])
    here = [f"{name}=={found['versions'].get(name)}" for name in PEER]
    if here != REQUIREMENTS:
        raise SystemExit(f"{site} has {' and '.join(here)}, not {' and '.join(REQUIREMENTS)}; name another --site")
    return found


def check_devices(jobs: Sequence[str], devices: Sequence[str]) -> None:
    """Refuse jobs that need more GPUs than there are.

    Raises:
        SystemExit: it says which.
    """
    if not devices:
        raise SystemExit("no CUDA device here; this benchmark needs GPUs with FP8 tensor cores, such as H100")
    too_large = [name for name in jobs if JOBS[name].gpus > len(devices)]
    if too_large:
        raise SystemExit(f"{len(devices)} GPU here, too few for {', '.join(too_large)}; leave them out of --jobs")


def settings_of(run: Run, args: argparse.Namespace, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's figures depend on."""
    settings = {"command": command_of(run, args), "warm_up": args.warm_up}
    return settings | {"versions": found["versions"], "device": found["devices"][0]}


def execute(
    run: Run, args: argparse.Namespace, found: Mapping[str, Any], base: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Run it, in the environment `base` and what its side adds: its figures, or its exit code and what its log ends
    with."""
    job = run.job
    log = args.out / f"{run.name}.log"
    if run.side == OURS:
        environment = {**base, "CONFIG_FILE": str(CONFIG), "NGPU": str(job.gpus), "LOG_RANK": "0"}
    else:
        environment = peer_environment(args.site, args.out, job.gpus, base)
    settings = settings_of(run, args, found)
    with FirstMatch(log, FIRST_STEP) as first:
        code, wall_s = run_command(settings["command"], log, environment, args.row_timeout)
    record = {"job": run.job.name, "row": run.row.name, "side": run.side, "repeat": run.repeat, **settings}
    record |= {"exit_code": code, "wall_s": round(wall_s, 1), "first_step_s": first.seconds}
    if code == TIMED_OUT:
        return record | {"error": f"ended after {args.row_timeout:g} s; last: {last_error(log)}"}
    if code:
        return record | {"error": f"exit code {code}: {last_error(log)}"}
    if run.side == OURS:
        lines, problem = read_metrics(args.out / run.name), None
    else:
        text = log.read_text(errors="replace")
        lines, problem = read_steps(text), other_model(read_parameters(text), job, args)
        write_metrics(args.out / run.name, lines)
    if not lines or lines[-1]["step"] != args.steps:
        problem = f"the log has no step {args.steps}; last: {last_error(log)}"
    if problem:
        return record | {"error": problem}
    counted = [line for line in lines if line["step"] <= args.steps - LOG_FREQ * run.traced]
    return record | figures(counted, args.warm_up) | {"losses": [[line["step"], line["loss"]] for line in lines]}


def write_metrics(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """The peer's logged steps where ours has its own, for `titan-fp8 plot`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def other_model(parameters: int | None, job: Job, args: argparse.Namespace) -> str | None:
    """What is wrong with the peer's model, if anything."""
    family, _, flavor = job.model.partition("/")
    overrides = {"n_layers": job.layers, "vocab_size": job.vocab_size or args.vocab_size}
    dims = resolve_dims(family, flavor, overrides)
    ours = count_parameters(dims)
    return None if parameters == ours else f"the peer's model has {parameters} parameters, ours {ours}"


def earlier_results(args: argparse.Namespace) -> dict[tuple[str, str, str, int | str], dict[str, Any]]:
    """What `results.jsonl` has of runs that ended well; the last one of each."""
    file = args.out / "results.jsonl"
    if not args.resume or not file.exists():
        return {}
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {(r["job"], r["row"], r["side"], r["repeat"]): r for r in records if "error" not in r}


def run_job(job: Job, args: argparse.Namespace, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All runs of a job, each recorded as it ends; those left out since their side failed are not in the list."""
    earlier = earlier_results(args)
    failed: set[tuple[str, str]] = set()

    def record_of(run: Run, lane: Mapping[str, str]) -> dict[str, Any] | None:
        if (run.row.name, run.side) in failed:
            return None
        record = earlier.get((run.job.name, run.row.name, run.side, run.repeat))
        if record is None or not settings_of(run, args, found).items() <= record.items():
            record = execute(run, args, found, {**os.environ, **lane})
            append_records(args.out, [record])
        if "error" in record:
            failed.add((run.row.name, run.side))
        result = record["error"] if "error" in record else f"{record['tps']:,.0f} tok/s/GPU"
        print(f"{run.name}: {result} [{record['wall_s']} s]", flush=True)
        return record

    runs = [*turns(job, args.rows, args.repeats), *profiled_runs(job, args)]
    lanes = lanes_of(args.lanes, job.gpus, visible_gpus())
    return [record for record in side_by_side(record_of, runs, lanes) if record is not None]


def profiled_runs(job: Job, args: argparse.Namespace) -> list[Run]:
    """The runs whose last step is traced; their speed does not count."""
    rows = [row for row in args.rows if row.is_for(job)]
    return [Run(job, row, side, PROFILE) for row in rows for side in row.sides] if args.profile else []


def profiles(job: str, args: argparse.Namespace, records: Sequence[dict[str, Any]]) -> str:
    """A table of each row's traces, ours beside the peer's."""
    texts = []
    for row in args.rows:
        columns: dict[str, profile_table.Summary] = {}
        for r in records:
            if (r["row"], r["repeat"]) == (row.name, PROFILE) and "error" not in r:
                traces = args.out / job / row.name / f"{r['side']}-{PROFILE}" / "profile_traces"
                trace = traces / f"iteration_{args.steps}" / "rank0_trace.json"
                columns[r["side"]] = profile_table.summarize(profile_table.read_events(trace))
        if columns:
            texts.append(f"{row.name}\n\n{profile_table.table(list(columns), list(columns.values()))}")
    return "\n\n".join(texts)


def revision() -> str:
    """Of this project; `unknown` outside of a git checkout."""
    command = ["git", "-C", str(REPO), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    found = inspect_peer(args.site, args.out)
    check_devices(args.jobs, found["devices"])
    failed = False
    for name in args.jobs:
        job = JOBS[name]
        tokens = args.steps * job.global_batch * (job.seq_len + 1)
        if not args.same_start:
            write_peer_text(args.data, args.tokenizer, args.out / name, ranks=job.gpus, tokens=tokens)
        records = run_job(job, args, found)
        failed |= any("error" in record for record in records)
        versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
        print(f"\n{name}: {job.gpus} x {found['devices'][0]}, {versions}, ours at revision {revision()}")
        ac = job.ac or args.ac
        print(
            f"{job.model}, {job.layers} layers, {args.steps} steps of {job.global_batch} x {job.seq_len}, --ac {ac}\n"
        )
        print(table([row.name for row in args.rows if row.is_for(job)], records))
        if args.profile:
            print(f"\n{profiles(name, args, records)}")
        print(flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
