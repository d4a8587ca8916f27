"""Pictures of results, as SVG by matplotlib, which is imported only to draw.

A chart is plain data: {"name", "alt", "rows": [[panel or None, ...], ...]}. A panel is {"title",
"x", "y", "lines"}, with "ticks" [[x, name], ...] if each x has one, and "span", the least range of
y in points, if it isn't `LEAST_SPAN`. A line is {"label", "style", "x", "y"}, with "points" [[x,
y], ...], the single seeds, if y are means, and "apart" if only its marks are drawn. A picture holds
its chart's fingerprint: one can tell, without drawing it, whether it is what the results make.
"""

import hashlib
import io
import json

import figures
import running

from util.checkpoint import write_whole
from util.errors import UserError

FOLDER = running.ROOT / "docs" / "images" / "results"
ACCURACY = "accuracy (%)"  # a panel's y
LEAST_SPAN = 5
# Okabe and Ito's colours, which colour-blind readers can tell apart; marks and dashes differ too.
STYLES = [
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#555555", "marker": "^", "linestyle": ":"},
]


def path(chart):
    """The chart's picture."""
    return FOLDER / f"{chart['name']}.svg"


def markdown(chart):
    """The line that shows the picture in docs/results.md."""
    return f"![{chart['alt']}](images/results/{chart['name']}.svg)\n"


def shown(chart, is_drawn):
    """(the line that shows the chart's picture or says that it was not run, charts to draw)"""
    if is_drawn:
        return markdown(chart), [chart]
    return f"Picture ({chart['alt']}): {figures.NOT_RUN}.\n", []


def fingerprint(chart):
    return hashlib.sha256(json.dumps(chart, sort_keys=True).encode()).hexdigest()


def is_current(chart):
    """Whether the chart's picture was drawn from the same data."""
    return path(chart).exists() and f">{fingerprint(chart)}<" in path(chart).read_text()


def stale(charts):
    """The pictures that are missing, were drawn from other data, or are of no chart."""
    wrong = [path(chart) for chart in charts if not is_current(chart)]
    return wrong + sorted({*FOLDER.glob("*.svg")} - {path(chart) for chart in charts})


def save(charts):
    """Draw the pictures that are not current, and remove those of no chart.

    Raises:
        UserError: matplotlib is missing.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        if not is_current(chart):
            write_whole(path(chart), svg(chart))
    for left in stale(charts):
        left.unlink()


def svg(chart):
    """The picture, the same bytes for the same chart and matplotlib."""
    content = io.BytesIO()
    figure = draw(chart)
    import matplotlib

    metadata = {"Date": None, "Creator": None, "Description": fingerprint(chart)}
    with matplotlib.rc_context({"svg.hashsalt": chart["name"]}):
        figure.savefig(content, format="svg", metadata=metadata)
    return content.getvalue()


def draw(chart):
    """The chart as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no state
    except ImportError as error:
        raise UserError("drawing results needs matplotlib: pip install matplotlib") from error
    rows = chart["rows"]
    columns = len(rows[0])
    figure = Figure(figsize=(3.4 * columns, 2.9 * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    handles = {}
    for axes, panel in zip(grid.flat, (p for row in rows for p in row), strict=True):
        if panel is None:
            axes.remove()
            continue
        for line in panel["lines"]:
            handles[line["label"]] = draw_line(axes, line, STYLES[line["style"]])
        axes.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        if "ticks" in panel:
            places, names = zip(*panel["ticks"], strict=True)
            axes.set_xticks(places, names)
            # Also those without a point, so that panels of one picture have the same x.
            axes.update_datalim([(place, panel["lines"][0]["y"][0]) for place in places])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.1, y=0.1)
        if panel["y"] == ACCURACY:
            widen(axes, panel.get("span", LEAST_SPAN))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
    return figure


def widen(axes, span):
    """Show at least `span` percentage points, so that noise does not look like a trend."""
    low, high = axes.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)


def draw_line(axes, line, style):
    """Draw a line and its seeds; returns what stands for it in the legend."""
    if points := line.get("points"):
        hollow = style | {"linestyle": "", "markerfacecolor": "none"}
        axes.plot(*zip(*points, strict=True), **hollow, markersize=7, alpha=0.7)
    if line.get("apart"):
        style = style | {"linestyle": ""}
    if len(line["x"]) > 30:
        style = style | {"marker": ""}
    (drawn,) = axes.plot(line["x"], line["y"], **style, markersize=4, linewidth=1.5)
    return drawn
