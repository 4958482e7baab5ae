"""Files are never half written and never overwritten, even on a full disk."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from titan_fp8.observability.files import atomic_write, move_aside
from titan_fp8.runtime.errors import UserError


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let the kernel refuse what a full disk would refuse: writing past `size` bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_atomic_write_replaces_the_text_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "config.toml"
    atomic_write(path, "old")
    atomic_write(path, "grüß")
    assert path.read_text(encoding="utf-8") == "grüß"
    assert names(tmp_path) == ["config.toml"]


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "config.toml"
    atomic_write(path, "old")
    with files_no_larger_than(1000), pytest.raises(UserError, match=r"cannot write .*config\.toml.*free some space"):
        atomic_write(path, "x" * 2000)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["config.toml"]


def test_moving_aside_numbers_upwards_and_overwrites_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text in ("first", "second", "third"):
        path.write_text(text)
        move_aside(path)
    assert [(tmp_path / f"metrics.jsonl.{number}").read_text() for number in (1, 2, 3)] == ["first", "second", "third"]
    assert not path.exists()


def test_files_moved_aside_together_get_the_same_number(tmp_path):
    metrics, validation = tmp_path / "metrics.jsonl", tmp_path / "validation.jsonl"
    (tmp_path / "metrics.jsonl.4").write_text("older")
    metrics.write_text("m")
    validation.write_text("v")
    assert move_aside(metrics, validation) == [tmp_path / "metrics.jsonl.5", tmp_path / "validation.jsonl.5"]


def test_moving_aside_what_is_not_there_does_nothing(tmp_path):
    assert move_aside(tmp_path / "metrics.jsonl") == []
