"""Fused producers in families with experts and latent attention: what is fused there, and that it changes little."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tests.cases import some_by_hand
from tests.tolerances import FUSED_VS_EAGER_SQNR_DB, FUSED_VS_UNFUSED_LOSS_DB, sqnr_db
from tests.unit.converters.fused_models import (
    OnceRoundedAttention,
    OnceRoundedFeedForward,
    OnceRoundedNorm,
    run,
    same_bits,
)
from titan_fp8.converters.api import convert_to_float8_training
from titan_fp8.converters.fusion import Float8FeedForward, Float8RMSNorm, fuse_producers
from titan_fp8.models.attention import Attention
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.moe import Gate, MoE
from titan_fp8.models.norm import RMSNorm
from titan_fp8.parallel.activation_checkpoint import apply_activation_checkpointing
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection
from titan_fp8.parallel.expert_load import force_balance
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES

# Sizes that every recipe takes; 38 tokens in `run`.
SIZES: dict[str, Any] = {
    "dim": 128, "n_layers": 2, "n_heads": 2, "ffn_dim": 256, "vocab_size": 64, "max_seq_len": 32, "n_experts": 19,
    "top_k": 2, "moe_ffn_dim": 128,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "n_heads": 1, "kv_lora_rank": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama4": {"n_shared_experts": 1, "top_k": 1, "router_score": "sigmoid", "score_before_experts": True}
    | {"nope_interval": 2, "qk_norm": "l2", "balance_rate": 1e-3},
    "qwen3_moe": {"qk_norm": "head", "head_dim": 64, "router_norm": True},
    "mixtral": {"router_norm": True},
    "deepseek_v3": LATENT
    | {"q_lora_rank": 128, "n_shared_experts": 1, "first_dense_layers": 1}
    | {"router_score": "sigmoid", "router_norm": True, "balance_rate": 1e-3},
    "deepseek_v2": LATENT | {"n_shared_experts": 2, "first_dense_layers": 1},
}
ALL_FAMILIES = pytest.mark.parametrize("family", FAMILIES)
ALL_RECIPES = pytest.mark.parametrize("recipe", RECIPES)


def build(
    family: str,
    recipe: str | None,
    *,
    fused: bool,
    skip: Callable[[str], bool] = lambda name: False,
    n_layers: int = 2,
) -> Decoder:
    """A decoder whose blocks' linears run in `recipe`, but for routers and those whose name `skip` says yes to."""
    dims = ModelDims(**SIZES | FAMILIES[family] | {"n_layers": n_layers})
    model = Decoder(dims, compute_dtype=torch.bfloat16)
    config = None if recipe is None else Float8Config(RECIPES[recipe], emulate=True)
    for name, linear in list(model.layers.named_modules()):
        if config is not None and isinstance(linear, nn.Linear) and not isinstance(linear, Gate) and not skip(name):
            model.layers.set_submodule(name, Float8Linear.from_linear(linear, config))
    initialize(model, seed=3)
    if fused:
        fuse_producers(model)
    return model


EXPERTS_LAYERS = {"llama4": (0, 1), "qwen3_moe": (0, 1), "mixtral": (0, 1), "deepseek_v3": (1,), "deepseek_v2": (1,)}


INNER_NORMS = {
    "llama4": set(),
    "qwen3_moe": {"q_norm", "k_norm"},
    "mixtral": set(),
    "deepseek_v3": {"q_norm", "kv_norm"},
    "deepseek_v2": {"kv_norm"},
}
"""Norms within attention, which stay."""


def expected_parts(family: str, *, one_function: bool) -> set[str]:
    """What is fused in the two layers; `one_function`: the recipe lets one function compute several products."""
    parts = {f"layers.{layer}.attention_norm" for layer in (0, 1)}
    if 0 not in EXPERTS_LAYERS[family]:
        parts |= {"layers.0.ffn_norm"} | ({"layers.0.feed_forward"} if one_function else set())
    if one_function and not family.startswith("deepseek"):
        parts |= {f"layers.{layer}.attention" for layer in (0, 1)}
    if one_function and "n_shared_experts" in FAMILIES[family]:
        parts |= {f"layers.{layer}.moe.shared_experts" for layer in EXPERTS_LAYERS[family]}
    return parts


@ALL_FAMILIES
@ALL_RECIPES
def test_norms_before_experts_and_of_latent_vectors_stay_and_all_else_is_fused(family: str, recipe: str) -> None:
    model = build(family, recipe, fused=False)
    fused = fuse_producers(model)
    assert len(fused) == len(set(fused))
    assert set(fused) == expected_parts(family, one_function=RECIPES[recipe].grad_weight_in_float8)
    plain = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is RMSNorm}
    assert plain == {"ffn_norm", "norm"} | INNER_NORMS[family]
    for block in model.layers.values():
        if block.moe is not None:
            assert type(block.ffn_norm) is RMSNorm
            assert type(block.moe) is MoE
            assert type(block.moe.router.gate) is Gate


@pytest.mark.parametrize(("family", "keeps"), [("mixtral", True), ("qwen3_moe", True), ("deepseek_v3", False)])
def test_wo_keeps_what_it_reads_where_attention_keeps_it_too(family: str, keeps: bool) -> None:
    """Latent attention keeps values that are padded, and wo reads them without the padding."""
    for block in build(family, "rowwise", fused=True).layers.values():
        assert block.attention.wo.config.keeps_input == keeps


@pytest.mark.parametrize("reader", ["wq_a", "wkv_a"])
def test_the_norm_before_latent_attention_stays_where_a_reader_is_in_high_precision(reader: str) -> None:
    model = build("deepseek_v3", "rowwise", fused=False, skip=lambda name: name.endswith(f".{reader}"))
    expected = {name for name in expected_parts("deepseek_v3", one_function=True) if "attention_norm" not in name}
    assert set(fuse_producers(model)) == expected
    run(model)


@pytest.mark.parametrize("weight", ["w1", "w2", "w3"])
def test_shared_experts_stay_where_one_of_their_linears_is_in_high_precision(weight: str) -> None:
    model = build("llama4", "rowwise", fused=False, skip=lambda name: name.endswith(f"shared_experts.{weight}"))
    expected = {name for name in expected_parts("llama4", one_function=True) if "shared_experts" not in name}
    assert set(fuse_producers(model)) == expected
    run(model)


class OnceRoundedSharedExperts(OnceRoundedFeedForward):
    """SwiGLU with the fused one's rounding points, of one tensor, which routed experts read too."""

    def hidden(self, x: Any) -> Tensor:
        """As there."""
        return super().hidden((x, x))


def _round_once(model: Decoder, *, one_function: bool) -> Decoder:
    """`fused_models.round_once` for what is fused here."""
    for block in model.layers.values():
        block.attention_norm.__class__ = OnceRoundedNorm
        block.attention_norm.readers = 1
        if one_function and type(block.attention) is Attention:
            block.attention_norm.readers = 3
            block.attention.__class__ = OnceRoundedAttention
        if block.moe is None:
            block.ffn_norm.__class__ = OnceRoundedNorm
            block.ffn_norm.readers = 2 if one_function else 1
        if one_function and block.moe is None:
            block.feed_forward.__class__ = OnceRoundedFeedForward
        elif one_function and block.moe.shared_experts is not None:
            block.moe.shared_experts.__class__ = OnceRoundedSharedExperts
    return model


@ALL_FAMILIES
@ALL_RECIPES
def test_a_fused_model_equals_one_that_rounds_at_the_same_points_bit_for_bit(family: str, recipe: str) -> None:
    model = _round_once(build(family, recipe, fused=False), one_function=RECIPES[recipe].grad_weight_in_float8)
    assert same_bits(run(build(family, recipe, fused=True)), run(model)) == []


def _balanced(model: Decoder) -> dict[str, Tensor]:
    """With experts that are chosen in turns: a difference in the last bit must not choose others."""
    force_balance(model)
    return run(model)


@ALL_FAMILIES
@ALL_RECIPES
def test_a_fused_model_is_as_exact_as_one_that_is_not(family: str, recipe: str) -> None:
    fused, unfused = (_balanced(build(family, recipe, fused=fused)) for fused in (True, False))
    true = build(family, None, fused=False).float()
    true.compute_dtype = torch.float32
    exact = _balanced(true)
    assert fused.keys() == unfused.keys() == exact.keys()
    losses = []
    for name, value in unfused.items():
        if name == "loss":
            continue
        # In latent attention what moved by one code is cast once more, and moves others.
        least = sqnr_db(exact[name], value) if LATENT.items() <= FAMILIES[family].items() else FUSED_VS_EAGER_SQNR_DB
        assert sqnr_db(value, fused[name]) > least, name
        losses.append(sqnr_db(exact[name], value) - sqnr_db(exact[name], fused[name]))
    assert sum(losses) / len(losses) < FUSED_VS_UNFUSED_LOSS_DB
    torch.testing.assert_close(fused["loss"], unfused["loss"], rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("family", "recipe"),
    some_by_hand(
        [
            ("llama4", "tensorwise"),
            ("llama4", "rowwise_with_gw_hp"),
            ("deepseek_v3", "rowwise"),
            ("deepseek_v3", "blockwise"),
        ],
        ("llama4", "rowwise_with_gw_hp"),
        ("deepseek_v3", "rowwise"),
        ("deepseek_v3", "blockwise"),
    ),
)
def test_compiled_equals_eager_bit_for_bit(family: str, recipe: str) -> None:
    torch._dynamo.reset()
    model = build(family, recipe, fused=True)
    eager = run(model)
    for block in model.layers.values():
        block.compile(backend="aot_eager", fullgraph=True)
    assert same_bits(run(model), eager) == []


@pytest.mark.parametrize("family", ["llama4", "deepseek_v3"])
@pytest.mark.parametrize("mode", [{"mode": "full"}, {"mode": "selective", "selective_ac_option": "op"}], ids=str)
def test_activation_checkpointing_changes_no_bit(family: str, mode: dict[str, str]) -> None:
    expected = run(build(family, "rowwise", fused=True))
    model = build(family, "rowwise", fused=True)
    apply_activation_checkpointing(model, ActivationCheckpointSection(**mode), compile_config=CompileSection())
    assert same_bits(run(model), expected) == []


@pytest.mark.parametrize(("family", "kinds"), [("mixtral", 1), ("llama4", 2), ("deepseek_v3", 2)])
def test_blocks_of_a_kind_share_one_compiled_graph(family: str, kinds: int) -> None:
    """Those with positions and those without; the dense ones and those with experts."""
    torch._dynamo.reset()
    compiler = CompileCounter()
    model = build(family, "rowwise", fused=True, n_layers=5)
    for block in model.layers.values():
        block.compile(backend=compiler, fullgraph=True)
    run(model)
    assert compiler.frame_count == kinds


def test_nan_in_a_shared_expert_or_a_latent_norm_reaches_loss_and_gradients() -> None:
    for part in ("moe.shared_experts.w1", "moe.shared_experts.w2", "attention_norm", "attention.kv_norm"):
        model = build("deepseek_v3", "rowwise", fused=True)
        block = model.layers["1"]
        assert isinstance(block.attention_norm, Float8RMSNorm)
        assert isinstance(block.moe.shared_experts, Float8FeedForward)
        with torch.no_grad():
            block.get_submodule(part).weight.view(-1)[3] = torch.nan
        result = run(model)
        assert not result["loss"].isfinite(), part
        assert not result[f"layers.1.{part}.weight"].isfinite().all(), part


def test_a_router_that_is_asked_for_by_name_multiplies_in_float8() -> None:
    model = Decoder(resolve_dims("qwen3_moe", "debugmodel", {"n_layers": 1}), compute_dtype=torch.bfloat16)
    initialize(model, seed=0)
    report = convert_to_float8_training(model, recipe_by_fqn={"router.gate": "rowwise"}, emulate=True)
    gate = model.layers["0"].moe.router.gate
    assert isinstance(gate, Float8Linear)
    assert {row.fqn: row.recipe for row in report.rows}["layers.0.moe.router.gate"] == "rowwise"
    model(torch.zeros(1, 16, dtype=torch.int64)).sum().backward()
    assert gate.weight.grad is not None
