"""Nearest names for error messages: a misspelt key, flavor or module is answered with what was likely meant."""

import difflib
from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str], n: int = 1) -> list[str]:
    """The up to `n` candidates most like `name`, best first; empty when nothing is close."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    return [by_lower[hit] for hit in difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.55)]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """` (did you mean "x"?)` for the nearest candidate, or the empty string."""
    hits = nearest(name, candidates)
    return f' (did you mean "{hits[0]}"?)' if hits else ""
