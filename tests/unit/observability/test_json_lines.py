"""A series on disk: torn ends, resumption, full disks."""

import json
import math
import os

import pytest

from tests.unit.observability.test_files import files_no_larger_than
from titan_fp8.observability.json_lines import JsonLinesFile, read_json_lines
from titan_fp8.runtime.errors import UserError


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps)


def steps_of(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_is_in_the_file_as_soon_as_it_is_appended(tmp_path):
    file = JsonLinesFile(tmp_path / "m.jsonl")
    file.append({"step": 1, "loss": 0.1})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "loss": 0.1}\n'
    file.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path, value):
    file = JsonLinesFile(tmp_path / "m.jsonl")
    file.append({"step": 1, "loss": value})
    file.close()
    assert json.loads((tmp_path / "m.jsonl").read_text())["loss"] is None


def test_a_float_survives_the_file_bit_for_bit(tmp_path):
    value = 0.1 + 0.2
    file = JsonLinesFile(tmp_path / "m.jsonl")
    file.append({"step": 1, "loss": value})
    file.close()
    assert read_json_lines(tmp_path / "m.jsonl")[0]["loss"] == value


def test_resuming_drops_the_lines_after_the_checkpoint_and_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(lines(1, 10, 20, 30))
    file = JsonLinesFile(path, resume_step=20)
    assert file.first == {"step": 1, "loss": 1.0}
    file.append({"step": 30})
    file.close()
    assert steps_of(path) == [1, 10, 20, 30]
    assert path.read_text().startswith(lines(1, 10, 20))


@pytest.mark.parametrize("tail", ['{"step": 30, "lo', "\0\0\0\0", '{"step": 30, "loss": 1.5}', "[3]\n", "\n\n"])
def test_the_torn_end_of_a_killed_run_is_dropped(tmp_path, tail):
    path = tmp_path / "m.jsonl"
    path.write_text(lines(1, 10, 20) + tail)
    assert [record["step"] for record in read_json_lines(path)] == [1, 10, 20]
    file = JsonLinesFile(path, resume_step=40)
    file.append({"step": 50})
    file.close()
    assert steps_of(path) == [1, 10, 20, 50]


def test_damage_before_a_wanted_line_is_an_error_that_names_file_and_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(lines(1) + "garbage\n" + lines(10))
    with pytest.raises(UserError, match=r"m\.jsonl:2: not a JSON object"):
        JsonLinesFile(path, resume_step=10)
    assert path.read_text() == lines(1) + "garbage\n" + lines(10)


def test_damage_after_the_checkpoint_is_dropped_with_what_follows(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(lines(1, 10) + "garbage\n" + lines(20))
    JsonLinesFile(path, resume_step=10).close()
    assert path.read_text() == lines(1, 10)


def test_a_full_disk_loses_no_earlier_line(tmp_path):
    path = tmp_path / "m.jsonl"
    file = JsonLinesFile(path)
    file.append({"step": 1})
    with files_no_larger_than(20), pytest.raises(UserError, match="free some space"):
        file.append({"step": 2, "text": "x" * 100})
    file.close()
    assert read_json_lines(path) == [{"step": 1}]
    again = JsonLinesFile(path, resume_step=1)
    again.append({"step": 2})
    again.close()
    assert steps_of(path) == [1, 2]


def test_flush_syncs_the_file_itself(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    file = JsonLinesFile(tmp_path / "m.jsonl")
    synced.clear()
    file.flush()
    assert synced == [(tmp_path / "m.jsonl").stat().st_ino]
    file.close()
