"""A checkpoint that does not belong to the run is refused in one message, before anything is touched."""

from pathlib import Path

import pytest
import torch

from tests.unit.checkpoint.tiny_run import TinyModel, TinyRun, assert_same, fingerprint
from titan_fp8.checkpoint import fingerprint as prints
from titan_fp8.runtime.errors import UserError


def test_another_model_is_refused_with_every_differing_field_and_nothing_is_touched(tmp_path: Path) -> None:
    TinyRun(tmp_path, prints=fingerprint(n_heads=4, rope={"theta": 1e4})).train(until=2)
    run = TinyRun(tmp_path, seed=1, prints=fingerprint(n_heads=8, rope={"theta": 5e5}))
    before = run.state()
    with pytest.raises(UserError) as caught:
        run.resume()
    assert "model.n_heads: 4 in the checkpoint, 8 here" in str(caught.value)
    assert "model.rope.theta: 10000.0 in the checkpoint, 500000.0 here" in str(caught.value)
    assert "model.dim" not in str(caught.value)
    assert_same(run.state(), before)


def test_another_model_can_be_allowed_by_name(tmp_path: Path) -> None:
    TinyRun(tmp_path, prints=fingerprint(rope_theta=1e4)).train(until=2)
    run = TinyRun(tmp_path, prints=fingerprint(rope_theta=5e5), allow_model_change=True)
    assert run.resume().counter.step == 2


def test_another_recipe_is_refused_unless_allowed_by_name(tmp_path: Path) -> None:
    ours = fingerprint() | {"recipe": {"recipe_name": "rowwise"}}
    expected = TinyRun(tmp_path / "whole", enable=False).train().state()
    TinyRun(tmp_path).train(until=4)
    with pytest.raises(UserError, match=r'"tensorwise" in the checkpoint, "rowwise" here\n.*allow_recipe_change'):
        TinyRun(tmp_path, prints=ours).resume()
    resumed = TinyRun(tmp_path, prints=ours, allow_recipe_change=True).resume()
    assert_same(resumed.train().state(), expected)


def test_both_differences_are_told_at_once(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=2)
    with pytest.raises(UserError, match=r"(?s)model.dim.*recipe.recipe_name"):
        TinyRun(tmp_path, prints={"model": {"dim": 1}, "recipe": {"recipe_name": "rowwise"}}).resume()


def test_weights_alone_may_be_quantized_otherwise_but_not_belong_to_another_model(tmp_path: Path) -> None:
    TinyRun(tmp_path / "old").train()
    path = str(tmp_path / "old/checkpoint/step-6")
    TinyRun(tmp_path / "new", initial_load_path=path, prints={**fingerprint(), "recipe": {}}).resume()
    with pytest.raises(UserError, match=r"model\.vocab_size"):
        TinyRun(tmp_path / "new", initial_load_path=path, prints=fingerprint(vocab_size=99)).resume()


def test_tuples_and_lists_are_the_same_after_a_file() -> None:
    assert prints.differences(prints.normalized({"a": (1, 2), "b": {"c": 1.0}}), {"a": [1, 2], "b": {"c": 1}}) == []


def test_group_without_fields_differs_by_the_fields_of_the_other_side_alone() -> None:
    assert prints.differences({"recipe": {}}, {"recipe": {"a": 1}}) == [("recipe.a", "(not there)", 1)]


def test_field_on_one_side_only_is_a_difference() -> None:
    rows = prints.differences({"a": {"b": 1}}, {"a": {"c": None}})
    assert [row[0] for row in rows] == ["a.b", "a.c"]


def test_tensors_that_do_not_fit_are_all_listed_and_nothing_is_touched(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=2)
    model = TinyModel(vocab=15)
    del model.layers["1"]
    model.layers["2"] = torch.nn.Linear(5, 6)
    run = TinyRun(tmp_path, model=model, allow_model_change=True)
    before = run.state()
    with pytest.raises(UserError) as caught:
        run.resume()
    message = str(caught.value)
    missing, rest = message.split("in the checkpoint, but not in this model:")
    unexpected, reshaped = rest.split("of another shape:")
    assert "layers.2.weight" in missing
    assert "optimizer.state.layers.2.bias.exp_avg_sq" in missing
    assert "layers.1.weight" in unexpected
    assert "optimizer.state.layers.1.bias.step" in unexpected
    assert "output.weight: [12, 6] in the checkpoint, [15, 6] here" in reshaped
    assert "exclude_from_loading" in reshaped
    assert_same(run.state(), before)


def test_long_lists_are_cut_with_their_count(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=2)
    model = TinyModel()
    for i in range(2, 8):
        model.layers[str(i)] = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="and 28 more"):
        TinyRun(tmp_path, model=model).resume()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_page_locked_memory_without_a_gpu_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='"async_with_pinned_mem" needs a CUDA device and there is none; use "async"'):
        TinyRun(tmp_path, async_mode="async_with_pinned_mem")


def test_state_that_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    run.batches.state_dict = lambda: {"path": tmp_path}
    with pytest.raises(TypeError, match="dataloader"):
        run.train()
