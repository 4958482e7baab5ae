"""Checkpoint folders as such: what counts, what goes, what comes back."""

import json
import os
import time
from pathlib import Path

import pytest

from titan_fp8.checkpoint import folder
from titan_fp8.checkpoint.folder import CheckpointError, Kind, Manifest


def _save(root: Path, step: int, kind: Kind = "full", text: str = "tensors", at: float | None = None) -> Path:
    path = folder.begin(root, step)
    (path / "data").write_text(text)
    manifest = Manifest(kind, step, 1, {}, {}, time.time() if at is None else at, folder.sizes(path))
    return folder.commit(path, manifest)


def _rewrite(manifest: Path, **entries: object) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | entries))


def _steps(root: Path) -> list[int]:
    return [saved.manifest.step for saved in folder.complete_checkpoints(root)]


def test_committed_folder_counts_and_reads_back_what_it_is(tmp_path: Path) -> None:
    path = _save(tmp_path, 5, "model")
    assert path == tmp_path / "step-5"
    manifest = folder.read_manifest(path)
    assert (manifest.kind, manifest.step, manifest.files) == ("model", 5, {"data": 7})
    assert os.listdir(tmp_path) == ["step-5"]


def test_folder_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    path = folder.begin(tmp_path, 5)
    (path / "data").write_text("tensors")
    assert _steps(tmp_path) == []
    assert folder.faulty_checkpoints(tmp_path) == {}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text('{"format": 1}'), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text('{"format": 99}'), "does not know"),
        (lambda path: _rewrite(path / "manifest.json", files=5), "cannot be read"),
        (lambda path: (path / "data").unlink(), "data is missing"),
        (lambda path: (path / "data").write_text("tens"), "data has 4 bytes instead of 7"),
    ],
)
def test_damaged_folder_does_not_count_and_says_why(tmp_path: Path, damage, reason: str) -> None:
    _save(tmp_path, 1)
    damage(_save(tmp_path, 5))
    assert _steps(tmp_path) == [1]
    assert reason in folder.faulty_checkpoints(tmp_path)[tmp_path / "step-5"]


def test_steps_are_ordered_as_numbers_and_other_names_are_not_steps(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        _save(tmp_path, step)
    for other in ("step-", "step-07", "step--1", "step-5x", "best", "step-3.incomplete"):
        (tmp_path / other).mkdir()
    (tmp_path / "step-8").write_text("a file")
    assert _steps(tmp_path) == [9, 10, 100]
    assert folder.faulty_checkpoints(tmp_path) == {}


def test_beginning_a_save_clears_what_earlier_ones_left(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (tmp_path / "step-2.incomplete").mkdir()
    (tmp_path / "step-2.incomplete" / "data").write_text("half")
    (tmp_path / "notes.incomplete").mkdir()
    folder.begin(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["notes.incomplete", "step-1", "step-3.incomplete"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    _save(tmp_path, 5, text="other")
    assert (tmp_path / "step-5" / "data").read_text() == "other"
    assert os.listdir(tmp_path) == ["step-5"]


@pytest.mark.parametrize("saves_at_once", [False, True])
def test_kill_between_the_two_renames_of_a_replacement_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves_at_once: bool
) -> None:
    _save(tmp_path, 5)
    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if self.name.endswith(".incomplete"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            _save(tmp_path, 5, text="other")
    assert _steps(tmp_path) == []
    folder.begin(tmp_path, 7) if saves_at_once else folder.recover(tmp_path)
    assert _steps(tmp_path) == [5]
    assert (tmp_path / "step-5" / "data").read_text() == "tensors"


def test_everything_is_on_disk_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    rename, fsync = Path.rename, os.fsync

    def record_rename(self: Path, target: Path) -> Path:
        seen.append(f"rename {self.name}")
        return rename(self, target)

    def record_fsync(descriptor: int) -> None:
        seen.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    monkeypatch.setattr(Path, "rename", record_rename)
    monkeypatch.setattr(os, "fsync", record_fsync)
    _save(tmp_path, 5)
    name = "step-5.incomplete"
    assert seen == ["flush manifest.json", f"flush {name}", f"rename {name}", f"flush {tmp_path.name}"]


def test_purge_keeps_the_latest_and_tells_what_it_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _save(tmp_path, step)
    assert folder.purge(tmp_path, 2) == [tmp_path / "step-1", tmp_path / "step-2"]
    assert sorted(os.listdir(tmp_path)) == ["step-3", "step-4"]


def test_purge_of_zero_keeps_all(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    assert folder.purge(tmp_path, 0) == []
    assert _steps(tmp_path) == [1, 2, 3]


def test_purge_never_deletes_the_newest_full_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path, 0, "seed")
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    _save(tmp_path, 3, "model")
    folder.purge(tmp_path, 1)
    assert _steps(tmp_path) == [2, 3]


def test_purge_goes_by_the_time_of_writing_after_a_run_went_back(tmp_path: Path) -> None:
    for step, at in ((20, 1.0), (30, 2.0), (15, 3.0)):
        _save(tmp_path, step, at=at)
    folder.purge(tmp_path, 2)
    assert _steps(tmp_path) == [15, 30]


def test_purge_leaves_damaged_folders_and_strangers_alone(tmp_path: Path) -> None:
    (_save(tmp_path, 1) / "data").unlink()
    (tmp_path / "mine").mkdir()
    for step in (2, 3):
        _save(tmp_path, step)
    folder.purge(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["mine", "step-1", "step-3"]


def test_manifest_is_readable_json_with_the_fingerprint(tmp_path: Path) -> None:
    path = folder.begin(tmp_path, 1)
    manifest = Manifest("full", 1, 4, {"model": {"dim": 8}}, {"torch": "2"}, 1.5, {})
    content = json.loads((folder.commit(path, manifest) / "manifest.json").read_text())
    assert content["fingerprint"] == {"model": {"dim": 8}}
    assert content["world_size"] == 4


def test_absent_manifest_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="manifest"):
        folder.read_manifest(tmp_path)
