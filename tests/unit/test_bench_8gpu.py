"""bench_8gpu.py: what it trains on any even number of GPUs, what it leaves out for want of time, and its tables."""

import importlib
import json
from pathlib import Path

import pytest

from titan_fp8.job_config import load_job_config

SCRIPTS = Path(__file__).parents[2] / "scripts"
FOUND = {"versions": {"torch": "2.11.0"}, "devices": ["NVIDIA H200"] * 8}


@pytest.fixture
def bench(load):
    """The script as a module."""
    return load("bench_8gpu")


@pytest.fixture
def bench_parts(bench):
    """What it trains, as a module."""
    return importlib.import_module("bench_8gpu_parts")


@pytest.fixture
def parse(bench, tmp_path):
    """The script's arguments from its optional options."""
    (tmp_path / "data").mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").touch()

    def parse(*options: str, gib: float = 140.0):
        required = ("--data", tmp_path / "data", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "out")
        args = bench.arguments([*map(str, required), *options])
        args.gib = gib
        args.out.mkdir(exist_ok=True)
        return args

    return parse


def waves(bench, args, gpus: int) -> list:
    return bench.all_waves(gpus, args)


@pytest.mark.parametrize("gpus", [2, 4, 6, 8])
def test_every_run_of_ours_is_a_job_for_its_gpus_and_runs_side_by_side_have_enough(bench, parse, gpus):
    jobs, args = importlib.import_module("peer.jobs"), parse()
    names = []
    for wave in waves(bench, args, gpus):
        assert sum(run.job.gpus for run in wave) <= gpus
        for run in wave:
            names.append(run.name)
            if run.side == "ours":
                config = ["--job.config_file", str(SCRIPTS.parent / "train_configs" / "llama3_8b.toml")]
                options = jobs.our_options(run, bench.arguments_of(run, args))
                found, _ = load_job_config([*config, *options], {"WORLD_SIZE": str(run.job.gpus)})
                assert found.training.global_batch_size == run.job.global_batch
                assert found.profiling.enable_profiling == run.traced
                assert found.profiling.trace_cpu == (not run.traced or run.job.gpus == 1)
                assert found.training.steps == (15 if run.traced else 10)
            else:
                command = jobs.command_of(run, bench.arguments_of(run, args))
                assert ("--device-trace" in command) == run.traced
    assert len(names) == len(set(names))
    assert {name.partition("/")[0].partition("-")[0] for name in names} == set(bench.PARTS)


def test_the_parts_of_eight_gpus_are_what_is_promised(bench, parse):
    jobs, args = importlib.import_module("peer.jobs"), parse()
    runs = [run for wave in waves(bench, args, 8) for run in wave]
    headline = {(run.row.name, run.side): run for run in runs if run.job.name == "headline"}
    both = {row for row, side in headline if side == "peer"}
    assert both == {
        "tensorwise-compiled",
        "bf16-compiled",
        "bf16-eager",
        "rowwise-compiled",
        "tensorwise-weights-gathered-whole",
    }
    gathers = "--quantize.linear.float8.enable_fsdp_float8_all_gather"
    for (row, side), run in headline.items():
        options = (jobs.our_options if side == "ours" else jobs.peer_options)(run, bench.arguments_of(run, args))
        selective = "--activation_checkpoint.selective_ac_option=op" in options
        assert selective == (not row.endswith("nothing-recomputed")), row
        assert ("--optimizer.state_dtype=bfloat16" in options) == row.startswith("float8-head-states")
        named = any(option.startswith(gathers) for option in options)
        recipe = run.row.recipe
        expected = recipe is not None and run.row.gathers and (side == "ours" or recipe == "tensorwise")
        assert named == expected, (row, side)
    assert [run.job.gpus for run in runs if run.job.name.startswith("scaling")] == [8, 4, 2, 1] * 2
    large = next(run.job for run in runs if run.job.name == "large")
    assert (large.tensor, large.global_batch, large.layers) == (2, 4, 61)
    experts = next(run.job for run in runs if run.job.name == "experts")
    assert (experts.experts, experts.layers, experts.local_batch, experts.global_batch) == (8, 4, 4, 32)
    for run in runs:
        options = (jobs.our_options if run.side == "ours" else jobs.peer_options)(run, bench.arguments_of(run, args))
        balance = [option for option in options if "moe_force_load_balance" in option]
        both = ["--debug.moe_force_load_balance=true"] if run.side == "ours" else ["--debug.moe_force_load_balance"]
        assert balance == (both if run.job.name == "experts" else [])
    assert {run.job.seq_len for run in runs if run.job.name.startswith("short")} == {4096}


@pytest.mark.parametrize("gpus", [2, 4])
def test_the_peer_trains_the_large_model_where_it_is_sharded(bench, parse, gpus):
    runs = [run for wave in waves(bench, parse(), gpus) for run in wave if run.job.name == "large"]
    assert {run.side for run in runs} == ({"ours"} if gpus == 2 else {"ours", "peer"})


def test_layers_of_the_large_model_take_no_more_memory_than_there_is(bench_parts):
    for gpus, gib in ((2, 140.0), (4, 79.0), (8, 79.0), (8, 140.0)):
        layers = bench_parts.fitting_layers(gpus, gib)
        parameters = layers * bench_parts.LAYER_PARAMETERS + bench_parts.TABLE_PARAMETERS
        state = (gib - 38) * 2**30
        assert 16 * parameters / gpus <= state < 16 * (parameters + bench_parts.LAYER_PARAMETERS) / gpus
    assert bench_parts.fitting_layers(8, 400.0) == 80
    with pytest.raises(SystemExit, match="no layer of Llama 3 70B fits 2 GPUs of 20 GiB"):
        bench_parts.fitting_layers(2, 20.0)


@pytest.mark.parametrize("layers", ["0", "-1", "81"])
def test_layers_that_the_large_model_does_not_have_are_refused(parse, layers):
    with pytest.raises(SystemExit, match=f"--large-layers {layers}: Llama 3 70B has 80"):
        parse("--large-layers", layers)


def test_gpus_of_80_gib_get_smaller_jobs(bench, parse):
    args = parse(gib=79.2)
    jobs = {run.job.name: run.job for wave in waves(bench, args, 4) for run in wave}
    assert (jobs["experts"].local_batch, jobs["experts"].global_batch) == (1, 4)
    assert jobs["scaling-1"].layers == 8
    assert jobs["large"].layers == 10


def test_time_counts_from_the_command_that_installs_the_peer(bench, parse, monkeypatch):
    monkeypatch.setattr(bench.time, "monotonic", lambda: 50.0)
    monkeypatch.setattr(bench.time, "time", lambda: 1000.0)
    assert parse().begin == 50.0
    monkeypatch.setenv("BENCH_BEGAN", "960")
    assert parse().begin == 10.0


@pytest.fixture
def executed(bench, monkeypatch) -> list[str]:
    """Names of what would have run; each takes 100 s of a clock of its own, and runs side by side 100 s together."""
    names: list[str] = []
    now = [0.0]

    def execute(run, args, found, base):
        names.append(run.name)
        if run.job.name != "scaling-1":
            now[0] += 100.0
        record = {"job": run.job.name, "row": run.row.name, "side": run.side, "repeat": run.repeat, "wall_s": 100.0}
        return record | bench.settings_of(run, args, found) | {"tps": 1000.0, "memory_gib": 9.0}

    monkeypatch.setattr(bench, "execute", execute)
    monkeypatch.setattr(bench, "write_peer_text", lambda *args, **more: names.append(f"text for {more['ranks']}"))
    monkeypatch.setattr(bench, "look_at_trace", lambda run, args: {"step_ms": 9.0, "exposed_ms": 1.0, "hidden_ms": 2.0})
    monkeypatch.setattr(bench, "visible_gpus", lambda: ["4", "5"])
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    return names


def trained(executed: list[str]) -> list[str]:
    """What has run, without the texts that were written."""
    return [name for name in executed if not name.startswith("text")]


def test_what_does_not_fit_the_time_is_left_out_and_resuming_goes_on_with_it(bench, parse, executed):
    args = parse("--limit", "450", "--parts", "headline")
    plan = waves(bench, args, 2)
    expected = [run.name for wave in plan for run in wave]
    records, left_out = bench.run_all(plan, args, FOUND)
    assert trained(executed) == expected[:4]
    assert [run.name for run in left_out] == expected[4:]
    assert len(records) == 4
    short = parse("--limit", "90", "--parts", "headline", "--resume")  # the runs before took 100 s
    short.begin = bench.time.monotonic()
    assert len(bench.run_all(plan, short, FOUND)[0]) == 4
    again = parse("--limit", "5000", "--parts", "headline", "--resume")
    again.begin = bench.time.monotonic()
    records, left_out = bench.run_all(plan, again, FOUND)
    assert trained(executed) == expected
    assert [f"{r['job']}/{r['row']}/{r['side']}-{r['repeat']}" for r in records] == expected
    assert not left_out


@pytest.mark.parametrize("options", [(), ("--ours-only",)])
def test_runs_of_every_part_come_first_then_the_others_part_by_part(bench, bench_parts, parse, options):
    plan = [(bench.part_of(wave[0]), wave[0].row.name, wave[0].side) for wave in waves(bench, parse(*options), 8)]
    headline = [side for part, row, side in plan if part == "headline" and f"headline/{row}" in bench_parts.FIRST]
    first = len(headline) + 6
    assert len(headline) == (4 if options else 7)
    parts = [part for part, _, _ in plan]
    order = ["headline", "scaling", "short", "experts", "large"]
    assert list(dict.fromkeys(parts[:first])) == list(dict.fromkeys(parts[first:])) == order
    assert parts == [part for half in (parts[:first], parts[first:]) for part in sorted(half, key=order.index)]
    assert {row for part, row, _ in plan[:first] if part == "short"} == {"bf16-eager", "tensorwise-eager"}
    assert {f"{part}/{row}" for part, row, _ in plan[:first]} == set(bench_parts.FIRST)


def test_what_a_run_takes_is_told_by_those_most_like_it(bench, parse, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    runs = {(run.job.name, run.row.name, run.side): run for wave in waves(bench, parse(), 4) for run in wave}
    ours = runs["headline", "tensorwise-compiled", "ours"]
    peer = runs["headline", "tensorwise-compiled", "peer"]
    eager = runs["headline", "tensorwise-eager", "ours"]
    large = runs["large", "bf16-compiled", "ours"]
    clock = bench.Clock(0.0, 100.0)

    def longest(run) -> float:
        return next(seconds for seconds in range(100, -1, -1) if not _fits(clock, run, now, seconds)) + 1

    assert longest(ours) == bench.USUAL_S
    clock.took(ours, 30.0)
    clock.took(peer, 50.0)
    assert (longest(ours), longest(peer), longest(eager), longest(large)) == (30, 50, 30, 30)
    clock.took(eager, 20.0)
    clock.took(large, 70.0)
    assert (longest(ours), longest(eager), longest(large)) == (30, 20, 70)


def _fits(clock, run, now: list[float], left_s: float) -> bool:
    now[0] = 100.0 - left_s
    return clock.has_time_for([run])


def test_the_text_of_a_job_is_written_once_and_for_its_data_parallel_ranks(bench, parse, executed):
    args = parse("--parts", "headline,large", "--limit", "99999")
    bench.run_all(waves(bench, args, 4), args, FOUND)
    assert [name for name in executed if name.startswith("text")] == ["text for 4", "text for 2"]


def test_a_run_that_hangs_fails_and_one_that_the_limit_ends_is_left_out(bench, parse, executed, monkeypatch):
    simulated, limits = bench.execute, []

    def execute(run, args, found, base):
        limits.append(args.row_timeout)
        assert base["NCCL_NVLS_ENABLE"] == "0"
        return simulated(run, args, found, base) | {"exit_code": 124, "error": "ended"}

    monkeypatch.setattr(bench, "execute", execute)
    args = parse("--parts", "headline", "--limit", "270")
    plan = waves(bench, args, 2)
    expected = [run.name for wave in plan for run in wave]
    records, left_out = bench.run_all(plan, args, FOUND)
    assert limits == [180, 170, 70]
    assert [record["row"] for record in records] == ["tensorwise-compiled"]
    assert [run.name for run in left_out] == expected[1:]


def test_what_failed_before_comes_last_in_the_next_call(bench, parse, executed, monkeypatch):
    simulated = bench.execute

    def execute(run, args, found, base):
        record = simulated(run, args, found, base)
        return record | {"error": "CUDA out of memory"} if run.name == expected[1] else record

    monkeypatch.setattr(bench, "execute", execute)
    args = parse("--limit", "450", "--parts", "headline")
    plan = waves(bench, args, 2)
    expected = [run.name for wave in plan for run in wave]
    bench.run_all(plan, args, FOUND)
    assert trained(executed) == expected[:4]
    again = parse("--limit", "5000", "--parts", "headline", "--resume")
    again.begin = bench.time.monotonic()
    bench.run_all(plan, again, FOUND)
    assert trained(executed) == [*expected, expected[1]]


def test_runs_side_by_side_see_gpus_of_their_own(bench, parse, executed, monkeypatch):
    seen = {}
    simulated = bench.execute
    monkeypatch.setattr(bench, "visible_gpus", lambda: list("abcdefgh"))

    def execute(run, args, found, base):
        seen[run.job.gpus] = base["CUDA_VISIBLE_DEVICES"]
        return simulated(run, args, found, base)

    monkeypatch.setattr(bench, "execute", execute)
    args = parse("--parts", "scaling", "--limit", "9999")
    records, _ = bench.run_all(waves(bench, args, 8), args, FOUND)
    assert seen == {8: "a,b,c,d,e,f,g,h", 4: "a,b,c,d", 2: "e,f", 1: "g"}
    assert len(records) == 8


def record_of(job: str, row: str, side: str, tps: float, gib: float, **more) -> dict:
    losses = {"first_loss": 12.0, "last_loss": 9.0}
    return {"job": job, "row": row, "side": side, "repeat": 1, "tps": tps, "memory_gib": gib, **losses, **more}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_tables_say_of_what_size_a_job_was_and_are_made_again_from_the_records_file(bench, tmp_path, capsys):
    make = importlib.import_module("bench_8gpu_tables")
    size = {"gpus": 4, "layers": 29, "local_batch": 2}
    failed = {
        "job": "large",
        "row": "bf16-compiled",
        "side": "ours",
        "repeat": 1,
        "error": "CUDA out of memory",
        **size,
    }
    records = [
        record_of("large", "tensorwise-compiled", "ours", 9000.0, 50.0, **size),
        failed,
        record_of("large", "bf16-compiled", "ours", 7000.0, 50.0, **size),
        failed,
        record_of("experts", "bf16-compiled", "peer", 7000.0, 50.0, **size | {"layers": 4}),
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    make.main([str(file)])
    text = capsys.readouterr().out
    assert "Llama 3 70B, 29 layers on 4 GPUs, 8192 tokens for two GPUs\n" in text
    assert "Llama 4 Scout, 4 layers on 4 GPUs, 2 x 8192 tokens a GPU, sent to all experts in turns\n" in text
    assert "| bf16-compiled | 7,000 [one run] |" in text
    assert "out of memory" not in text
    assert "out of memory" in make.tables(make.latest([json.dumps(failed)]))


def test_rows_in_bf16_come_first(bench):
    make = importlib.import_module("bench_8gpu_tables")
    names = ("tensorwise-compiled", "bf16-compiled", "rowwise-compiled", "bf16-eager")
    records = [record_of("headline", name, "ours", 1.0, 1.0) for name in names]
    assert make.rows_of(records) == ["bf16-eager", "bf16-compiled", "tensorwise-compiled", "rowwise-compiled"]


def test_scaling_starts_with_the_fewest_gpus_that_trained(bench):
    make = importlib.import_module("bench_8gpu_tables")
    records = [
        record_of("scaling-4", "bf16-compiled", "ours", 800.0, 50.0),
        record_of("scaling-2", "bf16-compiled", "ours", 1000.0, 50.0),
        {"job": "scaling-1", "row": "bf16-compiled", "side": "ours", "repeat": 1, "error": "no memory"},
    ]
    assert cells(make.scaling_table(records)) == [
        ["1", "failed: no memory", "", ""],
        ["2", "1,000", "100.0%", ""],
        ["4", "800", "80.0%", ""],
    ]


def test_tables_of_a_file_that_is_not_there_are_refused(bench, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("bench_8gpu_tables").main([str(tmp_path / "results.jsonl")])
    assert "is no file; name the results.jsonl" in capsys.readouterr().err


def test_tables_compare_each_side_with_its_own_baseline_and_say_why_a_run_failed(bench):
    make = importlib.import_module("bench_8gpu_tables")
    records = [
        record_of("headline", "tensorwise-compiled", "ours", 9000.0, 50.0, step_ms=9.0, exposed_ms=1.25, hidden_ms=7.0),
        record_of("headline", "tensorwise-compiled", "peer", 7500.0, 60.0),
        record_of("headline", "bf16-eager", "ours", 6000.0, 55.0),
        record_of("headline", "bf16-eager", "peer", 5000.0, 66.0),
        {"job": "headline", "row": "rowwise-compiled", "side": "peer", "repeat": 1, "error": "exit code 1: a | b"},
        record_of("scaling-8", "bf16-compiled", "ours", 900.0, 50.0, exposed_ms=3.0),
        record_of("scaling-1", "bf16-compiled", "ours", 1000.0, 50.0, exposed_ms=0.0),
        record_of("short-full", "bf16-eager", "ours", 4000.0, 40.0),
        record_of("short-full", "tensorwise-eager", "ours", 4400.0, 39.0),
    ]
    headline = cells(make.headline_table(make.of_job(records, "headline")))
    assert headline == [
        ["bf16-eager", "6,000", "-", "5,000", "-", "1.200", "55.0", "66.0"],
        ["tensorwise-compiled", "9,000", "+50.0 %", "7,500", "+50.0 %", "1.200", "50.0", "60.0"],
        ["rowwise-compiled", "", "", "failed: exit code 1: a \\", "b", "", "", "", ""],
    ]
    assert cells(make.scaling_table(records[5:7])) == [
        ["1", "1,000", "100.0%", "0.0"],
        ["8", "900", "90.0%", "3.0"],
    ]
    assert cells(make.memory_table(make.of_job(records, "short-full"))) == [
        ["bf16-eager", "4,000", "40.0", "-", "-"],
        ["tensorwise-eager", "4,400", "39.0", "+10.0 %", "-2.5 %"],
    ]
    text = make.tables(records)
    assert "| headline | tensorwise-compiled | ours | 9.0 | 1.2 | 7.0 |" in text
    assert "Llama 3 70B" not in text


def test_a_trace_that_cannot_be_read_loses_no_speed(bench, parse, executed, monkeypatch, capsys):
    def missing(run, args):
        raise FileNotFoundError("no such trace")

    monkeypatch.setattr(bench, "look_at_trace", missing)
    args = parse("--parts", "experts", "--limit", "9999")
    records, left_out = bench.run_all(waves(bench, args, 2), args, FOUND)
    assert [record["tps"] for record in records] == [1000.0] * 4
    assert not left_out
    assert "experts/bf16-compiled/peer-1: its trace cannot be read: no such trace" in capsys.readouterr().out
