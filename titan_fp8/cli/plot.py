"""`titan-fp8 plot RUN_FOLDER... --output loss.png`: curves of one or more runs from their `metrics.jsonl`.

Steps whose value is null (a loss that was not finite) leave a gap in the line. The picture has a white background of
its own, so that it reads the same on a light and on a dark page.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from titan_fp8.observability.files import disk_errors
from titan_fp8.observability.json_lines import METRICS_FILE, read_json_lines
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's palette: told apart with every common colour blindness.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_AXIS_LABELS = {
    "loss": "training loss (nats per token)",
    "validation_loss": "validation loss (nats per token)",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tps": "tokens per second and device",
    "tflops": "model TFLOP/s",
    "mfu": "MFU (%)",
    "memory_gib": "peak memory (GiB)",
    "step_time_s": "step time (s)",
}


@dataclass(frozen=True)
class Curve:
    """One line of the picture; a value that is null in the file is NaN here."""

    label: str
    steps: list[int]
    values: list[float]


def read_curve(run_folder: Path, *, key: str, label: str | None = None) -> Curve:
    """The values of `key` in the metrics of `run_folder` (or in a metrics file named directly).

    Args:
        run_folder: folder that holds `metrics.jsonl`, or such a file.
        key: a key of its lines.
        label: defaults to the folder's name.

    Raises:
        UserError: no metrics there, none logged yet, or no such key.
    """
    path = run_folder / METRICS_FILE if run_folder.is_dir() else run_folder
    if not path.exists():
        raise UserError(f"{run_folder}: no {METRICS_FILE} here; name the folder of a run (its job.dump_folder)")
    records = read_json_lines(path)
    if not records:
        raise UserError(f"{path}: no step was logged yet")
    if not any(key in record for record in records):
        raise UserError(f"{path}: no key {key!r}{did_you_mean(key, records[0])}; known: {', '.join(records[0])}")
    known = [record for record in records if key in record]
    values = [float("nan") if record[key] is None else float(record[key]) for record in known]
    return Curve(label or path.absolute().parent.name, [record["step"] for record in known], values)


Panel = tuple[str | None, Sequence[Curve]]
"""Title and curves."""


def draw(curves: Sequence[Curve], output: Path, *, key: str, title: str | None = None, log_scale: bool = False) -> None:
    """Draw `curves` into `output`; its suffix (.png, .svg, .pdf) decides the format.

    Raises:
        UserError: matplotlib is missing, or `output` cannot be written or has no known suffix.
    """
    draw_panels([[(title, curves)]], output, key=key, log_scale=log_scale, size=(8.0, 4.5))


def draw_panels(
    lines: Sequence[Sequence[Panel]],
    output: Path,
    *,
    key: str,
    log_scale: bool = False,
    size: tuple[float, float] = (4.8, 3.2),
) -> None:
    """Draw lines of panels into one picture, each of `size` inches. Raises `UserError` as `draw`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("titan-fp8 plot needs matplotlib: pip install matplotlib") from error

    width = max(map(len, lines))
    whole = (width * size[0], len(lines) * size[1])
    figure = Figure(figsize=whole, dpi=150, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    formats = canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in formats:
        raise UserError(f"--output {output}: no known picture format; end it in one of {', '.join(sorted(formats))}")
    for number, line in enumerate(lines):
        for column, (title, curves) in enumerate(line):
            axes = figure.add_subplot(len(lines), width, number * width + column + 1, facecolor="white")
            _draw_curves(axes, curves, key, title, log_scale)
    with disk_errors(output):
        figure.savefig(output)


def _draw_curves(axes: "Axes", curves: Sequence[Curve], key: str, title: str | None, log_scale: bool) -> None:
    for index, curve in enumerate(curves):
        style = "-" if index < len(_COLORS) else "--"
        marker = "o" if len(curve.steps) == 1 else None
        color = _COLORS[index % len(_COLORS)]
        axes.plot(curve.steps, curve.values, style, color=color, marker=marker, linewidth=1.6, label=curve.label)
    axes.set_xlabel("step")
    axes.set_ylabel(_AXIS_LABELS.get(key, key))
    if log_scale:
        axes.set_yscale("log")
    if title:
        axes.set_title(title)
    axes.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw as `argv` (default: the process's arguments) says.

    Raises:
        UserError: as `read_curve` and `draw`, or when labels and folders differ in number.
    """
    arguments = _parser().parse_args(argv)
    folders, labels = arguments.run_folders, arguments.labels
    if labels is not None and len(labels) != len(folders):
        raise UserError(f"--labels: {len(labels)} texts for {len(folders)} run folders; give one for each")
    curves = [
        read_curve(folder, key=arguments.key, label=label)
        for folder, label in zip(folders, labels or [None] * len(folders), strict=True)
    ]
    draw(curves, arguments.output, key=arguments.key, title=arguments.title, log_scale=arguments.log_scale)
    print(f"{arguments.output}: {arguments.key} of {', '.join(curve.label for curve in curves)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="titan-fp8 plot", description="Draw curves from the metrics of runs.")
    parser.add_argument("run_folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="a run's folder")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="picture to write (default: loss.png)")
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="one for each folder (default: the folder's name)")
    parser.add_argument("--key", default="loss", help="key of metrics.jsonl to draw (default: loss)")
    parser.add_argument("--title", help="text above the picture")
    parser.add_argument("--log-scale", action="store_true", help="logarithmic vertical axis")
    return parser
