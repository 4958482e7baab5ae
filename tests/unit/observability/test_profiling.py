"""Profiler traces at the promised steps, also in a resumed run; memory snapshots need CUDA."""

import json
import logging

import pytest
import torch
from torch.profiler import profile

from tests.unit.observability.test_files import files_no_larger_than
from titan_fp8.observability.config import ProfilingSection
from titan_fp8.observability.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.logging import logger as package_logger


def train(config, folder, *, first_step, last_step, rank=0):
    """Run steps `first_step` to `last_step`; step n computes a matrix product of size n."""
    with maybe_enable_profiling(config, folder, first_step - 1, rank) as profiler:
        for step in range(first_step, last_step + 1):
            torch.ones(step, step) @ torch.ones(step, step)
            profiler.step()


def traced_sizes(path):
    """Sizes of the matrix products in a trace, in order."""
    events = json.loads(path.read_text())["traceEvents"]
    return [event["args"]["Input Dims"][0][0] for event in events if event.get("name") == "aten::mm"]


def traces(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_trace_holds_the_last_steps_of_its_cycle(tmp_path):
    config = ProfilingSection(enable_profiling=True, profile_freq=4, profiler_warmup=1, profiler_active=2)
    train(config, tmp_path, first_step=1, last_step=9, rank=3)
    assert traces(tmp_path) == [f"profile_traces/iteration_{step}/rank3_trace.json" for step in (4, 8)]
    assert traced_sizes(tmp_path / "profile_traces/iteration_4/rank3_trace.json") == [3, 4]
    assert traced_sizes(tmp_path / "profile_traces/iteration_8/rank3_trace.json") == [7, 8]


def test_steps_have_their_own_numbers_in_a_trace(tmp_path):
    config = ProfilingSection(enable_profiling=True, profile_freq=4, profiler_warmup=1, profiler_active=2)
    train(config, tmp_path, first_step=5, last_step=8)
    events = json.loads((tmp_path / "profile_traces/iteration_8/rank0_trace.json").read_text())["traceEvents"]
    marked = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert marked == {"ProfilerStep#7", "ProfilerStep#8"}


def test_a_resumed_run_traces_the_same_steps(tmp_path):
    config = ProfilingSection(
        enable_profiling=True, profile_freq=5, profiler_warmup=1, profiler_active=1, save_traces_folder="t"
    )
    train(config, tmp_path, first_step=8, last_step=12)
    assert traces(tmp_path) == ["t/iteration_10/rank0_trace.json"]
    assert traced_sizes(tmp_path / "t/iteration_10/rank0_trace.json") == [10]


def test_a_run_resumed_in_the_middle_of_a_cycle_waits_for_the_next_one(tmp_path):
    config = ProfilingSection(enable_profiling=True, profile_freq=4, profiler_warmup=1, profiler_active=2)
    train(config, tmp_path, first_step=3, last_step=8)
    assert traces(tmp_path) == ["profile_traces/iteration_8/rank0_trace.json"]


def test_a_trace_of_no_gpu_and_without_the_cpu_is_refused(tmp_path, monkeypatch):
    config = ProfilingSection(enable_profiling=True, trace_cpu=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (
        pytest.raises(UserError, match=r"profiling\.trace_cpu = false: there is no GPU.*leave it out"),
        maybe_enable_profiling(config, tmp_path, 0, 0),
    ):
        pass


@pytest.mark.parametrize(("trace_cpu", "names"), [(True, ["CPU", "CUDA"]), (False, ["CUDA"])])
def test_what_is_traced_on_a_gpu(tmp_path, monkeypatch, trace_cpu, names):
    asked = []

    class Profiler:
        step_num = 0

        def __init__(self, *, activities, record_shapes, **_):
            asked.append(([activity.name for activity in activities], record_shapes))

        def start(self):
            pass

        stop = step = start

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("titan_fp8.observability.profiling.profile", Profiler)
    config = ProfilingSection(enable_profiling=True, trace_cpu=trace_cpu, profile_freq=2, profiler_warmup=1)
    with maybe_enable_profiling(config, tmp_path, 0, 0):
        pass
    assert asked == [(names, trace_cpu)]


def test_an_error_in_training_is_not_covered_up_by_the_profiler(tmp_path):
    config = ProfilingSection(enable_profiling=True, profile_freq=2, profiler_warmup=0, profiler_active=2)
    steps = iter([1.0, 0.0])

    def fail_in_step_2():
        with maybe_enable_profiling(config, tmp_path, 0, 0) as profiler:
            for divisor in steps:
                1 / divisor
                profiler.step()

    with pytest.raises(ZeroDivisionError):
        fail_in_step_2()
    assert traces(tmp_path) == []


@pytest.mark.parametrize("transition", ["prepare_trace", "start_trace", "stop_trace"])
def test_a_profiler_that_fails_between_two_states_is_not_stopped(tmp_path, monkeypatch, transition):
    """Stopping it would start a trace that was never prepared, which crashes the process."""

    def fail(profiler):
        raise UserWarning("from the profiler")

    stops = []
    monkeypatch.setattr(profile, transition, fail)
    monkeypatch.setattr(profile, "stop", lambda profiler: stops.append(profiler))
    config = ProfilingSection(enable_profiling=True, profile_freq=3, profiler_warmup=1, profiler_active=1)
    with pytest.raises(UserWarning, match="from the profiler"):
        train(config, tmp_path, first_step=1, last_step=6)
    monkeypatch.undo()
    assert stops == []
    train(config, tmp_path, first_step=1, last_step=3)  # a profiler of its own still works
    assert traces(tmp_path) == ["profile_traces/iteration_3/rank0_trace.json"]


def test_cycles_may_follow_each_other_without_a_pause(tmp_path):
    config = ProfilingSection(enable_profiling=True, profile_freq=2, profiler_warmup=0, profiler_active=2)
    train(config, tmp_path, first_step=1, last_step=4)
    assert traced_sizes(tmp_path / "profile_traces/iteration_2/rank0_trace.json") == [1, 2]
    assert traced_sizes(tmp_path / "profile_traces/iteration_4/rank0_trace.json") == [3, 4]


def test_switched_off_it_writes_nothing_and_can_still_be_stepped(tmp_path):
    train(ProfilingSection(), tmp_path, first_step=1, last_step=20)
    assert traces(tmp_path) == []


def test_a_run_too_short_for_a_trace_says_so(tmp_path):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    package_logger.addHandler(handler)
    train(ProfilingSection(enable_profiling=True), tmp_path, first_step=1, last_step=3)
    package_logger.removeHandler(handler)
    assert "before its first trace" in messages[-1]


def test_a_cycle_that_does_not_fit_is_refused_with_its_numbers(tmp_path):
    config = ProfilingSection(enable_profiling=True, profile_freq=4, profiler_active=2)
    (problem,) = config.problems()
    assert problem.key == "profile_freq"
    assert "profiler_warmup 3 + profiler_active 2" in problem.text
    with pytest.raises(UserError, match=r"profiling\.profile_freq = 4: .*raise profile_freq"):
        train(config, tmp_path, first_step=1, last_step=4)


def test_a_cycle_may_be_full_and_does_not_matter_while_profiling_is_off():
    assert [*ProfilingSection(enable_profiling=True, profile_freq=4).problems()] == []
    assert [*ProfilingSection(profile_freq=2).problems()] == []


def test_a_trace_that_cannot_be_written_is_an_error_that_names_the_path(tmp_path):
    (tmp_path / "profile_traces").write_text("a file in the way")
    config = ProfilingSection(enable_profiling=True, profile_freq=2, profiler_warmup=1, profiler_active=1)
    with pytest.raises(UserError, match=r"cannot write .*rank0_trace\.json"):
        train(config, tmp_path, first_step=1, last_step=3)


def test_half_a_trace_on_a_full_disk_is_an_error(tmp_path):
    config = ProfilingSection(enable_profiling=True, profile_freq=2, profiler_warmup=1, profiler_active=1)
    with files_no_larger_than(1000), pytest.raises(UserError, match=r"cannot write .*rank0_trace\.json.*disk full"):
        train(config, tmp_path, first_step=1, last_step=2)


def test_a_memory_snapshot_without_cuda_is_refused_and_names_the_rule(tmp_path):
    config = ProfilingSection(enable_memory_snapshot=True)
    with pytest.raises(UserError, match=r"profiling\.enable_memory_snapshot.*CUDA allocator.*cpu"):
        maybe_enable_memory_snapshot(config, tmp_path, 0, 0, device=torch.device("cpu"))


def test_memory_snapshots_switched_off_need_no_cuda(tmp_path):
    with maybe_enable_memory_snapshot(ProfilingSection(), tmp_path, 0, 0, device=torch.device("cpu")) as snapshots:
        snapshots.step()
    assert traces(tmp_path) == []
