"""A test of several processes has longer than others: of a rank that does not answer it is found out where it is, and
the job runs once more (`harness.py`)."""

from pathlib import Path

import pytest

TIMEOUT_S = 250


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
