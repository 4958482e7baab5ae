"""The comparison with torchtitan: both sides train the same, in turns; logs, tables, resuming, text, installation."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from titan_fp8.cli import prepare
from titan_fp8.cli.plot import read_curve
from titan_fp8.data.token_store import open_shards
from titan_fp8.data.tokenizer import build_tokenizer
from titan_fp8.job_config import load_job_config
from titan_fp8.models import initialize, resolve_dims
from titan_fp8.models.decoder import Decoder

SCRIPTS = Path(__file__).parents[2] / "scripts"
FLOAT8 = "quantize.linear.float8"
FOUND = {"versions": {"torch": "2.11.0", "torchtitan": "0.2.2", "torchao": "0.17.0"}, "devices": ["NVIDIA H100"]}


@pytest.fixture
def parse(load, tmp_path):
    """The script's arguments from its optional options."""
    (tmp_path / "data").mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").touch()

    def parse(*options: str):
        required = ("--data", tmp_path / "data", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "out")
        return load("bench_peers").arguments([*map(str, required), *options])

    parse.out = tmp_path / "out"
    return parse


def given(options: list[str]) -> dict[str, str]:
    """`--key=value` and, as `true`, the flag `--key`."""
    pairs = (option.removeprefix("--").partition("=") for option in options)
    return {key: value if separator else "true" for key, separator, value in pairs}


OWN_CHOICES = {
    "training.loss_chunk_tokens",
    "activation_checkpoint.mode",
    "activation_checkpoint.selective_ac_option",
    *(
        f"{FLOAT8}.{name}"
        for name in (
            "grad_weight_dtype",
            "force_recompute_fp8_weight_in_bwd",
            "enable_fsdp_float8_all_gather",
            "precompute_float8_dynamic_scale_for_fsdp",
            "keep_gate_up_in_float8",
            "keep_fp8_weight_shards",
        )
    ),
}


OURS_ALONE = ("float8-head", "float8-head-states")
"""Rows with other layers in float8, or another optimizer state, than the peer has."""


def test_both_sides_get_the_same_value_of_every_option_that_both_know(load, parse):
    jobs, args = load("peer.jobs"), parse("--ac", "full", "--lr", "1e-4")
    own = {"job.dump_folder", "model.flavor", "model.hf_assets_path", "training.dataset", "training.dataset_path"}
    rows = [row for row in jobs.ROWS.values() if row.name not in OURS_ALONE]
    for job, row in itertools.product(jobs.JOBS.values(), rows):
        if not row.is_for(job):
            continue
        ours, theirs = (
            given(options(jobs.Run(job, row, side, 1), args))
            for side, options in (("ours", jobs.our_options), ("peer", jobs.peer_options))
        )
        # The peer's switches are off where they are not given.
        off = {key for key, value in ours.items() if value == "false"} - {"training.shuffle"}
        assert off.isdisjoint(theirs), (job, row)
        assert (ours.pop("model.name"), theirs.pop("model.name")) in (
            ("llama3", "llama3"), ("llama4", "llama4"), ("qwen3_moe", "qwen3")
        )  # fmt: skip
        known = theirs.keys() - own - OWN_CHOICES
        assert {key: ours[key] for key in known} == {key: theirs[key] for key in known}, (job, row)
        only_ours = {f"model.overrides.{key}" for key in ("n_layers", "vocab_size", "max_seq_len")} | {
            "training.shuffle"
        }
        if row.recipe != "rowwise" and not row.grouped:
            only_ours.add(f"{FLOAT8}.recipe_name" if row.recipe else "model.converters")
        assert ours.keys() - theirs.keys() - off - OWN_CHOICES == only_ours, (job, row)
        is_leanest = job.name == "two-gpus-accumulating" and row.recipe == "tensorwise" and row.compiled
        assert ours["training.loss_chunk_tokens"] == ("2048" if is_leanest else "4096")
        is_dense = not job.experts
        mode = "selective" if is_leanest else "none"
        assert ours["activation_checkpoint.mode"] == (mode if row.recipe and is_dense else "full")
        assert ours.get("activation_checkpoint.selective_ac_option") == ("16" if is_leanest else None)
        assert ours.get("parallelism.expert_parallel_degree") == (None if is_dense else str(job.gpus))


def test_our_options_are_a_job_of_the_dimensions_batch_and_recipe_of_the_row(load, parse):
    jobs, args = load("peer.jobs"), parse("--steps", "30", "--vocab-size", "4096")
    for job, row in itertools.product(jobs.JOBS.values(), jobs.ROWS.values()):
        if not row.is_for(job):
            continue
        options = jobs.our_options(jobs.Run(job, row, "ours", 1), args)
        config = ["--job.config_file", str(load("bench_peers").CONFIG)]
        found, _ = load_job_config([*config, *options], {"WORLD_SIZE": str(job.gpus)})
        assert (f"{found.model.name}/{found.model.flavor}", found.model.overrides.n_layers) == (job.model, job.layers)
        assert found.model.overrides.vocab_size == (job.vocab_size or 4096)
        batch = (found.training.local_batch_size, found.training.global_batch_size)
        assert batch == (job.local_batch, job.global_batch)
        assert (found.training.steps, found.lr_scheduler.warmup_steps) == (30, 30)
        assert found.model.converters == [FLOAT8] * bool(row.recipe) + ["quantize.grouped_mm.float8"] * row.grouped
        assert found.quantize.grouped_mm.float8.patterns() == ["experts"] * row.grouped
        assert found.parallelism.expert_parallel_degree == (job.experts or 1)
        assert (found.compile.enable, found.compile.components) == (row.compiled, ["model", "loss"])
        float8 = found.quantize.linear.float8
        filtered = ["output", "router.gate"] if job.experts else ["output"]
        filtered = filtered if row.recipe and row.name not in OURS_ALONE else []
        assert found.optimizer.state_dtype == ("bfloat16" if row.name == "float8-head-states" else None)
        assert (float8.recipe_name, float8.filter_fqns) == (row.recipe, filtered)
        gathers = row.recipe is not None and job.gpus == 2
        assert float8.enable_fsdp_float8_all_gather == gathers
        assert float8.precompute_float8_dynamic_scale_for_fsdp == gathers


def test_the_peer_gathers_codes_only_without_a_named_recipe(load, parse):
    jobs, args = load("peer.jobs"), parse("--peer-options", "--training.dataloader.num_workers=1 --a b")
    for job, row in itertools.product(jobs.JOBS.values(), jobs.ROWS.values()):
        command = jobs.command_of(jobs.Run(job, row, "peer", 1), args)
        options = given(command[command.index("--") + 1 :])
        assert options.get(f"{FLOAT8}.recipe_name") == ("rowwise" if row.recipe == "rowwise" else None)
        assert (f"{FLOAT8}.enable_fsdp_float8_all_gather" in options) == (row.recipe == "tensorwise" and job.gpus == 2)
        assert command[-3:] == ["--training.dataloader.num_workers=1", "--a", "b"]
        assert command[command.index("--nproc_per_node") + 1] == str(job.gpus)
        assert command[command.index("--layers") + 1] == str(job.layers)


@pytest.mark.parametrize(("job", "alone"), [("one-gpu", False), ("two-gpus", True)])
def test_on_several_gpus_both_sides_trace_the_device_alone(load, parse, job, alone):
    jobs, args = load("peer.jobs"), parse("--profile")
    for repeat in (1, "profile"):
        run = jobs.Run(jobs.JOBS[job], jobs.ROWS["tensorwise-compiled"], "ours", repeat)
        config = ["--job.config_file", str(SCRIPTS.parent / "train_configs" / "llama3_8b.toml")]
        found, _ = load_job_config([*config, *jobs.our_options(run, args)], {"WORLD_SIZE": str(run.job.gpus)})
        traced = repeat == "profile"
        assert (found.profiling.enable_profiling, found.profiling.trace_cpu) == (traced, not (traced and alone))
        command = jobs.command_of(jobs.Run(run.job, run.row, "peer", repeat), args)
        assert ("--device-trace" in command[: command.index("--")]) == (traced and alone)


def test_the_peers_profiler_is_told_to_trace_the_device_alone(load, monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: asked.update(options))
    load("peer.launch")._trace_device_alone()
    torch.profiler.profile(activities=["both"], record_shapes=True, schedule="theirs")
    device = [torch.profiler.ProfilerActivity.CUDA]
    assert asked == {"activities": device, "record_shapes": False, "schedule": "theirs"}


def test_with_the_same_start_the_peer_is_told_of_our_model_and_shards_and_ours_of_what_it_lacks(load, parse):
    jobs, args = load("peer.jobs"), parse("--same-start")
    families = {}
    for job, row in itertools.product(jobs.JOBS.values(), jobs.ROWS.values()):
        if not row.is_for(job):
            continue
        command = jobs.command_of(jobs.Run(job, row, "peer", 1), args)
        end = command.index("--")
        assert command[end - 8 : end] == [
            *("--same-start", job.model, "--seed", "0"),
            *("--data", str(args.data), "--tokenizer", str(args.tokenizer)),
        ]
        assert given(command[end + 1 :])["metrics.log_freq"] == "1"
        options = jobs.our_options(jobs.Run(job, row, "ours", 1), args)
        config = ["--job.config_file", str(load("bench_peers").CONFIG)]
        found, _ = load_job_config([*config, *options], {"WORLD_SIZE": str(job.gpus)})
        assert (found.metrics.log_freq, found.debug.seed, found.training.shuffle) == (1, 0, False)
        families[found.model.name] = found.model.overrides
    assert (families["llama4"].qk_norm, families["qwen3_moe"].aux_loss_weight) == ("none", 0.0)
    assert families["llama4"].nope_interval > 48


def test_the_peers_model_is_filled_with_the_weights_of_ours_whatever_it_had(load):
    start = load("peer.same_start")
    dims = resolve_dims("llama3", "debugmodel", {"n_layers": 1, "dim": 64, "n_heads": 4})

    class Theirs(nn.Module):
        """Two of the parameters, one in a wrapper as activation checkpointing has it."""

        def __init__(self):
            super().__init__()
            self.tok_embeddings = nn.Embedding(dims.vocab_size, dims.dim)
            inner = nn.ModuleDict({"w1": nn.Linear(dims.dim, dims.ffn_hidden_dim, bias=False)})
            wrapper = nn.ModuleDict({"_checkpoint_wrapped_module": nn.ModuleDict({"feed_forward": inner})})
            self.layers = nn.ModuleDict({"0": wrapper})

        def init_weights(self, buffer_device=None):
            self.buffers_are_made = True

    theirs = start.with_our_weights(Theirs, dims, 3, halves=False)()
    theirs.init_weights(buffer_device=None)
    ours = Decoder(dims)
    initialize(ours, 3)
    expected = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, expected[name.replace("_checkpoint_wrapped_module.", "")]), name
    assert theirs.buffers_are_made
    theirs.surplus = nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="no initialization rule covers surplus"):
        theirs.init_weights(buffer_device=None)


def test_features_that_turn_together_lie_in_the_two_halves_of_a_head(load):
    rows = torch.arange(16).view(16, 1)
    assert load("peer.same_start").halves_first(rows, 8).flatten().tolist() == [
        *(0, 2, 4, 6, 1, 3, 5, 7),
        *(8, 10, 12, 14, 9, 11, 13, 15),
    ]


def test_the_peer_reads_microbatch_for_microbatch_what_the_rank_of_ours_reads(load, corpus):
    data, tokenizer = corpus
    start = load("peer.same_start")
    sizes = SimpleNamespace(seq_len=16, global_batch_size=8, local_batch_size=2)
    store = open_shards(data, "train", build_tokenizer(str(tokenizer)))
    for rank in (0, 1):
        with start.token_loader(str(data), str(tokenizer), sizes, rank, 2) as loader:
            batches = list(itertools.islice(start.TokenBatches(loader), 4))  # of two steps
        rows = torch.cat([torch.cat([inputs["input"], labels[:, -1:]], 1) for inputs, labels in batches])
        # A step has eight sequences of 16 tokens in file order, the first half for rank 0; the labels are one further.
        for step, slot in itertools.product((0, 1), range(4)):
            first = 16 * (8 * step + 4 * rank + slot)
            assert rows[4 * step + slot].tolist() == store.read(first, first + 17).tolist()


def test_a_further_row_of_ours_starts_from_the_jobs_options_or_from_those_of_a_row(load, parse):
    jobs = load("peer.jobs")
    no_ac = "no AC=@tensorwise-compiled --activation_checkpoint.mode none"
    args = parse("--rows", "", "--ours-extra", no_ac, "--ours-extra", "one pass=--optimizer.implementation=one_pass")
    assert [(row.name, row.recipe, row.compiled, row.sides) for row in args.rows] == [
        ("no AC", "tensorwise", True, ("ours",)),
        ("one pass", None, False, ("ours",)),
    ]
    config = ["--job.config_file", str(load("bench_peers").CONFIG)]
    first, second = (
        load_job_config(
            [*config, *jobs.our_options(jobs.Run(jobs.JOBS["two-gpus"], row, "ours", 1), args)], {"WORLD_SIZE": "2"}
        )[0]
        for row in args.rows
    )
    assert first.activation_checkpoint.mode == "none"
    assert first.quantize.linear.float8.enable_fsdp_float8_all_gather
    assert second.optimizer.implementation == "one_pass"
    assert not second.model.converters


def test_a_further_row_has_all_options_of_its_row_but_those_that_it_gives_itself(load, parse):
    jobs = load("peer.jobs")
    for job, row in itertools.product(jobs.JOBS.values(), jobs.ROWS.values()):
        if row.is_for(job):
            further = jobs.extra_row(f"further=@{row.name} --metrics.log_freq=1")
            own, expected = (
                given(jobs.our_options(jobs.Run(job, each, "ours", 1), parse())) for each in (further, row)
            )
            assert own == expected | {"job.dump_folder": own["job.dump_folder"], "metrics.log_freq": "1"}
    filters = f"--{FLOAT8}.filter_fqns"
    assert jobs.extra_row(f"w2=@float8-head {filters}=feed_forward.w2").extra == (f"{filters}=feed_forward.w2",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows", "fp4"), "no such name: fp4"),
        (("--jobs", "one-gpu,three"), "no such name: three"),
        (("--ours-extra", "no options"), "expected 'NAME=--key value"),
        (("--ours-extra", "x=@bf16"), "no row bf16"),
        (("--ours-extra", "bf16-compiled=--compile.enable"), "stands twice"),
        (("--ours-extra", "x=--job.description 'no end"), "No closing quotation"),
        (("--repeats", "0"), "nothing would run"),
        (("--steps", "12"), "multiples of 5"),
        (("--steps", "10"), "the warm-up the smaller one"),
    ],
)
def test_a_mistake_in_the_options_is_named(parse, options, message):
    with pytest.raises(SystemExit, match=message):
        parse(*options)


def test_the_sides_take_turns_within_a_row(load, parse):
    jobs = load("peer.jobs")
    args = parse("--rows", "bf16-compiled,tensorwise-eager")
    names = [run.name for run in jobs.turns(jobs.JOBS["one-gpu"], args.rows, 2)]
    assert names == [
        *(f"one-gpu/bf16-compiled/{run}" for run in ("ours-1", "peer-1", "peer-2", "ours-2")),
        *(f"one-gpu/tensorwise-eager/ours-{repeat}" for repeat in (1, 2)),
    ]


PREFIX = "[rank0]:[titan] 2026-11-22 10:00:00,000 - root - INFO - "
COLORED = (
    "\x1b[31mstep: {step:2}  \x1b[32mloss: {loss:8.5f}  \x1b[38;2;180;60;0mgrad_norm: {norm:7.4f}  "
    "\x1b[38;2;54;234;195mmemory: {gib:5.2f}GiB(35.50%)  \x1b[34mtps: {tps:,}  \x1b[36mtflops: {tflops:,.2f}  "
    "\x1b[35mmfu: 74.96%\x1b[39m\n"
)
SIZE = "\x1b[34mModel llama3 8B_cut \x1b[31msize: {:,} total parameters\x1b[39m\n"


def peer_log(parameters: int, steps: list[tuple[int, float, int]]) -> str:
    """What the peer prints for (step, loss, tok/s)."""
    lines = [COLORED.format(step=s, loss=x, norm=6.81, gib=49.0 + s / 100, tps=t, tflops=741.3) for s, x, t in steps]
    return "".join(PREFIX + line for line in [SIZE.format(parameters), *lines])


def test_steps_are_read_from_the_peers_log_through_colors_and_separators(load):
    log = load("peer.log")
    text = peer_log(2_795_573_248, [(1, 12.17, 1_234), (1005, 9.5, 44_012)])
    text += f"{PREFIX}\x1b[33mvalidate step: 20  \x1b[32mloss:  9.0000  memory: 50.00GiB(35.5%)  tps: 1\x1b[39m\n"
    text += COLORED.format(step=1010, loss=float("nan"), norm=float("inf"), gib=131.25, tps=999, tflops=1234.5)
    steps = log.read_steps(text)
    assert [(s["step"], s["loss"], s["tps"], s["memory_gib"]) for s in steps] == [
        (1, 12.17, 1234, 49.01),
        (1005, 9.5, 44012, 59.05),
        (1010, None, 999, 131.25),
    ]
    assert (steps[2]["tflops"], steps[2]["grad_norm"], steps[0]["mfu"]) == (1234.5, None, 74.96)
    assert log.read_parameters(text) == 2_795_573_248
    without_colors = "".join(part.partition("m")[2] for part in f"m{text}".split("\x1b["))
    assert log.read_steps(without_colors) == steps
    assert (log.read_steps("nothing"), log.read_parameters("nothing")) == ([], None)


def run_of_peer(load, parse, monkeypatch, program: str) -> dict:
    """The record of a run whose command is a Python program."""
    script, jobs = load("bench_peers"), load("peer.jobs")
    monkeypatch.setattr(script, "command_of", lambda run, args: [sys.executable, "-c", program])
    args = parse()
    return script.execute(jobs.Run(jobs.JOBS["one-gpu"], jobs.ROWS["bf16-compiled"], "peer", 1), args, FOUND)


def test_a_run_of_the_peer_is_judged_by_its_logged_steps_after_the_warm_up(load, parse, monkeypatch):
    steps = [(1, 12.0, 100), (5, 11.0, 200), (10, 10.0, 300), (15, 9.0, 44_000), (20, 8.0, 44_100)]
    record = run_of_peer(load, parse, monkeypatch, f"print({peer_log(2_795_573_248, steps)!r})")
    assert "error" not in record
    assert (record["tps"], record["first_loss"], record["last_loss"]) == (44_050, 12.0, 8.0)
    assert (record["memory_gib"], record["exit_code"], record["device"]) == (49.2, 0, "NVIDIA H100")
    assert record["losses"][-1] == [20, 8.0]
    curve = read_curve(parse.out / "one-gpu" / "bf16-compiled" / "peer-1", key="loss")
    assert (curve.steps, curve.values) == ([1, 5, 10, 15, 20], [12.0, 11.0, 10.0, 9.0, 8.0])
    assert json.loads(json.dumps(record)) == record


def test_steps_in_which_the_profiler_is_at_work_do_not_count(load, parse, monkeypatch):
    script, jobs = load("bench_peers"), load("peer.jobs")
    program = f"print({peer_log(2_795_573_248, [(15, 9.0, 44_000), (20, 8.0, 10)])!r})"
    monkeypatch.setattr(script, "command_of", lambda run, args: [sys.executable, "-c", program])
    run = jobs.Run(jobs.JOBS["one-gpu"], jobs.ROWS["bf16-compiled"], "peer", 1, traced=True)
    assert script.execute(run, parse(), FOUND)["tps"] == 44_000


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (f"print({peer_log(7, [(20, 8.0, 1)])!r})", "the peer's model has 7 parameters, ours 2795573248"),
        (f"print({peer_log(2_795_573_248, [(15, 8.0, 1)])!r})", "the log has no step 20"),
        ("raise ValueError('out of luck')", "exit code 1: ValueError: out of luck"),
    ],
)
def test_a_run_of_the_peer_that_is_not_the_same_training_has_failed(load, parse, monkeypatch, program, error):
    record = run_of_peer(load, parse, monkeypatch, program)
    assert record["error"].startswith(error)
    assert "tps" not in record


def record_of(row: str, side: str, repeat: int | str, tps: float, **more) -> dict:
    losses = {"first_loss": 12.2, "last_loss": 8.0 + tps / 1e5}
    return {"row": row, "side": side, "repeat": repeat, "tps": tps, "memory_gib": tps / 1e3, **losses, **more}


def failed(row: str, side: str, repeat: int | str, error: str) -> dict:
    return {"row": row, "side": side, "repeat": repeat, "error": error}


def test_a_table_has_medians_spreads_and_ratios_and_says_why_a_side_failed(load):
    records = [
        *(
            record_of("a", "ours", repeat, tps, first_step_s=20.0 + 100 / repeat)
            for repeat, tps in enumerate((50_000, 51_000, 49_000), 1)
        ),
        *(record_of("a", "peer", repeat, tps) for repeat, tps in enumerate((40_000, 39_000, 40_400), 1)),
        record_of("a", "ours", "profile", 10_000),
        record_of("b", "ours", 1, 30_000, last_loss=None),
        failed("b", "ours", 2, "exit code 9: x"),
        failed("b", "peer", 1, "exit code 1: ValueError: a | b"),
        record_of("c", "ours", 1, 45_000),
    ]
    lines = load("peer.table").table(["a", "b", "c"], records).splitlines()[2:]
    cells = [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines]
    a, b, c = cells
    assert a == [
        *("a", "50,000 [4.0 %]", "40,000 [3.5 %]", "1.250", "51.0", "40.4"),
        *("120 / 62", "", "12.200 -> 8.500", "12.200 -> 8.400"),
    ]
    assert b[1:4] == ["30,000 [one run], then failed: exit code 9: x", "failed: exit code 1: ValueError: a / b", ""]
    assert b[4:] == ["30.0", "", "", "", "12.200 -> n/a", ""]
    assert c == ["c", "45,000 [one run]", "", "", "45.0", "", "", "", "12.200 -> 8.450", ""]


@pytest.mark.parametrize(
    "line",
    [
        "[rank0]:09:37:47 rank 0 I step  1/20   loss  12.1642   grad_norm   9.1748",
        "[rank0]:[titan] 2026-11-26 09:38:30,667 - root - INFO - step:  1  loss: 12.27632  grad_norm:  9.6842",
    ],
)
def test_the_time_to_the_first_step_is_that_of_its_log_line(load, tmp_path, line):
    runs, pattern, log = load("bench_runs"), load("peer.log").FIRST_STEP, tmp_path / "log"
    log.write_text(line)  # of an earlier run
    others = [line.replace(" 1", " 11", 1).replace("step: 11", "step: 10"), "training to step 1"]
    code = "import sys, time; print(sys.argv[1], flush=True); time.sleep(0.6); print(sys.argv[2], flush=True)"
    for last, expected in ((line, True), (others[0], False)):
        with runs.FirstMatch(log, pattern) as first:
            runs.run_command([sys.executable, "-c", code, "\n".join(others), last], log, dict(os.environ))
        assert (first.seconds is not None) == expected
        assert first.seconds is None or first.seconds >= 0.6


FAILING: set[str] = set()


@pytest.fixture
def executed(load, monkeypatch) -> list[str]:
    """Names of the runs that were executed; those of `FAILING` fail."""
    script = load("bench_peers")
    names: list[str] = []

    def execute(run, args, found, base):
        names.append(run.name)
        record = {"job": run.job.name, "row": run.row.name, "side": run.side, "repeat": run.repeat, "wall_s": 1.0}
        record |= script.settings_of(run, args, found)
        return record | ({"error": "no"} if run.name in FAILING else {"tps": 1.0})

    monkeypatch.setattr(script, "execute", execute)
    FAILING.clear()
    return names


def test_runs_that_ended_well_with_the_same_options_on_the_same_device_are_not_run_again(load, parse, executed):
    script = load("bench_peers")
    options = ("--rows", "bf16-compiled", "--repeats", "2", "--resume")
    first = script.run_job(script.JOBS["one-gpu"], parse(*options), FOUND)
    assert executed == [f"one-gpu/bf16-compiled/{run}" for run in ("ours-1", "peer-1", "peer-2", "ours-2")]
    executed.clear()
    assert script.run_job(script.JOBS["one-gpu"], parse(*options), FOUND) == first
    assert executed == []
    assert len(script.run_job(script.JOBS["one-gpu"], parse(*options, "--repeats", "3"), FOUND)) == 6
    assert executed == ["one-gpu/bf16-compiled/ours-3", "one-gpu/bf16-compiled/peer-3"]
    for change in (("--lr", "1e-5"), ("--warm-up", "5")):
        executed.clear()
        script.run_job(script.JOBS["one-gpu"], parse(*options, *change), FOUND)
        assert len(executed) == 4, change
    executed.clear()
    elsewhere = {**FOUND, "devices": ["NVIDIA H200"]}
    script.run_job(script.JOBS["one-gpu"], parse(*options), elsewhere)
    assert len(executed) == 4
    executed.clear()
    script.run_job(script.JOBS["one-gpu"], parse(*options[:-1]), elsewhere)
    assert len(executed) == 4, "without --resume"


def test_a_side_that_failed_is_left_out_for_the_rest_of_its_row_and_run_again_by_the_next_call(load, parse, executed):
    script = load("bench_peers")
    options = ("--rows", "bf16-compiled,rowwise-compiled", "--repeats", "2", "--resume", "--profile")
    FAILING.add("one-gpu/bf16-compiled/peer-1")
    script.run_job(script.JOBS["one-gpu"], parse(*options), FOUND)
    bf16, rowwise = "one-gpu/bf16-compiled", "one-gpu/rowwise-compiled"
    of_rowwise = [f"{rowwise}/{run}" for run in ("ours-1", "peer-1", "peer-2", "ours-2")]
    profiled = [f"{bf16}/ours-profile", f"{rowwise}/ours-profile", f"{rowwise}/peer-profile"]
    assert executed == [f"{bf16}/ours-1", f"{bf16}/peer-1", f"{bf16}/ours-2", *of_rowwise, *profiled]
    executed.clear()
    FAILING.clear()
    script.run_job(script.JOBS["one-gpu"], parse(*options), FOUND)
    assert executed == [f"{bf16}/peer-1", f"{bf16}/peer-2", f"{bf16}/peer-profile"]


def test_too_few_gpus_are_refused(load):
    script = load("bench_peers")
    script.check_devices(["one-gpu"], ["NVIDIA H100"])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        script.check_devices(["one-gpu"], [])
    with pytest.raises(SystemExit, match="1 GPU here, too few for two-gpus, two-gpus-accumulating"):
        script.check_devices(list(load("peer.jobs").JOBS), ["NVIDIA H100"])


def test_a_peer_that_cannot_be_imported_is_named_with_its_error(load, tmp_path):
    broken = tmp_path / "site" / "torchtitan"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('half a package')")
    with pytest.raises(SystemExit, match=r"cannot be imported from .*site: ImportError: half a package"):
        load("bench_peers").inspect_peer(tmp_path / "site", tmp_path)
    with pytest.raises(SystemExit, match="installed but cannot be imported: ImportError: half a package"):
        load("peer.install").check_import(tmp_path / "site")


def test_the_versions_are_those_of_the_other_benchmarks(load):
    assert load("peer.install").PEER["torchao"] == load("bench_common").PEER_VERSION


def test_of_a_folder_of_wheels_those_of_packages_that_are_here_are_left_out(load, tmp_path):
    install = load("peer.install")
    with pytest.raises(SystemExit, match=r"no wheel of torchtitan==0\.2\.2 and torchao==0\.17\.0 there"):
        install.missing_wheels(tmp_path)
    names = (
        "torchtitan-0.2.2-py3-none-any",
        "torchao-0.16.0-cp310-abi3-any",
        "torch-2.11.0-any",
        "no_such_thing-1-any",
    )
    for name in names:
        (tmp_path / f"{name}.whl").touch()
    with pytest.raises(SystemExit, match=r"no wheel of torchao==0\.17\.0 there"):
        install.missing_wheels(tmp_path)
    (tmp_path / "torchao-0.16.0-cp310-abi3-any.whl").rename(tmp_path / "torchao-0.17.0-cp310-abi3-any.whl")
    found = [wheel.name.partition("-")[0] for wheel in install.missing_wheels(tmp_path)]
    assert found == ["no_such_thing", "torchao", "torchtitan"]


def test_a_folder_that_has_the_peer_is_left_alone_and_one_with_something_else_is_refused(load, tmp_path, monkeypatch):
    install = load("peer.install")
    monkeypatch.setattr(install, "_pip", lambda *arguments: pytest.fail("pip was called"))
    (tmp_path / "something").touch()
    with pytest.raises(SystemExit, match="is not empty and holds no torchtitan"):
        install.install(tmp_path, None)
    for name, version in install.PEER.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    install.install(tmp_path, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [((), "--out is missing"), (("--out", "x", "--wheels"), "--wheels needs a folder")],
)
def test_the_shell_script_refuses_what_it_cannot_do(options, message):
    done = subprocess.run([SCRIPTS / "bench_peers.sh", *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


def test_documents_go_to_the_rank_with_the_fewest_tokens_and_all_ranks_get_equally_many(load):
    deal = load("peer.text").deal
    assert deal([5, 5, 5], 1) == [[0, 1, 2]]
    # Rank 1 needs three documents to draw level; rank 0 begins again to have as many in the end.
    assert deal([9, 2, 3, 4, 1, 7], 2) == [[0, 4, 0, 4], [1, 2, 3, 5]]


@pytest.fixture
def corpus(tmp_path) -> tuple[Path, Path]:
    """Token shards, and their tokenizer, whose file adds a mark that `encode` of the peer would double."""
    documents = [f"Document {n}: über {'lorem ipsum, ' * (n % 7 + 1)}end.\n" for n in range(40)]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<b>", "<e>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 0)])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    options = {
        "--input": tmp_path / "corpus.jsonl",
        "--output": tmp_path / "data",
        "--tokenizer": tmp_path / "tokenizer",
        "--num-workers": 0,
        "--hold-out-every": 0,
    }
    prepare.main([str(part) for pair in options.items() for part in pair])
    return tmp_path / "data", tmp_path / "tokenizer"


def test_the_peers_text_and_tokenizer_give_the_tokens_of_the_shards(load, corpus, tmp_path):
    data, tokenizer_folder = corpus
    store = open_shards(data, "train", build_tokenizer(str(tokenizer_folder)))
    wanted = store.total_tokens // 3
    text, assets = load("peer.text").write_peer_text(data, tokenizer_folder, tmp_path / "o", ranks=1, tokens=wanted)
    marks = json.loads((assets / "tokenizer_config.json").read_text())
    assert marks == {"bos_token": "<b>", "eos_token": "<e>"}
    # As the peer does it: the tokenizer's own encoding, and the marks unless that has put them there already.
    theirs = tokenizers.Tokenizer.from_file(str(assets / "tokenizer.json"))
    assert theirs.encode("").ids == []
    codes: list[int] = []
    for line in (text / "data.jsonl").read_text().splitlines():
        codes += [0, *theirs.encode(json.loads(line)["text"]).ids, 1]
    assert wanted < len(codes) < store.total_tokens
    assert codes == store.read(0, len(codes)).tolist()


def test_for_two_ranks_each_half_of_the_documents_begins_where_the_shards_do(load, corpus, tmp_path):
    data, tokenizer = corpus
    write = load("peer.text").write_peer_text
    text, _ = write(data, tokenizer, tmp_path / "o", ranks=2, tokens=10**9)
    documents = [json.loads(line)["text"].split(":")[0] for line in (text / "data.jsonl").read_text().splitlines()]
    half = len(documents) // 2
    assert (documents[0], documents[half]) == ("Document 0", "Document 1")
    assert {*documents} == {f"Document {n}" for n in range(40)}


def test_shards_of_another_tokenizer_are_refused(load, corpus, tmp_path):
    data, tokenizer = corpus
    content = json.loads((tokenizer / "config.json").read_text())
    (tokenizer / "config.json").write_text(json.dumps(content | {"eos_token_id": 5}))
    with pytest.raises(SystemExit, match="written with another tokenizer"):
        load("peer.text").write_peer_text(data, tokenizer, tmp_path / "o", ranks=1, tokens=100)


def test_a_tokenizer_that_does_not_read_back_what_it_wrote_is_refused(load, corpus, tmp_path, monkeypatch):
    data, tokenizer = corpus
    text = load("peer.text")
    monkeypatch.setattr(text.HFTokenizer, "decode", lambda self, ids: "something else")
    with pytest.raises(SystemExit, match="get other tokens when decoded and encoded"):
        text.write_peer_text(data, tokenizer, tmp_path / "o", ranks=1, tokens=100)


def test_lanes_run_the_same_runs_on_gpus_of_their_own(load, parse, executed, monkeypatch):
    script = load("bench_peers")
    monkeypatch.setattr(script, "visible_gpus", lambda: ["0", "1", "2", "3"])
    seen = []
    one_by_one = script.execute

    def execute(run, args, found, base):
        seen.append(base["CUDA_VISIBLE_DEVICES"])
        return one_by_one(run, args, found, base)

    monkeypatch.setattr(script, "execute", execute)
    records = script.run_job(
        script.JOBS["two-gpus"], parse("--rows", "bf16-compiled,tensorwise-eager", "--lanes", "2"), FOUND
    )
    order = [("bf16-compiled", side, n) for n, sides in ((1, "op"), (2, "po"), (3, "op")) for side in sides]
    expected = [(row, {"o": "ours", "p": "peer"}[side], n) for row, side, n in order]
    expected += [("tensorwise-eager", "ours", n) for n in (1, 2, 3)]
    assert [(r["row"], r["side"], r["repeat"]) for r in records] == expected
    assert sorted(executed) == sorted(f"two-gpus/{row}/{side}-{n}" for row, side, n in expected)
    assert set(seen) <= {"0,1", "2,3"}


def test_the_peers_allocator_grows_its_segments_as_its_own_launcher_has_it_and_ours(load):
    def setting(**given: str) -> str:
        return load("bench_peers").peer_environment(Path("site"), Path("out"), 1, given)["PYTORCH_ALLOC_CONF"]

    grows = "expandable_segments:True"
    assert f"-{grows}}}}}" in (SCRIPTS.parent / "run_train.sh").read_text()
    assert setting() == setting(PYTORCH_ALLOC_CONF="") == grows
    assert setting(PYTORCH_CUDA_ALLOC_CONF="a:b") == "a:b"
    assert setting(PYTORCH_CUDA_ALLOC_CONF="a:b", PYTORCH_ALLOC_CONF="c:d") == "c:d"


@pytest.mark.parametrize(("module", "is_hidden"), [("_mlir_helpers", False), ("other", True)])
def test_the_peer_sees_no_cutlass_that_torchao_cannot_use(load, tmp_path, monkeypatch, module: str, is_hidden: bool):
    monkeypatch.setitem(sys.modules, "cutlass", None)  # what is there ends with this test
    del sys.modules["cutlass"]
    (tmp_path / "cutlass" / "base_dsl" / module).mkdir(parents=True)
    (tmp_path / "cutlass" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    load("peer.launch")._hide_other_cutlass()
    assert (importlib.util.find_spec("cutlass") is None) == is_hidden
