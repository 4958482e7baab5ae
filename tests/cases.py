"""Which cases of a test every run has, and which are run by hand (`-m slow`)."""

from collections.abc import Iterable
from typing import Any

import pytest


def some_by_hand(cases: Iterable[Any], *by_hand: Any) -> list[Any]:
    """Parameters of a test: `cases`, each a value or a tuple of them, of which those in `by_hand` are marked `slow`."""
    cases = list(cases)
    unknown = [case for case in by_hand if case not in cases]
    assert not unknown, f"no such cases: {unknown}"
    return [_parameter(case, slow=case in by_hand) for case in cases]


def _parameter(case: Any, *, slow: bool) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow if slow else ())
