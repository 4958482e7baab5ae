"""What a plan of a model refuses: all of it at once, each thing once."""

import pytest
import torch
from torch import nn

from titan_fp8 import model_plan
from titan_fp8.checkpoint.fingerprint import differences
from titan_fp8.config.errors import ConfigErrors
from titan_fp8.converters.filters import AUTO_FILTER
from titan_fp8.converters.size_rule import SIZE_RULES, SizeRule
from titan_fp8.job_config import JobConfig, load_job_config
from titan_fp8.model_plan import plan_model, run_fingerprint
from titan_fp8.models.chunked_loss import ChunkedHead
from titan_fp8.models.linear import Linear
from titan_fp8.quantization.chunked_head import Float8ChunkedHead
from titan_fp8.quantization.mx_chunked_head import MXFP8ChunkedHead
from titan_fp8.runtime.device import DeviceCapabilities

CPU = DeviceCapabilities("cpu", "CPU", None, False, None, None, None)
FLOAT8 = "quantize.linear.float8"
MODEL = "dim=1024 n_layers=2 n_heads=8 n_kv_heads=8 ffn_dim=8192 vocab_size=320"


def _job(tensor: int, tmp_path, **options: str) -> JobConfig:
    arguments = {
        "model.flavor": "debugmodel",
        "model.converters": FLOAT8,
        "training.dataset": "synthetic",
        "job.dump_folder": str(tmp_path),
        "parallelism.tensor_parallel_degree": str(tensor),
        f"{FLOAT8}.emulate": "true",
        **{f"model.overrides.{key}": value for key, value in (each.split("=") for each in MODEL.split())},
        **{f"{FLOAT8}.{key}": value for key, value in options.items()},
    }
    return load_job_config([f"--{key}={value}" for key, value in arguments.items()], {"WORLD_SIZE": "2"})[0]


@pytest.fixture(autouse=True)
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)


def _chunked(tmp_path, **options: str) -> JobConfig:
    job = _job(1, tmp_path, **options)
    return job.model_copy(update={"training": job.training.model_copy(update={"loss_chunk_tokens": 70})})


def test_the_loss_of_some_tokens_at_a_time_takes_a_head_in_high_precision_or_float8(tmp_path) -> None:
    plan = plan_model(_chunked(tmp_path), CPU)
    assert isinstance(plan.model.output, Float8ChunkedHead)
    assert plan.model.output.chunk_tokens == 80
    (report,) = plan.reports
    assert next(row for row in report.rows if row.fqn == "output").recipe == "tensorwise"
    assert isinstance(plan_model(_chunked(tmp_path, filter_fqns="output"), CPU).model.output, ChunkedHead)


def test_the_loss_of_some_tokens_at_a_time_takes_a_head_in_mxfp8(tmp_path) -> None:
    section = "quantize.linear.mx"
    arguments = [f"--model.converters={section}", f"--{section}.emulate", f"--{section}.filter_fqns=layers.0"]
    arguments += ["--training.loss_chunk_tokens=70", f"--job.dump_folder={tmp_path}", "--training.dataset=synthetic"]
    job, _ = load_job_config(arguments)
    plan = plan_model(job, CPU)
    assert isinstance(plan.model.output, MXFP8ChunkedHead)
    assert plan.model.output.chunk_tokens == 96


@pytest.mark.parametrize("kept", ["", "output"], ids=["float8", "high precision"])
def test_the_loss_of_some_tokens_at_a_time_takes_no_bias(kept: str, tmp_path, monkeypatch) -> None:
    build = model_plan._build_meta_model

    def build_with_bias(*arguments):
        model = build(*arguments)
        with torch.device("meta"):
            model.output = Linear(1024, 320, bias=True)
        return model

    monkeypatch.setattr(model_plan, "_build_meta_model", build_with_bias)
    with pytest.raises(ConfigErrors, match=r"^training\.loss_chunk_tokens = 70: .*Linear with one; set the key to 0$"):
        plan_model(_chunked(tmp_path, **({"filter_fqns": kept} if kept else {})), CPU)


def test_a_model_that_ranks_cannot_divide_is_refused_with_all_else(tmp_path, monkeypatch) -> None:
    build = model_plan._build_meta_model

    def build_other(*arguments):
        model = build(*arguments)
        attention = model.layers["0"].attention
        with torch.device("meta"):
            attention.wq = Linear(1024, 1024)
            attention.gate = Linear(1024, 1024, bias=False)
            attention.norm = nn.LayerNorm(1024)
        return model

    monkeypatch.setattr(model_plan, "_build_meta_model", build_other)
    job = _job(2, tmp_path, filter_fqns=f"{AUTO_FILTER},no_such_module", enable_fsdp_float8_all_gather="false")
    with pytest.raises(ConfigErrors) as caught:
        plan_model(job, CPU)
    lines = caught.value.render().split("\n")
    assert len(lines) == 4, lines
    assert "no_such_module" in lines[0]
    assert lines[1].startswith("model.converters: layers.0.attention.gate: parallelism.tensor_parallel_degree = 2")
    assert lines[2].startswith("layers.0.attention.wq: parallelism.tensor_parallel_degree = 2 divides weights alone")
    assert lines[3].startswith("layers.0.attention.norm: it is a torch.nn")


RULE = {"filter_fqns": AUTO_FILTER}


def _left_alone_and_fingerprint(tensor: int, tmp_path, **options: str) -> tuple[set[str], dict]:
    job = _job(tensor, tmp_path, **options)
    plan = plan_model(job, CPU)
    left_alone = {row.fqn for report in plan.reports for row in report.rows if row.recipe is None}
    return left_alone, run_fingerprint(job, plan.dims, plan.reports)


@pytest.mark.parametrize("options", [RULE, RULE | {"recipe_by_fqn": "feed_forward.w1=rowwise"}], ids=["one", "mixed"])
def test_a_checkpoint_fits_another_mesh_though_other_linears_are_too_small_there(options: dict, tmp_path) -> None:
    whole, ours = _left_alone_and_fingerprint(1, tmp_path, **options)
    divided, theirs = _left_alone_and_fingerprint(2, tmp_path, **options)
    assert {"layers.0.feed_forward.w1", "layers.1.feed_forward.w2"} <= divided - whole
    assert differences(ours, theirs) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "auto_filter_small_kn.tensorwise"),
        ({"filter_fqns": f"{AUTO_FILTER},feed_forward.w1"}, "exceptions.layers.*.feed_forward.w1"),
        (RULE | {"recipe_name": "rowwise"}, "recipe"),
        (RULE | {"recipe_by_fqn": "attention.wq=rowwise"}, "exceptions.layers.*.attention.wq"),
        (RULE | {"keep_first_blocks_hp": "1"}, "exceptions.layers.0.attention.wq"),
    ],
)
def test_what_the_user_changes_is_another_recipe_beside_the_rule_of_size(options: dict, told: str, tmp_path) -> None:
    ours, theirs = (_left_alone_and_fingerprint(1, tmp_path, **each)[1] for each in (RULE, options))
    assert f"recipe.{FLOAT8}.{told}" in [name for name, _, _ in differences(ours, theirs)]


def test_a_rule_of_size_with_other_thresholds_is_another_recipe(tmp_path, monkeypatch) -> None:
    _, ours = _left_alone_and_fingerprint(1, tmp_path, **RULE)
    monkeypatch.setitem(SIZE_RULES, "tensorwise", SizeRule(((16, None),), "nowhere"))
    _, theirs = _left_alone_and_fingerprint(1, tmp_path, **RULE)
    (row,) = differences(ours, theirs)
    assert row[0] == f"recipe.{FLOAT8}.{AUTO_FILTER}.tensorwise"
    assert row[2] == "K <= 16"
