"""Older spellings, and suggestions for names of other projects."""

import pytest

FLOAT8 = "quantize.linear.float8"


@pytest.mark.parametrize(
    ("options", "toml"),
    [
        (["--model.converters=float8"], None),
        (["--model.converters", '["float8"]'], None),
        ([], '[model]\nconverters = ["float8"]'),
    ],
)
def test_the_short_converter_name_is_read_as_the_long_one_and_a_line_says_so(read, options, toml):
    reading = read(*options, toml=toml)
    assert reading.accepted.model.converters == [FLOAT8]
    assert len(reading.notices) == 1
    assert reading.notices[0].endswith(f'"float8" is read as "{FLOAT8}"')


def test_the_short_mx_name_is_read_as_the_long_one(read):
    assert read("--model.converters=mx").accepted.model.converters == ["quantize.linear.mx"]


@pytest.mark.parametrize(
    ("options", "toml", "place"),
    [
        (["--float8.recipe_name=rowwise"], None, "--float8.recipe_name"),
        ([], '[float8]\nrecipe_name = "rowwise"', "my.toml:2: float8.recipe_name"),
    ],
)
def test_the_older_section_is_read_as_the_new_one(read, options, toml, place):
    reading = read("--model.converters=quantize.linear.float8", *options, toml=toml)
    assert reading.accepted.quantize.linear.float8.recipe_name == "rowwise"
    assert reading.notices[0].startswith(f"{place} is read as ")


@pytest.mark.parametrize(("options", "toml"), [(["--training.compile"], None), ([], "[training]\ncompile = true")])
def test_training_compile_is_read_as_compile_enable(read, options, toml):
    reading = read(*options, toml=toml)
    assert reading.accepted.compile.enable is True
    assert "training.compile is read as" in reading.notices[0]


def test_an_older_and_a_new_spelling_of_one_key_in_a_file_are_refused(read):
    error = read(toml="[training]\ncompile = true\n[compile]\nenable = false").error
    assert error == "my.toml:4: compile.enable: is the same key as compile.enable at my.toml:2; keep one of them"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("enable_fsdp_fp8_all_gather", "enable_fsdp_float8_all_gather"),
        ("precompute_fp8_dynamic_scale_for_fsdp", "precompute_float8_dynamic_scale_for_fsdp"),
        ("enabled", "model.converters"),
        ("recipe_nam", "recipe_name"),
    ],
)
def test_names_of_nemo_are_suggested(read, name, suggestion):
    assert f"no such key (did you mean {suggestion}?)" in read(f"--{FLOAT8}.{name}=true").error


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--fp8.enabled=true"], f"no such section (did you mean {FLOAT8}?)"),
        (["--checkpoint.enable_checkpoint"], "did you mean enable?"),
        (["--training.batch_size=3"], "did you mean local_batch_size?"),
        (["--training.tensor_parallel_degree=3"], "did you mean parallelism.tensor_parallel_degree?"),
        (["--training.xyzzy=3"], "--training.xyzzy: no such key"),
        (["--model.flavor=debugmodl"], 'did you mean "debugmodel"?'),
        (["--model.name=lama3"], 'did you mean "llama3"?'),
        (["--training.dataset=synthetc"], 'did you mean "synthetic"?'),
        (["--model.converters=quantize.linear.flot8"], 'did you mean "quantize.linear.float8"?'),
    ],
)
def test_misspelt_names_are_answered_with_the_nearest(read, options, answer):
    assert answer in read(*options).error


def test_the_hub_is_no_misspelling(read):
    assert read("--training.dataset=hf:owner/name").accepted.training.dataset == "hf:owner/name"


@pytest.mark.parametrize("option", ["--training.no_compile", "--training.compile=false"])
def test_an_older_flag_can_be_turned_off(read, option):
    reading = read(option, toml="[compile]\nenable = true")
    assert reading.accepted.compile.enable is False
    assert reading.notices[0].startswith(f"{option.partition('=')[0]} is read as --compile.")
