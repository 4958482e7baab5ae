"""The parts of the benchmark scripts that compute something from figures: suggestions, differences, choices of rows."""

import importlib
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def load(monkeypatch):
    """A script as a module; scripts import each other from their own folder."""
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module
    for name in ("bench_common", "bench_filter", "bench_linear", "loss_parity"):
        sys.modules.pop(name, None)


SIZES = (1024, 2048, 4096)


def test_suggested_corners_cover_exactly_what_does_not_gain(load):
    script = load("bench_filter")
    rule = ((2048, None), (None, 1024))
    gains = {(k, n): 0.9 if script.covered((k, n), rule) else 1.2 for k in SIZES for n in SIZES}
    found = script.corners(gains, margin=0.02)
    assert {size for size in gains if script.covered(size, found)} == {size for size in gains if gains[size] < 1}
    assert set(found) == set(rule)


def test_where_everything_gains_no_corner_is_suggested(load):
    script = load("bench_filter")
    assert script.corners({(k, n): 1.5 for k in SIZES for n in SIZES}, margin=0.02) == []
    assert "corners = ()" in script.suggestion("rowwise", {(1024, 1024): 1.5}, margin=0.02)


def test_a_suggestion_says_which_gains_it_gives_up(load):
    script = load("bench_filter")
    gains = {(1024, 1024): 1.5, (1024, 2048): 1.2, (2048, 1024): 1.2, (2048, 2048): 0.9, (4096, 4096): 1.5}
    text = script.suggestion("rowwise", gains, margin=0.02)
    assert "corners = ((2048, 2048),)" in text
    assert "1024x1024 1.50" in text
    assert "4096x4096" not in text.splitlines()[-1]


def test_a_loss_is_compared_with_bf16_of_its_own_world_and_with_the_smallest_world(load):
    script = load("loss_parity")
    runs = {("bf16", 1): 2.0, ("bf16-seed1", 1): 2.3, ("rowwise", 1): 2.1, ("bf16", 2): 2.2, ("rowwise", 2): 2.25}
    records = [
        {"row": row, "gpus": gpus, "exit_code": 0, "final_loss": loss, "losses": [9.0, loss], "tps": 1.0}
        for (row, gpus), loss in runs.items()
    ]
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in script.table(records, 1).splitlines()[2:]}
    assert cells["| rowwise", "1"][3:6] == ["+0.1000 (0.1000)", "0.3000", ""]
    assert cells["| rowwise", "2"][3:6] == ["+0.0500 (0.0500)", "0.3000", "+0.1500 (0.1500)"]


def test_a_row_of_the_peer_is_left_out_only_where_nobody_asked_for_it(load, monkeypatch, capsys):
    script = load("bench_common")
    monkeypatch.setattr(script, "peer_is_here", lambda: False)
    assert script.choose_rows(None, ["bf16", "torchao-rowwise"]) == ["bf16"]
    assert "torchao-rowwise" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pip install torchao"):
        script.choose_rows("torchao-rowwise", ["bf16", "torchao-rowwise"])
    with pytest.raises(SystemExit, match="no such row: fp4"):
        script.choose_rows("fp4", ["bf16"])


def test_our_eager_time_is_judged_against_the_peers_compiled_one(load):
    script = load("bench_linear")
    base = {"k": 64, "n": 32, "weight_dtype": "float32"}
    times = {"ours-rowwise": 1.0, "ours-tensorwise": 3.0, "torchao-rowwise-compiled": 2.0, "torchao-rowwise": 9.0}
    text = script.verdict([{**base, "row": row, "median_ms": ms} for row, ms in times.items()])
    lines = [line for line in text.splitlines() if "ours-" in line]
    assert lines == ["| 64 | 32 | float32 | ours-rowwise | 2.00x | yes |"]


def test_turns_time_every_contestant_equally_often_on_prepared_ground(load):
    script = load("bench_common")
    events: list[str] = []
    contestants = {
        name: script.Contestant(
            lambda name=name: events.append(f"prepare {name}"), lambda name=name: events.append(name)
        )
        for name in ("a", "b", "c")
    }
    times = script.take_turns(contestants, torch.device("cpu"), rounds=12, iterations=2, warm_up=1)
    assert all(len(each.device_ms) == len(each.host_ms) == 24 for each in times.values())
    assert all(events[at] == f"prepare {events[at + 1]}" for at in range(0, len(events), 2))
    blocks = events[2 * 3 + 1 :: 6]  # each has the dropped and the two timed iterations
    followers = {(earlier, later) for earlier, later in pairwise(blocks) if earlier != later}
    assert len(followers) == 6, "each follows each of the others now and then"
