"""The forms in which options are given."""

import pytest


def filters(job):
    return job.quantize.linear.float8.filter_fqns


FLOAT8 = "--quantize.linear.float8"
CONVERTER = "--model.converters=quantize.linear.float8"


@pytest.mark.parametrize(
    "options",
    [["--training.steps", "7"], ["--training.steps=7"], ["--training.steps=9", "--training.steps", "7"]],
)
def test_a_value_follows_its_key_and_the_last_one_counts(read, options):
    assert read(*options).accepted.training.steps == 7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--compile.enable"], True),
        (["--compile.enable", "true"], True),
        (["--compile.enable=True"], True),
        (["--compile.no_enable"], False),
        (["--compile.enable=false"], False),
        (["--compile.enable", "false"], False),
        (["--compile.enable", "--compile.no_enable"], False),
        (["--compile.no_enable", "--compile.enable"], True),
    ],
)
def test_flags(read, options, expected):
    assert read(*options, toml="[compile]\nenable = true").accepted.compile.enable is expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([f"{FLOAT8}.emulate"], True),
        ([f"{FLOAT8}.emulate", "--compile.enable"], True),
        ([f"{FLOAT8}.emulate=true"], True),
        ([f"{FLOAT8}.no_emulate"], False),
        ([f"{FLOAT8}.emulate", "auto"], "auto"),
        ([f"{FLOAT8}.emulate=auto"], "auto"),
    ],
)
def test_emulate_is_a_flag_and_takes_auto(read, options, expected):
    assert read(CONVERTER, *options).accepted.quantize.linear.float8.emulate == expected


@pytest.mark.parametrize("value", ["-1", "-0.5"])
def test_a_value_may_begin_with_a_dash(read, value):
    assert "must be at least 0" in read("--optimizer.lr", value).error
    assert read("--training.global_batch_size", "-1").accepted.training.global_batch_size == -1


@pytest.mark.parametrize(
    "options",
    [
        [f"{FLOAT8}.filter_fqns=attention.wk,output"],
        [f"{FLOAT8}.filter_fqns", "attention.wk, output"],
        [f"{FLOAT8}.filter_fqns", " attention.wk ,output "],
        [f"{FLOAT8}.filter_fqns=attention.wk", f"{FLOAT8}.filter_fqns=output"],
        [f"{FLOAT8}.filter_fqns", '["attention.wk", "output"]'],
    ],
)
def test_all_forms_of_a_list_say_the_same(read, options):
    assert filters(read(CONVERTER, *options).accepted) == ["attention.wk", "output"]


@pytest.mark.parametrize("options", [[f"{FLOAT8}.filter_fqns="], [f"{FLOAT8}.filter_fqns", ""]])
def test_an_empty_list_replaces_the_files(read, options):
    toml = '[model]\nconverters = ["float8"]\n[quantize.linear.float8]\nfilter_fqns = ["output"]'
    assert filters(read(toml=toml).accepted) == ["output"]
    assert filters(read(*options, toml=toml).accepted) == []


def test_an_empty_list_drops_what_was_given_before_it(read):
    first, second = f"{FLOAT8}.filter_fqns=attention.wk", f"{FLOAT8}.filter_fqns=output"
    assert filters(read(CONVERTER, first, f"{FLOAT8}.filter_fqns=").accepted) == []
    assert filters(read(CONVERTER, first, f"{FLOAT8}.filter_fqns=", second).accepted) == ["output"]


def test_a_list_on_the_command_line_replaces_the_files(read):
    toml = '[model]\nconverters = ["float8"]\n[quantize.linear.float8]\nfilter_fqns = ["output"]'
    assert filters(read(f"{FLOAT8}.filter_fqns=attention.wk", toml=toml).accepted) == ["attention.wk"]


@pytest.mark.parametrize("value", ["a,,b", ",", "a,", '[""]', '["a", ""]'])
def test_an_empty_element_is_an_error(read, value):
    assert "an element is empty" in read(CONVERTER, f"{FLOAT8}.filter_fqns={value}").error


@pytest.mark.parametrize("value", ["[a, b]", '["a"', "[1, 2"])
def test_a_broken_list_is_an_error(read, value):
    assert "is no list" in read(CONVERTER, f"{FLOAT8}.filter_fqns={value}").error


@pytest.mark.parametrize(
    "options",
    [
        ['--parallelism.module_fqns_per_model_part=[["a", "b"], ["c"]]'],
        ["--parallelism.module_fqns_per_model_part=a,b", "--parallelism.module_fqns_per_model_part=c"],
    ],
)
def test_lists_of_lists(read, options):
    assert 'module_fqns_per_model_part = [["a", "b"], ["c"]]: has no effect' in read(*options).error


def test_dashes_may_stand_for_underscores(read):
    assert read("--training.seq-len=64").accepted.training.seq_len == 64


def test_none_unsets_what_the_file_sets(read):
    toml = "[debug]\nseed = 3"
    assert read(toml=toml).accepted.debug.seed == 3
    assert read("--debug.seed=None", toml=toml).accepted.debug.seed is None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--training.steps"], "--training.steps: needs a value: integer"),
        (["--training.steps", "--compile.enable"], "--training.steps: needs a value: integer"),
        (["--compile.no_enable=true"], "--compile.no_enable: takes no value"),
        (["--training.no_steps"], "--training.no_steps: no such key"),
        (["train.toml"], 'command line: "train.toml": not an option; options are written as --section.key'),
        (["-training.steps", "4"], 'command line: "-training.steps": an option begins with two dashes'),
        (["--"], 'command line: "--": not an option'),
        (["--training"], "--training: is a section, not a key; it holds dataset"),
        (["--steps=3"], "--steps: no such key (did you mean training.steps or validation.steps?)"),
        (["--training.dataset", "c4\udc80"], "--training.dataset: the value is not valid UTF-8"),
    ],
)
def test_what_is_no_option_is_an_error(read, options, error):
    assert read(*options).errors[0].startswith(error)


def test_a_stray_word_after_a_list_is_answered_with_the_comma(read):
    error = read("--model.converters", "float8", "mx").error
    assert '"mx": not an option' in error
    assert "separate the elements of a list with commas" in error


@pytest.mark.parametrize("value", ["10.5", "1e3", "ten", "0x10", "", "1 ", "9" * 5000])
def test_what_is_no_integer_is_an_error(read, value):
    assert read(f"--training.steps={value}").error.endswith(": expected an integer")


@pytest.mark.parametrize(("value", "expected"), [("1", 1.0), ("1e-3", 1e-3), (".5", 0.5), ("2.", 2.0)])
def test_numbers(read, value, expected):
    assert read(f"--optimizer.lr={value}").accepted.optimizer.lr == expected


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_a_number_is_finite(read, value):
    assert read(f"--optimizer.lr={value}").error.endswith("must be a finite number")
