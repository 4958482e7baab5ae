"""The run's folder: made once, held by one run, with a record of what ran."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from titan_fp8.observability.run_folder import RunFolderLock, create_run_folder, write_run_record
from titan_fp8.observability.versions import collect_versions, git_revision
from titan_fp8.runtime.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_record(folder: Path, config_toml: str) -> None:
    write_run_record(folder, config_toml=config_toml, conversion_report={"rows": []}, versions={"torch": "2.11"})


def test_the_run_folder_is_made_with_its_parents_and_may_exist_already(tmp_path):
    folder = create_run_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert folder.is_absolute()
    assert create_run_folder(folder) == folder


def test_a_file_in_place_of_the_run_folder_is_an_error_that_names_the_key(tmp_path):
    (tmp_path / "outputs").write_text("")
    with pytest.raises(UserError, match=r"job\.dump_folder = .*outputs.*this is a file"):
        create_run_folder(tmp_path / "outputs")


def test_a_run_folder_below_a_file_is_an_error_not_a_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*; .*job\.dump_folder"):
        create_run_folder(tmp_path / "file" / "outputs")


def test_the_run_record_holds_configuration_report_and_versions(tmp_path):
    write_record(tmp_path, "[training]\nsteps = 3\n")
    assert (tmp_path / "config.toml").read_text() == "[training]\nsteps = 3\n"
    assert json.loads((tmp_path / "conversion_report.json").read_text()) == {"rows": []}
    assert json.loads((tmp_path / "versions.json").read_text()) == {"torch": "2.11"}


def test_the_same_record_again_changes_nothing_and_another_keeps_the_old_one(tmp_path):
    write_record(tmp_path, "a = 1\n")
    write_record(tmp_path, "a = 1\n")
    assert names(tmp_path) == ["config.toml", "conversion_report.json", "versions.json"]
    write_record(tmp_path, "a = 2\n")
    assert (tmp_path / "config.toml").read_text() == "a = 2\n"
    assert (tmp_path / "config.toml.1").read_text() == "a = 1\n"


def hold_the_lock(folder: Path) -> subprocess.Popen:
    program = """
        import sys, time
        from pathlib import Path
        from titan_fp8.observability.run_folder import RunFolderLock
        lock = RunFolderLock(Path(sys.argv[1]))
        print("held", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_one_is_dead(tmp_path):
    with hold_the_lock(tmp_path) as process:
        with pytest.raises(
            UserError, match=rf"another run is writing here \(process {process.pid} on .*job\.dump_folder"
        ):
            RunFolderLock(tmp_path)
        process.kill()
    RunFolderLock(tmp_path).release()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_git_revision_says_when_tracked_files_differ(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_revision(tmp_path) == commit
    (tmp_path / "code.py").write_text("2")
    assert git_revision(tmp_path) == f"{commit}-dirty"


def test_a_copy_that_is_not_tracked_by_the_repository_around_it_has_no_revision(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    (tmp_path / "site-packages").mkdir()
    assert git_revision(tmp_path / "site-packages") is None


def test_versions_name_the_packages_and_are_json():
    versions = json.loads(json.dumps(collect_versions()))
    assert versions["torch"] == __import__("torch").__version__
    assert {"titan_fp8", "python", "cuda", "device", "git_revision"} <= versions.keys()
