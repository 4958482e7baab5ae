"""The rules between sections, the keys of torchtitan 0.2.2, and what a configuration error costs."""

import os
import re
import resource
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from titan_fp8.cli.config_docs import DIFFERENT_DEFAULTS
from titan_fp8.config.keys import all_keys
from titan_fp8.config.text import show
from titan_fp8.converters.config import RECIPE_NAMES
from titan_fp8.job_config import ConfigErrors, JobConfig, load_job_config
from titan_fp8.models.families import FLAVORS

REPOSITORY = Path(__file__).parents[2]
FLOAT8 = "quantize.linear.float8"
KEYS = all_keys(JobConfig)
NOT_SUPPORTED_YET = re.compile(
    # What may answer "not supported yet": other forms of checkpoints, and whole features.
    r"checkpoint\.(.*_in_hf.*|enable_ft_dataloader_checkpoints)"
    r"|fault_tolerance\..*|memory_estimation\..*|experimental\..*|comm\.mode"
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(*argv: str, world_size: int = 1, toml: str | None = None) -> JobConfig:
    options = list(argv)
    if toml is not None:
        Path("my.toml").write_text(toml)
        options = ["--job.config_file", "my.toml", *options]
    return load_job_config(options, {"WORLD_SIZE": str(world_size)})[0]


def errors(*argv: str, world_size: int = 1, toml: str | None = None) -> list[str]:
    with pytest.raises(ConfigErrors) as raised:
        load(*argv, world_size=world_size, toml=toml)
    return raised.value.render().split("\n")


def error(*argv: str, world_size: int = 1, toml: str | None = None) -> str:
    found = errors(*argv, world_size=world_size, toml=toml)
    assert len(found) == 1, found
    return found[0]


# ---- the keys


def torchtitan_defaults() -> dict[str, object]:
    tables = tomllib.loads((Path(__file__).parent / "config/torchtitan_0_2_2_defaults.toml").read_text())
    defaults: dict[str, object] = dict.fromkeys(tables.pop("unset"))

    def collect(table, prefix):
        for name, value in table.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{name}.")
            else:
                defaults[prefix + name] = value

    collect(tables, "")
    return defaults


def test_every_key_of_torchtitan_is_known_with_its_default_but_for_the_documented_ones():
    expected = torchtitan_defaults()
    assert len(expected) == 149
    documented = {one.key: one.theirs for one in DIFFERENT_DEFAULTS}
    assert {path: show(expected[path]) for path in documented} == documented
    assert {one.key: one.ours for one in DIFFERENT_DEFAULTS} == {path: show(KEYS[path].default) for path in documented}
    kept = {path: default for path, default in expected.items() if path not in documented}
    assert {path: KEYS[path].default if path in KEYS else "no such key" for path in kept} == kept


@pytest.mark.parametrize("path", torchtitan_defaults())
def test_a_file_that_spells_out_torchtitans_defaults_is_accepted(path):
    if path in {one.key for one in DIFFERENT_DEFAULTS} or path == "job.config_file":
        return
    default = torchtitan_defaults()[path]
    if default is not None:
        load(toml=f"{path} = {show(default)}")


def test_only_the_promised_features_answer_not_supported_yet():
    marked = {path for path, key in KEYS.items() if not key.is_supported}
    assert {path for path in marked if not NOT_SUPPORTED_YET.fullmatch(path)} == set()
    assert {path for path in KEYS if NOT_SUPPORTED_YET.fullmatch(path)} == marked
    assert [path for path, key in KEYS.items() if key.unsupported_values] == []


OTHER_VALUES = {bool: lambda key: not key.default, int: lambda key: key.default + 2, str: lambda key: "other"}


@pytest.mark.parametrize("path", [path for path, key in KEYS.items() if not key.is_supported])
def test_a_key_that_is_not_supported_is_refused_at_another_value(path):
    key = KEYS[path]
    if key.choices:
        others = [choice for choice in key.choices if choice != key.default]
        if not others:
            pytest.skip("its default is its only value")
        value = others[0]
    elif key.list_item is not None:
        value = "something"
    else:
        kind = next(kind for kind in OTHER_VALUES if kind in key.members)
        value = OTHER_VALUES[kind](key) if key.default is not None else 3 if kind is int else "other"
    found = errors(f"--{path}={str(value).lower() if isinstance(value, bool) else value}")
    remedy = "leave it unset" if key.default is None else f"leave it at {show(key.default)}"
    assert any(
        line.startswith(f"--{path}: {path} = ") and line.endswith(f"not supported yet; {remedy}") for line in found
    )


def test_an_unsupported_value_in_a_file_can_be_overridden():
    toml = "[parallelism]\ntensor_parallel_degree = 8"
    assert load("--parallelism.tensor_parallel_degree=1", toml=toml)


# ---- processes and batches


@pytest.mark.parametrize(
    ("options", "world_size", "answer"),
    [
        (["shard_degree=4"], 8, "data_parallel_shard_degree 4, but WORLD_SIZE is 8; set it to -1"),
        (["shard_degree=4", "replicate_degree=4"], 8, "= 16, but WORLD_SIZE is 8; set one of them to -1"),
        (["replicate_degree=3"], 8, "does not divide WORLD_SIZE 8"),
        (["shard_degree=-1", "replicate_degree=-1"], 8, "only one degree can be inferred"),
    ],
)
def test_the_degrees_fit_the_processes(options, world_size, answer):
    found = error(*(f"--parallelism.data_parallel_{option}" for option in options), world_size=world_size)
    assert found.startswith("parallelism: ")
    assert answer in found


def test_degrees_that_fit_are_accepted():
    sharded = "--parallelism.data_parallel_shard_degree=4"
    assert load(sharded, "--parallelism.data_parallel_replicate_degree=2", world_size=8)
    assert load("--parallelism.data_parallel_replicate_degree=2", world_size=8)
    assert load(sharded, "--parallelism.data_parallel_replicate_degree=-1", world_size=8)


@pytest.mark.parametrize("world_size", ["0", "-1", "two", "", "1.0"])
def test_a_world_size_that_is_no_number_of_processes_is_an_error(world_size):
    with pytest.raises(ConfigErrors, match=r"WORLD_SIZE: .* is no number of processes"):
        load_job_config([], {"WORLD_SIZE": world_size})


def test_a_global_batch_is_a_whole_number_of_microbatches():
    options = ["--training.local_batch_size=4", "--training.global_batch_size=20"]
    assert load(*options, world_size=1)
    answer = error(*options, world_size=2)
    assert answer == (
        "--training.global_batch_size: training.global_batch_size = 20: not a multiple of training.local_batch_size 4 "
        "x 2 data-parallel ranks = 8; take 16 or 24, or change local_batch_size"
    )
    assert "take 32, or" in error("--training.global_batch_size=20", world_size=4)


def test_an_early_step_needs_whole_gradients():
    early = "--optimizer.early_step_in_backward"
    assert "set training.max_norm = 0" in error(early)
    unclipped = [early, "--training.max_norm=0"]
    assert load(*unclipped)
    assert "set training.global_batch_size = 8 or -1" in error(*unclipped, "--training.global_batch_size=16")
    assert load(*unclipped, "--training.global_batch_size=16", world_size=2)
    assert 'set training.nonfinite_policy = "stop"' in error(*unclipped, "--training.nonfinite_policy=skip")


def test_nothing_is_trained_with_a_learning_rate_of_zero():
    options = ["--lr_scheduler.total_steps=400", "--training.steps=500"]
    assert "the learning rate is 0 for the last 100 of 500 training.steps" in error(*options)
    assert load(*options, "--lr_scheduler.min_lr_factor=0.1")
    assert load(*options, "--lr_scheduler.decay_ratio=0")
    assert load("--lr_scheduler.total_steps=400", "--training.steps=300")


def test_a_schedule_of_stated_length_holds_its_warm_up():
    answer = error("--lr_scheduler.total_steps=100", "--training.steps=50")
    assert answer == "lr_scheduler: lr_scheduler.warmup_steps = 200: is longer than the schedule of total_steps = 100"
    assert load("--training.steps=2"), "a trial run may end within the warm-up"


def test_a_decay_that_does_not_happen_has_no_shape():
    assert "means no decay" in error("--lr_scheduler.decay_ratio=0", "--lr_scheduler.min_lr_factor=0.1")
    assert "means no decay" in error("--lr_scheduler.decay_ratio=0", "--lr_scheduler.decay_type=cosine")


# ---- the model and its converters


def test_flavors_are_listed_when_one_is_unknown():
    answer = error("--model.flavor=9B")
    assert all(flavor in answer for flavor in FLAVORS["llama3"])


def test_overridden_dimensions_fit_together():
    assert load("--model.overrides.n_layers", "8").model.overrides.given() == {"n_layers": 8}
    assert "is not a multiple of n_heads 7" in error("--model.overrides.n_heads=7")
    assert "must be at least 1" in error("--model.overrides.n_layers=0")


def test_a_width_of_its_own_leaves_nothing_to_its_formula():
    assert "has no effect beside ffn_dim = 64" in error(
        "--model.overrides.ffn_dim=64", "--model.overrides.multiple_of=8"
    )


def test_sequences_fit_into_the_model():
    longer = ["--model.overrides.max_seq_len=16", "--training.seq_len=32"]
    assert error(*longer).startswith(
        "--training.seq_len: training.seq_len = 32: is longer than the model's 16 positions"
    )
    validated = ["--validation.enable", "--validation.steps=2", "--validation.seq_len=64", "--training.seq_len=16"]
    assert "validation.seq_len = 64" in error("--model.overrides.max_seq_len=16", *validated)


def test_a_converter_is_named_once():
    assert "is named twice" in error(f"--model.converters={FLOAT8},{FLOAT8}")
    assert "is named twice" in error("--model.converters=float8", f"--model.converters={FLOAT8}")


def test_printing_after_a_conversion_needs_one():
    assert "has no effect without a converter" in error("--model.print_after_conversion")
    assert load("--model.print_after_conversion", "--model.converters=float8")


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
@pytest.mark.parametrize("emulate", [True, "auto"])
def test_emulation_goes_with_every_recipe(recipe, emulate):
    options = [f"--{FLOAT8}.recipe_name={recipe}", f"--{FLOAT8}.emulate={str(emulate).lower()}"]
    assert load("--model.converters=float8", *options).quantize.linear.float8.emulate == emulate


def float8(*options, **kwargs):
    """The job with the converter and these of its keys, or its one error."""
    argv = ["--model.converters=float8", *(f"--{FLOAT8}.{option}" for option in options)]
    try:
        return load(*argv, **kwargs).quantize.linear.float8
    except ConfigErrors as raised:
        (line,) = raised.render().split("\n")
        return line


def test_fast_accumulation_is_no_part_of_emulation_nor_of_blockwise():
    assert float8("fast_accum_in_backward", "emulate=auto").fast_accum_in_backward
    assert "has no effect with emulate = true" in float8("fast_accum_in_backward", "emulate")
    assert "has no effect with blockwise" in float8("fast_accum_in_backward", "recipe_name=blockwise")
    mixed = ["recipe_name=blockwise", "recipe_by_fqn=wo=rowwise"]
    assert float8("fast_accum_in_backward", *mixed).fast_accum_in_backward


def test_scales_are_rounded_where_there_is_a_choice():
    rounded = "round_scales_to_power_of_2"
    assert "is for blockwise, and no linear has it (tensorwise)" in float8(rounded)
    assert "(rowwise)" in float8(rounded, "recipe_name=rowwise")
    assert float8(rounded, "recipe_name=blockwise").round_scales_to_power_of_2
    assert float8(rounded, "recipe_by_fqn=w2=blockwise").round_scales_to_power_of_2


def test_recipes_of_single_modules_are_read_from_a_file_and_the_command_line():
    table = ["attention.wo=rowwise", "layers.*.w2=blockwise"]
    assert float8(f"recipe_by_fqn={','.join(table)}").recipe_by_fqn == table
    toml = f"[model]\nconverters = ['{FLOAT8}']\n[{FLOAT8}]\nrecipe_by_fqn = {table}"
    assert load(toml=toml).quantize.linear.float8.recipe_by_fqn == table


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("recipe_by_fqn=output", 'write "pattern=recipe"'),
        ("recipe_by_fqn=output=rowwize", 'did you mean "rowwise"'),
        ("recipe_by_fqn=a..b=rowwise", "is not a module name"),
        ("recipe_by_fqn=wo=rowwise,wo=tensorwise", "is there twice"),
        ("filter_fqns=a..b", "is not a module name"),
        ("keep_first_blocks_hp=-1", "must be at least 0"),
        ("kernels=cuda", "not one of auto, triton, torch"),
        ("recipe_name=delayed", "not one of tensorwise, rowwise, rowwise_with_gw_hp, blockwise"),
    ],
)
def test_what_no_model_can_mend_is_said_without_one(option, message):
    answer = float8(option)
    assert answer.startswith((f"--{FLOAT8}.{option.partition('=')[0]}: ", f"{FLOAT8}: "))
    assert message in answer


def test_fp8_communication_needs_shards():
    gather = "enable_fsdp_float8_all_gather"
    assert "nothing is sharded, so nothing is gathered; start two processes" in float8(gather)
    copies = [f"--parallelism.data_parallel_{part}" for part in ("shard_degree=1", "replicate_degree=2")]
    answer = error("--model.converters=float8", f"--{FLOAT8}.{gather}", *copies, world_size=2)
    assert "raise parallelism.data_parallel_shard_degree" in answer
    assert float8(gather, world_size=2).enable_fsdp_float8_all_gather


@pytest.mark.parametrize("section", ["quantize.linear.mx", "quantize.grouped_mm.mx"])
def test_mxfp8_communication_needs_shards(section):
    options = [f"--model.converters={section}", f"--{section}.enable_fsdp_mxfp8_all_gather"]
    assert f"{section}.enable_fsdp_mxfp8_all_gather" in error(*options)
    assert "nothing is sharded, so nothing is gathered; start two processes" in error(*options)
    assert load(*options, world_size=2)


def test_precomputed_scales_need_fp8_communication():
    precompute = "precompute_float8_dynamic_scale_for_fsdp"
    assert "needs enable_fsdp_float8_all_gather" in float8(precompute, world_size=2)
    assert float8(precompute, "enable_fsdp_float8_all_gather", world_size=2)


def test_codes_of_shards_are_let_go_only_where_they_are_gathered():
    keep, gather = f"--{FLOAT8}.keep_fp8_weight_shards=false", f"--{FLOAT8}.enable_fsdp_float8_all_gather"
    answer = error("--model.converters=float8", keep, world_size=2)
    assert f"{FLOAT8}.keep_fp8_weight_shards" in answer
    assert "has no effect without enable_fsdp_float8_all_gather" in answer
    section = load("--model.converters=float8", keep, gather, world_size=2).quantize.linear.float8
    assert not section.keep_fp8_weight_shards


def test_gradients_in_fp32_need_parameters_in_fp32():
    assert float8("grad_weight_dtype=float32").grad_weight_dtype == "float32"
    answer = error("--model.converters=float8", f"--{FLOAT8}.grad_weight_dtype=float32", "--training.dtype=bfloat16")
    assert f'{FLOAT8}.grad_weight_dtype = "float32": has no effect with training.dtype = "bfloat16"' in answer
    assert load("--model.converters=float8", "--training.dtype=bfloat16")


def test_recomputed_weights_need_nothing_but_that_they_are_not_kept():
    force, gather = "force_recompute_fp8_weight_in_bwd", "enable_fsdp_float8_all_gather"
    assert float8(force).force_recompute_fp8_weight_in_bwd
    assert float8(force, gather, world_size=2)
    never = "--parallelism.fsdp_reshard_after_forward=never"
    options = ["--model.converters=float8", f"--{FLOAT8}.{force}", never]
    assert load(*options, world_size=2)
    assert "leave one of the two out" in error(*options, f"--{FLOAT8}.{gather}", world_size=2)


SEED = """
[model]
converters = ["quantize.linear.float8"]

[quantize.linear.float8]
enable_fsdp_float8_all_gather = true
precompute_float8_dynamic_scale_for_fsdp = true
filter_fqns = ["output", "auto_filter_small_kn"]

[compile]
enable = true
components = ["model", "loss"]
"""


def test_the_file_of_the_seed_documents_is_accepted_with_two_shards():
    section = load(toml=SEED, world_size=2).quantize.linear.float8
    assert section.enable_fsdp_float8_all_gather
    assert section.precompute_float8_dynamic_scale_for_fsdp
    assert "start two processes" in error(toml=SEED)


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "train_configs").glob("llama3_*.toml")), ids=lambda p: p.stem)
def test_the_commented_lines_of_a_recipe_turn_float8_on(recipe):
    lines = recipe.read_text().splitlines()
    start = lines.index("# [quantize.linear.float8]")
    end = lines.index("", start)
    lines[start:end] = [line.removeprefix("# ") for line in lines[start:end]]
    text = "\n".join(lines).replace("# converters = ", "converters = ")
    job = load(toml=text, world_size=128)
    assert job.model.converters == [FLOAT8]
    assert job.quantize.linear.float8.enable_fsdp_float8_all_gather


@pytest.mark.parametrize("name", ["enable_fsdp_fp8_all_gather", "precompute_fp8_dynamic_scale_for_fsdp"])
def test_names_of_another_stack_are_answered_with_ours(name):
    assert f"did you mean {name.replace('fp8', 'float8')}?" in float8(name, world_size=2)


def test_nothing_is_offloaded_without_shards():
    offload = ["--training.enable_cpu_offload", "--parallelism.data_parallel_replicate_degree=2"]
    assert "only sharded parameters are offloaded" in error(*offload, world_size=2)
    assert load(*offload, world_size=4)
    assert load("--training.enable_cpu_offload")


def test_a_dense_model_has_no_experts_to_balance():
    assert "has no experts" in error("--debug.moe_force_load_balance")


# ---- data and files


@pytest.mark.parametrize("dataset", ["text", "tokens"])
def test_local_data_need_a_path_that_exists(dataset):
    assert "needs training.dataset_path" in error(f"--training.dataset={dataset}")
    missing = error(f"--training.dataset={dataset}", "--training.dataset_path=nowhere")
    assert missing.startswith("--training.dataset_path: training.dataset_path = ")
    assert "does not exist" in missing
    Path("data").mkdir()
    assert load(f"--training.dataset={dataset}", "--training.dataset_path=data")


def test_a_path_that_nothing_reads_is_refused():
    assert error("--training.dataset_path=.").startswith("--training.dataset_path: ")
    assert load("--training.dataset=c4_test", "--training.dataset_path=.")


@pytest.mark.parametrize("dataset", ["c4", "hf:owner/name"])
def test_a_local_copy_of_a_streamed_data_set_exists(dataset):
    assert "no such file or folder" in error(f"--training.dataset={dataset}", "--training.dataset_path=nowhere")


def test_a_validation_has_an_end():
    assert "have no end" in error("--validation.enable")
    assert load("--validation.enable", "--validation.steps=3")
    assert load("--validation.enable", "--validation.dataset=c4_validation")


def test_what_is_validated_on_is_checked_too():
    validate = ["--validation.enable", "--validation.steps=3"]
    assert "needs validation.dataset_path" in error(*validate, "--validation.dataset=text")
    assert 'did you mean "synthetic"?' in error(*validate, "--validation.dataset=synthetik")
    assert "is what training reads" in error(*validate, "--training.dataset=c4", "--validation.dataset=c4")


def test_worker_settings_need_workers():
    assert "needs num_workers" in error("--training.dataloader.persistent_workers")
    assert "needs num_workers" in error("--training.dataloader.prefetch_factor=3")
    assert load("--training.dataloader.prefetch_factor=3", "--training.dataloader.num_workers=1")


@pytest.mark.parametrize("key", ["hf_assets_path", "tokenizer_path"])
def test_a_tokenizer_exists(key):
    assert "no such file or folder" in error(f"--model.{key}=nowhere")
    Path("folder").mkdir()
    assert "is a folder without a tokenizer.json" in error(f"--model.{key}=folder")
    Path("folder/tokenizer.json").touch()
    assert load(f"--model.{key}=folder")


def test_two_tokenizers_are_one_too_many():
    for name in "ab":
        Path(name).mkdir()
        Path(name, "tokenizer.json").touch()
    assert "keep that one" in error("--model.hf_assets_path=a", "--model.tokenizer_path=b")
    assert load("--model.hf_assets_path=a", "--model.tokenizer_path=a")


def test_an_initial_checkpoint_exists():
    options = ["--checkpoint.enable", "--checkpoint.initial_load_path=nowhere"]
    assert "no such file or folder" in error(*options)
    assert load("--checkpoint.enable", "--checkpoint.initial_load_path=.")


def test_checkpoint_keys_that_contradict_each_other_are_refused():
    on = "--checkpoint.enable"
    assert "saves none" in error(on, "--checkpoint.load_only", "--checkpoint.create_seed_checkpoint")
    assert "without checkpoint.initial_load_path" in error(on, "--checkpoint.no_initial_load_model_only")
    assert "while checkpoint.load_only = true" in error(on, "--checkpoint.load_only", "--checkpoint.interval=3")
    full = "--checkpoint.no_last_save_model_only"
    assert "has no effect while checkpoint.last_save_model_only" in error(
        on, full, "--checkpoint.export_dtype=bfloat16"
    )
    seed = "--checkpoint.create_seed_checkpoint"
    assert "runs in one process, not 2" in error(on, seed, world_size=2)
    assert load(on, seed)


def test_the_memory_budget_needs_the_compiler():
    budget = "--activation_checkpoint.mode=memory_budget"
    assert "set compile.enable = true" in error(budget)
    assert 'with "model" in compile.components' in error(budget, "--compile.enable", "--compile.components=loss")
    assert load(budget, "--compile.enable")


def test_compiling_nothing_is_refused():
    assert "leaves nothing to compile" in error("--compile.enable", "--compile.components=")


# ---- a configuration class of the user's own

CUSTOM = """
from titan_fp8.config.section import Section, key
from titan_fp8.job_config import JobConfig as Base

class Mine(Section):
    '''Settings of mine.'''
    knob: int = key(3, ge=1, unit="turns")
    '''How far to turn.'''

class JobConfig(Base):
    mine: Mine = Mine()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> str:
        Path(f"{name}.py").write_text(text)
        return name

    yield write
    for name in [name for name in sys.modules if name.startswith("custom_")]:
        del sys.modules[name]


def test_a_custom_class_is_the_root(module):
    name = module("custom_mine", CUSTOM)
    job = load("--mine.knob=5", toml=f"[job]\ncustom_config_module = '{name}'\n[mine]\nknob = 4")
    assert job.mine.knob == 5  # pyright: ignore
    assert "must be at least 1" in error("--mine.knob=0", f"--job.custom_config_module={name}")
    assert "--mine.knob: no such section" in error("--mine.knob=5")


def test_a_section_of_the_users_own_comes_before_an_older_name(module):
    name = module("custom_float8", CUSTOM.replace("mine:", "float8:"))
    assert load("--float8.knob=5", toml=f"[job]\ncustom_config_module = '{name}'").float8.knob == 5  # pyright: ignore


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("x = 1", "exports no JobConfig"),
        ("class JobConfig: pass", "exports no JobConfig"),
        ("1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(.*custom_wrong\.py:1\)"),
        ("import no_such_module_at_all", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_module_without_a_job_config_is_an_error(module, text, answer):
    name = module("custom_wrong", text)
    assert re.search(answer, error(f"--job.custom_config_module={name}"))


def test_a_missing_module_is_an_error_at_its_line():
    assert error(toml="[job]\ncustom_config_module = 'no_such'").startswith("my.toml:2: job.custom_config_module = ")


# ---- cost


def run(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environ.pop("WORLD_SIZE", None)
    command = [sys.executable, "-c", textwrap.dedent(code), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


def test_a_configuration_error_imports_no_heavy_library_and_takes_well_under_a_second():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = run(
        """
        import sys
        from titan_fp8.cli.main import main
        code = main(["check", "--training.steps", "ten"])
        heavy = {"torch", "numpy", "datasets", "tokenizers", "triton", "pyarrow", "pandas"} & set(sys.modules)
        print(sorted(heavy))
        sys.exit(code)
        """
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.stdout == "[]\n"
    assert ran.stderr == "--training.steps: training.steps = ten: expected an integer\n"
    assert ran.returncode == 2
    # Processor time, since other work on the machine is not ours.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_a_data_path_that_does_not_exist_is_said_once():
    found = error("--training.dataset=c4_test", "--training.dataset_path=nowhere")
    assert found.startswith("--training.dataset_path: ")


def test_a_missing_tokenizer_says_how_to_do_without_a_file():
    found = error(toml='[model]\nhf_assets_path = "./tests/assets/tokenizer"')
    assert found.startswith("my.toml:2: ")
    assert "--model.hf_assets_path=None" in found
    assert load("--model.hf_assets_path=None", toml='[model]\nhf_assets_path = "x"').model.hf_assets_path is None


def test_what_a_document_of_a_txt_file_is_needs_text_to_read(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    option = "--training.txt_documents=paragraph"
    assert "is for text" in error(option)
    assert load(option, "--training.dataset=text", "--training.dataset_path=a.txt")
    assert load(option, "--validation.enable", "--validation.dataset=text", "--validation.dataset_path=a.txt")
