"""Fused producers in a model: the same numbers as the modules they replace, in less memory and fewer operators."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.cases import some_by_hand
from tests.tolerances import FUSED_VS_EAGER_SQNR_DB, FUSED_VS_UNFUSED_LOSS_DB, sqnr_db
from tests.unit.converters.fused_models import build, exact, round_once, run, same_bits
from tests.unit.quantization.test_ops import CountCalls
from titan_fp8.converters import fusion
from titan_fp8.converters.fusion import Float8Attention, Float8FeedForward, Float8RMSNorm, fuse_producers
from titan_fp8.kernels.producers import Cast
from titan_fp8.parallel.activation_checkpoint import apply_activation_checkpointing
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection
from titan_fp8.quantization import producer_ops
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.ops import GEMM_OPS
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.weights import cache_weights, mark_stale

ALL_RECIPES = pytest.mark.parametrize("recipe", RECIPES)
FULLY_FLOAT8 = pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if r.grad_weight_in_float8])
ALL_PARTS = ["attention", "attention_norm", "feed_forward", "ffn_norm"]
CHECKPOINTS = {
    "full": ActivationCheckpointSection(mode="full"),
    "op": ActivationCheckpointSection(mode="selective", selective_ac_option="op"),
}
FORWARD_OPS = ("rms_norm_cast", "add_rms_norm_cast", "swiglu_cast")


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Cast]]:
    """(operator, its cast) of each call of a fused producer."""
    calls: list[tuple[str, Cast]] = []
    for name in (*FORWARD_OPS, "norm_columns", "swiglu_backward_cast"):
        op = getattr(producer_ops, name)

        def record(*arguments, name=name, op=op):
            given = [argument for argument in arguments if not isinstance(argument, torch.Tensor | float | None)]
            calls.append((name, Cast(*given[:6])))
            return op(*arguments)

        monkeypatch.setattr(producer_ops, name, record)
    return calls


def parts(model: nn.Module) -> list[str]:
    kinds = (Float8Attention, Float8FeedForward, Float8RMSNorm)
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds)})


@ALL_RECIPES
def test_a_fused_model_equals_one_that_rounds_at_the_same_points_bit_for_bit(recipe: str) -> None:
    expected = run(round_once(build(recipe, fused=False, n_layers=2)))
    assert same_bits(run(build(recipe, fused=True, n_layers=2)), expected) == []


@ALL_RECIPES
def test_a_fused_model_is_as_exact_as_one_that_is_not(recipe: str) -> None:
    fused, unfused = (run(build(recipe, fused=fused, n_layers=2)) for fused in (True, False))
    true = exact(n_layers=2)
    losses = []
    for name, value in unfused.items():
        if name != "loss":
            assert sqnr_db(value, fused[name]) > FUSED_VS_EAGER_SQNR_DB, name
            losses.append(sqnr_db(true[name], value) - sqnr_db(true[name], fused[name]))
    assert sum(losses) / len(losses) < FUSED_VS_UNFUSED_LOSS_DB
    torch.testing.assert_close(fused["loss"], unfused["loss"], rtol=2**-8, atol=0)


@ALL_RECIPES
def test_compiled_equals_eager_bit_for_bit(recipe: str) -> None:
    torch._dynamo.reset()
    model = build(recipe, fused=True)
    eager = run(model)
    for block in model.layers.values():
        block.compile(backend="aot_eager", fullgraph=True)
    assert same_bits(run(model), eager) == []


@pytest.mark.parametrize("recipe", some_by_hand(RECIPES, "rowwise", "rowwise_with_gw_hp"))
def test_blocks_share_one_compiled_graph(recipe: str) -> None:
    torch._dynamo.reset()
    compiler = CompileCounter()
    model = build(recipe, fused=True, n_layers=3)
    for block in model.layers.values():
        block.compile(backend=compiler, fullgraph=True)
    run(model)
    assert compiler.frame_count == 1


@ALL_RECIPES
@pytest.mark.parametrize("mode", CHECKPOINTS)
def test_activation_checkpointing_changes_no_bit(recipe: str, mode: str) -> None:
    expected = run(build(recipe, fused=True))
    model = build(recipe, fused=True)
    apply_activation_checkpointing(model, CHECKPOINTS[mode], compile_config=CompileSection())
    assert same_bits(run(model), expected) == []


@FULLY_FLOAT8
def test_per_op_checkpointing_recomputes_every_second_product_as_in_an_unfused_model(recipe: str) -> None:
    counts = []
    for fused in (True, False):
        model = build(recipe, fused=fused)
        apply_activation_checkpointing(model, CHECKPOINTS["op"], compile_config=CompileSection())
        with CountCalls() as counter:
            run(model)
        counts.append(sum(counter.calls[op] for op in GEMM_OPS))
    assert counts == [3 * 7 + 3] * 2


@FULLY_FLOAT8
def test_the_first_pass_of_full_checkpointing_makes_no_columns(recipe: str, casts: list[tuple[str, Cast]]) -> None:
    model = build(recipe, fused=True)
    apply_activation_checkpointing(model, CHECKPOINTS["full"], compile_config=CompileSection())
    run(model)
    assert [cast.columns for name, cast in casts if name in FORWARD_OPS] == [False] * 6  # the second pass neither
    assert [name for name, _ in casts].count("norm_columns") == 2


@FULLY_FLOAT8
def test_every_producer_of_a_block_is_fused_and_emits_nothing(recipe: str, casts: list[tuple[str, Cast]]) -> None:
    model = build(recipe, fused=True)
    assert parts(model) == ALL_PARTS
    run(model)
    assert [name for name, _ in casts] == [*FORWARD_OPS, "swiglu_backward_cast", "norm_columns", "norm_columns"]
    assert all(cast.rows and not cast.emit for _, cast in casts)
    assert all(cast.columns == (name == "swiglu_backward_cast") for name, cast in casts)
    assert casts[3][1].dtype == RECIPES[recipe].grad_output_dtype


def test_a_product_in_high_precision_gets_the_norms_output(casts: list[tuple[str, Cast]]) -> None:
    run(build("rowwise_with_gw_hp", fused=True))
    assert [name for name, _ in casts] == ["rms_norm_cast", "add_rms_norm_cast"]
    assert all(cast.emit and not cast.columns for _, cast in casts)


@ALL_RECIPES
def test_without_gradients_nothing_but_rows_is_made(recipe: str, casts: list[tuple[str, Cast]]) -> None:
    model = build(recipe, fused=True)
    with torch.no_grad():
        loss = run(model)["loss"]
    assert all(cast.rows and not cast.columns and not cast.emit for _, cast in casts)
    assert torch.equal(loss, run(model)["loss"])


@FULLY_FLOAT8
def test_frozen_weights_cost_no_columns_and_leave_the_other_gradients_as_they_are(
    recipe: str, casts: list[tuple[str, Cast]]
) -> None:
    expected = run(build(recipe, fused=True))
    model = build(recipe, fused=True)
    frozen = ("wq", "wk", "wv", "w1", "w3")
    for name, parameter in model.layers.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] not in frozen)
    casts.clear()
    result = run(model)
    assert {name: cast.columns for name, cast in casts} == {
        "rms_norm_cast": False,
        "add_rms_norm_cast": False,
        "swiglu_cast": False,
        "swiglu_backward_cast": False,
    }
    assert same_bits(result, {name: expected[name] for name in result}) == []
    assert not any(part in name for name in result for part in frozen)


@FULLY_FLOAT8
def test_only_the_second_weight_of_a_feed_forward_may_have_a_gradient(
    recipe: str, casts: list[tuple[str, Cast]]
) -> None:
    feed_forward = build(recipe, fused=True).layers["0"].feed_forward
    x = torch.randn(2, 150, 128).bfloat16()
    expected = torch.autograd.grad(feed_forward(x).float().square().sum(), feed_forward.w2.weight)
    for linear in (feed_forward.w1, feed_forward.w3):
        linear.weight.requires_grad_(False)
    casts.clear()
    result = torch.autograd.grad(feed_forward(x).float().square().sum(), feed_forward.w2.weight)
    assert torch.equal(*result, *expected)
    assert [name for name, _ in casts] == ["swiglu_cast"] * 2  # in forward by rows, in backward by columns


@ALL_RECIPES
def test_a_feed_forward_in_one_function_equals_one_in_two_bit_for_bit(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(build(recipe, fused=True))
    calls = []
    one = fusion.gated_feed_forward
    monkeypatch.setattr(fusion, "gated_feed_forward", lambda *a: calls.append(a) or one(*a))
    run(build(recipe, fused=True))
    assert len(calls) == (recipe != "rowwise_with_gw_hp")
    monkeypatch.setattr(
        fusion, "gated_feed_forward", lambda x, w1, w3, w2: w2(fusion.gated_hidden(x, w1, w3, columns=True))
    )
    assert same_bits(run(build(recipe, fused=True)), expected) == []


@FULLY_FLOAT8
def test_one_frozen_weight_of_two_keeps_the_others_gradient(recipe: str) -> None:
    expected = run(build(recipe, fused=True))
    for frozen in ("w1", "w3"):
        model = build(recipe, fused=True)
        getattr(model.layers["0"].feed_forward, frozen).weight.requires_grad_(False)
        result = run(model)
        assert len(result) == len(expected) - 1
        assert same_bits(result, {name: expected[name] for name in result}) == []


@pytest.mark.parametrize(
    ("left_alone", "expected"),
    [
        ("attention.wk", ["feed_forward", "ffn_norm"]),
        ("attention.wo", ALL_PARTS),
        ("feed_forward.w1", ["attention", "attention_norm"]),
        ("feed_forward.w2", ["attention", "attention_norm", "ffn_norm"]),
        ("0.", []),
    ],
)
def test_a_producer_with_a_reader_in_high_precision_is_left_alone(left_alone: str, expected: list[str]) -> None:
    model = build("rowwise", fused=False, skip=lambda name: left_alone in name)
    assert [name.rpartition(".")[2] for name in sorted(fuse_producers(model))] == expected
    assert parts(model) == expected
    run(model)


@pytest.mark.parametrize(
    ("linear", "change", "expected"),
    [
        ("attention.wv", {"recipe": RECIPES["tensorwise"]}, ["feed_forward", "ffn_norm"]),
        ("attention.wv", {"fast_accum_in_backward": True}, ["attention_norm", "feed_forward", "ffn_norm"]),
        ("feed_forward.w2", {"recipe": RECIPES["tensorwise"]}, ["attention", "attention_norm", "ffn_norm"]),
        ("feed_forward.w3", {"fast_accum_in_backward": True}, ["attention", "attention_norm", "ffn_norm"]),
        ("feed_forward.w2", {"fast_accum_in_backward": True}, ALL_PARTS),
    ],
)
def test_linears_that_compute_differently_share_no_producer(linear: str, change: dict, expected: list[str]) -> None:
    model = build("rowwise", fused=False)
    model.layers["0"].get_submodule(linear).config = Float8Config(
        **({"recipe": RECIPES["rowwise"], "emulate": True} | change)
    )
    fuse_producers(model)
    assert parts(model) == expected
    run(model)


def test_a_bias_keeps_a_feed_forward_as_it_is() -> None:
    model = build("rowwise", fused=False)
    model.layers["0"].feed_forward.w3.bias = nn.Parameter(torch.zeros(256))
    fuse_producers(model)
    assert parts(model) == ["attention", "attention_norm", "ffn_norm"]


@ALL_RECIPES
def test_under_autocast_a_fused_model_computes_as_one_that_is_not_but_for_one_rounding(recipe: str) -> None:
    def under_autocast(fused: bool) -> dict:
        model = build(recipe, fused=fused)
        model.compute_dtype = torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(model)

    result, expected = under_autocast(True), under_autocast(False)
    for name, value in expected.items():
        assert sqnr_db(value, result[name]) > FUSED_VS_EAGER_SQNR_DB, name


def test_a_linear_that_is_replaced_after_fusion_gets_a_tensor() -> None:
    model = build("rowwise", fused=True)
    block = model.layers["0"]
    for parent, name in ((block.attention, "wq"), (block.feed_forward, "w1")):
        linear = nn.Linear(128, getattr(parent, name).out_features, bias=False, dtype=torch.bfloat16)
        setattr(parent, name, linear)
    run(model)


def test_names_parameters_hooks_and_mode_are_those_of_the_replaced_modules() -> None:
    model = build("rowwise", fused=False).eval()
    calls = []
    for name in ("attention_norm", "ffn_norm"):
        model.layers["0"].get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    before, names = dict(model.named_parameters()), list(model.state_dict())
    parts_in_order = ("feed_forward", "attention", "attention_norm", "ffn_norm")
    assert fuse_producers(model) == [f"layers.0.{name}" for name in parts_in_order]
    assert list(model.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not any(module.training for module in model.modules())
    assert fuse_producers(model) == []
    run(model)
    assert calls == ["attention_norm", "ffn_norm"]


def test_a_copy_of_a_fused_model_reads_its_own_linears() -> None:
    model = build("rowwise", fused=True)
    expected = run(model)
    other = copy.deepcopy(model)
    block = other.layers["0"]
    assert block.attention_norm.readers.module is block.attention
    assert block.ffn_norm.readers.module is block.feed_forward
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same_bits(run(other), expected) == []


@FULLY_FLOAT8
@pytest.mark.parametrize("recompute", [False, True])
def test_cached_weights_and_recomputed_ones_change_no_bit(recipe: str, recompute: bool) -> None:
    expected = run(build(recipe, fused=True))
    model = build(recipe, fused=False)
    linears = [module for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        linear.config = Float8Config(RECIPES[recipe], emulate=True, recompute_weight_in_backward=recompute)
    fuse_producers(model)
    assert parts(model) == ALL_PARTS
    assert same_bits(run(model), expected) == []
    cache_weights(model, linears)
    mark_stale(model)
    assert same_bits(run(model), expected) == []


@FULLY_FLOAT8
@pytest.mark.parametrize("part", ["attention_norm", "feed_forward.w1", "feed_forward.w2"])
def test_nan_in_a_weight_reaches_loss_and_gradients(recipe: str, part: str) -> None:
    model = build(recipe, fused=True)
    with torch.no_grad():
        model.layers["0"].get_submodule(part).weight.view(-1)[3] = torch.nan
    result = run(model)
    assert not result["loss"].isfinite()
    assert not any(result[f"layers.0.{name}.weight"].isfinite().all() for name in ("attention.wq", part))
