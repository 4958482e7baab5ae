"""The package as a library: models that are not ours, in a loop written by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

import titan_fp8
from tests.tolerances import SQNR_DB, sqnr_db
from titan_fp8.quantization.recipes import RECIPES

transformers = pytest.importorskip("transformers", reason="the dev extra brings transformers")

ALL_RECIPES = pytest.mark.parametrize("recipe", RECIPES)


def hugging_face_llama() -> nn.Module:
    """A small Llama of the transformers library, random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=64,
        attn_implementation="eager",
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def losses_of(model: nn.Module, steps: int = 12) -> list[float]:
    """A loop as a user writes it: bf16 autocast, AdamW, one batch learned by heart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@ALL_RECIPES
@pytest.mark.parametrize("cache_weights", [False, True])
def test_a_hugging_face_llama_learns_in_float8_as_in_bf16(recipe: str, cache_weights: bool) -> None:
    model = hugging_face_llama()
    reference = copy.deepcopy(model)
    report = titan_fp8.convert_to_float8_training(
        model, recipe_name=recipe, filter_fqns=["lm_head"], emulate=True, cache_weights=cache_weights
    )
    assert len(report.converted) == 14
    assert isinstance(model.model.layers[1].mlp.down_proj, titan_fp8.Float8Linear)
    losses, expected = losses_of(model), losses_of(reference)
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(expected, rel=0.05)


@ALL_RECIPES
def test_caching_weights_changes_no_bit_of_a_training_run(recipe: str) -> None:
    runs = []
    for cache_weights in (False, True):
        model = hugging_face_llama()
        titan_fp8.convert_to_float8_training(model, recipe_name=recipe, emulate=True, cache_weights=cache_weights)
        runs.append(losses_of(model, steps=4))
    assert runs[0] == runs[1]


def test_the_eager_mode_api_computes_the_same_bits() -> None:
    runs = []
    for convert in (titan_fp8.convert_to_float8_training, titan_fp8.convert_to_float8_nocompile_training):
        model = hugging_face_llama()
        convert(model, emulate=True)
        runs.append(losses_of(model, steps=4))
    assert runs[0] == runs[1]


def test_the_first_and_last_blocks_of_a_hugging_face_model_can_stay_in_high_precision() -> None:
    model = hugging_face_llama()
    titan_fp8.convert_to_float8_training(model, keep_first_blocks_hp=1, emulate=True)
    kinds = [type(layer.self_attn.q_proj) for layer in model.model.layers]
    assert kinds == [nn.Linear, titan_fp8.Float8Linear]


def test_gradient_checkpointing_of_transformers_changes_no_bit() -> None:
    runs = []
    for checkpointing in (False, True):
        model = hugging_face_llama()
        titan_fp8.convert_to_float8_nocompile_training(model, recipe_name="rowwise", emulate=True)
        if checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
        runs.append(losses_of(model, steps=3))
    assert runs[0] == runs[1]


def hugging_face_experts(experts_implementation: str) -> nn.Module:
    """A small Qwen3-MoE of the transformers library, whose groups of tokens end anywhere."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        attn_implementation="eager",
        experts_implementation=experts_implementation,
        use_cache=False,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def test_experts_of_hugging_face_learn_in_float8_as_in_high_precision() -> None:
    model, reference = (hugging_face_experts("grouped_mm") for _ in range(2))
    report = titan_fp8.convert_to_float8_grouped_training(model, emulate=True)
    assert [row.fqn for row in report.converted] == [
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]
    losses, expected = losses_of(model), losses_of(reference)
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(expected, rel=0.05)
    assert losses != expected


def test_experts_of_hugging_face_that_loop_are_refused() -> None:
    model = hugging_face_experts("eager")
    titan_fp8.convert_to_float8_grouped_training(model, emulate=True)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.experts: .* neither torch\._grouped_mm"):
        model(input_ids=torch.arange(8).view(1, 8))


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 10))


@ALL_RECIPES
def test_a_plain_sequential_keeps_its_bias_and_is_as_exact_as_the_recipe(recipe: str) -> None:
    model = sequential()
    with torch.no_grad():
        model[0].bias.fill_(3.0)
    exact = copy.deepcopy(model).double()
    titan_fp8.convert_to_float8_nocompile_training(model, recipe_name=recipe, filter_fqns=["4"], emulate=True)
    x = torch.randn(200, 128)
    first: Tensor = model[0](x)
    bound = SQNR_DB[recipe, "uniform"].output
    assert sqnr_db((exact[0](x.double()) - 3).detach(), (first - 3).detach()) > bound - 0.5
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_state_dict_moves_between_converted_and_plain_models() -> None:
    converted, plain = sequential(), sequential()
    titan_fp8.convert_to_float8_training(converted, filter_fqns=["4"], emulate=True, cache_weights=True)
    plain.load_state_dict(converted.state_dict())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    converted.load_state_dict(plain.state_dict())
    fresh = copy.deepcopy(plain)
    titan_fp8.convert_to_float8_training(fresh, filter_fqns=["4"], emulate=True)
    x = torch.randn(4, 128)
    assert torch.equal(converted(x), fresh(x))


def test_wrong_arguments_are_reported_together() -> None:
    with pytest.raises(ValueError, match="rowise") as error:
        titan_fp8.convert_to_float8_training(sequential(), recipe_name="rowise", filter_fqns=["outptu"], emulate=True)
    assert "outptu" in str(error.value)
