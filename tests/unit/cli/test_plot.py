"""`titan-fp8 plot`: a picture from metrics, or one clear line that says why not."""

import json
import math

import pytest

from titan_fp8.cli.main import main
from titan_fp8.cli.plot import read_curve
from titan_fp8.runtime.errors import UserError


def make_run(folder, losses):
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_curves_of_several_runs_become_one_picture_on_white(tmp_path, capsys):
    runs = [make_run(tmp_path / name, [3.0, 2.0, 1.5]) for name in ("bf16", "float8")]
    output = tmp_path / "loss.png"
    assert main(["plot", *map(str, runs), "--output", str(output), "--title", "debug model"]) == 0
    assert "loss of bf16, float8" in capsys.readouterr().out

    from matplotlib.image import imread

    pixels = imread(output)
    assert pixels.shape[:2] == (675, 1200)
    assert pixels[0, 0].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[-1]).tolist()}) > 50


def test_a_null_loss_is_a_gap(tmp_path):
    curve = read_curve(make_run(tmp_path / "run", [3.0, None, 1.0]), key="loss")
    assert curve.label == "run"
    assert curve.steps == [1, 2, 3]
    assert math.isnan(curve.values[1])


def test_the_torn_line_of_a_running_run_is_left_out(tmp_path):
    folder = make_run(tmp_path / "run", [3.0, 2.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_curve(folder, key="loss").steps == [1, 2]


def test_a_folder_without_metrics_ends_with_exit_code_2_and_a_remedy(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "no metrics.jsonl here; name the folder of a run" in capsys.readouterr().err


def test_a_misspelt_key_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"no key 'los' \(did you mean \"loss\"\?\)"):
        read_curve(make_run(tmp_path / "run", [1.0]), key="los")


def test_an_unknown_picture_format_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run", [1.0])
    assert main(["plot", str(run), "--output", str(tmp_path / "loss.docx")]) == 2
    assert "no known picture format" in capsys.readouterr().err


def test_labels_must_match_the_folders(tmp_path, capsys):
    run = make_run(tmp_path / "run", [1.0])
    assert main(["plot", str(run), "--labels", "a", "b"]) == 2
    assert "2 texts for 1 run folders" in capsys.readouterr().err
