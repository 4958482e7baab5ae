"""Loss curves of both sides: which are drawn, and how far apart they are."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    def record(side: str, losses: list[float | None], **more) -> dict:
        base = {"job": "one-gpu", "row": "bf16-compiled", "side": side, "repeat": 1}
        return base | {"losses": [[step, loss] for step, loss in enumerate(losses, 1)]} | more

    records = [
        record("ours", [9.0] * 4),  # run again below
        record("ours", [12.0, 11.0, 10.0, 8.0]),
        record("peer", [12.001, 11.002, 10.0, 8.5]),
        record("ours", [12.0, 11.0, None, 8.0], row="rowwise-compiled"),
        record("peer", [12.0, 11.0, 10.0, 8.0], row="rowwise-compiled"),
        record("peer", [12.0, 11.0, 10.0, 8.0], row="rowwise-compiled", repeat="profile"),
        record("ours", [1.0], row="float8-head"),
        record("peer", [1.0], job="two-gpus", error="exit code 1"),
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_a_row_that_both_sides_have_run_is_compared_from_its_last_run(load, runs):
    script = load("peer_curves")
    pairs = script.read_curves(runs, None, None)
    assert list(pairs) == [("one-gpu", "bf16-compiled"), ("one-gpu", "rowwise-compiled")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in script.table(pairs).splitlines()[2:]]
    assert cells[0][2:6] == ["12.0000 -> 8.0000", "12.0010 -> 8.5000", "0.0020", "0.5000"]
    assert cells[0][6] == "-0.1258 (-1.21 %)"
    assert cells[1][4:6] == ["0.0000", "0.0000"]  # of the steps that both have a loss of
    assert list(script.read_curves(runs, ["one-gpu"], ["rowwise-compiled"])) == [("one-gpu", "rowwise-compiled")]


def test_a_row_of_ours_alone_is_compared_with_the_peers_tensorwise_one(load, runs):
    script = load("peer_curves")
    with open(runs / "results.jsonl", "a") as file:
        for row, side, loss in (("tensorwise-compiled", "peer", 3.0), ("rowwise-compiled", "ours", 2.0)):
            record = {"job": "one-gpu", "row": row, "side": side, "repeat": 1, "losses": [[1, loss]]}
            file.write(json.dumps(record) + "\n")
    pairs = script.read_curves(runs, None, None)
    assert {label: curve.values for label, curve in pairs["one-gpu", "float8-head"].items()} == {
        "ours-1": [1.0],
        "peer-1": [3.0],
    }
    assert pairs["one-gpu", "rowwise-compiled"]["peer-1"].values == [12.0, 11.0, 10.0, 8.0]
    assert ("one-gpu", "tensorwise-compiled") not in pairs


def test_the_picture_has_a_panel_for_each_job_and_row(load, runs, capsys):
    script = load("peer_curves")
    grid = script.panels(script.read_curves(runs, None, None), repeats=1)
    assert [[title for title, _ in line] for line in grid] == [["one-gpu, bf16-compiled", "one-gpu, rowwise-compiled"]]
    assert [curve.label for curve in grid[0][0][1]] == ["ours", "peer"]
    assert script.main([str(runs), "--output", str(runs / "curves.png")]) == 0
    assert (runs / "curves.png").stat().st_size > 10_000
    assert "2 panels" in capsys.readouterr().out


def test_a_folder_without_pairs_is_refused(load, tmp_path):
    with pytest.raises(SystemExit, match="no row here that both sides have run"):
        load("peer_curves").read_curves(tmp_path, None, None)
