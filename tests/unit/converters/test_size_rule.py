"""The rule of size: the published thresholds, and the table of the documentation."""

from pathlib import Path

import pytest

from titan_fp8.converters.config import RECIPE_NAMES
from titan_fp8.converters.size_rule import SIZE_RULES, SizeRule, is_too_small

DOC = Path(__file__).parents[3] / "docs" / "float8.md"


@pytest.mark.parametrize(
    ("recipe", "k", "n", "small"),
    [
        ("tensorwise", 4096, 1024, True),
        ("tensorwise", 4112, 1024, False),
        ("tensorwise", 4096, 1040, False),
        ("tensorwise", 8192, 4100, True),
        ("rowwise", 8192, 2048, True),
        ("rowwise", 8192, 2064, False),
        ("rowwise", 1024, 8192, True),
        ("rowwise", 2048, 4096, True),
        ("rowwise", 2048, 4112, False),
        ("rowwise", 2064, 4096, False),
    ],
)
def test_the_rule_of_size_has_the_published_thresholds(recipe: str, k: int, n: int, small: bool) -> None:
    assert is_too_small(recipe, k, n) == small


def test_dimensions_that_a_recipe_cannot_take_are_too_small_for_it() -> None:
    assert not is_too_small("rowwise", 8192, 8192 + 16)
    assert is_too_small("rowwise", 8192, 8192 + 16, dim_multiple=128)


def test_the_rule_of_size_knows_every_recipe() -> None:
    assert set(SIZE_RULES) == set(RECIPE_NAMES)


@pytest.mark.parametrize(
    ("corners", "words"),
    [
        (((4096, 1024),), "K <= 4096 and N <= 1024"),
        (((None, 2048), (1024, None), (2048, 4096)), "N <= 2048, or K <= 1024, or (K <= 2048 and N <= 4096)"),
    ],
)
def test_a_rule_reads_as_the_documentation_has_it(corners: tuple, words: str) -> None:
    assert SizeRule(corners, "").in_words() == words


def test_the_documentation_has_the_table() -> None:
    lines = DOC.read_text(encoding="utf-8").splitlines()
    rows = [f"| `{name}` | {rule.in_words()} | {rule.measured_on} |" for name, rule in SIZE_RULES.items()]
    assert [row for row in rows if row not in lines] == []
