"""Compiled kernels of FlashAttention 4 are kept on disk: in the user's cache, or where the environment says."""

import os
from pathlib import Path

import pytest

from titan_fp8.models import flash4

ENABLED, FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENABLED, FOLDER):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)


def test_they_are_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flash4._keep_compiled_kernels()
    assert os.environ[ENABLED] == "1"
    assert os.environ[FOLDER] == str(tmp_path / "cache" / "flash_attention_cute_dsl")


def test_what_the_environment_says_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(ENABLED, "0")
    flash4._keep_compiled_kernels()
    assert os.environ[ENABLED] == "0"


def test_without_a_folder_that_can_be_written_to_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    flash4._keep_compiled_kernels()
    assert ENABLED not in os.environ
