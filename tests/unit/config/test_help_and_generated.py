"""`--help`, the reference page and the schema: all keys, and never stale."""

import json

import pytest

from titan_fp8.cli.config_docs import DOCS_FILE, docs_text
from titan_fp8.config.errors import ConfigErrors, HelpRequested
from titan_fp8.config.keys import all_keys, all_sections
from titan_fp8.config.schema import SCHEMA_FILE, schema_text
from titan_fp8.job_config import JobConfig, load_job_config

KEYS = all_keys(JobConfig)


def help_on(*argv: str) -> str:
    with pytest.raises(HelpRequested) as raised:
        load_job_config(argv, {})
    return str(raised.value)


def test_help_shows_every_key_with_type_default_meaning_and_unit():
    text = help_on("--help")
    flat = " ".join(text.split())
    for key in KEYS.values():
        assert f"--{key.path} ({key.type_in_words}" in flat
        assert key.meaning in flat
    assert "--training.seq_len (integer >= 1, <= 134217728, tokens; default 2048) Length of a sequence." in flat


@pytest.mark.parametrize(
    "argv", [["--help", "quantize.linear.float8"], ["--training.steps", "x", "--help=quantize.linear.float8"]]
)
def test_help_on_one_section_shows_that_section(argv):
    text = help_on(*argv)
    assert "--quantize.linear.float8.recipe_name" in text
    assert "--training.steps" not in text
    assert "--quantize.linear.mx" not in text


def test_help_on_an_outer_section_or_a_key():
    assert "--quantize.linear.mx.recipe_name" in help_on("--help", "quantize")
    assert help_on("-h", "--training.steps=1", "--training.seq_len=2").count("--training.") > 5
    assert help_on("--help", "training.steps").count("--training.") == 1


@pytest.mark.parametrize(
    ("topic", "answer"),
    [("quantize.linear.floot8", "did you mean quantize.linear.float8?"), ("training.step", "did you mean steps?")],
)
def test_help_on_an_unknown_section_suggests(topic, answer):
    with pytest.raises(ConfigErrors, match=answer.replace("?", r"\?")):
        load_job_config(["--help", topic], {})


def test_every_key_and_every_section_says_what_it_means():
    assert [path for path, key in KEYS.items() if len(key.meaning) < 15] == []
    assert [path for path, section in all_sections(JobConfig).items() if not section.__doc__] == []


def test_every_key_that_counts_in_something_has_a_unit():
    ends = ("_steps", "_degree", "_size", "_freq", "seq_len", "steps", "_seconds", "_ms", "interval")
    silent = [path for path, key in KEYS.items() if path.endswith(ends) and int in key.members and not key.unit]
    assert silent == []


def test_the_reference_page_is_current():
    assert DOCS_FILE.read_text(encoding="utf-8") == docs_text(JobConfig), "run `titan-fp8 config-docs`"


def test_the_reference_page_has_a_row_for_every_key():
    page = docs_text(JobConfig)
    for path, section in all_sections(JobConfig).items():
        if any(key.section == path for key in KEYS.values()):
            table = page.partition(f"### `[{path}]`")[2].partition("###")[0]
            assert all(f"| `{key.name}` |" in table for key in KEYS.values() if key.section == path), section
    rows = [line for line in page.split("\n") if line.startswith("| `")]
    assert all(row.replace("\\|", "").count("|") in (6, 5, 3) for row in rows)


def test_the_shipped_schema_is_current():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(JobConfig), "run `titan-fp8 schema`"


def test_the_schema_knows_types_ranges_and_what_is_not_supported():
    schema = json.loads(schema_text(JobConfig))
    training = schema["$defs"]["TrainingSection"]
    assert training["additionalProperties"] is False
    assert training["properties"]["steps"]["type"] == "integer"
    assert training["properties"]["steps"]["minimum"] == 1
    assert "Unit: tokens." in training["properties"]["seq_len"]["description"]
    assert schema["$defs"]["CheckpointSection"]["properties"]["enable_ft_dataloader_checkpoints"]["const"] is True
    assert schema["$defs"]["ParallelismSection"]["properties"]["expert_tensor_parallel_degree"]["minimum"] == 1
    assert schema["$defs"]["Float8LinearSection"]["properties"]["keep_first_blocks_hp"]["minimum"] == 0
    assert "only_with" not in json.dumps(schema)
