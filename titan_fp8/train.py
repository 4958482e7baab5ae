"""The entry point that torchrun starts: parse, plan, build, train, close.

    python -m titan_fp8.train --job.config_file train_configs/debug_model.toml --training.steps 20
    torchrun --nproc_per_node 2 -m titan_fp8.train --job.config_file ...

Alone it is a world of one process. The exit code is 0 for a finished run, 2 for a mistake in the configuration, 130
after Ctrl-C, 75 after a signal to stop and save (`runtime/preemption.py`) and 1 for anything else that ends the run;
mistakes are printed by rank 0 only, without a traceback.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from titan_fp8.runtime.permission import Follower, follow_launcher

if TYPE_CHECKING:
    from titan_fp8.job_config import JobConfig

CONFIGURATION_ERROR = 2
RUN_ERROR = 1
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Train as `argv` (default: the process's arguments) says and return the exit code."""
    try:
        return _load_and_train(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # before there is a log: while something was imported, or the job checked
        return INTERRUPTED


def _load_and_train(argv: Sequence[str]) -> int:
    launcher = follow_launcher()
    # Here, where an interrupt has an answer: this takes half a second.
    from titan_fp8.config.errors import ConfigErrors
    from titan_fp8.job_config import HelpRequested, load_job_config

    try:
        job, notices = load_job_config(argv)
    except HelpRequested as help_text:
        _say(str(help_text), sys.stdout)
        return 0
    except ConfigErrors as errors:
        if launcher is not None:
            launcher.wait()  # it finds the same, and says so
        _say(errors.render(), sys.stderr)
        return CONFIGURATION_ERROR
    return _train(job, notices, launcher)


def _train(job: "JobConfig", notices: Sequence[str], launcher: Follower | None) -> int:
    # Read once, when CUDA starts: streams that wait for other GPUs should have hardware queues of their own.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    # Importing torch takes seconds; a mistake in the configuration is answered before that.
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from titan_fp8.building import run
    from titan_fp8.config.errors import ConfigErrors
    from titan_fp8.runtime.errors import UserError
    from titan_fp8.runtime.logging import info_once, init_logging, logger

    if launcher is not None:
        launcher.wait()
    init_logging(rank=int(os.environ.get("RANK", "0")))
    for notice in notices:
        info_once(notice)
    try:
        run(job)
    except ConfigErrors as errors:
        _say(errors.render(), sys.stderr)
        return CONFIGURATION_ERROR
    except Exception as error:
        # LOG_RANK may hide this rank's log; torchrun's closing summary shows what is noted here, whatever the rank.
        get_error_handler().record_exception(error)
        if not isinstance(error, UserError):
            raise
        logger.error("%s", error)
        return RUN_ERROR
    except KeyboardInterrupt:
        logger.error("interrupted: what is saved stays, and the same command resumes if checkpoint.enable is set")
        return INTERRUPTED
    return 0


def _say(text: str, stream: TextIO) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        # The reader (`--help | head`) has seen enough; without this, closing the stream complains once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
