"""Expert parallelism as a user runs it: checkpoints that move between degrees, and what is refused before it starts."""

import json
from collections.abc import Callable

import pytest

from tests.end_to_end.conftest import FLOAT8, TINY, Result
from titan_fp8 import family_rules
from titan_fp8.config.errors import ConfigErrors
from titan_fp8.job_config import load_job_config

DEGREE = "--parallelism.expert_parallel_degree"
MODEL = [
    *("--model.name", "qwen3_moe", "--model.overrides.head_dim", "16", "--model.overrides.n_experts", "8"),
    *("--model.overrides.moe_ffn_dim", "32", "--model.overrides.balance_rate", "0.01"),
]
EXACT = [
    *("--training.mixed_precision_param", "float32", "--training.global_batch_size", "8"),
    *("--training.local_batch_size", "2", "--training.steps", "4", "--lr_scheduler.total_steps", "4"),
]
CHECKPOINTS = ["--checkpoint.enable", "--checkpoint.interval", "2", "--checkpoint.no_last_save_model_only"]
GROUPED = "quantize.grouped_mm.float8"
EXPERTS_IN_FLOAT8 = [f"--{GROUPED}.fqns", "experts", f"--{GROUPED}.emulate"]
Run = Callable[..., Result]


def assert_same(actual: Result, expected: Result) -> None:
    assert actual.code == expected.code == 0, actual.output
    assert [line["step"] for line in actual.lines] == [line["step"] for line in expected.lines] == [1, 2, 3, 4]
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    for key in ("grad_norm", "moe/max_load", "moe/entropy", "moe/aux_loss"):
        # A token that stands between two experts may go to the other one, which is one of 512.
        tolerance = 1e-4 if key == "grad_norm" else 0.02
        assert [x[key] for x in actual.lines] == pytest.approx([x[key] for x in expected.lines], rel=tolerance), key


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", ["1", pytest.param("4", marks=pytest.mark.slow)])
def test_a_run_on_two_ranks_of_experts_goes_on_in_one_process_and_on_four(
    run_shell: Run, run_here: Run, ranks: str
) -> None:
    options = [*MODEL, *EXACT, *CHECKPOINTS]
    whole = run_here(*options, folder="whole")
    two = run_shell(*options, DEGREE, "2", "--training.steps", "2", folder="two", NGPU="2")
    assert two.code == 0, two.output
    if ranks == "1":
        assert_same(run_here(*options, folder="two"), whole)
    else:
        assert_same(run_shell(*options, DEGREE, ranks, folder="two", NGPU=ranks), whole)


@pytest.mark.slow
def test_linears_and_experts_in_float8_train_on_two_ranks_as_in_one_process(run_shell: Run, run_here: Run) -> None:
    converters = ["--model.converters", f"quantize.linear.float8,{GROUPED}", *EXPERTS_IN_FLOAT8, *FLOAT8[2:]]
    options = [*MODEL, *EXACT, *converters, "--quantize.linear.float8.recipe_name", "rowwise"]
    single = run_here(*options, folder="one")
    two = run_shell(*options, DEGREE, "2", "--compile.enable", "--compile.backend", "aot_eager", NGPU="2")
    assert two.code == 0, two.output
    assert two.losses == pytest.approx(single.losses, rel=2e-4)
    assert [x["grad_norm"] for x in two.lines] == pytest.approx([x["grad_norm"] for x in single.lines], rel=2e-3)
    linears, experts = json.loads((two.folder / "conversion_report.json").read_text())["converters"]
    assert (linears["converter"], experts["converter"]) == ("quantize.linear.float8", GROUPED)
    assert experts["converted"] == len(experts["rows"]) == 2 * 3
    assert experts["rows"][0]["global_shape"] == experts["rows"][0]["local_shape"] == [8, 32, 64]
    assert experts["weights"] == "cast once an optimizer step"
    assert single.losses != run_here(*MODEL, *EXACT, folder="fp32").losses


def test_a_run_resumes_with_the_same_experts_in_float8_unless_asked_by_name(run_here: Run) -> None:
    options = [*MODEL, *EXACT, *CHECKPOINTS]
    converted = ["--model.converters", GROUPED, *EXPERTS_IN_FLOAT8]
    assert run_here(*options, *converted, "--training.steps", "2").code == 0
    refused = run_here(*options)
    assert refused.code == 2
    assert GROUPED in refused.output
    assert "Traceback" not in refused.output
    allowed = run_here(*options, "--checkpoint.allow_recipe_change")
    assert allowed.code == 0, allowed.output
    assert [line["step"] for line in allowed.lines] == [1, 2, 3, 4]


TP2 = {"tensor_parallel_degree": 2, "model.overrides.n_kv_heads": 2}
REFUSALS = {
    "no divisor of the shards": (
        4,
        {"expert_parallel_degree": 3, "model.overrides.n_experts": 12},
        "parallelism: expert_parallel_degree = 3 takes its ranks from data_parallel_shard_degree 4 x "
        "context_parallel_degree 1 = 4, which is no multiple of it; choose a divisor of 4",
    ),
    "copies are no shards": (
        4,
        {"expert_parallel_degree": 4, "data_parallel_replicate_degree": 2},
        "takes its ranks from data_parallel_shard_degree 2 x context_parallel_degree 1 = 2",
    ),
    "one process": (1, {"expert_parallel_degree": 2}, "set it to 1"),
    "no divisor of the experts": (
        3,
        {"expert_parallel_degree": 3},
        "parallelism.expert_parallel_degree = 3: 3 ranks do not divide the 8 experts; choose a divisor",
    ),
    "a dense model": (
        2,
        {"expert_parallel_degree": 2, "model.name": "llama3", "model.overrides.n_experts": None}
        | {"model.overrides.moe_ffn_dim": None, "model.overrides.balance_rate": None},
        "parallelism.expert_parallel_degree = 2: llama3 has no experts to deal out; set it to 1",
    ),
    "deepep": (
        2,
        {"expert_parallel_degree": 2, "expert_parallel_comm_backend": "deepep"},
        'tokens travel by the process group\'s all-to-all alone; set it to "standard"',
    ),
    "ranks that divide experts have no others": (
        4,
        {**TP2, "expert_parallel_degree": 4, "expert_tensor_parallel_degree": 2},
        "takes its ranks from data_parallel_shard_degree 2 x context_parallel_degree 1 = 2, which is no multiple of it",
    ),
    "neither whole nor divided": (
        4,
        {**TP2, "tensor_parallel_degree": 4, "model.overrides.n_kv_heads": 4, "expert_tensor_parallel_degree": 2},
        "expert_tensor_parallel_degree = 2: each expert is either whole or divided over all ranks of "
        "tensor_parallel_degree = 4; set it to 1 or 4",
    ),
    "nothing to divide experts": (
        2,
        {"expert_tensor_parallel_degree": 2},
        "expert_tensor_parallel_degree = 2: each expert is either whole or divided over all ranks of "
        "tensor_parallel_degree = 1; set it to 1, or raise tensor_parallel_degree with it",
    ),
    "hidden features of an expert": (
        2,
        {**TP2, "expert_tensor_parallel_degree": 2, "model.overrides.moe_ffn_dim": 33},
        "parallelism.expert_tensor_parallel_degree = 2: 2 ranks do not divide an expert's hidden features, 33; set it",
    ),
    "hidden features of the shared experts": (
        2,
        {**TP2, "model.overrides.moe_ffn_dim": 33, "model.overrides.n_shared_experts": 1},
        "parallelism.tensor_parallel_degree = 2: 2 ranks do not divide the hidden features of the shared experts, 33",
    ),
    "experts of a dense model": (
        2,
        {**TP2, "expert_tensor_parallel_degree": 2, "model.name": "llama3", "model.overrides.n_experts": None}
        | {"model.overrides.moe_ffn_dim": None, "model.overrides.balance_rate": None},
        "parallelism.expert_tensor_parallel_degree = 2: llama3 has no experts to divide; set it to 1",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_experts_cannot_be_dealt_out_to_is_refused_in_one_line(name: str) -> None:
    ranks, options, words = REFUSALS[name]
    given = dict(zip(*2 * [iter([*TINY, *MODEL])], strict=True))
    given |= {f"--{key}" if "." in key else f"--parallelism.{key}": value for key, value in options.items()}
    arguments = [f"{key}={value}" for key, value in given.items() if value is not None]
    with pytest.raises(ConfigErrors) as caught:
        load_job_config(arguments, {"WORLD_SIZE": str(ranks)})
    assert caught.value.render().count(words) == 1, caught.value.render()
    assert len(caught.value.violations) == 1


@pytest.mark.parametrize(
    ("package", "words"),
    [(None, "and its package deep_ep is not installed"), (object(), "though its package deep_ep is installed")],
    ids=["absent", "installed"],
)
def test_deepep_is_refused_with_the_reason_and_where_its_package_is_installed_too(
    package: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family_rules, "find_spec", lambda name: package if name == "deep_ep" else None)
    arguments = ["--parallelism.expert_parallel_degree=2", "--parallelism.expert_parallel_comm_backend=deepep"]
    with pytest.raises(ConfigErrors) as caught:
        load_job_config([*TINY, *MODEL, *arguments], {"WORLD_SIZE": "2"})
    (violation,) = caught.value.violations
    assert violation.message == (
        f'parallelism.expert_parallel_comm_backend = "deepep": not supported yet, {words}: tokens travel by the '
        'process group\'s all-to-all alone; set it to "standard"'
    )


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (8, {"expert_parallel_degree": 8}),
        (8, {"expert_parallel_degree": 2, "data_parallel_replicate_degree": 2}),
        (4, {"expert_parallel_degree": 4, "context_parallel_degree": 4}),
        (4, {"expert_parallel_degree": 2, "pipeline_parallel_degree": 2}),
        (2, {**TP2, "expert_parallel_degree": 2}),
        (2, {**TP2, "expert_parallel_degree": 1, "model.overrides.moe_ffn_dim": 33}),
        (8, {**TP2, "expert_parallel_degree": 8}),
        (4, {**TP2, "expert_parallel_degree": 2, "expert_tensor_parallel_degree": 2}),
    ],
    ids=str,
)
def test_what_experts_can_be_dealt_out_to_is_not_refused(ranks: int, options: dict[str, int]) -> None:
    arguments = [f"--{key}={value}" if "." in key else f"--parallelism.{key}={value}" for key, value in options.items()]
    job, _ = load_job_config([*TINY, *MODEL, *arguments], {"WORLD_SIZE": str(ranks)})
    assert job.parallelism.expert_parallel_degree == options["expert_parallel_degree"]


def test_a_mistake_is_told_before_any_rank_starts(run_shell: Run) -> None:
    result = run_shell(*MODEL, DEGREE, "3", NGPU="2")
    assert result.code == 2
    assert "expert_parallel_degree = 3 takes its ranks from data_parallel_shard_degree 2" in result.output
    assert "Traceback" not in result.output
    assert not result.folder.exists()
