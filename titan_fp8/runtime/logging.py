"""One logger for the whole package: `[titan_fp8] HH:MM:SS rank message` on standard error of every rank.

torchrun filters ranks (`LOG_RANK` in `run_train.sh`), so no rank stays silent by itself; a message that only one rank
should say is logged with `info_once`.
"""

import logging
import os
import sys

logger = logging.getLogger("titan_fp8")


def init_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send the package's log to standard error; calling it again replaces the handler."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"rank {rank} " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def info_once(message: str) -> None:
    """Log on rank 0 only."""
    if int(os.environ.get("RANK", "0")) == 0:
        logger.info(message)
