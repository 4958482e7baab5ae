"""The parts of the benchmark scripts that compute something from figures: suggestions, differences, choices of rows."""

import os
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from titan_fp8.job_config import load_job_config
from titan_fp8.models.arithmetic import count_active_parameters

SCRIPTS = Path(__file__).parents[2] / "scripts"


SIZES = (1024, 2048, 4096)


def test_suggested_corners_cover_exactly_what_does_not_gain(load):
    script = load("bench_filter")
    rule = ((2048, None), (None, 1024))
    gains = {(k, n): 0.9 if script.covered((k, n), rule) else 1.2 for k in SIZES for n in SIZES}
    found = script.corners(gains, margin=0.02)
    assert {size for size in gains if script.covered(size, found)} == {size for size in gains if gains[size] < 1}
    assert set(found) == set(rule)


def test_where_everything_gains_no_corner_is_suggested(load):
    script = load("bench_filter")
    assert script.corners({(k, n): 1.5 for k in SIZES for n in SIZES}, margin=0.02) == []
    assert "corners = ()" in script.suggestion("rowwise", {(1024, 1024): 1.5}, margin=0.02)


def test_a_suggestion_says_which_gains_it_gives_up(load):
    script = load("bench_filter")
    gains = {(1024, 1024): 1.5, (1024, 2048): 1.2, (2048, 1024): 1.2, (2048, 2048): 0.9, (4096, 4096): 1.5}
    text = script.suggestion("rowwise", gains, margin=0.02)
    assert "corners = ((2048, 2048),)" in text
    assert "1024x1024 1.50" in text
    assert "4096x4096" not in text.splitlines()[-1]


def test_a_loss_is_compared_with_bf16_of_its_own_world_and_with_the_smallest_world(load):
    script = load("loss_parity")
    runs = {("bf16", 1): 2.0, ("bf16-seed1", 1): 2.3, ("rowwise", 1): 2.1, ("bf16", 2): 2.2, ("rowwise", 2): 2.25}
    records = [
        {"row": row, "gpus": gpus, "exit_code": 0, "final_loss": loss, "losses": [9.0, loss], "tps": 1.0}
        for (row, gpus), loss in runs.items()
    ]
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in script.table(records, 1).splitlines()[2:]}
    assert cells["| rowwise", "1"][3:6] == ["+0.1000 (0.1000)", "0.3000", ""]
    assert cells["| rowwise", "2"][3:6] == ["+0.0500 (0.0500)", "0.3000", "+0.1500 (0.1500)"]


def test_validation_losses_are_compared_with_bf16_in_per_cent(load):
    script = load("loss_parity")
    runs = {("bf16", 1): 2.0, ("bf16-seed1", 1): 2.02, ("rowwise", 1): 1.99, ("rowwise", 2): 2.25}
    records = [{"row": row, "gpus": gpus, "exit_code": 0, "validation_loss": loss}
               for (row, gpus), loss in runs.items()]  # fmt: skip
    records.append({"row": "blockwise", "gpus": 1, "exit_code": 1})
    cells = [line.strip("| ").split(" | ") for line in script.validation_table(records).splitlines()[2:]]
    assert [line[-1] for line in cells[1:3]] == ["+1.000 %", "-0.500 %"]
    assert [line[:3] for line in cells] == [["bf16", "1", "2.0000"], ["bf16-seed1", "1", "2.0200"],
                                            ["rowwise", "1", "1.9900"], ["rowwise", "2", "2.2500"]]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        "bf16-seed2",
        "tensorwise",
        "tensorwise-fast",
        "rowwise-fast",
        "tensorwise-head",
        "tensorwise-head-states",
        "mxfp8_cublas_rceil",
    ],
)
def test_options_of_a_row_make_the_job_that_it_is(load, monkeypatch, tmp_path, row):
    script = load("loss_parity")
    words = ["--out", str(tmp_path), "--size", "375m", "--steps", "1500", "--log-every", "10", "--validate"]
    monkeypatch.setattr(sys, "argv", ["loss_parity.py", *words, "--rows", f"bf16,{row}"])
    args = script.arguments()
    script.settle(args)
    job, _ = load_job_config(["--job.config_file", str(args.config), *script.options_of(row, 1, args, tmp_path)])
    assert (job.training.steps, job.metrics.log_freq, job.debug.seed) == (1500, 10, 2 if row == "bf16-seed2" else 0)
    assert (job.validation.enable, job.validation.freq, job.validation.steps) == (True, 150, 2)
    assert job.model.overrides.n_layers == 24
    assert bool(job.model.converters) == (row != "bf16-seed2")
    if row.startswith("mxfp8"):
        assert job.model.converters == ["quantize.linear.mx"]
        assert (job.quantize.linear.mx.recipe_name, job.quantize.linear.mx.emulate) == (row, "auto")
        return
    float8 = job.quantize.linear.float8
    assert float8.filter_fqns == ([] if row.startswith("tensorwise-head") else ["output"] * (row != "bf16-seed2"))
    assert float8.recipe_name == (None if row == "bf16-seed2" else row.partition("-")[0])
    is_fast = row.endswith(("-fast", "-head", "-states"))
    assert job.optimizer.state_dtype == ("bfloat16" if row.endswith("-states") else None)
    assert job.training.loss_chunk_tokens == 4096 * is_fast
    assert (float8.grad_weight_dtype == "float32", float8.force_recompute_fp8_weight_in_bwd) == (is_fast, is_fast)


@pytest.mark.parametrize("gpus", [1, 2])
def test_fast_rows_have_the_options_of_the_rows_whose_speed_is_measured(load, monkeypatch, tmp_path, gpus):
    script, peers, jobs = load("loss_parity"), load("bench_peers"), load("peer.jobs")
    monkeypatch.setattr(script, "visible_gpus", list)
    # On one GPU the second and the third keep less.
    rows = ("tensorwise-fast", "rowwise-lean", "tensorwise-head-lean", script.STATES)
    rows = rows if gpus == 1 else ("tensorwise-fast", "rowwise-fast", script.HEAD, script.STATES)
    rows = dict(
        zip(rows, ("tensorwise-compiled", "rowwise-compiled", "float8-head", "float8-head-states"), strict=True)
    )
    words = ["--out", str(tmp_path), "--gpus", str(gpus), "--rows", ",".join(["bf16", *rows])]
    monkeypatch.setattr(sys, "argv", ["loss_parity.py", *words])
    args = script.arguments()
    script.settle(args)
    (tmp_path / "tokenizer.json").touch()
    of_speed = peers.arguments([f"--{name}={tmp_path}" for name in ("data", "tokenizer", "out")])
    speed_job = jobs.JOBS["one-gpu" if gpus == 1 else "two-gpus"]
    for row, name in rows.items():
        options = script.options_of(row, gpus, args, tmp_path)
        mine, _ = load_job_config(["--job.config_file", str(args.config), *options], {"WORLD_SIZE": str(gpus)})
        options = jobs.our_options(jobs.Run(speed_job, jobs.ROWS[name], "ours", 1), of_speed)
        theirs, _ = load_job_config(["--job.config_file", str(args.config), *options], {"WORLD_SIZE": str(gpus)})
        assert mine.quantize.linear.float8 == theirs.quantize.linear.float8, row
        assert mine.activation_checkpoint.mode == theirs.activation_checkpoint.mode == "none"
        assert (
            mine.optimizer.state_dtype
            == theirs.optimizer.state_dtype
            == ("bfloat16" if name == "float8-head-states" else None)
        )
        # A quarter of the tokens of one GPU's microbatch. Speed is measured with what memory allows.
        of_speed_row = {("float8-head", 2): 2048, ("float8-head-states", 1): 16384, ("float8-head-states", 2): 8192}
        assert mine.training.loss_chunk_tokens == 4096
        assert theirs.training.loss_chunk_tokens == of_speed_row.get((name, gpus), 4096)


@pytest.mark.parametrize("row", ["bf16-seed1", "experts", "experts-rowwise", "experts-payload"])
def test_rows_of_a_model_with_experts_convert_its_experts(load, monkeypatch, tmp_path, row):
    script = load("loss_parity")
    words = ["--out", str(tmp_path), "--size", "experts", "--gpus", "2", "--rows", f"bf16,{row}"]
    monkeypatch.setattr(sys, "argv", ["loss_parity.py", *words])
    monkeypatch.setattr(script, "visible_gpus", list)
    args = script.arguments()
    script.settle(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    job, _ = load_job_config(["--job.config_file", str(args.config), *script.options_of(row, 2, args, tmp_path)])
    assert (job.model.name, job.parallelism.expert_parallel_degree) == ("qwen3_moe", 2)
    assert ("quantize.grouped_mm.float8" in job.model.converters) == (row != "bf16-seed1")
    assert ("quantize.linear.float8" in job.model.converters) == (row == "experts-rowwise")
    assert job.parallelism.expert_parallel_payload == ("float8" if row == "experts-payload" else "activations")


def test_rows_that_a_model_lacks_are_refused(load, monkeypatch, tmp_path):
    script = load("loss_parity")
    for size, rows in (("110m", "bf16,experts"), ("experts", "bf16,tensorwise"), ("experts", "bf16,experts-payload")):
        monkeypatch.setattr(sys, "argv", ["loss_parity.py", "--out", str(tmp_path), "--size", size, "--rows", rows])
        with pytest.raises(SystemExit, match=f"no such row of --size {size} --gpus 1: {rows.partition(',')[2]}"):
            script.settle(script.arguments())


def test_lanes_divide_the_gpus_that_are_there(load):
    runs = load("bench_runs")
    lanes = runs.lanes_of(2, 2, ["4", "5", "6", "7", "8"])
    assert [lane["CUDA_VISIBLE_DEVICES"] for lane in lanes] == ["4,5", "6,7"]
    assert runs.lanes_of(1, 2, ["0"]) == [{}]
    assert runs.lanes_of(3, 1, []) == [{}] * 3  # on a CPU
    with pytest.raises(SystemExit, match="3 GPUs each, but 5 are here"):
        runs.lanes_of(2, 3, ["4", "5", "6", "7", "8"])
    with pytest.raises(SystemExit, match="at least one"):
        runs.lanes_of(0, 1, ["0"])


def test_as_many_run_side_by_side_as_there_are_lanes_each_in_one_of_its_own(load):
    runs = load("bench_runs")
    both, busy, most = threading.Barrier(2, timeout=60), set(), []

    def work(item: int, lane: dict[str, str]) -> int:
        assert lane["name"] not in busy
        busy.add(lane["name"])
        both.wait()  # ends only with two at a time
        most.append(len(busy))
        busy.remove(lane["name"])
        both.wait()
        return 10 * item

    assert runs.side_by_side(work, range(6), [{"name": "a"}, {"name": "b"}]) == [0, 10, 20, 30, 40, 50]
    assert max(most) == 2
    assert runs.side_by_side(lambda item, lane: (item, lane), "xy", [{"name": "a"}]) == [
        ("x", {"name": "a"}),
        ("y", {"name": "a"}),
    ]


def test_where_one_fails_the_commands_beside_it_are_killed_and_no_other_begins(load, tmp_path):
    runs = load("bench_runs")
    begun = []

    def work(item: str, lane: dict[str, str]) -> int:
        begun.append(item)
        if item == "fails":
            for _ in range(600):
                if (tmp_path / "sleeps").exists():
                    break
                time.sleep(0.1)
            raise ValueError("fails")
        code = f"import pathlib, time; pathlib.Path({str(tmp_path / 'sleeps')!r}).touch(); time.sleep(600)"
        return runs.run_command([sys.executable, "-c", code], tmp_path / "log", dict(os.environ))[0]

    begin = time.monotonic()
    with pytest.raises(ValueError, match="fails"):
        runs.side_by_side(work, ["sleeps", "fails", "begun", "never"], [{}, {}])
    assert time.monotonic() - begin < 120
    assert "never" not in begun  # the lane of the one that failed may have taken one more


def test_the_gpus_that_are_there_are_those_that_this_process_sees(load, monkeypatch):
    runs = load("bench_runs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5a,3")
    assert runs.visible_gpus() == ["GPU-5a", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert len(runs.visible_gpus()) == torch.cuda.device_count()


def test_a_row_of_the_peer_is_left_out_only_where_nobody_asked_for_it(load, monkeypatch, capsys):
    script = load("bench_common")
    monkeypatch.setattr(script, "peer_is_here", lambda: False)
    assert script.choose_rows(None, ["bf16", "torchao-rowwise"]) == ["bf16"]
    assert "torchao-rowwise" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pip install torchao"):
        script.choose_rows("torchao-rowwise", ["bf16", "torchao-rowwise"])
    with pytest.raises(SystemExit, match="no such row: fp4"):
        script.choose_rows("fp4", ["bf16"])


def test_our_eager_time_is_judged_against_the_peers_compiled_one(load):
    script = load("bench_linear")
    base = {"k": 64, "n": 32, "weight_dtype": "float32"}
    times = {"ours-rowwise": 1.0, "ours-tensorwise": 3.0, "torchao-rowwise-compiled": 2.0, "torchao-rowwise": 9.0}
    text = script.verdict([{**base, "row": row, "median_ms": ms} for row, ms in times.items()])
    lines = [line for line in text.splitlines() if "ours-" in line]
    assert lines == ["| 64 | 32 | float32 | ours-rowwise | 2.00x | yes |"]


def test_turns_time_every_contestant_equally_often_on_prepared_ground(load):
    script = load("bench_common")
    events: list[str] = []
    contestants = {
        name: script.Contestant(
            lambda name=name: events.append(f"prepare {name}"), lambda name=name: events.append(name)
        )
        for name in ("a", "b", "c")
    }
    times = script.take_turns(contestants, torch.device("cpu"), rounds=12, iterations=2, warm_up=1)
    assert all(len(each.device_ms) == len(each.host_ms) == 24 for each in times.values())
    assert all(events[at] == f"prepare {events[at + 1]}" for at in range(0, len(events), 2))
    blocks = events[2 * 3 + 1 :: 6]  # each has the dropped and the two timed iterations
    followers = {(earlier, later) for earlier, later in pairwise(blocks) if earlier != later}
    assert len(followers) == 6, "each follows each of the others now and then"


def test_every_mesh_trains_on_the_same_global_batches(load, monkeypatch, tmp_path):
    script = load("bench_meshes")
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = script.arguments(["--out", str(tmp_path), "--layers", "4"])
    rows = script.rows_of(args)
    assert len(rows) == 18
    for row in rows:
        job, _ = load_job_config(["--job.config_file", str(args.config), *script.options_of(row, args)])
        assert (job.training.global_batch_size, job.training.seq_len, job.debug.seed) == (4, 8192, 0), row
        assert job.compile.enable == (row.mode == "compiled"), row
        float8 = job.quantize.linear.float8
        assert float8.enable_fsdp_float8_all_gather == (row.precision == "float8" and row.mesh in ("fsdp2", "cp2")), row


def test_losses_of_a_mesh_are_compared_with_fsdp2_of_the_same_kind_and_failures_say_why(load):
    script = load("bench_meshes")

    def record(mesh, mode, losses):
        kind = {"mesh": mesh, "precision": "bf16", "mode": mode, "exit_code": 0, "losses": losses, "step_1_s": 9.0}
        return kind | {"last_loss": losses[-1], "tps": 1000.0, "memory_gib": 3.0, "memory_gib_of_ranks": [3.0, 5.0]}

    records = [
        record("fsdp2", "eager", [3.0, 2.0]),
        record("pp2", "eager", [3.5, 1.9]),
        record("cp2", "eager", [3.0, None]),
        record("tp2", "compiled", [3.0, 2.0]),
        {"mesh": "tp2", "precision": "bf16", "mode": "eager", "exit_code": 1, "error": "ValueError: a | b"},
    ]
    cells = [line[2:].split(" | ") for line in script.table(records).splitlines()[2:]]
    assert cells[1] == ["PP 2", "bf16", "eager", "1,000", "5.0", "1.9000", "-0.1000", "0.5000", "9.0 |"]
    assert [line[5:8] for line in cells[2:4]] == [["n/a", "n/a", "n/a"], ["2.0000", "n/a", "n/a"]]
    assert script.table(records).splitlines()[-1].count(" | ") == len(cells[0]) - 1
    assert "failed with exit code 1: ValueError: a \\| b" in script.table(records)


def test_the_peak_of_every_rank_is_read_from_the_log(load):
    script = load("bench_meshes")
    line = "[rank{0}]:02:17:37 rank {0} I step {1}/3   loss   7.2   tok/s   515   MFU n/a   mem {2} GiB   ETA 0:00:00\n"
    log = "".join(line.format(*each) for each in ((1, 1, "70.25"), (0, 1, "3.50"), (1, 2, "9.00"), (0, 2, "4.50")))
    assert script.peaks_gib(log) == [4.5, 70.25]


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (
            "[rank1]:[rank1]: RuntimeError: connection closed\n"
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\nRoot Cause:\n"
            "  traceback : Traceback (most recent call last):\n"
            "  torch.OutOfMemoryError: CUDA out of memory.\n  of which 1 GiB is free\n=====\n",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (
            "one\n  traceback : Signal 9 (SIGKILL) received by PID 7\n=====\n",
            "traceback : Signal 9 (SIGKILL) received by PID 7",
        ),
        ("", "nothing was printed"),
    ],
)
def test_the_last_error_of_a_log_is_the_first_failure_of_torchruns_summary(load, tmp_path, log, error):
    (tmp_path / "log").write_text(log)
    assert load("bench_runs").last_error(tmp_path / "log") == error


def test_past_its_limit_a_command_is_killed_with_processes_that_have_sessions_of_their_own(load, tmp_path):
    script = load("bench_runs")
    worker = "subprocess.Popen(['sleep', '60'], start_new_session=True)"
    program = f"import subprocess, time; print({worker}.pid, flush=True); time.sleep(60)"
    code, wall_s = script.run_command([sys.executable, "-c", program], tmp_path / "log", os.environ, timeout_s=3)
    assert code == script.TIMED_OUT
    assert wall_s < 30
    worker_status = Path("/proc", (tmp_path / "log").read_text().strip(), "stat")
    for _ in range(100):
        # Without a parent it may stay as a zombie.
        if not worker_status.exists() or worker_status.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker is still running")


def test_figures_are_medians_over_the_steps_after_the_warm_up(load):
    lines = [
        {"step": step, "tps": tps, "tflops": None, "mfu": None, "memory_gib": 10.0 / step, "loss": 5.0 - step}
        for step, tps in ((1, 1.0), (2, 100.0), (3, 110.0), (4, 150.0))
    ]
    found = load("bench_runs").figures(lines, 1)
    assert (found["tps"], found["tflops"], found["tps_spread"]) == (110.0, None, 50 / 110)
    assert (found["memory_gib"], found["first_loss"], found["last_loss"]) == (10.0, 4.0, 1.0)


GB, TERA = 1e9, 1e12
ROOFLINE = {
    # Counted by hand: 6 T N K FLOPs of products; (2 b + 2) (T K + N K + T N) bytes; b = 33/32.
    "dense": {
        "products of linears": (343.0476, 170.725, 115.595),
        "casts of weights": (0, 5.6285, 70.6234),
        "casts of gradients": (0, 0, 45.8018),
        "casts of activations": (0, 0, 28.3535),
        "output layer and loss": (25.8213, 13.8601, 13.8601),
        "attention": (61.5727, 16.1061, 16.1061),
        "norms, SwiGLU, permutation": (0, 111.6691, 111.6691),
        "optimizer": (0, 28.1059, 28.1059),
    },
    "moe": {
        "products of linears": (4205.632, 1476.7306, 999.8696),
        "products of experts": (2968.6814, 978.4472, 662.4903),
        "products in bf16": (247.3901, 292.9302, 292.9302),
        "casts of weights": (0, 2.5015, 149.9182),
        "casts of gradients": (0, 0, 850.6049),
        "casts of activations": (0, 0, 653.3048),
        "hidden of experts made again": (0, 0, 193.2735),
        "output layer and loss": (508.4704, 174.2412, 174.2412),
        "attention": (1154.4872, 289.9103, 289.9103),
        "norms, SwiGLU, permutation": (0, 2319.2823, 2319.2823),
        "optimizer": (0, 11.7873, 11.7873),
    },
}


@pytest.mark.parametrize("name", ROOFLINE)
def test_the_roofline_counts_flops_and_bytes_of_each_kind_of_kernel(load, name: str):
    sums: dict[str, list[float]] = {}
    script = load("mx_roofline")
    for kernel in script.kernels_of(script.JOBS[name]):
        found = sums.setdefault(kernel.group, [0.0, 0.0, 0.0])
        for i, number in enumerate((kernel.flops / TERA, kernel.bytes_bf16 / GB, kernel.bytes_mx / GB)):
            found[i] += kernel.count * number
    assert sums.keys() == ROOFLINE[name].keys()
    for group, expected in ROOFLINE[name].items():
        assert sums[group] == pytest.approx(expected, rel=1e-4), group


def test_the_roofline_multiplies_the_parameters_that_a_token_meets(load):
    """6 FLOPs for each of them, but for tables, norms and routers."""
    script = load("mx_roofline")
    for job in script.JOBS.values():
        products = [k for k in script.kernels_of(job) if k.group.startswith("products")]
        met = count_active_parameters(job.dims) - 2 * job.dims.vocab_size * job.dims.dim
        assert sum(k.count * k.flops for k in products) == pytest.approx(6 * job.tokens * met, rel=1e-3)


def test_the_roofline_tells_the_three_products_of_a_linear_apart(load):
    script = load("mx_roofline")
    t, n, k, b = 8192, 1024, 4096, 33 / 32
    (wk,) = (each for each in script.linears_of(script.JOBS["dense"]) if each.name == "wk")
    assert (wk.tokens, wk.n, wk.k, wk.count) == (t, n, k, 32)
    moved = {kernel.name: (kernel.bytes_bf16, kernel.bytes_mx) for kernel in script.products_of(wk)}
    in_bf16 = 2 * (t * k + n * k + t * n)
    assert moved == {
        "wk forward": (in_bf16, b * (t * k + n * k) + 2 * t * n),
        "wk grad_input": (in_bf16, b * (t * n + n * k) + 2 * t * k),
        "wk grad_weight": (in_bf16, b * (t * n + t * k) + 2 * n * k),
    }


def test_the_roofline_predicts_what_its_document_says(load):
    script = load("mx_roofline")
    document = (SCRIPTS.parent / "docs/mxfp8.md").read_text()
    for name, ratios in {"dense": {"B200": 1.412, "GB200": 1.392}, "moe": {"B200": 1.468, "GB200": 1.454}}.items():
        job = script.JOBS[name]
        for device, ratio in ratios.items():
            bf16, mx = script.milliseconds(job, script.DEVICES[device])
            assert bf16 / mx == pytest.approx(ratio, abs=1e-3)
        device = script.DEVICES[job.device]
        for line in (script.table(job, device) + "\n" + script.product_table(job, device)).splitlines():
            assert line.startswith("| ---") or line in document, line
        bf16, mx = script.milliseconds(job, device)
        published = 1e3 * job.tokens / job.published_tokens_s
        for speedup in job.published.values():
            slower, rest = script.fitted(bf16, mx, published, speedup)
            assert slower * bf16 + rest == pytest.approx(published)
            assert (slower * bf16 + rest) / (slower * mx + rest) == pytest.approx(speedup)


def test_a_kernel_takes_as_long_as_the_slower_of_its_flops_and_its_bytes(load):
    script = load("mx_roofline")
    device = script.Device(bf16=1e12, mx=2e12, bandwidth=1e9)
    by_flops = script.Kernel("", "", 1e12, 1, 1, count=3, in_mx=True)
    assert by_flops.seconds(device, mx=False) == pytest.approx(3 / 0.70)
    assert by_flops.seconds(device, mx=True) == pytest.approx(3 / 2 / 0.68)
    assert script.Kernel("", "", 1, 1e9, 5e8).seconds(device, mx=True) == pytest.approx(0.5 / 0.88)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_wide_product_is_that_of_its_parts_where_scales_stay_their_own(load, recipe):
    script = load("bench_wide")
    operands = script.Operands(recipe, 32, 64, (48, 16, 32), torch.device("cpu"))
    for kind in ("output", "grad_weight"):
        calls = script.calls(operands, recipe, kind)
        parts, (wide,) = calls[script.PARTS](), calls[script.ROWS]()
        assert torch.equal(wide, torch.cat(parts, dim=1 if kind == "output" else 0))
    shared = operands.g[0].scale, operands.w_t[0].scale
    for name, scale in zip(("g", "w_t"), shared, strict=True):
        setattr(operands, name, [script.Factor(factor.codes, scale) for factor in getattr(operands, name)])
    calls = script.calls(operands, recipe, "grad_input")
    (wide,), parts = calls.pop(next(name for name in calls if name != script.PARTS))(), calls[script.PARTS]()
    torch.testing.assert_close(wide.float(), sum(part.float() for part in parts), rtol=2e-2, atol=2e-4)


def test_the_benchmark_of_wide_products_runs_on_a_cpu(load, capsys):
    assert load("bench_wide").main(["--device", "cpu", "--tiny", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "Error" not in out
    assert out.count("| w1, w3 |") == 8
    assert "new tensors, strided" in out


def test_the_exchange_is_measured_in_processes_of_torchrun_alone(load, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("sys.argv", ["bench_exchange.py"])
    with pytest.raises(SystemExit) as ended:
        load("bench_exchange").main()
    assert ended.value.code == 2
    assert "start it with torchrun" in capsys.readouterr().err


def test_the_exchange_is_measured_with_what_fsdp_has(load):
    class Group:
        def size(self):
            return 2

    gather, reduce = load("bench_exchange").exchanges_of(Group())
    assert isinstance(gather, AllGather)
    assert isinstance(reduce, ReduceScatter)
