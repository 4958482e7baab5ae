"""Every float8 recipe through the trainer: which operators a step runs, and that nothing in between is a formality."""

import json
from collections import Counter

import pytest

from tests.end_to_end.conftest import FLOAT8

WIDE = ["--model.overrides.dim", "128", "--model.overrides.multiple_of", "128", "--training.steps", "4"]
"""Every dimension a multiple of 128, as `blockwise` needs."""
PROFILED = ["--profiling.enable_profiling", "--profiling.profile_freq", "4"]

RECIPES = {
    "tensorwise": {"amax", "scaled_mm", "transpose_codes"},
    "rowwise": {"scaled_mm", "columns_from_rows"},
    "rowwise_with_gw_hp": {"scaled_mm", "tensor_columns_from_rows"},
    "blockwise": {"scaled_mm_blockwise", "cast_blocks", "transpose_codes"},
}
"""Operators that no run of the recipe can do without."""


def recipe(name: str) -> list[str]:
    return [
        *FLOAT8,
        *WIDE,
        "--quantize.linear.float8.recipe_name",
        name,
        "--quantize.linear.float8.filter_fqns",
        "output",
    ]


def operators(folder) -> Counter:
    """How often the profiled steps of a run called each operator of this package."""
    (trace,) = folder.rglob("*trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    names = (event.get("name", "") for event in events if event.get("cat") == "cpu_op")
    return Counter(name.removeprefix("titan_fp8::") for name in names if name.startswith("titan_fp8::"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_profiled_step_of_the_trainer_runs_the_operators_of_the_recipe(run_here, name: str) -> None:
    force = ["--quantize.linear.float8.force_recompute_fp8_weight_in_bwd"]
    result = run_here(*recipe(name), *force, *PROFILED)
    assert result.code == 0, result.output
    found = operators(result.folder)
    assert RECIPES[name] <= found.keys(), found
    products = found["scaled_mm"] + found["scaled_mm_blockwise"]
    per_step = 14 * (2 if name == "rowwise_with_gw_hp" else 3)  # seven linears in each of two layers
    assert products % per_step == 0


@pytest.mark.parametrize("name", ["tensorwise", pytest.param("blockwise", marks=pytest.mark.slow)])
def test_with_more_microbatches_a_step_casts_no_weight_again(run_here, name: str) -> None:
    counts = {}
    for microbatches in (1, 3):
        size = ["--training.local_batch_size", "1", "--training.global_batch_size", str(microbatches)]
        result = run_here(*recipe(name), *size, *PROFILED, folder=f"run{microbatches}")
        assert result.code == 0, result.output
        counts[microbatches] = operators(result.folder)
    products = "scaled_mm_blockwise" if name == "blockwise" else "scaled_mm"
    assert counts[3][products] == 3 * counts[1][products]
    weight_op = {"tensorwise": "cast_tensor_both", "blockwise": "cast_blocks"}[name]
    if name == "blockwise":
        assert counts[3][weight_op] == counts[1][weight_op]
    else:  # activations and gradients use the same operator, weights add 14 a step to it
        steps = counts[1][products] // 42
        activations = (counts[1][weight_op] - 14 * steps) * 3
        assert counts[3][weight_op] == activations + 14 * steps


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_near_bf16(run_here, name: str) -> None:
    high = run_here(*WIDE, folder="bf16")
    low = run_here(*recipe(name), folder="fp8")
    assert low.code == 0, low.output
    assert low.losses != high.losses
    assert low.losses == pytest.approx(high.losses, rel=0.02)


def test_mixed_recipes_and_high_precision_blocks_train_and_are_reported(run_here) -> None:
    result = run_here(
        *recipe("tensorwise"),
        *("--quantize.linear.float8.recipe_by_fqn", "attention.wo=rowwise,feed_forward.w2=blockwise"),
        *("--quantize.linear.float8.keep_first_blocks_hp", "1"),
    )
    assert result.code == 0, result.output
    report = json.loads((result.folder / "conversion_report.json").read_text())["converters"][0]
    recipes = {row["fqn"]: row["recipe"] for row in report["rows"]}
    assert recipes["layers.0.attention.wo"] is None
    assert recipes["layers.1.attention.wo"] == "rowwise"
    assert recipes["layers.1.feed_forward.w2"] == "blockwise"
    assert recipes["layers.1.attention.wq"] == "tensorwise"
