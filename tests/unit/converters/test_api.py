"""The functions of the package: on models that are not ours, in loops that are not ours."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import titan_fp8
from tests.unit.converters.models import H200, Model, converted_names
from titan_fp8.converters import api
from titan_fp8.converters.config import Float8LinearSection
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.moe import MoE
from titan_fp8.quantization.sharded_weight import ShardableFloat8Weight

DOC = Path(__file__).parents[3] / "docs" / "float8.md"
CONVERSIONS = [titan_fp8.convert_to_float8_training, titan_fp8.convert_to_float8_nocompile_training]
both_conversions = pytest.mark.parametrize("convert", CONVERSIONS, ids=["training", "nocompile"])
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without a GPU")


def test_every_promised_name_is_there() -> None:
    assert [name for name in titan_fp8.__all__ if not hasattr(titan_fp8, name)] == []
    assert {*titan_fp8._HOME, "__version__"} == set(titan_fp8.__all__)


def test_the_arguments_are_the_keys_of_the_configuration() -> None:
    training, nocompile = (set(inspect.signature(convert).parameters) for convert in CONVERSIONS)
    assert training - set(Float8LinearSection.model_fields) == {"model", "cache_weights"}
    # The hand-written loop calls the function instead.
    assert set(Float8LinearSection.model_fields) - training == {"precompute_float8_dynamic_scale_for_fsdp"}
    assert training - nocompile == {"kernels"}
    assert nocompile - training == set()


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 30) -> list[float]:
    torch.manual_seed(1)
    x = torch.randn(64, 32)
    target = x.roll(1, 1)
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@both_conversions
@pytest.mark.parametrize("cache", [False, True])
def test_the_optimizer_made_before_the_conversion_trains_anybodys_model(convert, cache: bool) -> None:
    model = sequential()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    report = convert(model, recipe_name="rowwise", emulate=True, cache_weights=cache)
    assert len(report.converted) == 2
    losses = train(model, optimizer)
    assert losses[-1] < losses[0] / 2
    reference = sequential()
    titan_fp8.convert_to_float8_training(reference, recipe_name="rowwise", emulate=True)
    assert train(reference, torch.optim.AdamW(reference.parameters(), lr=1e-2)) == losses


@pytest.mark.parametrize("cache", [False, True])
def test_weights_made_for_the_all_gather_train_alike_without_it(cache: bool) -> None:
    plain, wrapped = sequential(), sequential()
    titan_fp8.convert_to_float8_training(plain, emulate=True)
    titan_fp8.convert_to_float8_training(wrapped, emulate=True, enable_fsdp_float8_all_gather=True, cache_weights=cache)
    assert all(isinstance(wrapped[number].weight, ShardableFloat8Weight) for number in (0, 2))
    losses = [train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 5) for model in (plain, wrapped)]
    assert losses[0] == losses[1]
    titan_fp8.precompute_float8_dynamic_scale_for_fsdp(wrapped)
    assert list(wrapped.state_dict()) == list(plain.state_dict())


def test_a_table_of_recipes_may_be_a_dict_or_a_list() -> None:
    reports = []
    for table in (
        {"attention.wo": "rowwise", "w1": "rowwise_with_gw_hp"},
        ["attention.wo=rowwise", "w1=rowwise_with_gw_hp"],
    ):
        reports.append(titan_fp8.convert_to_float8_training(Model(), recipe_by_fqn=table, emulate=True))
    assert reports[0] == reports[1]
    assert reports[0].recipe == "tensorwise + rowwise + rowwise_with_gw_hp"


def test_all_arguments_reach_the_layers() -> None:
    model = Model(256)
    titan_fp8.convert_to_float8_training(
        model,
        recipe_name="blockwise",
        filter_fqns=("output",),
        recipe_by_fqn={"attention.wo": "rowwise"},
        keep_first_blocks_hp=1,
        emulate="auto",
        kernels="auto",
        round_scales_to_power_of_2=True,
        fast_accum_in_backward=True,
        grad_weight_dtype=torch.float32,
        force_recompute_fp8_weight_in_bwd=True,
    )
    assert converted_names(model) == {
        f"layers.1.{name}" for name in ("attention.wq", "attention.wk", "attention.wo", "w1")
    }
    config = model.layers[1].w1.config
    assert (config.recipe.name, config.recipe.power_of_two_scales) == ("blockwise", True)
    assert (config.fast_accum_in_backward, config.recompute_weight_in_backward) == (True, True)
    assert config.grad_weight_dtype == torch.float32
    assert model.layers[1].attention.wo.config.recipe.name == "rowwise"


@both_conversions
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe_name": "tensorwize"}, 'did you mean "tensorwise"'),
        ({"recipe_name": ["tensorwise"]}, r"recipe_name = \['tensorwise'\]: expected the name of a recipe, tensorwise"),
        ({"recipe_name": None}, "recipe_name = None: expected the name of a recipe, .*; leave it out for tensorwise"),
        ({"recipe_name": "delayed"}, "not supported yet"),
        ({"filter_fqns": "output"}, "expected a list"),
        ({"filter_fqns": None}, "filter_fqns = None"),
        ({"filter_fqns": [3]}, r"filter_fqns = \[3\]"),
        ({"filter_fqns": ["outptu"]}, 'did you mean "output"'),
        ({"recipe_by_fqn": {"output": None}}, "expected a dict"),
        ({"recipe_by_fqn": "output=rowwise"}, "expected a dict"),
        ({"recipe_by_fqn": {"output": "rowwize"}}, 'did you mean "rowwise"'),
        ({"keep_first_blocks_hp": -1}, "keep_first_blocks_hp = -1: expected a number of blocks"),
        ({"keep_last_blocks_hp": True}, "keep_last_blocks_hp = True: expected a number of blocks"),
        ({"keep_last_blocks_hp": 3}, "keep_last_blocks_hp = 3: 0 . 3 blocks are more than the 2"),
        ({"fast_accum_in_backward": "no"}, "expected True or False"),
        ({"cache_weights": 1}, "cache_weights = 1: expected True or False"),
        ({"round_scales_to_power_of_2": True}, "round_scales_to_power_of_2: is for blockwise"),
        (
            {"recipe_name": "blockwise", "fast_accum_in_backward": True, "emulate": "auto"},
            "has no effect with blockwise",
        ),
        ({"fast_accum_in_backward": True}, "fast_accum_in_backward: has no effect with emulate = true"),
        ({"keep_fp8_weight_shards": False}, "keep_fp8_weight_shards: false has no effect without enable_fsdp"),
        ({"keep_fp8_weight_shards": 0}, "keep_fp8_weight_shards = 0: expected True or False"),
        ({"emulate": "maybe"}, 'expected true, false or "auto"'),
        ({"grad_weight_dtype": torch.float16}, "grad_weight_dtype"),
    ],
)
def test_wrong_arguments_are_value_errors(convert, arguments: dict, message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        convert(model, **({"emulate": True} | arguments))
    assert converted_names(model) == set()


def test_wrong_arguments_come_together_with_what_the_model_breaks() -> None:
    model = Model()
    model.layers[0].w1 = nn.Linear(30, 32)
    with pytest.raises(titan_fp8.ConversionError) as error:
        titan_fp8.convert_to_float8_training(
            model, cache_weights=None, keep_first_blocks_hp=-1, filter_fqns=["outptu"], emulate="no", kernels="cuda"
        )
    starts = ["keep_first", "cache_weights", "filter_fqns", "layers.0.w1", "emulate", "kernels"]
    found = error.value.violations
    assert len(found) == len(starts)
    assert all(any(violation.startswith(start) for violation in found) for start in starts), found


EVERY = [
    titan_fp8.convert_to_float8_training,
    titan_fp8.convert_to_float8_nocompile_training,
    titan_fp8.convert_to_float8_grouped_training,
    titan_fp8.convert_to_mxfp8_training,
    titan_fp8.convert_to_mxfp8_grouped_training,
]
every_conversion = pytest.mark.parametrize("convert", EVERY, ids=lambda convert: convert.__name__)


def both_kinds() -> nn.ModuleDict:
    """A model with linears and with experts."""
    dims = ModelDims(dim=64, n_layers=1, n_heads=2, vocab_size=97, n_experts=4, moe_ffn_dim=32, top_k=2)
    return nn.ModuleDict({"linear": nn.Linear(64, 64), "moe": MoE(dims, residual_std=0.02)})


@every_conversion
def test_only_a_bool_turns_anything_on_or_off(convert) -> None:
    flags = [name for name, each in inspect.signature(convert).parameters.items() if each.annotation is bool]
    assert "cache_weights" in flags
    for name in flags:
        for value in ("no", "x", 1, None):
            model = both_kinds()
            with pytest.raises(titan_fp8.ConversionError, match=rf"{name} = {value!r}: expected True or False"):
                convert(model, emulate="auto", **{name: value})
            assert {type(module) for module in model.modules()} == {type(module) for module in both_kinds().modules()}


@every_conversion
def test_none_stands_for_a_default_only_where_it_is_the_default(convert) -> None:
    arguments = {name: each for name, each in inspect.signature(convert).parameters.items() if name != "model"}
    for name in [name for name, each in arguments.items() if each.default is not None]:
        with pytest.raises(titan_fp8.ConversionError, match=rf"(?m)^{name} = None: "):
            convert(both_kinds(), **({"emulate": True} | {name: None}))


@every_conversion
@pytest.mark.parametrize("names", [None, 3, [1], ["experts", None], {"experts": 1}], ids=str)
def test_names_are_a_list_of_strings(convert, names) -> None:
    for which in {"fqns", "filter_fqns"} & set(inspect.signature(convert).parameters):
        with pytest.raises(
            titan_fp8.ConversionError, match=rf"{which} = {re.escape(repr(names))}: expected a list of names"
        ):
            convert(both_kinds(), emulate=True, **{which: names})


@every_conversion
@pytest.mark.parametrize("emulate", ["yes", "true", 1, None])
def test_emulation_is_a_bool_or_auto(convert, emulate) -> None:
    with pytest.raises(titan_fp8.ConversionError, match=rf'emulate = {emulate!r}: expected true, false or "auto"'):
        convert(both_kinds(), emulate=emulate)


@every_conversion
def test_what_is_converted_is_a_module(convert) -> None:
    for model in (nn.Linear, None, [nn.Linear(32, 32)]):
        with pytest.raises(titan_fp8.ConversionError, match=r"^model = .*: expected a torch.nn.Module"):
            convert(model, emulate=True)


def test_all_wrong_arguments_of_experts_come_together() -> None:
    with pytest.raises(titan_fp8.ConversionError) as error:
        titan_fp8.convert_to_float8_grouped_training(
            both_kinds(), fqns=None, aligned_groups="no", cache_weights=0, emulate="yes"
        )
    starts = ["fqns = None", "aligned_groups = 'no'", "cache_weights = 0", "emulate = 'yes'"]
    found = error.value.violations
    assert len(found) == len(starts)
    assert all(violation.startswith(start) for violation, start in zip(found, starts, strict=True)), found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"cache_weights": True, "enable_fsdp_float8_all_gather": True},
            "cache_weights = True has no effect with enable",
        ),
        ({"fast_accum_in_backward": True}, "fast_accum_in_backward: has no effect with emulate = true"),
    ],
)
def test_options_of_experts_that_would_do_nothing_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(titan_fp8.ConversionError, match=message):
        titan_fp8.convert_to_float8_grouped_training(both_kinds(), emulate=True, **arguments)


@without_a_gpu
@both_conversions
def test_nothing_is_emulated_unasked(convert) -> None:
    with pytest.raises(ValueError, match="has no FP8 tensor cores"):
        convert(Model())


@without_a_gpu
def test_triton_kernels_are_not_replaced_in_silence() -> None:
    with pytest.raises(ValueError, match='kernels = "triton", but CPU is no CUDA device'):
        titan_fp8.convert_to_float8_training(Model(), emulate=True, kernels="triton")


@pytest.mark.parametrize("installed", [False, True])
def test_without_the_compiler_a_gpu_casts_with_triton_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(api, "detect_device", lambda: H200)
    monkeypatch.setattr("titan_fp8.converters.support.has_triton", lambda: installed)
    if installed:
        assert titan_fp8.convert_to_float8_nocompile_training(Model()).kernels == "triton"
    else:
        assert titan_fp8.convert_to_float8_training(Model()).kernels == "torch"
        with pytest.raises(ValueError, match="Triton is not installed"):
            titan_fp8.convert_to_float8_nocompile_training(Model())


@pytest.mark.parametrize("gather", [False, True])
def test_writes_that_nothing_sees_are_told_by_mark_stale(gather: bool) -> None:
    model = sequential()
    titan_fp8.convert_to_float8_training(model, emulate=True, cache_weights=True, enable_fsdp_float8_all_gather=gather)
    x = torch.randn(16, 32)
    before = model(x)
    weight = model[2].weight.tensor if gather else model[2].weight
    memory = torch.from_numpy(weight.detach().numpy())
    memory.zero_()
    titan_fp8.mark_stale(model)
    assert torch.equal(model(x), model[2].bias.expand(16, 32))
    assert not torch.equal(model(x), before)


def test_a_hugging_face_llama_trains_as_the_documentation_shows() -> None:
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "transformers" in block]
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(example, str(DOC), "exec"), names)
    report = names["report"]
    assert {row.reason for row in report.rows} == {None, 'filter "lm_head"', "last block"}
    assert len(report.converted) == 3 * 7
    assert report.recipe == "rowwise + blockwise"
    assert report.weights == "cast once an optimizer step"
    assert names["loss"].isfinite()
    assert all(parameter.isfinite().all() for parameter in names["model"].parameters())


def test_a_tied_hugging_face_head_trains_and_stays_tied() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight \(high precision\), lm_head\.weight \(tensorwise\)"
    ):
        titan_fp8.convert_to_float8_training(model, emulate=True, enable_fsdp_float8_all_gather=True)
    titan_fp8.convert_to_float8_training(model, emulate=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.randint(0, 64, (2, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.lm_head.weight.grad.isfinite().all()
