"""`exclude_from_loading` and the checkpoint's own names: what the model lacks can be left out, and said beforehand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from tests.unit.checkpoint.tiny_run import TinyModel, TinyRun, assert_same, fingerprint, names
from titan_fp8.checkpoint import tensor_files
from titan_fp8.checkpoint.config import CheckpointSection
from titan_fp8.checkpoint.preview import check_loading
from titan_fp8.runtime.errors import UserError


def _with_adapter() -> TinyModel:
    """The tiny model and two parameters that its forward does not need."""
    torch.manual_seed(0)
    model = TinyModel()
    model.adapter = nn.Linear(3, 2)
    return model


def _preview(run_folder: Path, model: nn.Module | None = None, **checkpoint: Any) -> str:
    """What is refused before anything of the run exists; empty: nothing."""
    if model is None:
        with torch.device("meta"):
            model = TinyModel()
    config = CheckpointSection(**({"enable": True} | checkpoint))
    try:
        check_loading(config, run_folder, model=model, fingerprint=fingerprint(), total_steps=6)
    except UserError as error:
        return str(error)
    return ""


def _own(folder: Path) -> dict[str, Any]:
    TinyRun(folder, model=_with_adapter()).train(until=4)
    return {}


def _weights(folder: Path) -> dict[str, Any]:
    TinyRun(folder / "old", model=_with_adapter(), last_save_model_only=True).train()
    return {"initial_load_path": str(folder / "old/checkpoint/step-6")}


def _everything(folder: Path) -> dict[str, Any]:
    TinyRun(folder / "old", model=_with_adapter()).train(until=4)
    return {"initial_load_path": str(folder / "old/checkpoint/step-4"), "initial_load_model_only": False}


def _seed(folder: Path) -> dict[str, Any]:
    TinyRun(folder, model=_with_adapter(), create_seed_checkpoint=True).checkpointer.save(0, last_step=True)
    return {}


def _torchtitan(folder: Path) -> dict[str, Any]:
    state = {"param_groups.output.weight.lr": 0.1, "param_groups.output.weight.betas": torch.ones(2)}
    theirs = {**_with_adapter().state_dict(), "optimizer": state, "train_state": {"step": 9}}
    tensor_files.expect_no_process_group()
    dcp.save(theirs, checkpoint_id=folder / "step-9")
    return {"initial_load_path": str(folder / "step-9")}


FORMATS = pytest.mark.parametrize("save", [_own, _weights, _everything, _seed, _torchtitan])
Save = Callable[[Path], dict[str, Any]]


@FORMATS
@pytest.mark.parametrize("pattern", ["adapter", "adapter.*", "adap*"])
def test_what_the_checkpoint_alone_has_is_left_out_and_all_else_is_loaded(
    tmp_path: Path, save: Save, pattern: str
) -> None:
    keys = save(tmp_path)
    assert _preview(tmp_path, exclude_from_loading=[pattern], **keys) == ""
    run = TinyRun(tmp_path, seed=1, exclude_from_loading=[pattern], **keys)
    with_adapter = TinyRun(tmp_path, seed=1, model=_with_adapter(), **keys)
    run.resume()
    with_adapter.resume()
    loaded = {name: value for name, value in with_adapter.state().items() if "adapter" not in name}
    assert_same(run.state(), loaded)


@pytest.mark.parametrize("save", [_weights, _torchtitan])
def test_an_exclusion_that_leaves_nothing_to_load_is_refused(tmp_path: Path, save: Save) -> None:
    keys = save(tmp_path)
    message = _preview(tmp_path, exclude_from_loading=["model"], **keys)
    assert '"model" leaves nothing of' in message
    with pytest.raises(UserError, match='"model" leaves nothing of'):
        TinyRun(tmp_path, seed=1, exclude_from_loading=["model"], **keys).resume()


@FORMATS
def test_without_the_exclusion_the_preview_and_the_load_refuse_and_name_it(tmp_path: Path, save: Save) -> None:
    keys = save(tmp_path)
    run = TinyRun(tmp_path, seed=1, **keys)
    before = run.state()
    with pytest.raises(UserError) as caught:
        run.resume()
    for message in (str(caught.value), _preview(tmp_path, **keys)):
        assert "in the checkpoint, but not in this model:" in message
        assert "adapter.weight" in message
        assert "exclude_from_loading" in message
    assert_same(run.state(), before)


@FORMATS
@pytest.mark.parametrize("pattern", ["adaptor", "param_groups", "exp_avg", "dapter", "adapter.weights", "outptu"])
def test_a_name_of_neither_is_refused_by_the_preview_and_the_load(tmp_path: Path, save: Save, pattern: str) -> None:
    keys = save(tmp_path)
    run = TinyRun(tmp_path, seed=1, exclude_from_loading=[pattern, "adapter"], **keys)
    before = run.state()
    with pytest.raises(UserError) as caught:
        run.resume()
    for message in (str(caught.value), _preview(tmp_path, exclude_from_loading=[pattern, "adapter"], **keys)):
        assert f'"{pattern}"' in message
        assert '"adapter"' not in message.replace('did you mean "adapter"', "")
        assert "of this model or of " in message
    assert ('"adaptor" (did you mean "adapter"?)' in str(caught.value)) == (pattern == "adaptor")
    assert_same(run.state(), before)


def test_leaving_out_the_old_name_of_a_parameter_does_not_excuse_the_new_one(tmp_path: Path) -> None:
    TinyRun(tmp_path, model=_with_adapter()).train(until=2)
    model = TinyModel()
    model.renamed = nn.Linear(3, 2)
    message = _preview(tmp_path, model, exclude_from_loading=["adapter"])
    assert "not in the checkpoint:\n    renamed.bias\n    renamed.weight" in message
    with pytest.raises(UserError, match=r"not in the checkpoint:(\n.*)+renamed\.weight"):
        TinyRun(tmp_path, model=model, exclude_from_loading=["adapter"]).resume()
    assert _preview(tmp_path, model, exclude_from_loading=["adapter", "renamed"]) == ""


def test_the_same_command_goes_on_when_the_checkpoint_that_it_began_with_is_gone(tmp_path: Path) -> None:
    TinyRun(tmp_path, model=_with_adapter()).train(until=2)
    keys = {"exclude_from_loading": ["adapter"], "keep_latest_k": 1, "interval": 1}
    for until in (3, 4):
        TinyRun(tmp_path, **keys).resume().train(until=until)
        assert names(tmp_path) == {f"step-{until}"}
        assert _preview(tmp_path, **keys) == ""
    assert '"adaptor"' in _preview(tmp_path, exclude_from_loading=["adapter", "adaptor"])


def test_an_exclusion_given_up_is_forgotten(tmp_path: Path) -> None:
    TinyRun(tmp_path, model=_with_adapter()).train(until=2)
    TinyRun(tmp_path, exclude_from_loading=["adapter"]).resume().train(until=4)
    TinyRun(tmp_path, interval=1).resume().train(until=5)
    assert '"adapter"' in _preview(tmp_path, exclude_from_loading=["adapter"])
    with pytest.raises(UserError, match='"adapter"'):
        TinyRun(tmp_path, exclude_from_loading=["adapter"]).resume()


def test_only_a_checkpoint_that_needs_the_note_has_it(tmp_path: Path) -> None:
    TinyRun(tmp_path, model=_with_adapter()).train(until=2)
    run = TinyRun(tmp_path, exclude_from_loading=["adapter", "output", "rng"]).resume().train(until=4)
    manifests = [json.loads((run.checkpointer.folder / f"step-{n}/manifest.json").read_text()) for n in (2, 4)]
    assert [manifest.get("left_out") for manifest in manifests] == [None, ["adapter"]]


def test_tensors_of_another_shape_are_told_by_the_preview_unless_they_are_left_alone(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=2)
    model = TinyModel(vocab=15)
    assert "output.weight: [12, 6] in the checkpoint, [15, 6] here" in _preview(tmp_path, model)
    assert _preview(tmp_path, model, exclude_from_loading=["output", "tok_embeddings"]) == ""
    assert _preview(tmp_path, model, exclude_from_loading=["model"]) == ""


def test_without_a_checkpoint_the_model_alone_decides(tmp_path: Path) -> None:
    assert _preview(tmp_path, exclude_from_loading=["output"]) == ""
    message = _preview(tmp_path, exclude_from_loading=["adapter"])
    assert message.endswith("part of the name of a parameter of this model")
    assert not list(tmp_path.iterdir())


def test_names_are_not_judged_while_the_checkpoint_that_was_meant_is_not_known(tmp_path: Path) -> None:
    TinyRun(tmp_path, model=_with_adapter()).train(until=2)
    message = _preview(tmp_path, load_step=3, exclude_from_loading=["adapter"])
    assert "load_step = 3" in message
    assert "adapter" not in message


def test_a_tied_model_fits_its_own_checkpoint_and_may_leave_out_the_second_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    TinyRun(tmp_path / "tied", model=TinyModel(tied=True)).train(until=2)
    TinyRun(tmp_path / "apart").train(until=2)
    with torch.device("meta"):
        model = TinyModel(tied=True)
    assert _preview(tmp_path / "tied", model) == ""
    assert "output.weight" in _preview(tmp_path / "apart", model)
    assert _preview(tmp_path / "apart", model, exclude_from_loading=["output"]) == ""


def test_damaged_metadata_are_told_by_the_preview(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=2)
    file = tmp_path / "checkpoint/step-2/.metadata"
    file.write_bytes(b"\x00" * file.stat().st_size)
    assert f"{file} cannot be read" in _preview(tmp_path)
