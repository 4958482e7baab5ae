"""`run_train.sh` as a user calls it: the seeds' flags, several gloo ranks, mistakes."""

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.end_to_end.conftest import FLOAT8, TINY, command_environment
from titan_fp8.cli.main import main


@pytest.mark.slow
def test_four_ranks_compute_what_one_does(run_shell, run_here) -> None:
    options = [
        *FLOAT8,
        "--training.steps",
        "3",
        "--training.global_batch_size",
        "8",
        "--training.local_batch_size",
        "2",
    ]
    exact = [*options, "--training.mixed_precision_param", "float32"]
    single = run_here(*exact, folder="one")
    many = run_shell(*exact, folder="four", NGPU="4")
    assert many.code == 0, many.output
    assert many.losses == pytest.approx(single.losses, rel=2e-4)
    assert [x["grad_norm"] for x in many.lines] == pytest.approx([x["grad_norm"] for x in single.lines], rel=2e-3)


def test_a_run_resumes_on_another_world_size(run_shell, run_here) -> None:
    options = ["--training.global_batch_size", "8", "--training.local_batch_size", "2", "--checkpoint.enable"]
    options += ["--checkpoint.interval", "2", "--checkpoint.no_last_save_model_only"]
    options += ["--training.mixed_precision_param", "float32", "--lr_scheduler.total_steps", "6"]
    whole = run_here(*options, "--training.steps", "6", folder="whole")
    two = run_shell(*options, "--training.steps", "4", folder="moved", NGPU="2")
    assert two.code == 0, two.output
    one = run_here(*options, "--training.steps", "6", folder="moved")
    assert one.code == 0, one.output
    assert one.losses == pytest.approx(whole.losses, rel=1e-4)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("processes", "flags", "recipe"),
    [
        (
            "2",
            [
                "--model.converters=quantize.linear.float8",
                "--quantize.linear.float8.enable_fsdp_float8_all_gather",
                "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
                "--quantize.linear.float8.force_recompute_fp8_weight_in_bwd",
                "--compile.enable",
            ],
            "tensorwise",
        ),
        (
            "1",
            [
                "--model.converters=quantize.linear.float8",
                *("--quantize.linear.float8.recipe_name", "rowwise"),
                "--quantize.linear.float8.filter_fqns=attention.wk,attention.wv,output",
                "--compile.enable",
            ],
            "rowwise",
        ),
        (
            "1",
            [
                "--model.converters=float8",
                "--float8.recipe_name=tensorwise",
                "--quantize.linear.float8.filter_fqns=auto_filter_small_kn",
            ],
            "tensorwise",
        ),
    ],
    ids=["all-gather", "compiled", "older names"],
)
def test_the_seed_documents_flags_run(run_shell, processes: str, flags: list[str], recipe: str) -> None:
    """The commands of the float8 documents, with a CONFIG_FILE that stands elsewhere in torchtitan's tree."""
    result = run_shell(
        *flags,
        *("--quantize.linear.float8.emulate", "--model.overrides.n_layers", "1"),
        *("--training.steps", "2", "--training.global_batch_size", "2", "--training.local_batch_size", "1"),
        CONFIG_FILE="./torchtitan/models/llama3/train_configs/llama3_8b.toml",
        NGPU=processes,
        timeout_s=240,
    )
    assert result.code == 0, result.output
    assert "train_configs/llama3_8b.toml" in result.output
    assert recipe in result.output
    assert len(result.losses) == 2


def test_an_old_converter_spelling_says_what_it_became(run_here) -> None:
    result = run_here(
        "--model.converters=float8", "--float8.recipe_name=rowwise", "--float8.emulate", "--training.steps", "1"
    )
    assert result.code == 0, result.output
    assert "quantize.linear.float8" in result.output


def test_a_mistake_ends_in_one_clean_block_with_exit_code_2(run_shell) -> None:
    begin = time.monotonic()
    result = run_shell("--training.step", "3", "--activation_checkpoint.mode", "selectiv", NGPU="2")
    assert result.code == 2
    assert "did you mean steps" in result.output
    assert 'did you mean "selective"' in result.output
    assert "Traceback" not in result.output
    assert "torch.distributed" not in result.output
    assert not result.folder.exists()
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "environment",
    [
        {"NGPU": "two"},
        {"NGPU": "0"},
        {"LOG_RANK": "x"},
        {"LOG_RANK": "1"},
        {"NNODES": "2"},
        {"NNODES": "0"},
        {"NODE_RANK": "1"},
    ],
    ids=str,
)
def test_a_setting_of_the_launcher_that_means_nothing_is_one_line(run_shell, environment: dict[str, str]) -> None:
    (name,) = environment
    result = run_shell(**{"NGPU": "1", **environment})
    assert result.code == 2
    assert result.output.startswith(f"run_train.sh: {name}=")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("options", [("--help", "compile"), ("--help=compile",), ("-h", "compile")], ids=" ".join)
def test_help_in_every_form_starts_no_run(run_shell, options: tuple[str, ...]) -> None:
    result = run_shell(*options, NGPU="2")
    assert result.code == 0
    assert result.output.startswith("[compile]")


def test_one_process_answers_a_late_mistake_without_a_trace_of_a_launcher(run_shell) -> None:
    """Ranks that are set from outside are not this run's."""
    result = run_shell("--optimizer.lr", "1e30", NGPU="1", RANK="1", WORLD_SIZE="4")
    assert result.code == 1
    assert 'training.nonfinite_policy = "stop"' in result.output
    assert "Traceback" not in result.output


def test_the_reader_of_the_help_may_leave_early() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    child = subprocess.run(
        [sys.executable, "-m", "titan_fp8.train", "--help"],
        env=command_environment(),
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write_end)
    assert (child.returncode, child.stderr) == (0, "")


def test_the_drawn_seed_is_in_the_resolved_configuration_also_after_a_resume(run_here) -> None:
    options = ["--debug.seed=None", "--checkpoint.enable", "--checkpoint.no_last_save_model_only"]
    first = run_here(*options, "--training.steps", "2", "--job.save_config_file", "copies/first.toml")
    seed = tomllib.loads((first.folder / "copies" / "first.toml").read_text())["debug"]["seed"]
    again = run_here("--job.config_file", str(first.folder / "config.toml"), f"--debug.seed={seed}", folder="again")
    assert again.losses[:2] == first.losses
    resumed = run_here(*options, "--training.steps", "3")
    assert resumed.code == 0, resumed.output
    assert tomllib.loads((first.folder / "config.toml").read_text())["debug"]["seed"] == seed


def test_float8_all_gather_is_refused_in_one_process_with_the_remedy(run_here) -> None:
    result = run_here(*FLOAT8, "--quantize.linear.float8.enable_fsdp_float8_all_gather")
    assert result.code == 2
    assert "nothing is sharded, so nothing is gathered; start two processes (NGPU=2)" in result.output
    assert not result.folder.exists()


def test_a_tied_head_that_codes_cannot_serve_is_refused_by_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--quantize.linear.float8.enable_fsdp_float8_all_gather", "--model.overrides.tied_embeddings"]
    assert main(["check", "--job.dump_folder", str(tmp_path / "run"), *TINY, *FLOAT8, *options]) == 2
    problem = "tok_embeddings.weight (high precision), output.weight (tensorwise) are one parameter"
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_resumes_with_the_same_mixture_of_recipes_alone(run_here) -> None:
    options = [*FLOAT8, "--checkpoint.enable", "--checkpoint.no_last_save_model_only", "--lr_scheduler.total_steps=4"]
    mixture = ["--quantize.linear.float8.recipe_by_fqn", "attention.wo=rowwise"]
    assert run_here(*options, *mixture, "--training.steps", "2").code == 0
    other = run_here(*options, "--quantize.linear.float8.recipe_by_fqn", "w1=rowwise", "--training.steps", "4")
    assert other.code == 2
    assert 'layers.*.attention.wo: "rowwise" in the checkpoint, (not there) here' in other.output
    assert 'layers.*.feed_forward.w1: (not there) in the checkpoint, "rowwise" here' in other.output
    again = run_here(*options, *mixture, "--training.steps", "4")
    assert again.code == 0, again.output
    assert [line["step"] for line in again.lines] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_deep_model_compiles_one_block(run_shell) -> None:
    float8 = "quantize.linear.float8"
    flags = [f"--model.converters={float8}", f"--{float8}.emulate", f"--{float8}.enable_fsdp_float8_all_gather"]
    # Deeper than the compiler's limit for versions of one code, which is 8.
    sizes = ["--model.overrides.n_layers", "10", "--training.steps", "2"]
    run = run_shell(*flags, *sizes, "--compile.enable", "--compile.backend", "aot_eager", folder="deep", NGPU="2")
    assert run.code == 0, run.output
