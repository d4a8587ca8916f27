"""Curves of one or several runs, from their log.txt: a panel for each figure, a line for each run.

matplotlib draws them. It is an optional library, imported only here.
"""

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from util.checkpoint import write_whole
from util.errors import UserError, warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Titles of the panels and the entries of log.txt that they show; a run has one of these.
PANELS = {
    "training loss": ("train_loss",),
    "held-out loss": ("val_loss", "test_loss"),
    "learning rate": ("train_lr",),
    "k-NN accuracy of features (%)": ("knn_acc1",),
    "accuracy (%)": ("test_acc1",),
}


class Run(NamedTuple):
    """A run's name in the legend, and the entries of its log.txt, a dictionary an epoch."""

    name: str
    records: list[dict[str, Any]]


def read_log(output_dir: str | Path) -> list[dict[str, Any]]:
    """The epochs' entries in output_dir/log.txt. A line that is torn or is no entry is said.

    Raises:
        UserError: the file is missing or holds no entries.
    """
    path = Path(output_dir) / "log.txt"
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}): give the --output_dir of a training"
        ) from error
    records, torn = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            float(record["epoch"])
            records.append(record)
        except (ValueError, KeyError, TypeError):
            torn.append(str(number))
    if not records:
        raise UserError(f"{path} has no epochs to draw: a run adds a line after each")
    if torn:
        warn(f"{path}: left out as torn or as no epoch's entry: line {', '.join(torn)}")
    return records


def read_runs(output_dirs: list[str]) -> list[Run]:
    """The runs in these folders, named by them, or by their paths where a name occurs twice."""
    names = [Path(folder).absolute().name for folder in output_dirs]
    return [
        Run(name if names.count(name) == 1 else folder, read_log(folder))
        for name, folder in zip(names, output_dirs, strict=True)
    ]


def draw(runs: list[Run]) -> "Figure":
    """A figure of the panels that a run has entries for, over the epoch.

    Raises:
        UserError: matplotlib is missing, or no panel has anything to show.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no state
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UserError("--curves needs matplotlib: pip install matplotlib") from error
    panels = {
        title: lines
        for title, entries in PANELS.items()
        if any(lines := [_points(run.records, entries) for run in runs])
    }
    if not panels:
        raise UserError("the log.txt of these runs have no figures to draw")
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.4), layout="constrained")
    places = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
    for (title, lines), axes in zip(panels.items(), places, strict=False):
        for number, points in enumerate(lines):
            if points:
                epochs, values = zip(*points, strict=True)
                axes.plot(
                    epochs,
                    values,
                    label=runs[number].name,
                    color=f"C{number}",
                    marker="." if len(points) < 50 else "",
                )
        axes.set_title(title)
        axes.grid(alpha=0.3)
    all_axes = list(figure.axes)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes in all_axes[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("epoch")
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines_of = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    figure.legend(handles=list(lines_of.values()), loc="outside upper center", ncols=4)
    return figure


def _points(records: list[dict[str, Any]], entries: tuple[str, ...]) -> list[tuple[float, float]]:
    """(epoch, value) wherever a record has a finite number for one of these entries."""
    points = []
    for record in records:
        for entry in entries:
            value = record.get(entry)
            if isinstance(value, (int, float)) and math.isfinite(value):
                points.append((record["epoch"], value))
    return points


def save(output_dirs: list[str], output: str | Path) -> None:
    """Draw the runs in `output_dirs` into the file `output`, in the format of its suffix.

    Raises:
        UserError: a run can't be read or drawn, or the file can't be written.
    """
    figure = draw(read_runs(output_dirs))
    formats = figure.canvas.get_supported_filetypes()
    suffix = Path(output).suffix.lower().removeprefix(".")
    if suffix not in formats:
        raise UserError(f"--output {output} has no suffix of an image format: use .png")
    content = io.BytesIO()
    figure.savefig(content, dpi=100, format=suffix)
    try:
        write_whole(Path(output), content.getvalue())
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error.strerror}") from error
