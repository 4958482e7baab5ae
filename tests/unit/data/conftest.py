"""Small sources, and a simulation of several ranks in one process."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from titan_fp8.data.batch import Batch
from titan_fp8.data.config import DataloaderSection, TrainingSection
from titan_fp8.data.loader import TrainLoader
from titan_fp8.data.sources import StepPlan
from titan_fp8.data.tokenizer import ByteTokenizer


class Documents(list):
    """A list of texts that stands in for `TextDocuments`, and counts who reads what."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__(texts)
        self.total_bytes = sum(map(len, texts))


def make_documents(count: int, longest: int = 120) -> Documents:
    """Texts of 1 to `longest` characters, no stretch of which occurs twice."""
    rng = random.Random(0)
    letters = [chr(code) for code in range(65, 123)]
    return Documents(
        [f"{number}:" + "".join(rng.choices(letters, k=rng.randrange(longest))) for number in range(count)]
    )


class Ranks:
    """The loaders of all ranks of a run, stepped together."""

    def __init__(self, source: Any, world: int, global_batch: int, local_batch: int = 1, workers: int = 0) -> None:
        training = TrainingSection(dataloader=DataloaderSection(num_workers=workers))
        self.loaders = [
            TrainLoader(
                source,
                StepPlan(global_batch, local_batch, rank, world),
                training,
                gather=lambda _: [loader.local_state() for loader in self.loaders],
            )
            for rank in range(world)
        ]

    def step(self) -> list[Batch]:
        """The microbatches of a step in the order of the slots."""
        return [batch for loader in self.loaders for batch in loader.next_step()]

    def samples(self, steps: int) -> list[tuple[int, ...]]:
        """All samples of some steps in the order of the slots, each as its tokens and last label."""
        return [row for _ in range(steps) for batch in self.step() for row in rows(batch)]

    def state(self) -> dict[str, Any]:
        """The state, which must be the same on every rank."""
        states = [loader.state_dict() for loader in self.loaders]
        assert all(state == states[0] for state in states)
        return states[0]

    def load(self, state: dict[str, Any]) -> "Ranks":
        """Load a state on every rank."""
        for loader in self.loaders:
            loader.load_state_dict(state)
        return self

    def close(self) -> None:
        """Close all loaders."""
        for loader in self.loaders:
            loader.close()


def rows(batch: Batch) -> list[tuple[int, ...]]:
    """Each row of a batch as its tokens and its last label."""
    return [(*tokens, labels[-1]) for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)]


@pytest.fixture
def ranks() -> Iterator[Callable[..., Ranks]]:
    """Makes `Ranks` that are closed at the end of the test."""
    made: list[Ranks] = []

    def make(*args: Any, **kwargs: Any) -> Ranks:
        made.append(Ranks(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    """The built-in tokenizer."""
    return ByteTokenizer()
