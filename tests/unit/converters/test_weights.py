"""What becomes of the weights, by where they will lie: cached, gathered as codes, or gathered in high precision."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.unit.converters.models import Model, converted_names, converter, violations
from titan_fp8.converters import float8_linear
from titan_fp8.converters.protocol import Placement
from titan_fp8.optim.one_pass import OnePassAdamW
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.sharded_weight import ShardableFloat8Weight
from titan_fp8.trainer import Trainer

GATHER = {"enable_fsdp_float8_all_gather": True}
TWO_SHARDS, TWO_COPIES = Placement(ranks=2, shards=2), Placement(ranks=2, shards=1)
OFFLOADED = Placement(offloaded=True)


def linears(model: nn.Module) -> list[Float8Linear]:
    return [module for module in model.modules() if isinstance(module, Float8Linear)]


def holds_codes(model: nn.Module) -> set[bool]:
    return {isinstance(linear.weight, ShardableFloat8Weight) for linear in linears(model)}


@pytest.mark.parametrize("forced", [False, True])
def test_one_process_keeps_the_codes_of_its_weights(forced: bool) -> None:
    model = Model()
    report = converter(force_recompute_fp8_weight_in_bwd=forced).convert(model)
    assert report.weights == "cast once an optimizer step"
    assert report.weights in report.summary()
    caches = [linear.weight_cache for linear in linears(model)]
    assert {cache.keep_columns for cache in caches if cache is not None} == {not forced}
    assert None not in caches
    assert {linear.config.recompute_weight_in_backward for linear in linears(model)} == {forced}
    assert holds_codes(model) == {False}


def test_weights_that_fsdp_gathers_in_high_precision_are_cast_again_in_backward() -> None:
    for placement in (TWO_SHARDS, OFFLOADED):
        model = Model()
        report = converter(placement=placement).convert(model)
        assert report.weights == "gathered in high precision, cast in the forward and in the backward pass"
        assert {linear.config.recompute_weight_in_backward for linear in linears(model)} == {True}
        assert {linear.weight_cache for linear in linears(model)} == {None}
        assert holds_codes(model) == {False}


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (True, "cast shard by shard, gathered as float8 codes"),
        (False, "cast shard by shard for each gather, gathered as float8 codes"),
    ],
)
def test_weights_are_made_for_the_float8_all_gather_and_keep_their_codes_between_steps_if_asked(
    keep: bool, words: str
) -> None:
    model = Model()
    plain = [linear.weight.detach().clone() for linear in (model.layers[0].w1, model.output)]
    report = converter(placement=TWO_SHARDS, keep_fp8_weight_shards=keep, **GATHER).convert(model)
    assert report.weights == words
    assert {linear.fsdp_weight_state.keeps_codes for linear in linears(model)} == {keep}
    assert holds_codes(model) == {True}
    assert all(linear.fsdp_weight_state.caches for linear in linears(model))
    assert {linear.config.recompute_weight_in_backward for linear in linears(model)} == {False}
    for linear, weight in zip((model.layers[0].w1, model.output), plain, strict=True):
        assert torch.equal(linear.weight.tensor, weight)


def test_copies_without_shards_keep_codes_unless_something_else_reads_a_weight() -> None:
    model = Model()
    assert converter(placement=TWO_COPIES).convert(model).weights == "cast once an optimizer step on each rank"
    assert holds_codes(model) == {True}
    model = Model()
    model.output.weight = model.tok_embeddings.weight
    assert converter(placement=TWO_COPIES).convert(model).weights.startswith("gathered in high precision")
    assert holds_codes(model) == {False}


def test_a_tied_embedding_cannot_be_gathered_as_codes_and_nothing_is_changed() -> None:
    model = Model()
    model.output.weight = model.tok_embeddings.weight
    model.layers[0].w1 = nn.Linear(30, 32)
    problems = violations(model, placement=TWO_SHARDS, **GATHER)
    assert len(problems) == 2
    assert "tok_embeddings.weight (high precision), output.weight (tensorwise) are one parameter" in problems[1]
    assert type(model.layers[1].w1.weight) is nn.Parameter
    model.layers[0].w1 = nn.Linear(32, 64)
    converter(placement=TWO_SHARDS, filter_fqns=["output"], **GATHER).convert(model)
    assert "output" not in converted_names(model)


def test_a_weight_of_two_linears_is_gathered_as_the_codes_of_one_recipe() -> None:
    def tied() -> Model:
        model = Model(256)
        model.layers[1].w1.weight = model.layers[0].w1.weight
        return model

    (problem,) = violations(tied(), placement=TWO_SHARDS, recipe_by_fqn=["layers.1.w1=rowwise"], **GATHER)
    assert "layers.0.w1.weight (tensorwise), layers.1.w1.weight (rowwise) are one parameter" in problem
    model = tied()
    converter(placement=TWO_SHARDS, recipe_by_fqn=["w1=rowwise"], **GATHER).convert(model)
    assert model.layers[0].w1.weight is model.layers[1].w1.weight


@pytest.mark.parametrize("settings", [{}, {"placement": TWO_SHARDS, **GATHER}], ids=["one process", "all-gather"])
def test_after_the_optimizer_step_codes_are_stale_however_the_weight_was_written(settings: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    subject = converter(**settings)
    subject.convert(model)
    x = torch.randn(16, 32)
    if settings:
        (state,) = [linear.fsdp_weight_state for linear in linears(model)]
        state._made_from = object()
        subject.post_optimizer([model])
        assert state._made_from is None
        return
    before = model(x)
    weight = model[0].weight
    torch.from_numpy(weight.detach().numpy()).neg_()  # seen by nothing in PyTorch
    assert torch.equal(model(x), before)
    subject.post_optimizer([model])
    assert torch.equal(model(x), -before)


def test_what_the_optimizer_told_outlives_the_call_after_its_step() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    subject = converter(placement=TWO_SHARDS, **GATHER)
    subject.convert(model)
    weight = model[0].weight
    weight.grad = torch.ones(32, 32)
    OnePassAdamW(model.parameters(), lr=0.1).step()
    subject.post_optimizer([model])
    assert weight.state.amax_of(weight) is not None


def test_the_optimizers_state_and_then_the_converters_come_before_the_first_step() -> None:
    class Called(Exception):
        pass

    def call(parts: list[nn.Module]) -> None:
        raise Called(parts, states)

    states: list[str] = []

    trainer = SimpleNamespace(
        job=SimpleNamespace(training=SimpleNamespace(steps=1)),
        state=SimpleNamespace(step=0, tokens_seen=0),
        converters=[SimpleNamespace(pre_training=call)],
        optimizers=SimpleNamespace(create_state=lambda: states.append("made")),
        parts=["the parts"],
        _set_training=lambda _: None,
    )
    with pytest.raises(Called, match=r"the parts.*made"):
        Trainer.train(trainer)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("precompute", [False, True])
def test_scales_are_computed_ahead_exactly_if_asked_for(precompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(float8_linear, "cast_ahead", called.append)
    parts: list[nn.Module] = [Model(), Model()]
    subject = converter(placement=TWO_SHARDS, precompute_float8_dynamic_scale_for_fsdp=precompute, **GATHER)
    for part in parts:
        subject.convert(part)
    for number, call in enumerate((subject.pre_training, subject.post_optimizer), start=1):
        call(parts)
        assert called == (number * [list(linears(part)) for part in parts] if precompute else [])


def test_weights_that_each_rank_has_whole_are_cast_together_after_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(float8_linear, "cast_ahead", called.append)
    model, subject = Model(), converter(placement=TWO_COPIES)
    subject.convert(model)
    subject.post_optimizer([model])
    assert called == [list(linears(model))]


def test_conversion_for_the_all_gather_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Model()
    converter(placement=TWO_SHARDS, **GATHER).convert(model)
    assert holds_codes(model) == {True}
    assert all(parameter.is_meta for parameter in model.parameters())
