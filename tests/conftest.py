"""What holds for every test: GPU tests are skipped without a GPU, and a test has one thread; and what many need."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.distributed.harness import RETRIES, close_groups
from titan_fp8.runtime.logging import logger

pytest.register_assert_rewrite("tests.distributed.trainings")


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if RETRIES not in os.environ:  # processes of xdist have it from the one that shows the report
        os.environ[RETRIES] = tempfile.mkstemp(prefix="titan_fp8_retries_")[1]
    # How long an example takes depends on what else the machine does.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "distributed" not in item.path.parts and not hasattr(getattr(item, "module", None), "run_distributed"):
        close_groups()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    notes = Path(os.environ[RETRIES])
    text = notes.read_text()
    if text:
        terminalreporter.section("tried again")
        terminalreporter.write(text)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        Path(os.environ.pop(RETRIES)).unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def log_messages() -> Iterator[list[str]]:
    """What the package logs, each message once. After a run in this process, which leaves a logger that propagates
    nothing, `caplog` listens there too and has each message twice."""
    handler, handlers, level = _Messages(), logger.handlers, logger.level
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    yield handler.messages
    logger.handlers = handlers
    logger.setLevel(level)
