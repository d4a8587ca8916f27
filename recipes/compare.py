"""Compare tables that were run anew with the project's.

    python recipes/fashion_mnist.py --into DIR
    python recipes/compare.py DIR

Each row is one figure, with its mean over the seeds here and in DIR. The exit code is 1 if a mean
is missing or beyond the spread: it differs by more than two standard deviations of the project's
seeds, and by more than 1 point of accuracy or 0.01 of a loss. All rows of MAE hang on one
pre-training: if that differs, as it may on another processor, they move together.
"""

import shlex
import sys
from pathlib import Path
from statistics import mean, stdev

import figures
import running

from benchmarks.table import grid
from util import cli
from util.errors import UserError

STANDARD_DEVIATIONS = 2
LEAST = {"held-out loss": 0.01}  # that may differ of a measure, however little its seeds scatter
LEAST_POINTS = 1  # of an accuracy; the sampling error of 80% of 2,000 images is 0.9
EQUAL, WITHIN, BEYOND, PART = "equal", "within the spread", "beyond it", "in part"
HEAD = ["figure", "project's", "anew", "by seed", ""]


def measures(cell):
    """{name: figures} of a cell: accuracies (%), and the held-out loss of its pre-training."""
    found = {}
    for name, content in cell["outputs"].items():
        if name.endswith("eval.json"):
            found[f"accuracy, {name}"] = [content["test_acc1"]]
        elif name.endswith("knn.json"):
            found |= {f"k-NN, {percent}%": values for percent, values in content.items()}
        elif name.endswith("log.txt") and content and "val_loss" in content[-1]:
            found["held-out loss"] = [content[-1]["val_loss"]]
    return found


def gathered(cells):
    """{name of a figure: {(seed of the cell, number of its draw): one of each}}"""
    found = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        about = ", ".join(f"{name} {value}" for name, value in cell["about"].items())
        for name, values in measures(cell).items():
            numbered = {(cell["seed"], number): value for number, value in enumerate(values)}
            found.setdefault(f"{about}: {name}", {}).update(numbered)
    return found


def check_same_commands(own, again, output):
    """Refuse, with a UserError, cells that the project lacks or ran by other commands.

    Args:
        own, again: cells of the project, and those that were run anew.
        output: folder of the latter's outputs, as their commands name it.
    """
    lines_of = {cell["cell"]: cell["commands"] for cell in own}
    for cell in again:
        name = f"{cell['table']}/{cell['cell']}"
        if cell["cell"] not in lines_of:
            raise UserError(f"{running.shown(running.RESULTS)} has no {name}")
        usual = f"{running.shown(running.OUTPUT)}"
        lines = [
            shlex.join(word.replace(f"{output}", usual) for word in shlex.split(line))
            for line in cell["commands"]
        ]
        if lines != lines_of[cell["cell"]]:
            raise UserError(f"{name} was run anew by other commands than the project's")


def compared(values, others, least):
    """Texts: the figures of the project's seeds, those that were run anew, their differences.

    Args:
        values, others: {seed: figure}.
        least: a difference of the means that is within the spread in any case.
    """
    texts = [figures.mean_and_std([*found.values()], len(values)) for found in (values, others)]
    differences = [others[seed] - values[seed] for seed in values if seed in others]
    if not others:
        said = figures.NOT_RUN
    elif len(differences) < len(values):
        said = PART
    elif not any(differences):
        said = EQUAL
    else:
        spread = STANDARD_DEVIATIONS * stdev(values.values()) if len(values) > 1 else 0
        said = WITHIN if abs(mean(differences)) <= max(spread, least) else BEYOND
    return [*texts, " ".join(f"{points:+.2f}" for points in differences), said]


def compare(table, folder):
    """Print a table's rows; whether all figures are there and within the spread."""
    own, again = figures.read(table), figures.read(table, folder / running.RESULTS.name)
    check_same_commands(own, again, running.shown(folder / running.OUTPUT.name))
    found = gathered(again)
    rows = []
    for name, values in gathered(own).items():
        least = LEAST.get(name.split(": ")[-1], LEAST_POINTS)
        rows.append([name, *compared(values, found.get(name, {}), least)])
    print(f"{table}, project's: {figures.origin(own)}\n{table}, anew: {figures.origin(again)}\n")
    print(grid(HEAD, rows))
    verdicts = [row[-1] for row in rows]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
    print(f"{table}: of {len(rows)} figures {', '.join(counts)}")
    return not {BEYOND, PART, figures.NOT_RUN} & {*verdicts}


def main(args):
    folder = args.folder.resolve()
    tables = sorted(path.name for path in (folder / running.RESULTS.name).glob("*"))
    if not tables:
        raise UserError(f"{args.folder} holds no results: run a table with --into {args.folder}")
    found = [compare(table, folder) for table in tables]
    sys.exit(0 if all(found) else 1)


if __name__ == "__main__":
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="as a table's --into")
    cli.run(main, parser)
