"""The root of the configuration: one field a section, and how a job is read from a TOML file and the command line.

    job, notices = load_job_config(["--job.config_file", "train_configs/debug_model.toml", "--training.steps", "20"])

The rules between sections are in `titan_fp8.job_rules`. `titan_fp8.config` does the reading and knows no section by
name. Nothing on the way imports torch.
"""

import importlib
import os
import traceback
from collections.abc import Mapping, Sequence

from titan_fp8.checkpoint.config import CheckpointSection
from titan_fp8.config.errors import ConfigErrors, HelpRequested, Violation
from titan_fp8.config.given import Sources
from titan_fp8.config.job import JobSection
from titan_fp8.config.keys import Key
from titan_fp8.config.loader import Loader
from titan_fp8.config.names import CONVERTERS_KEY
from titan_fp8.config.section import Section
from titan_fp8.config.to_toml import to_toml
from titan_fp8.converters.config import CONVERTERS, QuantizeSection
from titan_fp8.data.config import TrainingSection, ValidationSection
from titan_fp8.job_rules import RULES
from titan_fp8.models.config import ModelSection
from titan_fp8.observability.config import MemoryEstimationSection, MetricsSection, ProfilingSection
from titan_fp8.optim.config import LRSchedulerSection, OptimizerSection
from titan_fp8.parallel.config import (
    ActivationCheckpointSection,
    CompileSection,
    FaultToleranceSection,
    ParallelismSection,
)
from titan_fp8.runtime.config import CommSection, DebugSection, ExperimentalSection

__all__ = ["ConfigErrors", "HelpRequested", "JobConfig", "Violation", "load_job_config", "to_toml"]


class JobConfig(Section):
    """A whole run. Immutable; `load_job_config` makes one and checks it."""

    job: JobSection = JobSection()
    """The run itself."""
    profiling: ProfilingSection = ProfilingSection()
    """Traces and memory snapshots."""
    metrics: MetricsSection = MetricsSection()
    """The console, `metrics.jsonl` and the trackers."""
    model: ModelSection = ModelSection()
    """The model, its tokenizer and its converters."""
    optimizer: OptimizerSection = OptimizerSection()
    """The optimizer."""
    lr_scheduler: LRSchedulerSection = LRSchedulerSection()
    """The learning rate over time."""
    training: TrainingSection = TrainingSection()
    """Data, batch, length and precision."""
    parallelism: ParallelismSection = ParallelismSection()
    """How the model and the data are spread over ranks."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving and loading."""
    activation_checkpoint: ActivationCheckpointSection = ActivationCheckpointSection()
    """What is recomputed in the backward pass."""
    compile: CompileSection = CompileSection()
    """`torch.compile`."""
    quantize: QuantizeSection = QuantizeSection()
    """Settings of the converters."""
    comm: CommSection = CommSection()
    """Communication between processes."""
    memory_estimation: MemoryEstimationSection = MemoryEstimationSection()
    """Estimate of the memory."""
    fault_tolerance: FaultToleranceSection = FaultToleranceSection()
    """Replicas that may come and go."""
    experimental: ExperimentalSection = ExperimentalSection()
    """Hooks for code of one's own."""
    validation: ValidationSection = ValidationSection()
    """Loss on held-out data."""
    debug: DebugSection = DebugSection()
    """Seeds and determinism."""


def load_job_config(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> tuple[JobConfig, list[str]]:
    """Read and check a job.

    Args:
        argv: the command line without the program's name, such as `["--training.steps", "20"]`.
        environ: environment variables, `os.environ` by default; WORLD_SIZE is the number of processes (1 if not set).

    Returns:
        The job, and lines to log about how it was read (an older spelling, a file found elsewhere).

    Raises:
        ConfigErrors: with every violation of every rule that needs neither torch nor the model.
        HelpRequested: `--help` is among the options; its text is the help.
    """
    loader = Loader(
        JobConfig, rules=RULES, source_rules=[sections_belong_to_named_converters], find_root=custom_job_config
    )
    return loader.load(argv, os.environ if environ is None else environ)


def sections_belong_to_named_converters(keys: Mapping[str, Key], sources: Sources) -> None:
    """A converter's settings without the converter do nothing, so they are an error.

    The comparison stays within one source: where the command line sets `model.converters`, the TOML file's sections of
    the converters that it leaves out are dropped, and a line says so.
    """
    if CONVERTERS_KEY in sources.rejected:
        return
    named = sources.effective(keys, CONVERTERS_KEY)
    for converter in CONVERTERS:
        if converter in named:
            continue
        paths = [path for path in keys if path.startswith(f"{converter}.")]
        for path in paths:
            given = sources.cli.get(path)
            if given is not None:
                sources.violations.append(Violation(given.place, _unnamed(path, converter)))
        filled_in = [path for path in paths if path in sources.toml and sources.toml[path].value != keys[path].default]
        if CONVERTERS_KEY in sources.cli:
            sources.drop(filled_in, f"--{CONVERTERS_KEY} does not name {converter}")
        else:
            remedy = f", or leave the file's converters out with --{CONVERTERS_KEY}="
            problems = [(path, _unnamed(path, converter) + remedy) for path in filled_in]
            sources.violations += [Violation(sources.toml[path].place, problem) for path, problem in problems]


def _unnamed(path: str, converter: str) -> str:
    return f"{path} is set, but {CONVERTERS_KEY} does not name {converter}; name it there or remove the key"


def custom_job_config(module_name: str) -> type[JobConfig]:
    """The class `JobConfig` of the module `job.custom_config_module`.

    Raises:
        ValueError: the module cannot be imported, or has no subclass of our `JobConfig` under that name.
    """
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if where.filename.startswith("<frozen") else f" ({where.filename}:{where.lineno})"
        raise ValueError(f"cannot be imported: {type(error).__name__}: {error}{place}") from error
    found = getattr(module, "JobConfig", None)
    if not (isinstance(found, type) and issubclass(found, JobConfig)):
        raise ValueError("exports no JobConfig; write `class JobConfig(titan_fp8.job_config.JobConfig)` in it")
    return found
