#!/usr/bin/env python3
"""Llama 3 8B in float8 on all GPUs of one host, beside torchtitan 0.2.2 + torchao 0.17.0: one command, several tables.

    scripts/bench_8gpu.sh --data TOKENS --tokenizer DIR --out RUNS        installs the peer, then runs this script
    ... --resume                                                          what was left out, and all tables
    ... --parts headline,scaling --limit 1200                             a part of it, in more time

| part | what trains | sides |
|---|---|---|
| headline | all 32 layers, FSDP2, 8192 tokens a GPU, selective recomputation of operators | both |
| scaling | 16 of 32 layers on all GPUs, then on a half, a quarter and so on, these side by side | ours |
| short | all 32 layers, 4096 tokens a GPU, with no, every second block's and full recomputation | ours |
| experts | 4 of 48 layers of Llama 4 Scout, experts dealt out to all GPUs, 4 x 8192 tokens a GPU (80 GiB: 1 x) | both |
| | that go to all experts in turns | |
| large | Llama 3 70B with as many layers as fit, FSDP2 times tensor parallelism of 2, 8192 tokens for two GPUs | both |
| | on two GPUs nothing is sharded, and the peer would multiply in fp32 | ours |

There may be any number of GPUs that 2 divides. Each row is one training of 10 steps, counted from the
sixth to the tenth; a row whose communication is looked at trains for five more and traces the last one. First come some
of each part (`bench_8gpu_parts.py`), so that a call of ten minutes tells something of all, then the others in the order
of the table; options of both sides are those of `bench_peers.py`, and so is what is recomputed in each.

No run begins that would end after `--limit` seconds, as far as those before it tell, and one that still runs then is
ended. What was left out is named, and the command exits with 3: the same command with `--resume` goes on; what failed
before comes last then. `bench_8gpu_tables.py OUT/results.jsonl` prints the tables again, without a GPU.

NVLink multicast is off on both sides.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import profile_table
from bench_8gpu_parts import LARGE_LAYERS, PARTS, Wave, all_waves, part_of
from bench_8gpu_tables import tables
from bench_common import append_records
from bench_peers import check_devices, earlier_results, execute, inspect_peer, parser_of, revision, settings_of, settle
from bench_runs import TIMED_OUT, shares, side_by_side, visible_gpus
from peer.jobs import LOG_FREQ, THEIRS, Job, Run
from peer.text import write_peer_text

COUNTED = 2 * LOG_FREQ
"""Steps of a run that is not traced; the first half is its warm-up."""
USUAL_S = 60.0
"""What a run is expected to take before any of its side has run."""
WITHOUT_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""In the environment of both sides: a program that uses NVLink multicast claims a resource of the whole host."""
BEGAN = "BENCH_BEGAN"
"""Names, in the environment, when the command began that calls this script, in seconds since the epoch."""
LEFT_OUT = 3
"""Exit code where not all rows have run."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help="comma-separated (default: all: " + ", ".join(PARTS) + ")")
    add("--limit", type=float, default=570, help="seconds after which no run is under way any more (default: 570)")
    add("--large-layers", type=int, help=f"of {LARGE_LAYERS} (default: as many as fit)")
    add("--ours-only", action="store_true", help="without the peer")
    add("--row-timeout", type=float, default=180, help="seconds after which a run is ended (default: 180)")
    add("--resume", action="store_true", help="leave out runs that results.jsonl has with the same options")
    args = parser.parse_args(argv)
    settle(args, parts=PARTS)
    if args.large_layers is not None and not 1 <= args.large_layers <= LARGE_LAYERS:
        raise SystemExit(f"--large-layers {args.large_layers}: Llama 3 70B has {LARGE_LAYERS}")
    now = time.time()
    args.begin = time.monotonic() - max(0.0, now - float(os.environ.get(BEGAN, now)))
    # What the runs of bench_peers.py are told besides.
    args.warm_up, args.lr, args.ac, args.vocab_size, args.peer_options = LOG_FREQ, 3e-4, "op", 128256, []
    args.same_start = False
    return args


class Clock:
    """How much time there is, and what runs take."""

    def __init__(self, begin: float, limit_s: float) -> None:
        self._end = begin + limit_s
        self._longest: dict[tuple[Any, ...], float] = {}

    @property
    def left_s(self) -> float:
        """Seconds to the limit."""
        return self._end - time.monotonic()

    def has_time_for(self, wave: Wave) -> bool:
        """Whether runs would end before the limit, if they take what the longest of those most like them took."""
        return self.left_s >= max(map(self._expected_s, wave))

    def took(self, run: Run, seconds: float) -> None:
        """A run has ended, now or in an earlier call."""
        for kind in _kinds(run):
            self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def _expected_s(self, run: Run) -> float:
        return next((self._longest[kind] for kind in _kinds(run) if kind in self._longest), USUAL_S)


def _kinds(run: Run) -> list[tuple[Any, ...]]:
    """What a run is one of, the narrowest first."""
    compiled = run.row.compiled
    return [(part_of(run), run.side, compiled), (run.side, compiled), (run.side,)]


def run_all(waves: Sequence[Wave], args: argparse.Namespace, found: Mapping[str, Any]) -> tuple[list[dict], list[Run]]:
    """The records of all that has run, now or before, and the runs that were left out, both in the order of `waves`."""
    clock = Clock(args.begin, args.limit)
    planned = {run.name: run for wave in waves for run in wave}
    records = finished_before(planned.values(), args, found)
    for name, record in records.items():
        clock.took(planned[name], record["wall_s"])
    failed = failed_before(args)
    texts: set[str] = set()
    for wave in sorted(waves, key=lambda wave: any(run.name in failed for run in wave)):
        waiting = [run for run in wave if run.name not in records]
        if waiting and clock.has_time_for(waiting):
            for job in {run.job.name: run.job for run in waiting if run.side == THEIRS}.values():
                if job.name not in texts:
                    write_text(job, args)
                    texts.add(job.name)
            records |= run_wave(waiting, args, found, clock)
    return (
        [records[name] for name in planned if name in records],
        [run for name, run in planned.items() if name not in records],
    )


def finished_before(
    runs: Iterable[Run], args: argparse.Namespace, found: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Run -> its record of an earlier call, of those that ended well with the same options."""
    earlier = earlier_results(args)
    finished = {}
    for run in runs:
        record = earlier.get((run.job.name, run.row.name, run.side, run.repeat))
        if record and settings_of(run, arguments_of(run, args), found).items() <= record.items():
            finished[run.name] = record
    return finished


def failed_before(args: argparse.Namespace) -> set[str]:
    """Names of the runs that failed in the earlier calls that this one resumes."""
    file = args.out / "results.jsonl"
    if not args.resume or not file.exists():
        return set()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {f"{r['job']}/{r['row']}/{r['side']}-{r['repeat']}" for r in records if "error" in r}


def run_wave(wave: Wave, args: argparse.Namespace, found: Mapping[str, Any], clock: Clock) -> dict[str, dict[str, Any]]:
    """Train side by side, each on GPUs of its own: run -> its record; none of a run that the limit ended."""

    def train(item: tuple[Run, Mapping[str, str]], _: Mapping[str, str]) -> dict[str, Any] | None:
        run, share = item
        given = arguments_of(run, args)
        begin, left_s = time.monotonic(), clock.left_s
        given.row_timeout = min(args.row_timeout, left_s)
        record = execute(run, given, found, {**os.environ, **WITHOUT_MULTICAST, **share})
        if record.get("exit_code") == TIMED_OUT and left_s < args.row_timeout:
            print(f"{run.name}: ended at the limit", flush=True)
            return None
        record |= {"gpus": run.job.gpus, "layers": run.job.layers, "local_batch": run.job.local_batch}
        if run.traced and "error" not in record:
            try:
                record |= look_at_trace(run, given)
            except (OSError, ValueError, LookupError, SystemExit) as error:  # the speed was measured all the same
                print(f"{run.name}: its trace cannot be read: {error}", flush=True)
        append_records(args.out, [record])
        if "error" not in record:
            clock.took(run, time.monotonic() - begin)
        result = record["error"] if "error" in record else f"{record['tps']:,.0f} tok/s/GPU"
        print(f"{run.name}: {result} [{record['wall_s']} s]", flush=True)
        return record

    parts = shares([run.job.gpus for run in wave], visible_gpus())
    found_of = side_by_side(train, list(zip(wave, parts, strict=True)), [{}] * len(wave))
    return {run.name: record for run, record in zip(wave, found_of, strict=True) if record is not None}


def arguments_of(run: Run, args: argparse.Namespace) -> argparse.Namespace:
    """What a run's options are made of."""
    return argparse.Namespace(**{**vars(args), "steps": COUNTED + LOG_FREQ * run.traced})


def write_text(job: Job, args: argparse.Namespace) -> None:
    """What the peer reads in a job."""
    tokens = (COUNTED + LOG_FREQ) * job.global_batch * (job.seq_len + 1)
    write_peer_text(args.data, args.tokenizer, args.out / job.name, ranks=job.gpus // job.tensor, tokens=tokens)


def look_at_trace(run: Run, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the traced step: all of it, communication beside which nothing runs, and the other
    communication."""
    trace = args.out / run.name / "profile_traces" / f"iteration_{args.steps}" / "rank0_trace.json"
    summary = profile_table.summarize(profile_table.read_events(trace))
    return {
        "step_ms": summary.span,
        "exposed_ms": summary.exposed,
        "hidden_ms": summary.communication - summary.exposed,
    }


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """As `inspect_peer`; of this process, where the peer does not train."""
    if not args.ours_only:
        return inspect_peer(args.site, args.out)
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"versions": {"torch": torch.__version__}, "devices": devices}


def main() -> int:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    found = inspect(args)
    check_devices([], found["devices"])
    gpus = len(found["devices"])
    if gpus % 2:
        raise SystemExit(
            f"{gpus} GPUs here, but trainings need a number that 2 divides; choose with CUDA_VISIBLE_DEVICES"
        )
    import torch

    args.gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    records, left_out = run_all(all_waves(gpus, args), args, found)
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    print(f"\n{gpus} x {found['devices'][0]}, {versions}, ours at revision {revision()}\n")
    print(tables(records))
    if left_out:
        print("\nLeft out for want of time, --resume goes on: " + ", ".join(run.name for run in left_out))
        return LEFT_OUT
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
