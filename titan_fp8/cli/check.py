"""`titan-fp8 check`: is this job's configuration right? Takes the options of a training run and trains nothing.

Two passes. The first needs neither torch nor the model and answers in a fraction of a second. If it finds nothing, the
second builds the model without memory and asks the rules that need it. All violations of a pass are printed at
once, one a line, and the exit code is 2.

    titan-fp8 check --job.config_file train_configs/llama3_8b.toml --training.steps 20
"""

import importlib
import os
import sys
from collections.abc import Sequence

from titan_fp8.config.errors import ConfigErrors, HelpRequested
from titan_fp8.job_config import JobConfig, load_job_config

CONFIGURATION_ERROR = 2


def main(argv: Sequence[str]) -> int:
    """Check the job that the options describe and return the exit code: 0 or 2."""
    try:
        job, notices = load_job_config(argv)
        for notice in notices:
            _say(notice)
        _check_model(job)
    except HelpRequested as text:
        print(text)
        return 0
    except ConfigErrors as errors:
        _say(errors.render())
        return CONFIGURATION_ERROR
    return 0


def _check_model(job: JobConfig) -> None:
    # By name, because it imports torch: the first pass must have answered before.
    violations = importlib.import_module("titan_fp8.model_plan").check_model(job)
    if violations:
        raise ConfigErrors(violations)


def _say(text: str) -> None:
    """To standard error, on one rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
