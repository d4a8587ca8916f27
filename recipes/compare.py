"""Compare tables that were run anew with the project's.

    python recipes/fashion_mnist.py --into DIR
    python recipes/compare.py DIR

A row is a figure: its mean over the seeds in recipes/results, and in DIR. A difference of more than
two standard errors (Welch) is more than noise, if there are three seeds of both.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

import figures
import running

from benchmarks.table import grid
from util.errors import UserError

EQUAL, NOISE, MORE, UNKNOWN = "equal", "within the noise", "more than noise", "too few seeds"
HEAD = ["figure", "project's", "anew", "difference", "standard error", ""]


def measures(cell):
    """{name: figures} of a cell: accuracies (%), and the held-out loss of its pre-training."""
    found = {}
    for name, content in cell["outputs"].items():
        if name.endswith("eval.json"):
            found[f"accuracy, {name}"] = [content["test_acc1"]]
        elif name.endswith("knn.json"):
            found |= {f"k-NN, {percent}%": values for percent, values in content.items()}
        elif "val_loss" in content[-1]:
            found["held-out loss"] = [content[-1]["val_loss"]]
    return found


def gathered(cells):
    """{(what a cell is, name of a figure): one of each seed}."""
    found = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        about = ", ".join(f"{name} {value}" for name, value in cell["about"].items())
        for name, values in measures(cell).items():
            found.setdefault((about, name), []).extend(values)
    return found


def compare(table, anew):
    """The rows of a table, of the project's results and of those in the folder `anew`."""
    own, again = gathered(figures.read(table)), gathered(figures.read(table, anew))
    return [
        [f"{about}: {name}", *compared(values, again.get((about, name), []))]
        for (about, name), values in own.items()
    ]


def compared(values, others):
    """Texts: the figures of the project's seeds, of those that were run anew, the difference."""
    texts = [figures.mean_and_std(numbers, len(numbers)) for numbers in (values, others)]
    if not others:
        return texts
    difference = figures.difference(others, values)
    if values == others:
        said = EQUAL
    elif difference is None:
        said = UNKNOWN
    else:
        said = NOISE if figures.verdict(difference) == NOISE else MORE
    error = f"{difference[1]:.2f}" if difference else ""
    return [*texts, f"{mean(others) - mean(values):+.2f}", error, said]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="as a table's --into")
    anew = parser.parse_args().folder.resolve() / running.RESULTS.name
    try:
        tables = [path.name for path in sorted(anew.glob("*")) if figures.read(path.name)]
        if not tables:
            raise UserError(f"{anew} has no results of a table in {running.shown(running.RESULTS)}")
        for table in tables:
            rows = compare(table, anew)
            print(f"{table}, project's: {figures.origin(figures.read(table))}")
            print(f"{table}, anew: {figures.origin(figures.read(table, anew))}")
            print(grid(HEAD, rows))
            counts = [f"{sum(row[-1] == s for row in rows)} {s}" for s in (EQUAL, NOISE, MORE)]
            print(f"{table}: of {len(rows)} figures {', '.join(counts)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
