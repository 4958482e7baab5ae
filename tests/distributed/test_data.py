"""The state of a loader that several processes share: complete, the same on each, and good for any number of them."""

from pathlib import Path
from typing import Any

import pyarrow
import pytest

from tests.distributed.harness import run_distributed
from titan_fp8.data.config import TrainingSection
from titan_fp8.data.loader import build_train_loader
from titan_fp8.data.tokenizer import ByteTokenizer

GLOBAL_BATCH = 8


def _train(
    rank: int, world_size: int, path: str | None, state: dict[str, Any] | None, steps: int
) -> tuple[list[list[list[int]]], dict[str, Any]]:
    """Tokens [steps][slots of this rank][S] of some steps, and the state behind them."""
    training = TrainingSection(dataset="text" if path else "synthetic", dataset_path=path, seq_len=32)
    loader = build_train_loader(
        training,
        ByteTokenizer(),
        seed=3,
        global_batch_sequences=GLOBAL_BATCH,
        local_batch_sequences=2,
        dp_rank=rank,
        dp_world_size=world_size,
    )
    with loader:
        if state is not None:
            loader.load_state_dict(state)
        tokens = [[row for batch in loader.next_step() for row in batch.tokens.tolist()] for _ in range(steps)]
        return tokens, loader.state_dict()


def _joined(results: list[Any]) -> list[list[int]]:
    """The samples of all ranks in the order of their numbers."""
    return [row for step in zip(*(tokens for tokens, _ in results), strict=True) for part in step for row in part]


@pytest.mark.parametrize("dataset", ["text", "synthetic"])
def test_a_run_moves_between_world_sizes_and_reads_each_sample_once(tmp_path: Path, dataset: str) -> None:
    path = None
    if dataset == "text":
        path = str(tmp_path / "a.arrow")
        table = pyarrow.table({"text": [f"{number} " * (number % 37) for number in range(1000, 1300)]})
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    expected, _ = _train(0, 1, path, None, 12)
    samples: list[list[int]] = []
    state = None
    for world_size in (4, 2):
        results = run_distributed(_train, world_size, path, state, 4)
        samples += _joined(results)
        states = [state for _, state in results]
        assert all(each == states[0] for each in states)
        state = states[0]
        assert state["samples"] == len(samples)
    tail, _ = _train(0, 1, path, state, 4)
    samples += [row for step in tail for row in step]
    assert samples == [row for step in expected for row in step]
