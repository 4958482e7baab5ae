"""bench_fit.py finds the largest size that fits in few runs, and takes no other failure for a full device."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def fit(load):
    """The script as a module."""
    return load("bench_fit")


@pytest.mark.parametrize(("fixed", "each"), [(43.0, 3.1), (40.0, 98.0), (10.0, 0.6), (43.0, 9.0)])
def test_the_largest_size_that_fits_is_found_beside_one_that_does_not(fit, fixed, each):
    capacity = 140.0

    def run(size: int) -> dict:
        memory = fixed + each * size + 0.02 * size**2  # not quite a line
        return {"memory_gib": memory} if memory < 139.0 else {"error": "exit code 1: torch.OutOfMemoryError: x"}

    size, tried = fit.largest(run, capacity)
    assert "error" not in run(size)
    assert "error" in run(size + 1)
    assert tried[size] == run(size)


def test_a_search_ends_where_a_run_fails_for_another_reason_or_nothing_fits(fit):
    with pytest.raises(SystemExit, match="not for memory: exit code 1: ValueError"):
        fit.largest(lambda size: {"error": "exit code 1: ValueError: x"} if size > 1 else {"memory_gib": 1.0}, 9.0)
    with pytest.raises(SystemExit, match="the smallest size does not fit"):
        fit.largest(lambda size: {"error": "torch.OutOfMemoryError: x"}, 9.0)


def test_sizes_are_batches_or_lengths(fit):
    assert (fit.job_of("batch", 3).local_batch, fit.job_of("batch", 3).seq_len) == (3, 8192)
    assert (fit.job_of("sequence", 3).local_batch, fit.job_of("sequence", 3).seq_len) == (1, 24576)
