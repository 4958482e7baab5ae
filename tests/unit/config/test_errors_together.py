"""All violations at once, and rules that do not speak about refused values."""

from collections.abc import Iterator

import pytest
from pydantic import model_validator

from titan_fp8.config.errors import ConfigErrors
from titan_fp8.config.loader import Loader
from titan_fp8.config.section import Problem, Section, key

TOML = """\
[training]
seq_len = "2048"
global_batch_size = 3

[activation_checkpoint]
mode = "selectiv"

[quantize.linear.float8]
enable_fsdp_float8_all_gather = true

[parallelism]
data_parallel_shard_degree = 4
tensor_parallel_degree = 4

[checkpoint]
enable_ft_dataloader_checkpoints = false
"""


def test_mistakes_of_every_kind_are_reported_together_and_in_place(read):
    errors = read("--quantize.linear.float8.recipe_nam=rowwise", toml=TOML, world_size=8).errors
    assert 'my.toml:2: training.seq_len = "2048": expected an integer' in errors
    assert any(error.startswith('my.toml:6: activation_checkpoint.mode = "selectiv": not one of') for error in errors)
    assert "--quantize.linear.float8.recipe_nam: no such key (did you mean recipe_name?)" in errors
    assert (
        "parallelism: data_parallel_shard_degree 4 x tensor_parallel_degree 4 = 16, but WORLD_SIZE is 8; "
        "set one of them to -1"
    ) in errors
    unnamed = "quantize.linear.float8.enable_fsdp_float8_all_gather is set, but model.converters does not name"
    assert any(unnamed in error for error in errors)
    unsupported = "checkpoint.enable_ft_dataloader_checkpoints"
    assert f"my.toml:16: {unsupported} = false: not supported yet; leave it at true" in errors


def test_a_rule_is_silent_about_a_value_that_was_refused(read):
    toml = "[training]\nlocal_batch_size = 'four'\nglobal_batch_size = 7"
    assert read(toml=toml).errors == ['my.toml:2: training.local_batch_size = "four": expected an integer']


def test_a_rule_speaks_about_other_values(read):
    toml = "[training]\nsteps = 'four'\n[optimizer]\nearly_step_in_backward = true"
    errors = read(toml=toml).errors
    assert len(errors) == 2
    assert "max_norm = 0" in errors[1]


class Box(Section):
    """A section with a validator over all of it."""

    width: int = 1
    height: int = 1

    @model_validator(mode="after")
    def _is_flat(self) -> "Box":
        if self.height > self.width:
            raise ValueError("higher than wide")
        return self


class Root(Section):
    """A job with that section."""

    box: Box = Box()
    steps: int = key(1, ge=1)


def _box_is_small(job: Root, world_size: int) -> Iterator[Problem]:
    if job.box.width > 5:
        yield Problem("box.width", "too wide")


def test_a_validator_over_a_section_is_reported_at_the_section_and_ends_rules_about_it():
    loader = Loader(Root, rules=[_box_is_small])
    with pytest.raises(ConfigErrors) as raised:
        loader.load(["--box.height=7", "--box.width=6", "--steps=0"], {})
    assert raised.value.render().split("\n") == [
        "--steps: steps = 0: must be at least 1",
        "box: higher than wide",
    ]


def test_a_validator_over_the_whole_job_is_reported():
    class Strict(Root):
        @model_validator(mode="after")
        def _never(self) -> "Strict":
            raise ValueError("no job is good enough")

    with pytest.raises(ConfigErrors, match="no job is good enough"):
        Loader(Strict).load([], {})


def test_a_defect_in_a_rule_is_not_taken_for_a_refused_value():
    def broken(job: Root, world_size: int) -> Iterator[Problem]:
        yield from job.no_such_section  # pyright: ignore

    with pytest.raises(AttributeError):
        Loader(Root, rules=[broken]).load([], {})


def test_broken_syntax_does_not_hide_mistakes_on_the_command_line(read):
    errors = read("--training.step=5", toml="[training")
    assert errors.errors[0].startswith("my.toml:1: not TOML")
    assert errors.errors[1] == "--training.step: no such key (did you mean steps?)"
