"""docs/results.md: a table that was run anew elsewhere, beside the project's."""

import compare
import figures
import running

from benchmarks.table import grid

FOLDER = running.ROOT / "recipes" / "anew"
TABLE = "fashion_mnist"
INTRODUCTION = f"""## Run anew

Fashion-MNIST's table, made again from nothing on other processors: a second clone and `make
results-small`. The results are in `recipes/anew`, and `python recipes/compare.py recipes/anew`
prints these rows. A mean is within the spread if it differs by at most
{compare.STANDARD_DEVIATIONS} standard deviations of the project's seeds, or by at most
{compare.LEAST_POINTS} point of accuracy or {compare.LEAST_LOSS} of a loss. Labels are in percent,
and both keep the same ones. All rows of MAE hang on one pre-training: they move together.

"""


def section():
    own, again = figures.read(TABLE), figures.read(TABLE, FOLDER / running.RESULTS.name)
    rows = compare.figure_rows(own, again)
    origins = "\n\n".join(
        f"{whose}, {sum(cell['cpu_s'] for cell in cells) / 3600:.1f} core-hours: "
        + figures.origin(cells)
        for whose, cells in (("The project's", own), ("Anew", again))
    )
    text = INTRODUCTION + grid(compare.HEAD, rows)
    return f"{text}\n{compare.counted(rows)}.\n\n{origins}\n", []
