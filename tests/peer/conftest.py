"""Comparisons with torchao 0.17: skipped where it is not installed (it comes with the `bench` extra)."""

import importlib.metadata
import warnings

import pytest

PEER_VERSION = "0.17.0"


def _why_not() -> str | None:
    """Why the peer cannot be compared with here, or None."""
    try:
        version = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        return f"torchao is not installed; pip install torchao=={PEER_VERSION}, or the extra 'bench'"
    if version != PEER_VERSION:
        return f"compares with torchao {PEER_VERSION}, found {version}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    if reason is None:
        return
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if item.get_closest_marker("peer"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _import_quietly() -> None:
    """The peer's import warns about libraries and registrations that are not ours to mend."""
    if _why_not() is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchao.float8  # noqa: F401
