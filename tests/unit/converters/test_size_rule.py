"""The rule of size: what was measured, and the table of the documentation."""

import importlib
from pathlib import Path

import pytest

from titan_fp8.converters.config import RECIPE_NAMES
from titan_fp8.converters.size_rule import (
    EXPERTS_RULE,
    SIZE_RULES,
    SizeRule,
    experts_are_too_small,
    is_too_small,
)

DOC = Path(__file__).parents[3] / "docs" / "float8.md"
BENCHMARKS = DOC.with_name("benchmarks.md")
MARGIN = 0.02


def measured_gains(recipe: str) -> dict[tuple[int, int], float]:
    """(K, N) -> time of bf16 over time of float8, as the documentation's table has it."""
    text = BENCHMARKS.read_text(encoding="utf-8").split("## Where float8 begins to pay")[1]
    lines = text.split(f"`{recipe}`:")[1].strip().split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(int(k), int(n)): float(gain) for k, *gains in rows for n, gain in zip(header[1:], gains, strict=True)}


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_the_corners_are_those_of_what_was_measured_to_gain_nothing(recipe: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(DOC.parents[1] / "scripts")
    bench_filter = importlib.import_module("bench_filter")
    gains = measured_gains(recipe)
    assert len(gains) == 36
    assert sorted(map(str, SIZE_RULES[recipe].corners)) == sorted(map(str, bench_filter.corners(gains, MARGIN)))


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_thresholds_belong_to_what_is_too_small(recipe: str) -> None:
    for k, n in SIZE_RULES[recipe].corners:
        large = 100_000
        assert is_too_small(recipe, k or large, n or large)
        assert k is None or not is_too_small(recipe, k + 16, large if n is None else max(n, 8192))
        assert n is None or not is_too_small(recipe, large if k is None else max(k, 8192), n + 16)


def test_dimensions_that_a_recipe_cannot_take_are_too_small_for_it() -> None:
    assert not is_too_small("rowwise", 8192, 8192 + 16)
    assert is_too_small("rowwise", 8192, 8192 + 16, dim_multiple=128)


def test_the_rule_of_size_knows_every_recipe() -> None:
    assert set(SIZE_RULES) == set(RECIPE_NAMES)


@pytest.mark.parametrize(
    ("corners", "words"),
    [
        (((64, 32),), "K <= 64 and N <= 32"),
        (((None, 8), (16, None), (64, 32)), "N <= 8, or K <= 16, or (K <= 64 and N <= 32)"),
    ],
)
def test_a_rule_reads_as_the_documentation_has_it(corners: tuple, words: str) -> None:
    assert SizeRule(corners, "").in_words() == words


def test_a_rule_of_experts_names_hidden_features() -> None:
    assert SizeRule(((64, 32), (None, 8)), "", names=("K", "H")).in_words() == "(K <= 64 and H <= 32), or H <= 8"


def test_thresholds_of_experts_belong_to_what_is_too_small() -> None:
    for k, hidden in EXPERTS_RULE.corners:
        assert experts_are_too_small(k or 100_000, hidden or 100_000)
    assert not experts_are_too_small(16_384, 16_384)
    assert experts_are_too_small(16_384 + 8, 16_384)
    assert experts_are_too_small(16_384, 16_384 + 8)


def test_the_documentation_of_experts_has_their_thresholds() -> None:
    lines = DOC.with_name("moe.md").read_text(encoding="utf-8").splitlines()
    assert f"| {EXPERTS_RULE.in_words()} | {EXPERTS_RULE.measured_on} |" in lines


def test_the_documentation_has_the_table() -> None:
    lines = DOC.read_text(encoding="utf-8").splitlines()
    rows = [f"| `{name}` | {rule.in_words()} | {rule.measured_on} |" for name, rule in SIZE_RULES.items()]
    assert [row for row in rows if row not in lines] == []
