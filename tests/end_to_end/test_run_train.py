"""`run_train.sh` as a user calls it: the seeds' flags, several gloo ranks, mistakes."""

import time

import pytest

from tests.end_to_end.conftest import FLOAT8


def test_four_ranks_and_two_compute_what_one_does(run_shell, run_here) -> None:
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
    for ranks in ("2", "4"):
        many = run_shell(*exact, folder=f"ranks{ranks}", NGPU=ranks)
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


def test_the_seed_documents_flags_run(run_shell) -> None:
    """The rowwise command of the float8 document, with a CONFIG_FILE that stands elsewhere in torchtitan's tree."""
    result = run_shell(
        *("--model.converters=quantize.linear.float8", "--quantize.linear.float8.recipe_name", "rowwise"),
        *("--quantize.linear.float8.filter_fqns=attention.wk,attention.wv,output", "--quantize.linear.float8.emulate"),
        *("--training.steps", "2", "--training.global_batch_size", "2", "--training.local_batch_size", "1"),
        CONFIG_FILE="./torchtitan/models/llama3/train_configs/llama3_8b.toml",
        NGPU="2",
    )
    assert result.code == 0, result.output
    assert "train_configs/llama3_8b.toml" in result.output
    assert "rowwise" in result.output


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


def test_float8_all_gather_is_refused_by_name(run_here) -> None:
    result = run_here(*FLOAT8, "--quantize.linear.float8.enable_fsdp_float8_all_gather")
    assert result.code == 2
    assert "not supported yet" in result.output
