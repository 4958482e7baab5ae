"""Keys without effect, and the sections of converters that are not named."""

import pytest

FLOAT8 = "quantize.linear.float8"


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("--checkpoint.interval=5", "while checkpoint.enable = false; add --checkpoint.enable"),
        ("--validation.steps=5", "while validation.enable = false; add --validation.enable"),
        ("--validation.dataloader.num_workers=5", "add --validation.enable"),
        ("--compile.backend=eager", "add --compile.enable"),
        ("--metrics.save_tb_folder=x", "add --metrics.enable_tensorboard"),
        ("--metrics.save_for_all_ranks", "add --metrics.enable_tensorboard or --metrics.enable_wandb"),
        ("--profiling.profile_freq=5", "add --profiling.enable_profiling or --profiling.enable_memory_snapshot"),
        ("--profiling.profiler_active=2", "add --profiling.enable_profiling"),
        ("--debug.deterministic_warn_only", "add --debug.deterministic"),
        ("--training.max_nonfinite_steps=3", "add --training.nonfinite_policy=skip"),
        ("--activation_checkpoint.memory_budget=0.1", "add --activation_checkpoint.mode=memory_budget"),
    ],
)
def test_an_option_without_effect_is_refused_with_the_option_that_is_missing(read, option, remedy):
    error = read(option).error
    assert error.startswith(option.partition("=")[0])
    assert error.endswith(remedy)


def test_an_option_with_its_default_value_asks_for_nothing(read):
    assert read("--checkpoint.interval=500").accepted


def test_a_key_without_effect_in_a_file_is_refused(read):
    error = read(toml="[checkpoint]\ninterval = 5").error
    assert error.startswith("my.toml:2: checkpoint.interval = 5: has no effect while checkpoint.enable = false")
    assert error.endswith("write checkpoint.enable = false)")


def test_a_file_may_keep_keys_beside_a_switch_that_it_turns_off(read):
    reading = read(toml="[checkpoint]\nenable = false\ninterval = 5")
    assert reading.accepted.checkpoint.interval == 5
    assert reading.notices == []


def test_the_command_line_may_turn_off_what_the_file_turns_on(read):
    toml = "[checkpoint]\nenable = true\ninterval = 5"
    assert read("--checkpoint.no_enable", toml=toml).accepted.checkpoint.interval == 5


def test_the_command_line_turns_on_what_the_file_keeps(read):
    toml = "[checkpoint]\nenable = false\ninterval = 5"
    assert read("--checkpoint.enable", "--checkpoint.keep_latest_k=3", toml=toml).accepted.checkpoint.keep_latest_k == 3


def test_another_mode_on_the_command_line_drops_the_files_key_and_a_line_says_so(read):
    toml = '[compile]\nenable = true\n[activation_checkpoint]\nmode = "memory_budget"\nmemory_budget = 0.2'
    assert read(toml=toml).accepted.activation_checkpoint.memory_budget == 0.2
    reading = read("--activation_checkpoint.mode=full", toml=toml)
    assert reading.accepted.activation_checkpoint.memory_budget == 0.5
    assert reading.notices == [
        'dropped from the TOML file: activation_checkpoint.memory_budget, because activation_checkpoint.mode = "full"'
    ]


def test_a_selective_option_may_stay_beside_another_mode_as_recipes_have_it(read):
    assert read(toml='[activation_checkpoint]\nmode = "full"\nselective_ac_option = "op"').accepted


def test_a_converters_section_needs_the_converter(read):
    error = read(toml=f"[{FLOAT8}]\nemulate = true").error
    assert error == (
        f"my.toml:2: {FLOAT8}.emulate is set, but model.converters does not name {FLOAT8}; "
        "name it there or remove the key, or leave the file's converters out with --model.converters="
    )
    assert read("--model.converters=", toml=f"[{FLOAT8}]\nemulate = true").accepted.model.converters == []


def test_a_converters_section_that_holds_defaults_asks_for_nothing(read):
    assert read(toml=f"[{FLOAT8}]\nemulate = false").accepted


def test_an_option_of_a_converter_that_is_not_named_is_refused(read):
    assert f"--{FLOAT8}.emulate: {FLOAT8}.emulate is set, but" in read(f"--{FLOAT8}.emulate").error
    assert (
        f"--{FLOAT8}.emulate: {FLOAT8}.emulate is set, but" in read(f"--{FLOAT8}.emulate", "--model.converters=").error
    )


def test_the_files_converter_may_be_configured_on_the_command_line(read):
    reading = read(f"--{FLOAT8}.emulate", toml='[model]\nconverters = ["quantize.linear.float8"]')
    assert reading.accepted.quantize.linear.float8.emulate is True


def test_converters_on_the_command_line_drop_the_sections_that_they_leave_out(read):
    toml = f'[model]\nconverters = ["{FLOAT8}"]\n[{FLOAT8}]\nemulate = true\nrecipe_name = "rowwise"'
    reading = read("--model.converters=", toml=toml)
    assert reading.accepted.quantize.linear.float8.emulate is False
    assert reading.notices == [
        f"dropped from the TOML file: {FLOAT8}.recipe_name, {FLOAT8}.emulate, "
        f"because --model.converters does not name {FLOAT8}"
    ]


def test_a_converter_on_the_command_line_uses_the_files_section(read):
    reading = read(f"--model.converters={FLOAT8}", toml=f"[{FLOAT8}]\nemulate = true")
    assert reading.accepted.quantize.linear.float8.emulate is True
    assert reading.notices == []
