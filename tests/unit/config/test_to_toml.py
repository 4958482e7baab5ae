"""The resolved configuration as TOML."""

import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titan_fp8.config.command_line import Option, enter_options
from titan_fp8.config.given import Sources
from titan_fp8.config.keys import Key, all_keys, all_sections
from titan_fp8.config.to_toml import to_toml
from titan_fp8.job_config import ConfigErrors, JobConfig, load_job_config

KEYS = all_keys(JobConfig)
# Keys that name things outside of the configuration: a module, files, packages.
OUTSIDE = ("job.custom_config_module", "job.config_file", "metrics.enable_wandb", "model.name", "model.flavor")
SETTABLE = [key for key in KEYS.values() if key.is_supported and key.path not in OUTSIDE]

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)
items = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Z", "Cc"], exclude_characters=","), min_size=1)


def values_of(key: Key):
    """Values of a key's type, many of them in its range."""
    alternatives = []
    for member in key.members:
        if member is bool:
            alternatives.append(st.booleans())
        elif member is int:
            alternatives.append(st.integers(1, 4))
        elif member is float:
            alternatives.append(st.floats(0.0009765625, 0.5) | st.integers(1, 1))
        elif member is str:
            alternatives.append(words)
        elif get_origin(member) is Literal:
            alternatives.append(st.sampled_from(get_args(member)))
        elif get_origin(member) is list:
            inner = st.sampled_from(get_args(get_args(member)[0])) if key.choices else items
            alternatives.append(st.lists(inner, min_size=1, max_size=3))
    return st.one_of(alternatives)


@st.composite
def some_options(draw):
    chosen = draw(st.lists(st.sampled_from(SETTABLE), max_size=6, unique_by=lambda key: key.path))
    options = []
    for key in chosen:
        value = draw(values_of(key))
        if isinstance(value, list):
            options += [f"--{key.path}={item}" for item in value]
        else:
            options.append(f"--{key.path}={str(value).lower() if isinstance(value, bool) else value}")
    return options


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options=some_options())
def test_the_resolved_toml_starts_the_same_job_again(options, tmp_path_factory):
    enabled = ["--checkpoint.enable", "--compile.enable", "--validation.enable", "--validation.steps=3"]
    try:
        job, _ = load_job_config([*enabled, *options], {})
    except ConfigErrors:
        return
    file = tmp_path_factory.getbasetemp() / "resolved.toml"
    file.write_text(to_toml(job), encoding="utf-8")
    again, notices = load_job_config(["--job.config_file", str(file)], {})
    expected = job.model_copy(update={"job": job.job.model_copy(update={"config_file": str(file)})})
    assert again == expected
    assert notices == []
    assert to_toml(again) == to_toml(job)


@pytest.mark.parametrize("recipe", sorted(Path(__file__).parents[3].glob("train_configs/*.toml")), ids=lambda p: p.stem)
def test_every_recipe_is_accepted_and_resolves_to_itself(recipe, read):
    ranks = 256 if recipe.stem == "mxfp8_llama4_17bx16e" else 1  # for as many it is written
    job = read("--job.config_file", str(recipe), world_size=ranks).accepted
    Path("resolved.toml").write_text(to_toml(job), encoding="utf-8")
    again = read("--job.config_file", "resolved.toml", world_size=ranks).accepted
    assert again.model_copy(update={"job": job.job}) == job


def test_a_file_kept_for_later_is_kept(read):
    job = read("--checkpoint.no_enable", toml="[checkpoint]\nenable = true\ninterval = 5").accepted
    assert read(toml=to_toml(job)).accepted == job


def test_unset_keys_and_the_files_own_path_are_left_out(read):
    data = tomllib.loads(to_toml(read(toml="").accepted))
    assert "seed" not in data["debug"]
    assert "config_file" not in data["job"]


@pytest.mark.parametrize("key", SETTABLE, ids=lambda key: key.path)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_a_value_typed_as_an_option_is_the_value_that_toml_has(key, data):
    value = data.draw(values_of(key))
    typed = str(value).lower() if isinstance(value, bool) else value
    options = [Option(f"--{key.path}", str(word)) for word in (typed if isinstance(value, list) else [typed])]
    sources = Sources()
    enter_options(options, KEYS, all_sections(JobConfig), sources)
    entered = sources.cli.get(key.path)  # a list that is refused is not entered
    given = None if entered is None else entered.value
    if isinstance(value, list) and "list[list" in str(key.annotation):
        assert sources.violations or all(isinstance(each, list) for each in given)
    elif isinstance(value, list):
        # Words that begin with a bracket are lists in TOML's form, and elements lose white space.
        assert sources.violations or given == [word.strip() for word in value] or any(w.startswith("[") for w in value)
    elif "list[str] | str" in str(key.annotation):
        # A word is a list of one, or of its parts between commas; white space alone is no word.
        parts = [part.strip() for part in value.split(",")] if value.strip() else []
        assert sources.violations or given == parts or value.startswith("[")
    else:
        assert given == value or (isinstance(value, str) and key.is_optional and value == "None")
        assert isinstance(given, bool) is isinstance(value, bool)
