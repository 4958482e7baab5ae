"""`[metrics]`, `[profiling]` and `[memory_estimation]`: what can be seen of a run."""

import importlib.util
from collections.abc import Iterator

from titan_fp8.config.section import Problem, Section, key, not_supported_yet


class ProfilingSection(Section):
    """Traces of the profiler and snapshots of the GPU's memory.

    A cycle of `profile_freq` steps ends with `profiler_warmup` steps that are not recorded and `profiler_active` steps
    that are.
    """

    enable_profiling: bool = False
    """Write a profiler trace every `profile_freq` steps."""

    save_traces_folder: str = key("profile_traces", min_length=1, only_with={"enable_profiling": [True]})
    """Folder of the traces, relative to `job.dump_folder`."""

    profile_freq: int = key(
        10, ge=1, unit="steps", only_with={"enable_profiling": [True], "enable_memory_snapshot": [True]}
    )
    """Steps between two traces or snapshots."""

    profiler_active: int = key(1, ge=1, unit="steps", only_with={"enable_profiling": [True]})
    """Steps that one trace records."""

    profiler_warmup: int = key(3, ge=0, unit="steps", only_with={"enable_profiling": [True]})
    """Steps before those, in which the profiler runs and does not record."""

    trace_cpu: bool = key(True, only_with={"enable_profiling": [True]})
    """Record operators and their shapes, too. That slows the CPU down, in steps of many small kernels so far that the
    GPU waits for it; without it a trace has kernels and their launches alone. `false` needs a GPU."""

    enable_memory_snapshot: bool = False
    """Write a snapshot of the GPU's memory every `profile_freq` steps, and when memory runs out. Needs a GPU."""

    save_memory_snapshot_folder: str = key(
        "memory_snapshot", min_length=1, only_with={"enable_memory_snapshot": [True]}
    )
    """Folder of the snapshots, relative to `job.dump_folder`."""

    def problems(self) -> Iterator[Problem]:
        """A cycle holds its warm-up and its recorded steps."""
        if self.enable_profiling and self.profiler_warmup + self.profiler_active > self.profile_freq:
            yield Problem(
                "profile_freq",
                f"a cycle cannot hold profiler_warmup {self.profiler_warmup} + profiler_active {self.profiler_active} "
                "steps; raise profile_freq or lower profiler_warmup",
            )


class MetricsSection(Section):
    """The console's lines, `metrics.jsonl` and the trackers."""

    log_freq: int = key(10, ge=1, unit="steps")
    """Steps between two lines. Step 1 and the last step always have one."""

    enable_tensorboard: bool = False
    """Write the metrics for TensorBoard too."""

    disable_color_printing: bool = False
    """Print the console's lines without colours. They are without when the output is not a terminal."""

    save_tb_folder: str = key("tb", min_length=1, only_with={"enable_tensorboard": [True]})
    """Folder of TensorBoard's files, relative to `job.dump_folder`."""

    save_for_all_ranks: bool = key(False, only_with={"enable_tensorboard": [True], "enable_wandb": [True]})
    """Every rank writes to the trackers, instead of rank 0 alone. `metrics.jsonl` is written by rank 0 in any case."""

    enable_wandb: bool = False
    """Send the metrics to Weights & Biases too. Needs the extra `wandb`."""

    def problems(self) -> Iterator[Problem]:
        """A tracker's package is there."""
        if self.enable_wandb and importlib.util.find_spec("wandb") is None:
            yield Problem("enable_wandb", "the package wandb is not installed; pip install 'titan-fp8[wandb]'")


class MemoryEstimationSection(Section):
    """Estimate of the memory that a run needs."""

    enable: bool = not_supported_yet(False)
    """Estimate the peak memory instead of training."""

    disable_fake_mode: bool = not_supported_yet(False)
    """Estimate with real tensors."""
