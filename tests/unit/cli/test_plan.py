"""`titan-fp8 plan`: how the model and its experts lie on the ranks."""

import re

import pytest

from titan_fp8.cli.plan import describe
from titan_fp8.job_config import load_job_config

MODEL = ["--model.name=qwen3_moe", "--model.flavor=30B-A3B", "--model.overrides.n_experts=8"]


def lines(monkeypatch: pytest.MonkeyPatch, ranks: int, **degrees: int) -> dict[str, str]:
    """First word -> the rest of a line."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    options = [f"--parallelism.{key}={value}" for key, value in degrees.items()]
    job, _ = load_job_config([*MODEL, "--training.local_batch_size=2", *options])
    return dict(line.split(maxsplit=1) for line in describe(job, ranks).splitlines() if line)


def test_experts_and_ranks_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = lines(monkeypatch, 8, tensor_parallel_degree=2, expert_parallel_degree=2)
    assert plan["ranks"] == "1 copies of the model in 4 shards, 2 ranks for each matrix product"
    assert plan["experts"].endswith("2 parts of 4, 4 shards of each")
    divided = lines(monkeypatch, 8, tensor_parallel_degree=2, expert_parallel_degree=2, expert_tensor_parallel_degree=2)
    assert divided["experts"].endswith("2 parts of 4, 2 shards of each, each expert over 2 ranks")


@pytest.mark.parametrize(
    "degrees",
    [{}, {"tensor_parallel_degree": 2}, {"context_parallel_degree": 2}, {"pipeline_parallel_degree": 2}],
    ids=["shards", "tensor", "context", "pipeline"],
)
def test_the_state_of_a_rank_is_its_share_however_the_model_is_spread(
    monkeypatch: pytest.MonkeyPatch, degrees: dict[str, int]
) -> None:
    whole = float(lines(monkeypatch, 1)["state"].split()[0])
    spread = float(lines(monkeypatch, 8, **degrees)["state"].split()[0])
    assert spread == pytest.approx(whole / 8, abs=0.01)
    copies = lines(monkeypatch, 8, data_parallel_replicate_degree=2, data_parallel_shard_degree=4)
    assert float(copies["state"].split()[0]) == pytest.approx(whole / 4, abs=0.01)


@pytest.mark.parametrize(("options", "bytes_"), [([], 16), (["--optimizer.state_dtype=bfloat16"], 12)])
def test_the_state_of_a_rank_has_the_means_in_their_dtype(
    monkeypatch: pytest.MonkeyPatch, options: list[str], bytes_: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    job, _ = load_job_config([*MODEL, "--training.local_batch_size=1", *options])
    plan = describe(job, 1)
    parameters = int(re.search(r"([\d,]+) parameters", plan)[1].replace(",", ""))  # pyright: ignore[reportOptionalSubscript]
    assert f"state        {parameters * bytes_ / 2**30:.2f} GiB a rank" in plan
