"""Fused modules that somebody watches, or whose linears were changed, are seen and called as unfused ones are."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tests.tolerances import FUSED_VS_EAGER_SQNR_DB, sqnr_db
from tests.unit.converters.fused_models import build, run, same_bits
from tests.unit.converters.test_fusion import FULLY_FLOAT8
from titan_fp8.quantization import producer_ops


@pytest.mark.parametrize("watched", ["attention.wk", "feed_forward.w1", "feed_forward", "attention"])
def test_who_watches_a_reader_sees_tensors(watched: str) -> None:
    model = build("rowwise", fused=True)
    seen = []
    model.layers["0"].get_submodule(watched).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run(model)
    assert seen
    assert all(isinstance(x, torch.Tensor) and x.isfinite().all() for x in seen)


@pytest.mark.parametrize("watched", ["attention_norm", "ffn_norm"])
def test_who_watches_a_norm_sees_the_stream_and_changes_no_output(watched: str) -> None:
    model = build("rowwise", fused=True)
    expected = run(model)
    seen = []
    model.layers["0"].get_submodule(watched).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    result = run(model)
    assert [x.shape for x in seen] == [(2, 19, 128)]
    assert torch.equal(result["loss"], expected["loss"])
    for name, value in expected.items():  # the gradient of the stream is rounded once more
        assert sqnr_db(value, result[name]) > FUSED_VS_EAGER_SQNR_DB, name


def test_watched_modules_compute_what_they_did_before_they_were_fused() -> None:
    model = build("tensorwise", fused=True)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: None)
    assert same_bits(run(model), run(build("tensorwise", fused=False))) == []


@FULLY_FLOAT8
@pytest.mark.parametrize("name", ["attention_norm", "ffn_norm"])
def test_a_norm_with_hooks_makes_its_columns_at_once(recipe: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP's hooks, which free the norm's weight after its forward pass and gather it for its own backward."""
    expected = run(build(recipe, fused=True))
    model = build(recipe, fused=True)
    model.layers["0"].get_submodule(name).register_forward_pre_hook(lambda *_: None)
    calls, op = [], producer_ops.norm_columns
    monkeypatch.setattr(producer_ops, "norm_columns", lambda *a: calls.append(a) or op(*a))
    result = run(model)
    assert len(calls) == 1  # of the other norm
    assert torch.equal(result["loss"], expected["loss"])
    last = "layers.0.feed_forward.w2.weight"  # before which no gradient went through the norm
    assert torch.equal(result[last], expected[last])


def test_a_forward_that_was_replaced_is_called_and_two_names_of_a_weight_are_no_obstacle() -> None:
    model = build("rowwise", fused=True)
    attention, calls = model.layers["0"].attention, []
    original = attention.wq.forward
    attention.wq.forward = lambda x: calls.append(x) or original(x)
    run(model)
    assert len(calls) == 1
    attention.wv.weight = attention.wk.weight
    assert not attention.shares_input()
    run(model)


def test_hooks_of_all_modules_see_the_linears() -> None:
    model, seen = build("rowwise", fused=True), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        run(model)
    finally:
        handle.remove()
    block = model.layers["0"]
    assert {block.attention.wk, block.feed_forward.w1, block.feed_forward.w2} <= set(seen)
    assert block.attention.shares_input()
