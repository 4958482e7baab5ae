"""One rank, in this process: what a run computes, writes and refuses."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.end_to_end.conftest import FLOAT8, command_environment
from titan_fp8 import building, trainer
from titan_fp8.cli.main import main
from titan_fp8.data.documents import check_text
from titan_fp8.data.token_store import Manifest, Shard
from titan_fp8.data.tokenizer import ByteTokenizer
from titan_fp8.job_config import load_job_config
from titan_fp8.optim.optimizers import OptimizersContainer
from titan_fp8.runtime.host_copy import HostCopy


def test_a_run_writes_its_record_and_one_line_a_step(run_here) -> None:
    result = run_here(*FLOAT8, "--model.attention_backend", "math")
    assert result.code == 0, result.output
    assert "CPU x 1, attention by math, seed 0" in result.output
    names = {path.name for path in result.folder.iterdir()}
    assert {"config.toml", "conversion_report.json", "versions.json", "metrics.jsonl"} <= names
    assert [line["step"] for line in result.lines] == [1, 2, 3, 4, 5, 6]
    keys = {"step", "loss", "grad_norm", "lr", "tps", "tflops", "mfu", "memory_gib"}
    assert all(keys <= line.keys() for line in result.lines)
    assert "trained 6 steps" in result.output
    assert str(result.folder) in result.output
    report = json.loads((result.folder / "conversion_report.json").read_text())
    assert report["converters"][0]["recipe"] == "tensorwise"


def test_the_first_loss_is_that_of_a_uniform_guess(run_here) -> None:
    result = run_here("--training.steps", "1")
    assert result.losses[0] == pytest.approx(math.log(320), rel=0.1)


def test_the_resolved_configuration_repeats_the_run_bit_for_bit(run_here) -> None:
    first = run_here(*FLOAT8, "--training.steps", "3")
    again = run_here(
        "--job.config_file", str(first.folder / "config.toml"), *FLOAT8, "--training.steps", "3", folder="again"
    )
    assert again.code == 0, again.output
    assert again.losses == first.losses


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_training_stays_near_bf16_training_and_is_not_the_same(run_here, recipe: str) -> None:
    high = run_here("--training.steps", "6", folder="bf16")
    low = run_here(*FLOAT8, "--quantize.linear.float8.recipe_name", recipe, "--training.steps", "6", folder="fp8")
    assert low.code == 0, low.output
    assert low.losses != high.losses
    assert low.losses == pytest.approx(high.losses, rel=0.02)


def test_accumulated_microbatches_equal_one_large_batch(run_here) -> None:
    exact = ["--training.mixed_precision_param", "float32", "--training.global_batch_size", "8"]
    whole = run_here(*exact, "--training.local_batch_size", "8", folder="whole")
    parts = run_here(*exact, "--training.local_batch_size", "2", folder="parts")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert [x["grad_norm"] for x in parts.lines] == pytest.approx([x["grad_norm"] for x in whole.lines], rel=1e-4)


def test_bf16_compute_is_real_on_one_device(run_here) -> None:
    half = run_here("--training.steps", "2", folder="bf16")
    full = run_here("--training.steps", "2", "--training.mixed_precision_param", "float32", folder="fp32")
    assert half.losses != full.losses
    assert half.losses == pytest.approx(full.losses, rel=1e-2)


def test_a_compiled_run_follows_the_eager_one(run_here) -> None:
    options = [*FLOAT8, "--training.steps", "3", "--training.mixed_precision_param", "float32"]
    eager = run_here(*options, folder="eager")
    compiled = run_here(*options, "--compile.enable", "--compile.backend", "aot_eager", folder="compiled")
    assert compiled.code == 0, compiled.output
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-4)


def test_validation_is_logged_and_leaves_training_alone(run_here) -> None:
    plain = run_here("--training.steps", "4", folder="plain")
    options = ["--validation.enable", "--validation.freq", "2", "--validation.steps", "2"]
    sizes = ["--validation.seq_len", "64", "--validation.local_batch_size", "2"]
    checked = run_here("--training.steps", "4", *options, *sizes, folder="validated")
    assert checked.code == 0, checked.output
    assert checked.losses == plain.losses
    lines = [json.loads(line) for line in (checked.folder / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(0 < line["validation_loss"] < 10 for line in lines)


@pytest.fixture
def poisoned_step(monkeypatch: pytest.MonkeyPatch):
    """Makes the loss of one microbatch (counted from 1) NaN."""
    from titan_fp8.models.loss import cross_entropy_sum

    def poison(*numbers: int) -> None:
        calls = iter(range(1, 1000))

        def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            factor = float("nan") if next(calls) in numbers else 1.0
            return cross_entropy_sum(logits, labels) * factor

        monkeypatch.setattr(building, "cross_entropy_sum", loss)

    return poison


@pytest.mark.parametrize(
    ("options", "after_read"),
    [
        ("", ["forward", "read", "backward", "forward", "backward"]),
        # Gradients are dropped on the stream that sums them, and their memory is free when it has done so.
        ("--optimizer.early_step_in_backward --training.max_norm 0", ["read", "forward", "backward"]),
    ],
)
def test_the_host_waits_for_a_steps_loss_when_it_is_logged_or_the_next_forward_pass_is_asked_for(
    run_here, monkeypatch, options: str, after_read: list[str]
) -> None:
    order: list[str] = []
    loss, backward = building.cross_entropy_sum, torch.Tensor.backward

    class Copy(HostCopy):
        def __init__(self, value: torch.Tensor) -> None:
            order.append("loss known")
            super().__init__(value)

        def read(self) -> torch.Tensor:
            order.append("read")
            return super().read()

    step = OptimizersContainer.step
    monkeypatch.setattr(trainer, "HostCopy", Copy)
    monkeypatch.setattr(OptimizersContainer, "step", lambda *a, **k: order.append("update") or step(*a, **k))
    monkeypatch.setattr(building, "cross_entropy_sum", lambda *a: order.append("forward") or loss(*a))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a: order.append("backward") or backward(*a))
    batch = [] if "early" in options else ["--training.global_batch_size", "4"]
    result = run_here("--training.steps", "5", "--metrics.log_freq", "4", *batch, *options.split())
    assert result.code == 0, result.output
    known = ["loss known", "update"]
    started, after_read = [event for event in after_read if event != "read"] + known, after_read + known
    steps = [[*started, "read"], started, after_read, [*after_read, "read"], [*started, "read"]]
    assert order == [event for step in steps for event in step]
    assert [line["step"] for line in result.lines] == [1, 4, 5]


@pytest.mark.parametrize(
    ("options", "copies", "expected"),
    [
        ([], 1, True),
        (["--training.mixed_precision_reduce=bfloat16"], 1, False),
        (["--training.mixed_precision_reduce=bfloat16", "--training.dtype=bfloat16"], 1, True),
        ([], 2, False),
        (["--optimizer.early_step_in_backward", "--training.max_norm=0"], 1, False),
    ],
)
def test_gradients_stay_unless_something_casts_sums_or_drops_them(options, copies: int, *, expected: bool) -> None:
    job, _ = load_job_config(["--model.name=llama3", *options], {"WORLD_SIZE": "4"})
    mesh: Any = SimpleNamespace(degrees=SimpleNamespace(data_parallel_replicate=copies))
    assert building._gradients_stay(job, mesh) is expected


@pytest.mark.parametrize("log_freq", ["1", "10"])
def test_a_non_finite_loss_stops_the_run_with_one_clear_error(run_here, poisoned_step, log_freq: str) -> None:
    poisoned_step(3)
    result = run_here("--metrics.log_freq", log_freq)
    assert result.code == 1
    assert result.lines[-1]["step"] == 3
    assert "step 3: loss nan" in result.output
    assert "Traceback" not in result.output
    assert result.losses[:2] != [None, None]
    assert result.losses[-1] is None


def test_a_non_finite_gradient_is_seen_before_it_is_saved_though_backward_dropped_it(run_here) -> None:
    result = run_here(
        *("--optimizer.lr", "1e30", "--lr_scheduler.warmup_steps", "0", "--checkpoint.enable"),
        *("--checkpoint.interval", "1", "--optimizer.early_step_in_backward", "--training.max_norm", "0"),
    )
    assert result.code == 1
    last = result.lines[-1]
    assert (last["loss"] is not None, last["grad_norm"]) == (True, None)
    assert {path.name for path in (result.folder / "checkpoint").iterdir()} == {
        f"step-{step}" for step in range(1, last["step"])
    }


@pytest.mark.parametrize(
    "due",
    ["--checkpoint.enable --checkpoint.interval 3", "--validation.enable --validation.freq 3 --validation.steps 2"],
)
def test_a_non_finite_step_is_known_before_what_is_due_after_it(run_here, poisoned_step, due: str) -> None:
    poisoned_step(3)
    result = run_here("--metrics.log_freq", "10", *due.split())
    assert result.code == 1
    assert "step 3: loss nan" in result.output
    assert not (result.folder / "checkpoint" / "step-3").exists()
    assert not (result.folder / "validation.jsonl").exists()


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_skipped_step_leaves_the_weights_alone_and_is_counted(run_here, poisoned_step, implementation: str) -> None:
    poisoned_step(3)
    options = ["--training.nonfinite_policy", "skip", "--optimizer.implementation", implementation]
    result = run_here(*options, "--training.steps", "5")
    assert result.code == 0, result.output
    assert "update skipped (1 of at most 10)" in result.output
    assert [loss is None for loss in result.losses] == [False, False, True, False, False]
    assert result.lines[-1]["nonfinite_steps"] == 1


@pytest.mark.parametrize("log_freq", ["1", "10"])
def test_more_skipped_steps_than_allowed_stop_the_run(run_here, poisoned_step, log_freq: str) -> None:
    poisoned_step(2, 3, 4)
    options = ["--training.nonfinite_policy", "skip", "--training.max_nonfinite_steps", "2"]
    result = run_here(*options, "--metrics.log_freq", log_freq)
    assert result.code == 1
    assert (result.lines[-1]["step"], result.lines[-1]["nonfinite_steps"]) == (4, 3)
    assert "training.max_nonfinite_steps = 2" in result.output


def test_document_masking_changes_what_tokens_see(run_here) -> None:
    plain = run_here("--training.steps", "1", "--training.seq_len", "512", folder="plain")
    masked = run_here(
        "--training.steps", "1", "--training.seq_len", "512", "--training.document_masking", folder="masked"
    )
    assert masked.code == 0, masked.output
    assert masked.losses != plain.losses


@pytest.mark.parametrize(
    "options",
    [FLOAT8, [*FLOAT8, "--model.name", "mixtral", "--model.overrides.n_kv_heads", "2"]],
    ids=["kept without modes", "kept with modes"],
)
def test_steps_between_the_passes_of_a_block_change_nothing(run_here, options: list[str]) -> None:
    early = ["--optimizer.early_step_in_backward", "--training.max_norm", "0", "--training.steps", "3", *options]
    kept = run_here(*early, folder="kept")
    by_operation = ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"]
    recomputed = run_here(*early, *by_operation, folder="again")
    assert recomputed.code == 0, recomputed.output
    assert recomputed.losses == kept.losses


@pytest.mark.parametrize("options", [["full"], ["selective", "--activation_checkpoint.selective_ac_option", "op"]])
def test_recomputed_activations_change_nothing(run_here, options: list[str]) -> None:
    kept = run_here(*FLOAT8, "--training.steps", "2", folder="kept")
    recomputed = run_here(*FLOAT8, "--training.steps", "2", "--activation_checkpoint.mode", *options, folder="again")
    assert recomputed.code == 0, recomputed.output
    assert recomputed.losses == kept.losses


def test_a_second_run_in_a_folder_that_is_in_use_changes_nothing_there(run_here) -> None:
    first = run_here("--training.steps", "2")
    program = (
        "import sys, time; from pathlib import Path; from titan_fp8.observability.run_folder import RunFolderLock;"
    )
    program += "lock = RunFolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", program, str(first.folder)]
    with subprocess.Popen(command, env=command_environment(), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = {path.name: path.read_bytes() for path in first.folder.iterdir() if path.is_file()}
        second = run_here("--training.steps", "3", "--checkpoint.enable")
        holder.kill()
    assert second.code == 1
    assert "another run is writing here" in second.output
    assert {path.name: path.read_bytes() for path in first.folder.iterdir() if path.is_file()} == before


def test_model_mistakes_are_reported_together_before_anything_is_written(run_here) -> None:
    result = run_here(
        *("--model.overrides.n_heads", "3", "--model.converters", "quantize.linear.float8"),
        *("--quantize.linear.float8.filter_fqns", "attention.wkk"),
    )
    assert result.code == 2
    assert "n_heads" in result.output
    assert "Traceback" not in result.output
    assert not result.folder.exists()


def test_what_needs_a_gpu_is_refused_on_a_cpu_before_anything_is_written(run_here) -> None:
    result = run_here(
        *("--training.dataloader.pin_memory", "--profiling.enable_memory_snapshot", "--validation.enable"),
        *("--validation.dataloader.pin_memory", "--validation.steps", "1", "--validation.seq_len", "64"),
        *("--checkpoint.enable", "--checkpoint.async_mode", "async_with_pinned_mem"),
        *("--profiling.enable_profiling", "--profiling.trace_cpu=false"),
    )
    assert result.code == 2
    assert result.output.count("needs a GPU") == 5
    assert not result.folder.exists()


def _text_folder(path: Path, name: str, content: str) -> Path:
    path.mkdir()
    (path / name).write_text(content)
    return path


def _token_folder(path: Path, fingerprint: str, shard: str = "train-00000") -> Path:
    """Shards with 1000 tokens of one document, under a right manifest."""
    path.mkdir()
    (path / "train-00000.bin").write_bytes(bytes(2000))
    (path / "train-00000.starts").write_bytes(bytes(8))
    manifest = Manifest("uint16", 259, "some tokenizer", fingerprint, {"train": (Shard(shard, 1000, 1),)})
    (path / "manifest.json").write_text(manifest.to_json())
    return path


def _everything_below(path: Path) -> dict[str, int]:
    return {str(entry): entry.stat().st_mtime_ns for entry in path.rglob("*")}


@pytest.mark.parametrize(
    ("dataset", "make", "message"),
    [
        ("tokens", lambda path: _text_folder(path, "a.txt", "words"), "holds no manifest.json"),
        ("tokens", lambda path: _text_folder(path, "manifest.json", "{"), "is damaged"),
        ("tokens", lambda path: _token_folder(path, "another"), "another tokenizer"),
        ("tokens", lambda path: _token_folder(path, ByteTokenizer.fingerprint, "train-00001"), "is missing"),
        ("text", lambda path: _text_folder(path, "a.txt", ""), "is empty"),
        ("text", lambda path: _text_folder(path, "a.md", "words"), "holds no data files"),
        ("text", lambda path: _text_folder(path, "a.jsonl", '{"content": "words"}\n'), 'no column "text"'),
        ("text", lambda path: _text_folder(path, "a.json", '[{"content": "words"}]'), 'no column "text"'),
    ],
)
def test_data_that_cannot_be_used_are_refused_before_anything_is_written(
    run_here, tmp_path: Path, dataset: str, make, message: str
) -> None:
    data = make(tmp_path / "data")
    before = _everything_below(tmp_path)
    result = run_here("--training.dataset", dataset, "--training.dataset_path", str(data))
    assert result.code == 2, result.output
    assert result.output.count(message) == 1
    assert _everything_below(tmp_path) == before


@pytest.mark.parametrize("content", ['["some words", "more words"]', '{"a": 1}\n{"text": "words"}\n'])
def test_text_whose_column_shows_only_on_reading_is_not_refused(tmp_path: Path, content: str) -> None:
    check_text(_text_folder(tmp_path / "data", "a.json", content), "train")


def test_mistakes_in_files_are_reported_with_all_others_before_anything_is_written(run_here, tmp_path: Path) -> None:
    data = _text_folder(tmp_path / "data", "a.txt", "")
    before = _everything_below(tmp_path)
    result = run_here(
        *("--training.dataset", "text", "--training.dataset_path", str(data), "--checkpoint.enable"),
        *(
            "--checkpoint.load_step",
            "5",
            "--checkpoint.exclude_from_loading",
            "outpt",
            "--model.overrides.n_heads",
            "4",
        ),
        *("--model.converters", "quantize.linear.float8", "--quantize.linear.float8.filter_fqns", "attention.wkk"),
    )
    assert result.code == 2, result.output
    for message in ("is empty", "checkpoint.load_step = 5", '"outpt" (did you mean "output"?)', "attention.wkk"):
        assert message in result.output
    assert _everything_below(tmp_path) == before


def test_a_folder_that_is_no_checkpoint_is_refused_before_anything_is_written(run_here, tmp_path: Path) -> None:
    other = _text_folder(tmp_path / "other", "a.txt", "")
    result = run_here("--checkpoint.enable", "--checkpoint.initial_load_path", str(other))
    assert result.code == 2, result.output
    assert "is no complete checkpoint" in result.output
    assert not result.folder.exists()


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(run_here, monkeypatch) -> None:
    options = ["--checkpoint.enable", "--checkpoint.no_last_save_model_only"]
    first = run_here(*options, "--training.steps", "1")
    before = _everything_below(first.folder)
    second = run_here(*options, "--training.steps", "2", "--model.overrides.n_layers", "3")
    assert second.code == 2, second.output
    assert "n_layers: 2 in the checkpoint, 3 here" in second.output
    assert _everything_below(first.folder) == before


def test_a_run_folder_that_cannot_be_is_refused_by_the_check(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["check", "--job.dump_folder", str(folder)]) == 2
        assert "is a file" in capsys.readouterr().err


def test_only_rank_0_looks_at_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    options = ["check", "--job.dump_folder", str(tmp_path / "file")]
    monkeypatch.setenv("RANK", "1")
    assert main(options) == 0
    monkeypatch.setenv("RANK", "0")
    assert main(options) == 2


@pytest.mark.parametrize("key", ["local_batch_size", "global_batch_size", "seq_len", "steps", "dataloader.num_workers"])
def test_a_number_beyond_all_bounds_is_a_mistake_in_the_configuration(run_here, key: str) -> None:
    result = run_here(f"--training.{key}", str(10**23))
    assert result.code == 2, result.output
    assert "must be at most" in result.output
    assert not result.folder.exists()


def test_the_default_recipes_plan_without_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from titan_fp8.cli import plan

    recipes = sorted((Path(__file__).resolve().parents[2] / "train_configs").glob("*.toml"))
    assert len(recipes) >= 6
    for recipe in recipes:
        # That one is written for as many ranks.
        monkeypatch.setenv("WORLD_SIZE", "256" if recipe.stem == "mxfp8_llama4_17bx16e" else "1")
        assert plan.main(["--job.config_file", str(recipe)]) == 0, recipe
        assert "parameters" in capsys.readouterr().out
