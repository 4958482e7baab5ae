"""A resumed run is the run that was not interrupted."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.checkpoint.tiny_run import TinyModel, TinyRun, assert_same, fingerprint, names
from titan_fp8.checkpoint import tensor_files
from titan_fp8.runtime.errors import UserError


@pytest.fixture
def uninterrupted(tmp_path: Path) -> dict[str, Any]:
    return TinyRun(tmp_path / "uninterrupted", enable=False).train().state()


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_resumed_run_ends_bit_for_bit_like_the_uninterrupted_one(
    tmp_path: Path, async_mode: str, implementation: str
) -> None:
    keys = {"async_mode": async_mode, "optimizer": {"implementation": implementation}}
    expected = TinyRun(tmp_path / "whole", enable=False, optimizer=keys["optimizer"]).train().state()
    TinyRun(tmp_path, **keys).train(until=5).close()
    resumed = TinyRun(tmp_path, seed=1, **keys).resume()
    assert resumed.counter.step == 4
    assert_same(resumed.train().close().state(), expected)


def test_saving_does_not_disturb_the_run(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    assert_same(TinyRun(tmp_path, interval=1, async_mode="async").train().close().state(), uninterrupted)


def test_background_save_holds_the_state_of_its_own_step(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, async_mode="async")
    run.train(until=2)
    saved = run.state()
    run.step()
    run.close()
    assert_same(TinyRun(tmp_path, seed=1).resume().state(), saved)


def test_optimizer_that_steps_in_backward_resumes(tmp_path: Path) -> None:
    early = {"optimizer": {"early_step_in_backward": True}}
    expected = TinyRun(tmp_path / "whole", enable=False, **early).train().state()
    TinyRun(tmp_path, **early).train(until=3)
    assert_same(TinyRun(tmp_path, seed=1, **early).resume().train().state(), expected)


def test_tied_weight_is_saved_once_and_stays_tied(tmp_path: Path) -> None:
    expected = TinyRun(tmp_path / "whole", model=_tied(), enable=False).train().state()
    TinyRun(tmp_path, model=_tied()).train(until=3)
    model = _tied()
    resumed = TinyRun(tmp_path, model=model, seed=1).resume().train()
    assert "output.weight" not in tensor_files.read_metadata(tmp_path / "checkpoint/step-2").state_dict_metadata
    assert model.output.weight is model.tok_embeddings.weight
    assert_same(resumed.state(), expected)
    with pytest.raises(
        UserError, match=r"not in the checkpoint:\n +optimizer\.state\.output\.weight.*\n(.*\n)+ +output\.weight\n"
    ):
        TinyRun(tmp_path).resume()


def _tied() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(tied=True)


def test_compiled_and_checkpoint_wrapped_modules_keep_their_plain_names(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    TinyRun(tmp_path).train(until=2)
    model = TinyModel()
    model.layers["0"] = checkpoint_wrapper(model.layers["0"])
    model.layers["1"] = torch.compile(model.layers["1"], backend="eager")
    resumed = TinyRun(tmp_path, model=model).resume()
    assert resumed.counter.step == 2


def test_loading_tells_the_model_so_that_caches_of_its_weights_are_dropped(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=2)
    told: list[float] = []

    def hook(module: nn.Module, _: object) -> None:
        told.append(float(module.weight.detach()[0, 0]))

    run = TinyRun(tmp_path, seed=1)
    run.model.layers["0"].register_load_state_dict_post_hook(hook)
    run.resume()
    assert told == [float(run.model.layers["0"].weight.detach()[0, 0])]


def test_fresh_folder_starts_at_zero(tmp_path: Path) -> None:
    assert TinyRun(tmp_path).checkpointer.load() == 0


def test_load_step_goes_back_and_replaces_what_comes_after(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    TinyRun(tmp_path).train()
    again = TinyRun(tmp_path, load_step=2, seed=1).resume()
    assert again.counter.step == 2
    assert again.checkpointer.finished_step() is None
    assert_same(again.train().state(), uninterrupted)
    assert names(tmp_path) == {"step-2", "step-4", "step-6"}


def test_killed_after_it_went_back_a_run_goes_on_from_what_it_saved_last(tmp_path: Path) -> None:
    TinyRun(tmp_path, last_save_model_only=True).train()
    again = TinyRun(tmp_path, load_step=2, seed=1, interval=1).resume()
    again.train(until=3)
    after_kill = TinyRun(tmp_path, seed=2)
    assert after_kill.checkpointer.finished_step() is None
    assert_same(after_kill.resume().state(), again.state())


def test_a_clock_that_is_behind_does_not_make_the_newest_checkpoint_an_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TinyRun(tmp_path, keep_latest_k=1).train(until=2)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    run.train(until=4)
    assert names(tmp_path) == {"step-4"}
    assert TinyRun(tmp_path).resume().counter.step == 4


def test_load_step_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    TinyRun(tmp_path).train()
    with pytest.raises(UserError, match=r"load_step = 3.*step-2 \(full\), step-4 \(full\), step-6 \(full\)"):
        TinyRun(tmp_path, load_step=3).resume()


def test_finished_run_says_so(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, last_save_model_only=True)
    assert run.checkpointer.finished_step() is None
    run.train()
    assert TinyRun(tmp_path).checkpointer.finished_step() == 6
    assert TinyRun(tmp_path, total=8).checkpointer.finished_step() is None
    assert TinyRun(tmp_path, total=5).checkpointer.finished_step() == 6


def test_raised_steps_go_on_from_the_newest_full_checkpoint(tmp_path: Path) -> None:
    TinyRun(tmp_path, last_save_model_only=True).train()
    assert TinyRun(tmp_path, total=8).resume().counter.step == 4


def test_raised_steps_without_a_full_checkpoint_name_the_remedy(tmp_path: Path) -> None:
    TinyRun(tmp_path, last_save_model_only=True, interval=100).train()
    with pytest.raises(UserError, match=r"only step-6 \(model\).*initial_load_path"):
        TinyRun(tmp_path, total=8).resume()
    with pytest.raises(UserError, match="weights only"):
        TinyRun(tmp_path, total=8, load_step=6).resume()


def test_configuration_wins_over_the_checkpoint_where_they_differ(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=4)
    resumed = TinyRun(tmp_path, total=12, optimizer={"weight_decay": 0.5, "implementation": "foreach"}).resume()
    assert resumed.optimizers.param_groups[0]["weight_decay"] == 0.5
    assert resumed.schedule.lr == pytest.approx(0.01 * 8 / 10)


# ---- initial_load_path


def test_weights_of_another_run_start_a_fresh_one(tmp_path: Path) -> None:
    old = TinyRun(tmp_path / "old").train()
    new = TinyRun(tmp_path / "new", seed=1, initial_load_path=str(tmp_path / "old/checkpoint/step-6"))
    assert new.checkpointer.load() == 0
    assert (new.counter.step, new.batches.position) == (0, 0)
    assert all(v.count_nonzero() == 0 for k, v in new.optimizers.state_dict().items())
    for left, right in zip(new.model.parameters(), old.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_full_state_of_another_run_goes_on_where_that_stood(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    TinyRun(tmp_path / "old").train(until=4)
    path = str(tmp_path / "old/checkpoint/step-4")
    new = TinyRun(tmp_path / "new", seed=1, initial_load_path=path, initial_load_model_only=False).resume()
    assert_same(new.train().state(), uninterrupted)


def test_own_checkpoints_come_before_the_initial_ones(tmp_path: Path) -> None:
    TinyRun(tmp_path / "old").train(until=4)
    keys = {"initial_load_path": str(tmp_path / "old/checkpoint/step-4")}
    TinyRun(tmp_path / "new", **keys).train(until=2)
    assert TinyRun(tmp_path / "new", **keys).resume().counter.step == 2


def test_weights_saved_in_bf16_load_into_a_fp32_model(tmp_path: Path) -> None:
    old = TinyRun(tmp_path / "old", last_save_model_only=True, export_dtype="bfloat16").train()
    new = TinyRun(tmp_path / "new", seed=1, initial_load_path=str(tmp_path / "old/checkpoint/step-6"))
    new.checkpointer.load()
    for left, right in zip(new.model.parameters(), old.model.parameters(), strict=True):
        assert torch.equal(left, right.bfloat16().float())
        assert not torch.equal(left, right)


def test_folder_of_checkpoints_as_initial_path_names_the_newest(tmp_path: Path) -> None:
    TinyRun(tmp_path / "old").train()
    for path in (tmp_path / "old", tmp_path / "old/checkpoint"):
        with pytest.raises(UserError, match=r"name one of them, such as .*step-6"):
            TinyRun(tmp_path / "new", initial_load_path=str(path)).resume()


def test_initial_path_that_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, why in ((tmp_path / "empty", "manifest"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(UserError, match=why):
            TinyRun(tmp_path / "new", initial_load_path=str(path)).resume()


def test_model_only_checkpoint_cannot_give_a_full_state(tmp_path: Path) -> None:
    TinyRun(tmp_path / "old", last_save_model_only=True).train()
    path = str(tmp_path / "old/checkpoint/step-6")
    with pytest.raises(UserError, match="initial_load_model_only = true"):
        TinyRun(tmp_path / "new", initial_load_path=path, initial_load_model_only=False).resume()


def test_weights_that_torchtitan_wrote_load(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(5)
    theirs = TinyModel()
    run = TinyRun(tmp_path, seed=1, initial_load_path=str(tmp_path / "step-9"))
    optimizer = {"state.output.weight.exp_avg": torch.ones(3), "param_groups.output.weight.lr": 0.1}
    dcp.save(
        {**theirs.state_dict(), "optimizer": optimizer, "train_state": {"step": 9}}, checkpoint_id=tmp_path / "step-9"
    )
    assert run.checkpointer.load() == 0
    for left, right in zip(run.model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(UserError, match="not written by titan_fp8"):
        TinyRun(tmp_path, initial_load_path=str(tmp_path / "step-9"), initial_load_model_only=False).resume()


# ---- seed checkpoints


def test_seed_checkpoint_gives_a_run_its_initial_weights(tmp_path: Path) -> None:
    seed = TinyRun(tmp_path, create_seed_checkpoint=True, seed=3)
    seed.checkpointer.save(0, last_step=True)
    assert names(tmp_path) == {"step-0"}
    run = TinyRun(tmp_path, seed=4)
    assert run.checkpointer.finished_step() is None
    assert run.checkpointer.load() == 0
    for left, right in zip(run.model.parameters(), seed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    run.train(until=2)
    assert TinyRun(tmp_path).resume().counter.step == 2


# ---- exclude_from_loading


@pytest.mark.parametrize("component", ["lr_scheduler", "dataloader", "optimizer", "model", "rng", "train_state"])
def test_excluded_component_keeps_its_fresh_state(tmp_path: Path, component: str) -> None:
    TinyRun(tmp_path).train(until=4)
    run, full = TinyRun(tmp_path, seed=1, exclude_from_loading=[component]), TinyRun(tmp_path, seed=1)
    fresh, fresh_random = run.state(), torch.get_rng_state()
    assert run.checkpointer.load() == (0 if component == "train_state" else 4)
    state, state_random = run.state(), torch.get_rng_state()
    full.resume()
    loaded = full.state()
    owned = {
        "lr_scheduler": {"lr"},
        "dataloader": {"position"},
        "train_state": {"step"},
        "optimizer": {k for k in fresh if k.startswith("state.")},
        "model": set(run.model.state_dict()),
        "rng": set(),
    }[component]
    assert_same({k: v for k, v in state.items() if k in owned}, {k: v for k, v in fresh.items() if k in owned})
    assert_same({k: v for k, v in state.items() if k not in owned}, {k: v for k, v in loaded.items() if k not in owned})
    assert torch.equal(state_random, fresh_random if component == "rng" else torch.get_rng_state())


def test_excluded_parameters_keep_their_initial_values_and_a_fresh_optimizer_state(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=4)
    model = TinyModel(vocab=VOCAB_OF_NEW_TASK)
    run = TinyRun(
        tmp_path,
        model=model,
        prints=fingerprint(vocab_size=VOCAB_OF_NEW_TASK),
        exclude_from_loading=["tok_embeddings", "output"],
        allow_model_change=True,
    )
    before = model.output.weight.detach().clone()
    run.resume()
    assert torch.equal(model.output.weight, before)
    state = run.optimizers.state_dict()
    assert state["state.output.weight.step"] == 0
    assert state["state.layers.0.weight.step"] == 4


VOCAB_OF_NEW_TASK = 14


def test_excluded_name_that_matches_nothing_is_an_error_with_the_nearest_names(tmp_path: Path) -> None:
    names_ = ["optimiser", "output", "layers.*.weight", "layer", "ayers.0"]
    with pytest.raises(UserError, match=r'"optimiser" \(did you mean "optimizer"\?\); "layer".*; "ayers.0"') as caught:
        TinyRun(tmp_path, exclude_from_loading=names_).resume()
    assert '"output"' not in str(caught.value)


@pytest.mark.parametrize("pattern", ["layers.?", "layers.[01]", "outpu[t]"])
def test_an_excluded_name_has_no_special_character_but_the_star(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match="nor part of the name of a parameter"):
        TinyRun(tmp_path, exclude_from_loading=[pattern]).resume()
