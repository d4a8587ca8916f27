"""Compare tables that were run anew with the project's.

    python recipes/fashion_mnist.py --into DIR
    python recipes/compare.py DIR

Each row is one figure: its mean over the seeds here and in DIR, and each seed's difference. The
exit code is 1 if a seed is missing, or a mean is beyond the spread: it differs by more than two
standard deviations of the project's seeds, and by more than 1 point of accuracy or 0.01 of a loss.
All rows of MAE hang on one pre-training: if that differs, as it may on another processor, they move
together.
"""

import shlex
import sys
from pathlib import Path
from statistics import mean, stdev

import figures
import running

from benchmarks.table import grid
from util import cli
from util.errors import UserError, say

STANDARD_DEVIATIONS = 2
LOSS = "held-out loss"
# What may differ, however little seeds scatter: points of an accuracy, of which the sampling error
# is 0.9 for 80% of 2,000 images; and of the loss.
LEAST_POINTS, LEAST_LOSS = 1, 0.01
EQUAL, WITHIN, BEYOND = "equal", "within the spread", "beyond it"
PART = "within it, in part"
HEAD = ["figure", "project's", "anew", "by seed", ""]


def measures(cell):
    """{name: figures} of a cell: accuracies (%), and the held-out loss of its pre-training."""
    found = {}
    for name, content in cell["outputs"].items():
        if name.endswith("eval.json"):
            kind = "accuracy, linear probe" if name.startswith("probe") else "accuracy"
            found[kind] = [content["test_acc1"]]
        elif name.endswith("knn.json"):
            found |= {f"k-NN, {percent}%": values for percent, values in content.items()}
        elif name.endswith("log.txt") and content and "val_loss" in content[-1]:
            found[LOSS] = [content[-1]["val_loss"]]
    return found


def gathered(cells):
    """{name of a figure: {(seed of the cell, number of its draw): one of each}}"""
    found = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        about = ", ".join(
            value if isinstance(value, str) else f"{name} {value}"
            for name, value in cell["about"].items()
        )
        for name, values in measures(cell).items():
            numbered = {(cell["seed"], number): value for number, value in enumerate(values)}
            found.setdefault(f"{about}: {name}", {}).update(numbered)
    return found


def commands(cell):
    """A cell's commands, with its outputs named from the table on, wherever they are."""
    mark = f"{running.OUTPUT.name}/{cell['table']}/"
    return [
        [word[word.rfind(mark) :] if mark in word else word for word in shlex.split(line)]
        for line in cell["commands"]
    ]


def check_same_commands(own, again):
    """Refuse, with a UserError, cells that the project lacks or ran by other commands.

    Args:
        own, again: cells of the project, and those that were run anew.
    """
    commands_of = {cell["cell"]: commands(cell) for cell in own}
    for cell in again:
        name = f"{cell['table']}/{cell['cell']}"
        if cell["cell"] not in commands_of:
            raise UserError(f"{running.shown(running.RESULTS)} has no {name}")
        if commands(cell) != commands_of[cell["cell"]]:
            raise UserError(f"{name} was run anew by other commands than the project's")


def compared(values, others, least, digits):
    """Texts: the figures of the project's seeds, those that were run anew, their differences.

    Args:
        values, others: {seed: figure}.
        least: a difference of the means that is within the spread in any case.
        digits: of means, behind the point; differences have one more.
    """
    texts = [
        figures.mean_and_std([*found.values()], len(values), digits) for found in (values, others)
    ]
    differences = [others[seed] - values[seed] for seed in values if seed in others]
    spread = STANDARD_DEVIATIONS * stdev(values.values()) if len(values) > 1 else 0
    if not differences:
        said = figures.NOT_RUN
    elif abs(mean(differences)) > max(spread, least):
        said = BEYOND
    elif len(differences) < len(values):
        said = PART
    else:
        said = WITHIN if any(differences) else EQUAL
    return [*texts, " ".join(f"{points:+.{digits + 1}f}" for points in differences), said]


def figure_rows(own, again):
    """A table's rows, one for each figure of the project's cells.

    Args:
        own, again: cells of the project, and those that were run anew.
    """
    check_same_commands(own, again)
    found = gathered(again)
    made = []
    for name, values in gathered(own).items():
        least, digits = (LEAST_LOSS, 3) if name.endswith(LOSS) else (LEAST_POINTS, 1)
        made.append([name, *compared(values, found.get(name, {}), least, digits)])
    return made


def counted(rows):
    """Text: how many rows there are, and how many of each verdict."""
    verdicts = [row[-1] for row in rows]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
    return f"{len(rows)} figures: {', '.join(counts)}"


def compare(table, folder):
    """Print a table's rows; whether all figures are there and within the spread."""
    own, again = figures.read(table), figures.read(table, folder / running.RESULTS.name)
    rows = figure_rows(own, again)
    say(
        f"{table}, project's: {figures.origin(own)}\n{table}, anew: {figures.origin(again)}\n\n"
        f"{grid(HEAD, rows)}\n{table}, {counted(rows)}",
        sys.stdout,
    )
    return not {BEYOND, PART, figures.NOT_RUN} & {row[-1] for row in rows}


def main(args):
    folder = args.folder.resolve()
    running.check_not_own(folder, "the folder")
    tables = sorted({path.parent.name for path in (folder / running.RESULTS.name).glob("*/*.json")})
    if not tables:
        raise UserError(f"{args.folder} holds no results: run a table with --into {args.folder}")
    found = [compare(table, folder) for table in tables]
    sys.exit(0 if all(found) else 1)


if __name__ == "__main__":
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="as a table's --into")
    cli.run(main, parser)
