"""When something is saved, what stays, and what a failing or killed save leaves behind."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.checkpoint.tiny_run import TinyModel, TinyRun, assert_same, names
from titan_fp8.checkpoint import folder, host_state, tensor_files
from titan_fp8.checkpoint.folder import CheckpointError


def _kinds(path: Path) -> dict[int, str]:
    return {s.manifest.step: s.manifest.kind for s in folder.complete_checkpoints(path / "checkpoint")}


def test_saved_every_interval_after_the_first_step_and_after_the_last(tmp_path: Path) -> None:
    TinyRun(tmp_path, interval=3, total=7, enable_first_step_checkpoint=True, last_save_model_only=True).train()
    assert _kinds(tmp_path) == {1: "full", 3: "full", 6: "full", 7: "model"}


def test_what_is_due_is_what_is_saved(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, interval=3, enable_first_step_checkpoint=True)
    assert [step for step in range(1, 8) if run.checkpointer.is_due(step)] == [1, 3, 6]
    assert run.checkpointer.is_due(5, last_step=True)
    assert not TinyRun(tmp_path, enable=False).checkpointer.is_due(3, last_step=True)


def test_last_save_is_complete_when_it_returns(tmp_path: Path) -> None:
    TinyRun(tmp_path, async_mode="async").train()
    assert 6 in _kinds(tmp_path)


def test_full_last_save_is_full(tmp_path: Path) -> None:
    TinyRun(tmp_path, interval=100).train()
    assert _kinds(tmp_path) == {6: "full"}


@pytest.mark.parametrize("keys", [{"enable": False}, {"load_only": True}])
def test_nothing_is_saved_when_saving_is_off(tmp_path: Path, keys: dict[str, bool]) -> None:
    TinyRun(tmp_path, **keys).train().close()
    assert not (tmp_path / "checkpoint").exists()


def test_disabled_checkpoints_load_nothing_either(tmp_path: Path) -> None:
    TinyRun(tmp_path).train()
    run = TinyRun(tmp_path, enable=False)
    assert (run.checkpointer.load(), run.checkpointer.finished_step()) == (0, None)


def test_load_only_run_loads(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=4)
    assert TinyRun(tmp_path, load_only=True).resume().counter.step == 4


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_old_checkpoints_go_once_the_new_one_is_complete(tmp_path: Path, async_mode: str) -> None:
    keys = {"interval": 1, "keep_latest_k": 2, "last_save_model_only": True}
    TinyRun(tmp_path, async_mode=async_mode, **keys).train().close()
    assert names(tmp_path) == {"step-5", "step-6"}
    TinyRun(tmp_path / "one", async_mode=async_mode, **keys | {"keep_latest_k": 1}).train().close()
    assert _kinds(tmp_path / "one") == {5: "full", 6: "model"}


def test_folder_key_names_the_folder(tmp_path: Path) -> None:
    TinyRun(tmp_path, folder="kept/here").train(until=2)
    assert folder.fault_of(tmp_path / "kept" / "here" / "step-2") is None


def test_export_dtype_rounds_the_model_only_last_save_and_nothing_else(tmp_path: Path) -> None:
    TinyRun(tmp_path, last_save_model_only=True, export_dtype="float16").train()
    for step, dtype in ((4, torch.float32), (6, torch.float16)):
        saved = tensor_files.read_metadata(tmp_path / f"checkpoint/step-{step}").state_dict_metadata
        assert saved["output.weight"].properties.dtype == dtype


def test_model_only_save_holds_the_model_and_nothing_else(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, last_save_model_only=True, interval=100).train()
    saved = tensor_files.read_metadata(tmp_path / "checkpoint/step-6").state_dict_metadata
    assert saved.keys() == run.model.state_dict().keys()
    assert not (tmp_path / "checkpoint/step-6" / host_state.FILE_NAME).exists()


def test_newest_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TinyRun(tmp_path).train()
    (tmp_path / "checkpoint/step-6" / host_state.FILE_NAME).unlink()
    assert TinyRun(tmp_path).resume().counter.step == 4
    assert "step-6 does not count as a checkpoint: host_state.pt is missing" in caplog.text


def test_only_damaged_checkpoints_are_no_fresh_start(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=2)
    (tmp_path / "checkpoint/step-2" / host_state.FILE_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"step-2: host_state\.pt is missing"):
        TinyRun(tmp_path).resume()


def test_tensor_file_of_the_right_size_but_damaged_is_a_clear_error(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=2)
    file = next((tmp_path / "checkpoint/step-2").glob("*.distcp"))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="step-2 is damaged"):
        TinyRun(tmp_path).resume()


def test_folder_that_cannot_be_made_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("a file")
    with pytest.raises(CheckpointError, match=r"making .*checkpoint failed: FileExistsError"):
        TinyRun(tmp_path).resume()


def test_damage_in_the_list_of_tensors_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TinyRun(tmp_path).train(until=2)

    def damaged(*_: object) -> None:
        raise TypeError("'tuple' object is not callable")  # what one flipped bit in a pickle made of it

    monkeypatch.setattr(tensor_files.FileSystemReader, "read_metadata", damaged)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: .*remove that step's folder"):
        TinyRun(tmp_path).resume()


def test_damage_anywhere_in_the_host_state_is_a_clear_error(tmp_path: Path) -> None:
    TinyRun(tmp_path).train(until=2)
    file = tmp_path / "checkpoint/step-2" / host_state.FILE_NAME
    whole = file.read_bytes()
    for start in range(0, len(whole) - 64, len(whole) // 12):
        file.write_bytes(whole[:start] + bytes(byte ^ 0x5A for byte in whole[start : start + 64]) + whole[start + 64 :])
        with pytest.raises(CheckpointError, match=r"host_state\.pt .*remove that step's folder"):
            host_state.read(file.parent)


# ---- full disks


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """The nearest thing to a full disk that a test can have: no file of this process may grow past `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
@pytest.mark.parametrize(
    ("size", "vocab"),
    [(2_000, 12), (20_000, 12), (60_000, 3_000)],
    ids=["no room for the host state", "no room for the tensors", "no room within a tensor"],
)
def test_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path, async_mode: str, size: int, vocab: int) -> None:
    run = _wide_run(tmp_path, vocab, async_mode=async_mode).train(until=2)
    run.checkpointer._finish_pending()
    saved = run.state()
    with _files_of_at_most(size), pytest.raises(CheckpointError, match=r"writing step-4 .*File too large") as caught:
        run.train(until=4).close()
    assert "inline_container" not in str(caught.value)
    assert names(tmp_path) == {"step-2"}
    assert_same(_wide_run(tmp_path, vocab, seed=1).resume().state(), saved)


def _wide_run(path: Path, vocab: int, **keys: Any) -> TinyRun:
    torch.manual_seed(keys.get("seed", 0))
    return TinyRun(path, model=TinyModel(vocab=vocab), **keys)


def test_disk_that_fills_up_at_the_manifest_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TinyRun(tmp_path).train(until=2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder, "_write_flushed", full)
    with pytest.raises(CheckpointError, match=r"writing step-4 .*No space left on device; free some space"):
        run.train(until=4)
    assert names(tmp_path) == {"step-2"}


def test_file_that_rank_0_does_not_see_whole_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "sizes", lambda path: {"__0_0.distcp": 100})
    with pytest.raises(CheckpointError, match="file system that all machines share"):
        TinyRun(tmp_path).train(until=2)
    assert names(tmp_path) == set()


def test_run_goes_on_saving_after_a_failed_save_was_caught(tmp_path: Path) -> None:
    run = TinyRun(tmp_path).train(until=2)
    with _files_of_at_most(2_000), pytest.raises(CheckpointError):
        run.train(until=4)
    run.train().close()
    assert names(tmp_path) == {"step-2", "step-6"}


def test_old_checkpoints_are_kept_when_the_new_one_fails(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, keep_latest_k=1).train(until=2)
    with _files_of_at_most(20_000), pytest.raises(CheckpointError):
        run.train(until=4)
    assert TinyRun(tmp_path).resume().counter.step == 2


def test_defect_in_a_state_keeps_its_own_traceback(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)

    def broken() -> dict[str, int]:
        raise ZeroDivisionError("a defect")

    run.batches.state_dict = broken
    with pytest.raises(ZeroDivisionError, match="a defect"):
        run.train()


# ---- kills

_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.checkpoint.tiny_run import TinyRun
from titan_fp8.checkpoint import folder, tensor_files

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

run = TinyRun(Path(sys.argv[1]), async_mode=sys.argv[3]).train(until=3)
run.checkpointer._finish_pending()
if sys.argv[2] == "tensors":       # half of the tensors are written
    write = tensor_files._Writer._write_data
    tensor_files._Writer._write_data = lambda self, *a: (write(self, *a), die())
elif sys.argv[2] == "manifest":    # all files are written, the folder has no name yet
    folder._flush_folder = die
else:                              # the new checkpoint is complete, the old ones are not deleted yet
    folder.purge = die
run.train().close()
"""


@pytest.mark.parametrize(
    ("moment", "left", "resumed"),
    [("tensors", "step-4.incomplete", 2), ("manifest", "step-4.incomplete", 2), ("purge", "step-4", 4)],
)
def test_kill_in_the_middle_of_a_save_loses_nothing_that_was_saved(
    tmp_path: Path, moment: str, left: str, resumed: int
) -> None:
    async_mode = "async" if moment == "tensors" else "disabled"
    command = [sys.executable, "-c", _KILLED, str(tmp_path), moment, async_mode]
    killed = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names(tmp_path) == {"step-2", left}
    expected = TinyRun(tmp_path / "whole", enable=False).train().state()
    run = TinyRun(tmp_path, seed=1).resume()
    assert run.counter.step == resumed
    assert_same(run.train().state(), expected)
    assert names(tmp_path) == {"step-2", "step-4", "step-6"}
