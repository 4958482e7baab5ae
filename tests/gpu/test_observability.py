"""What is seen of a run on a GPU: memory peaks, kernels in traces, snapshots of the allocator."""

import json
import pickle

import pytest
import torch

from titan_fp8.observability.config import MetricsSection, ProfilingSection
from titan_fp8.observability.memory import PeakMemory
from titan_fp8.observability.metrics import MetricsLogger
from titan_fp8.observability.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling
from titan_fp8.observability.versions import collect_versions

pytestmark = pytest.mark.gpu

MIB = 2**20


@pytest.fixture
def device():
    torch.cuda.empty_cache()
    return torch.device("cuda", torch.cuda.current_device())


def test_the_peak_is_that_of_the_stretch_and_not_of_the_whole_run(device):
    memory = PeakMemory(device)
    before = torch.cuda.memory_allocated(device) / 2**30
    block = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    del block
    first = memory.take()
    assert first.allocated_gib == pytest.approx(before + 0.25, abs=0.01)
    assert first.reserved_gib >= first.allocated_gib
    torch.cuda.empty_cache()
    memory.take()  # emptying the cache lowers what is reserved only from the next stretch on
    assert memory.take().reserved_gib <= first.reserved_gib - 0.2


def test_a_line_reports_the_memory_of_the_device(device, tmp_path):
    metrics = MetricsLogger(
        MetricsSection(), tmp_path, device=device, total_steps=1, flops_per_token=1e9, peak_flops=1e15
    )
    block = torch.empty(64 * MIB, dtype=torch.uint8, device=device)
    metrics.log_step(1, loss=1.0, grad_norm=1.0, lr=0.1, tokens=100)
    del block
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["memory_gib"] >= record["memory_allocated_gib"] >= 64 / 1024
    assert record["mfu"] == pytest.approx(100 * 1e9 * record["tps"] / 1e15)


def test_a_trace_holds_the_kernels_of_its_steps(device, tmp_path):
    config = ProfilingSection(enable_profiling=True, profile_freq=3, profiler_warmup=1, profiler_active=1)
    a = torch.ones(64, 64, device=device)
    with maybe_enable_profiling(config, tmp_path, 0, 0) as profiler:
        for _ in range(6):
            a @ a
            torch.cuda.synchronize()
            profiler.step()
    for iteration in (3, 6):
        text = (tmp_path / f"profile_traces/iteration_{iteration}/rank0_trace.json").read_text()
        kernels = [event for event in json.loads(text)["traceEvents"] if event.get("cat") == "kernel"]
        assert len(kernels) >= 1


def snapshot_traces(path):
    return pickle.loads(path.read_bytes())["device_traces"]


def test_snapshots_come_at_the_frequency_of_the_section_and_hold_the_history(device, tmp_path):
    config = ProfilingSection(enable_memory_snapshot=True, profile_freq=2)
    with maybe_enable_memory_snapshot(config, tmp_path, 3, 0, device=device) as snapshots:
        for _ in range(3):
            torch.empty(MIB, device=device)
            snapshots.step()
    names = sorted(path.parent.name for path in tmp_path.rglob("*.pickle"))
    assert names == ["iteration_4", "iteration_6"]
    path = tmp_path / "memory_snapshot/iteration_6/rank0_memory_snapshot.pickle"
    assert any(event["action"] == "alloc" for trace in snapshot_traces(path) for event in trace)


def test_running_out_of_memory_leaves_a_snapshot_and_stays_an_error(device, tmp_path):
    config = ProfilingSection(enable_memory_snapshot=True)
    total = torch.cuda.get_device_properties(device).total_memory

    def run_out_of_memory():
        with maybe_enable_memory_snapshot(config, tmp_path, 0, 1, device=device) as snapshots:
            snapshots.step()
            torch.empty(2 * total, dtype=torch.uint8, device=device)

    with pytest.raises(torch.OutOfMemoryError):
        run_out_of_memory()
    assert (tmp_path / "memory_snapshot/iteration_1_out_of_memory/rank1_memory_snapshot.pickle").exists()


def test_versions_name_cuda_and_the_device():
    versions = collect_versions()
    assert versions["cuda"] == torch.version.cuda
    assert versions["device"] == torch.cuda.get_device_name()
