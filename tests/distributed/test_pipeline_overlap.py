"""Pairs of a pipeline that take turns at exchanges of tokens: the same training, bit for bit, in another order."""

from pathlib import Path

import pytest

from tests.distributed.test_expert_parallel import ALL_IN_FLOAT8, BF16, on
from tests.distributed.trainings import FULL, Run

KEY = "parallelism.pipeline_parallel_expert_parallel_overlap"
DUALPIPEV = {
    "parallelism.pipeline_parallel_schedule": "DualPipeV",
    "model.overrides.n_layers": "6",
    "model.overrides.first_dense_layers": "2",
    "training.local_batch_size": "5",
    "training.global_batch_size": "10",
}
CASES = {"fp32": {}, "float8": ALL_IN_FLOAT8 | BF16 | FULL}


def assert_equal(actual: Run, expected: Run) -> None:
    assert actual.losses == expected.losses
    assert actual.norms == expected.norms
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert grad.equal(actual.grads[name]), name


@pytest.mark.parametrize("name", CASES)
def test_passes_in_turns_are_passes_one_after_the_other(name: str, tmp_path: Path) -> None:
    options = {**DUALPIPEV, **CASES[name]}
    overlapped, plain = (
        on("pp2 fsdp2 ep2", {**options, KEY: value}, tmp_path / value, steps=2) for value in ("true", "false")
    )
    assert_equal(overlapped, plain)
