"""Filters: runs of whole components, stars within one, mistakes answered with what was likely meant."""

import pytest

from titan_fp8.converters.filters import check_patterns, check_recipe_patterns, parse_recipe_table
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


def test_a_pattern_may_have_to_match_a_linear() -> None:
    found = check_patterns(
        ["output", "layers.1", "attention"],
        FQNS,
        setting="f",
        may_match_nothing=False,
        linears=["output", "layers.1.x"],
    )
    assert found == ["f: 'attention' matches no linear of the model; correct it or take it out"]


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


def table(*entries: str) -> tuple[list[tuple[str, str]], list[str]]:
    return parse_recipe_table(entries, ["tensorwise", "rowwise"])


def test_a_table_of_recipes_keeps_its_order() -> None:
    assert table("layers.1=rowwise", "attention.w*=tensorwise") == (
        [("layers.1", "rowwise"), ("attention.w*", "tensorwise")],
        [],
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["output"], 'write "pattern=recipe"'),
        (["output=rowwize"], 'did you mean "rowwise"'),
        (["output="], "no such recipe"),
        (["output=rowwise=tensorwise"], "no such recipe"),
        (["=rowwise"], "'' is not a module name"),
        (["a..b=rowwise"], "is not a module name"),
        (["output=bfloat16"], "belongs in filter_fqns"),
        (["output=rowwise", "output=tensorwise"], "is there twice"),
    ],
)
def test_a_wrong_entry_of_the_table_is_refused(entries: list[str], message: str) -> None:
    (problem,) = table(*entries)[1]
    assert message in problem


LINEARS = ["layers.1.attention.wq", "layers.1.attention.wk", "layers.10.attention.wk", "output"]


def recipe_problems(*entries: str) -> list[str]:
    return check_recipe_patterns(table(*entries)[0], FQNS, LINEARS, setting="recipe_by_fqn")


def test_entries_that_match_linears_have_no_problems() -> None:
    assert recipe_problems("layers.1.attention.wk=rowwise", "attention=tensorwise", "output=rowwise") == []


@pytest.mark.parametrize("pattern", ["outptu", "tok_embeddings"])
def test_an_entry_that_matches_no_linear_is_refused(pattern: str) -> None:
    (problem,) = recipe_problems(f"{pattern}=rowwise")
    assert f"recipe_by_fqn: '{pattern}=rowwise' matches no linear" in problem
    assert ('did you mean "output"' in problem) == (pattern == "outptu")


def test_an_entry_behind_others_that_take_all_its_linears_is_refused() -> None:
    (problem,) = recipe_problems("layers.1=tensorwise", "layers.10=rowwise", "attention.wk=rowwise", "output=rowwise")
    assert "'attention.wk=rowwise' has no effect" in problem
    assert "by 'layers.1', 'layers.10' before it" in problem
