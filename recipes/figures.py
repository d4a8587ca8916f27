"""Figures of the cells that were run: read from their JSON, gathered over seeds, compared."""

import math
import statistics

import running

from util.errors import UserError

NOT_RUN, NO_TIME, NOISE = "not run", "no comparable time", "within the noise"
SEEDS = 3  # a difference is judged by so many
STUDENT = 4.303  # standard errors of its 95% interval: Student's t, 2 degrees of freedom


def read(table, results=None):
    """The JSON of a table's done cells, sorted by name, in a folder of results or the project's.

    Each gets an entry `timed`: its whole time is known, and it ran on the hardware that ran most
    of its model's cells, the first one of several.
    """
    folder = (results or running.RESULTS) / table
    cells = [running.record(path) for path in sorted(folder.glob("*.json"))]
    for cell in cells:
        same_model = [c for c in cells if c["about"].get("model") == cell["about"].get("model")]
        usual = statistics.mode(hardware(other) for other in same_model)
        cell["timed"] = hardware(cell) == usual and not cell["attempts_without_times"]
    return cells


def hardware(cell):
    """Text: the processor that ran a cell, and its GPU if it had one."""
    return ", ".join(cell["hardware"].values())


def select(cells, **about):
    """The cells whose `about` has these entries, by seed."""
    found = [c for c in cells if all(c["about"].get(k) == v for k, v in about.items())]
    return sorted(found, key=lambda cell: cell["seed"])


def output(cell, name):
    """One of the cell's outputs.

    Raises:
        UserError: there is none of this name.
    """
    try:
        return cell["outputs"][name]
    except KeyError:
        path = f"{running.shown(running.RESULTS)}/{cell['table']}/{cell['cell']}.json"
        raise UserError(f"{path} has no {name}: delete it and run the cell again") from None


def evaluated(cell, folder="eval"):
    """Percentage of all held-out images that the cell's last epoch classified correctly."""
    return output(cell, f"{folder}/eval.json")["test_acc1"]


def neighbours(cell, percent=100):
    """Accuracies (%) by nearest neighbours, one for each draw of so many percent of the labels."""
    return output(cell, "knn.json")[str(percent)]


def core_hours(cells):
    """The mean processor time of the `timed` cells, None without one."""
    known = [cell["cpu_s"] for cell in cells if cell["timed"]]
    return statistics.mean(known) / 3600 if known else None


def pretraining_minutes(cell):
    """Core-minutes of the cell's pre-training."""
    parts = zip(cell["commands"], cell["parts"], strict=True)
    return sum(part["cpu_s"] for line, part in parts if "main_pretrain.py" in line.split()) / 60


def mean_and_std(values, expected, digits=1):
    """Text: mean, sample standard deviation and how many seeds it is of.

    Args:
        values: one for each seed that was run.
        expected: the number of seeds that are to run.
        digits: behind the point.
    """
    if not values:
        return NOT_RUN
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    part = len(values) < expected
    return text + (f", {len(values)} of {expected} seeds" if part else f", n = {len(values)}")


def difference(values, others):
    """(mean of the seeds' differences, half its 95% interval), None with too few seeds of either.

    Args:
        values, others: one for each seed, of the same seeds.
    """
    if {len(values), len(others)} != {SEEDS}:
        return None
    found = [value - other for value, other in zip(values, others, strict=True)]
    return statistics.mean(found), STUDENT * statistics.stdev(found) / math.sqrt(SEEDS)


def verdict(compared):
    """What a `difference` says of the first of its two."""
    points, half = compared
    if abs(points) <= half:
        return NOISE
    return "ahead" if points > 0 else "behind"


def pooled_std(samples):
    """The standard deviation within samples, of which each has its own mean; None without any."""
    samples = [values for values in samples if len(values) > 1]
    if not samples:
        return None
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in samples)
    return math.sqrt(squares / sum(len(values) - 1 for values in samples))


def ran_by(command, cells):
    """The paragraph below a table's sections: what runs its cells, and what ran them."""
    return f"`{command}` runs these cells. {origin(cells)}\n"


def origin(cells):
    """Text: how many cells, and the commits, hardware, types and versions that made them."""
    if not cells:
        return "No cell was run."
    count = f"{len(cells)} cells" if len(cells) > 1 else "1 cell"
    parts = [
        shares([f"commit {cell['commit']}" for cell in cells]),
        shares([hardware(cell) for cell in cells]),
        shares([cell["amp_auto"] for cell in cells]),
        shares([", ".join(f"{k} {v}" for k, v in cell["versions"].items()) for cell in cells]),
    ]
    text = f"{count}: {'; '.join(parts)}."
    if lost := sum(bool(cell["attempts_without_times"]) for cell in cells):
        text += f" In {lost} of them an attempt was killed and its time is not counted."
    return text


def shares(names):
    """Text: each name, with how often it occurs if there are several."""
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    if len(counts) == 1:
        return names[0]
    return " and ".join(f"{name} ({count})" for name, count in counts.items())


def changed(flags):
    """Text: changed flags as one would type them, or without which."""
    texts = [
        f"no `--{flag}`" if value is False else f"`{' '.join(running.flags({flag: value}))}`"
        for flag, value in flags.items()
    ]
    return ", ".join(texts) or "nothing"
