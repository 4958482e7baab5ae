"""The TOML source: where errors are, what is refused, where files are found."""

from pathlib import Path

import pytest

FLOAT8 = "quantize.linear.float8"


def test_values_are_read_and_the_command_line_overrides_them(read):
    reading = read("--training.seq_len=32", toml="[training]\nsteps = 5\nseq_len = 16")
    assert (reading.accepted.training.steps, reading.accepted.training.seq_len) == (5, 32)
    assert reading.accepted.job.config_file == "my.toml"


@pytest.mark.parametrize(
    ("toml", "error"),
    [
        ('[training]\n\nseq_len = "2048"', 'my.toml:3: training.seq_len = "2048": expected an integer'),
        ("[training]\nsteps = 10.5", "my.toml:2: training.steps = 10.5: expected an integer"),
        ("training.steps = true", "my.toml:1: training.steps = true: expected an integer"),
        ("[optimizer]\nlr = '1e-3'", 'my.toml:2: optimizer.lr = "1e-3": expected a number'),
        ("[compile]\nenable = 1", "my.toml:2: compile.enable = 1: expected true or false"),
        ("[job]\ndescription = 3", "my.toml:2: job.description = 3: expected a string"),
        ("[training]\nsteps = 2020-01-01", "my.toml:2: training.steps = 2020-01-01: expected an integer"),
        ("[training]\nsteps = {a = 1}", "my.toml:2: training.steps = {a = 1}: expected an integer"),
        ("[training]\nsteps = 0", "my.toml:2: training.steps = 0: must be at least 1"),
        ("[optimizer]\nlr = -1", "my.toml:2: optimizer.lr = -1: must be at least 0"),
        ("[optimizer]\nlr = nan", "my.toml:2: optimizer.lr = nan: must be a finite number"),
        (
            "[parallelism]\ndata_parallel_shard_degree = 0",
            "my.toml:2: parallelism.data_parallel_shard_degree = 0: must be at least 1, or -1",
        ),
        ("[job]\ndump_folder = ''", 'my.toml:2: job.dump_folder = "": must not be empty'),
        ("[model]\nconverters = [1]", "my.toml:2: model.converters = [1]: expected a list of strings"),
        ('[model]\nconverters = [""]', 'my.toml:2: model.converters = [""]: an element is empty; leave it out'),
        (
            '[activation_checkpoint]\nmode = "selectiv"',
            'my.toml:2: activation_checkpoint.mode = "selectiv": not one of none, full, selective, memory_budget '
            '(did you mean "selective"?)',
        ),
        (
            '[activation_checkpoint]\nselective_ac_option = "0"',
            'my.toml:2: activation_checkpoint.selective_ac_option = "0": expected "op" or a number of layers such as',
        ),
        (
            '[compile]\nenable = true\ncomponents = ["modell"]',
            'my.toml:3: compile.components = ["modell"]: "modell" is not one of model, loss (did you mean "model"?)',
        ),
        (
            '[model]\nconverters = "quantize.linear.float8"',
            'my.toml:2: model.converters = "quantize.linear.float8": expected a list of strings; '
            'write converters = ["quantize.linear.float8"]',
        ),
        ("[training]\nseq_length = 1", "my.toml:2: training.seq_length: no such key (did you mean seq_len?)"),
        ("[trainig]\nsteps = 1", "my.toml:1: trainig: no such section (did you mean training?)"),
        ("[quantize.linear.flot8]", "my.toml:1: quantize.linear.flot8: no such section"),
        ("training = 5", "my.toml:1: training: is a section, not a key"),
        ("steps = 5", "my.toml:1: steps: no such key (did you mean training.steps or validation.steps?)"),
        ("[training]\nlr = 5", "my.toml:2: training.lr: no such key (did you mean optimizer.lr?)"),
        ("[job]\nconfig_file = 'a'", "my.toml:2: job.config_file: stands on the command line only"),
        ("[checkpoint]\ninterval = 1", "my.toml:2: checkpoint.interval = 1: has no effect while"),
    ],
)
def test_an_error_names_line_value_and_remedy(read, toml, error):
    assert read(toml=toml).error.startswith(error)


def test_a_mistake_in_the_file_counts_even_where_the_command_line_overrides_it(read):
    assert "my.toml:2" in read("--training.steps=5", toml="[training]\nsteps = 10.5").error


def test_spaces_around_list_elements_are_taken_off_and_commas_refused(read):
    toml = '[model]\nconverters = ["float8"]\n[quantize.linear.float8]\nfilter_fqns = [" output "]'
    assert read(toml=toml).accepted.quantize.linear.float8.filter_fqns == ["output"]
    assert "has a comma in it" in read(toml=toml.replace(" output ", "output, attention.wk")).error


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"[training\n", "my.toml:1: not TOML: Expected ']'"),
        (b"[training]\nsteps = 1\nsteps = 2\n", "my.toml:3: not TOML: Cannot overwrite a value"),
        (b'[training]\n\nx = """\n', "my.toml:4: not TOML: Unterminated string"),
        (b"[job]\ndescription = '\xff'\n", "my.toml:2: not UTF-8: byte 0xff"),
        (b"a = " + b"[" * 100_000, "my.toml: values are nested too deeply"),
        (b"[training]\nsteps = " + b"9" * 5000, "my.toml: not TOML"),
    ],
)
def test_a_broken_file_is_one_clean_error(read, content, error):
    Path("my.toml").write_bytes(content)
    assert read("--job.config_file", "my.toml").error.startswith(error)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(read):
    Path("my.toml").write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 3\r\n")
    assert read("--job.config_file=my.toml").accepted.training.steps == 3


def test_a_folder_is_no_file(read):
    Path("folder.toml").mkdir()
    assert "is a folder, not a TOML file" in read("--job.config_file", "folder.toml").error


@pytest.mark.parametrize("name", ["", "\0", "x" * 5000])
def test_an_impossible_path_is_no_crash(read, name):
    assert read(f"--job.config_file={name}").error.startswith("--job.config_file: ")


def test_a_missing_file_is_answered_with_the_nearest_recipe(read):
    Path("train_configs").mkdir()
    Path("train_configs/llama_tiny.toml").touch()
    error = read("--job.config_file", "somewhere/lama_tiny.toml").error
    assert error.endswith("no such file (did you mean train_configs/llama_tiny.toml?)")


def test_a_path_of_another_project_is_found_by_its_base_name(read):
    Path("train_configs").mkdir()
    Path("train_configs/tiny.toml").write_text("[training]\nsteps = 3")
    reading = read("--job.config_file", "./torchtitan/models/llama3/train_configs/tiny.toml")
    assert reading.accepted.training.steps == 3
    assert reading.accepted.job.config_file == "train_configs/tiny.toml"
    assert reading.notices == [
        "./torchtitan/models/llama3/train_configs/tiny.toml does not exist; reading train_configs/tiny.toml instead"
    ]


def test_the_repositorys_recipes_are_found_from_any_folder(read):
    assert read("--job.config_file", "elsewhere/debug_model.toml").accepted.model.flavor == "debugmodel"


def test_without_a_file_every_key_has_its_default(read):
    job = read().accepted
    assert job == type(job)()


def test_a_quoted_truth_value_is_no_misspelt_word(read):
    text = f'[model]\nconverters = ["{FLOAT8}"]\n[{FLOAT8}]\nemulate = "true"'
    assert read(toml=text).error == f'my.toml:4: {FLOAT8}.emulate = "true": expected true or false or "auto"'
