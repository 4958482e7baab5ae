"""Filters: runs of whole components, stars within one, mistakes answered with what was likely meant."""

import pytest

from titan_fp8.converters.filters import check_patterns, is_too_small
from titan_fp8.runtime.patterns import matches

FQNS = [
    "tok_embeddings", "layers", "layers.1", "layers.1.attention", "layers.1.attention.wq", "layers.1.attention.wk",
    "layers.10", "layers.10.attention.wk", "layers.1.moe.experts.w1", "layers.1.moe.shared_experts.w1", "output",
]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("output", ["output"]),
        ("attention.wk", ["layers.1.attention.wk", "layers.10.attention.wk"]),
        ("experts", ["layers.1.moe.experts.w1"]),
        ("layers.10", ["layers.10", "layers.10.attention.wk"]),
        ("layers.1.attention", ["layers.1.attention", "layers.1.attention.wq", "layers.1.attention.wk"]),
        ("1.*.wq", ["layers.1.attention.wq"]),
        ("*_embeddings", ["tok_embeddings"]),
        ("layers.*.wq", []),
        ("put", []),
        ("wk.attention", []),
        ("w?", []),
        ("[1]", []),
    ],
)
def test_a_pattern_matches_whole_components_standing_together(pattern: str, matching: list[str]) -> None:
    assert [fqn for fqn in FQNS if matches(pattern, fqn)] == matching


def problems(*patterns: str, may_match_nothing: bool = False) -> list[str]:
    return check_patterns(patterns, FQNS, setting="filter_fqns", may_match_nothing=may_match_nothing)


def test_good_patterns_have_no_problems() -> None:
    assert problems("output", "layers.1", "attention.w*", "auto_filter_small_kn") == []


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("outptu", "output"),
        ("attention.wkk", "attention.wk"),
        ("auto_filter_small_nk", "auto_filter_small_kn"),
        ("layers.1.attention.kq", "layers.1.attention.wq"),
    ],
)
def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest_name(pattern: str, meant: str) -> None:
    (problem,) = problems(pattern)
    assert f"filter_fqns: '{pattern}' matches no module" in problem
    assert f'did you mean "{meant}"?' in problem


@pytest.mark.parametrize("pattern", ["", " ", "output ", "layers..1", ".output", "a b"])
def test_an_empty_or_malformed_pattern_is_refused(pattern: str) -> None:
    assert "is not a module name" in problems(pattern, may_match_nothing=True)[0]


def test_a_pattern_that_is_only_a_default_may_match_nothing() -> None:
    assert problems("router.gate", may_match_nothing=True) == []


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


def test_the_rule_of_size_knows_no_other_recipe() -> None:
    with pytest.raises(ValueError, match="blockwise"):
        is_too_small("blockwise", 16, 16)
