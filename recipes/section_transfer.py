"""docs/results.md: does pre-training pay? Reads the cells that transfer.py makes."""

import itertools
from dataclasses import dataclass

import cifar10
import fashion_mnist
import figures
import folders
import knn
import plots
import transfer

from benchmarks.table import grid

ROWS = {
    "finetune": "MAE, fine-tuned",
    "probe": "MAE, linear probe (frozen)",
    "knn": "MAE, k-NN (frozen)",
    "scratch": "from scratch, fine-tuning's epochs",
    "scratch_long": "from scratch, as long as pre-training and fine-tuning",
}
COMPARED = ("finetune", "probe")  # with the rows from scratch
CURVE_SPAN = 15  # points: twice 2 sampling errors, 3.5 points each, of 200 images at 50%


@dataclass
class Shown:
    """A table as the page shows it.

    Attributes:
        title: the images' name.
        settings: of its cells.
        models: nano, tiny.
        command: runs its cells.
        about: a sentence on the images.
    """

    title: str
    settings: transfer.Settings
    models: list[str]
    command: str
    about: str


TABLES = {
    "cifar10": Shown(
        "CIFAR-10",
        cifar10.SETTINGS,
        ["nano", "tiny"],
        "python recipes/cifar10.py --data_path CIFAR10",
        "50,000 training and 10,000 held-out images of 32 x 32 pixels, in patches of 4 x 4.",
    ),
    "fashion_mnist": Shown(
        "Fashion-MNIST",
        fashion_mnist.SETTINGS,
        ["nano"],
        "python recipes/fashion_mnist.py",
        "the bundled images, 8,000 for training and 2,000 held out, of 28 x 28 pixels, in patches "
        "of 4 x 4. Nothing is downloaded. With 1% of the labels a class has 8 labelled images, "
        f"fewer than k-NN's {knn.NEIGHBOURS} neighbours.",
    ),
}
PUBLISHED = [
    ["ViT-Ti/2", "2000 epochs", "89.8", "74.1", "IcarusWizard/MAE, a re-implementation"],
    ["ViT-lite/4", "800 epochs", "95.5", "not stated", "a user, supmae #1"],
    [
        "ViT with 3.64 M parameters, 36 px",
        "not stated",
        "96.4",
        "not stated",
        "arXiv 2402.03752, whose loss also counts visible patches",
    ],
]
INTRODUCTION = f"""## Does pre-training pay?

Each model is pre-trained once. Its encoder is fine-tuned, probed and used for k-NN, and ± is
over the seeds of these. How much another pre-training would differ was not measured. The same
classifier is trained from scratch, with as many epochs as in fine-tuning, and with about as much
computing as in pre-training and fine-tuning together: the second table has the times.

k-NN is by the {knn.NEIGHBOURS} nearest neighbours. It trains nothing: with all labels there is one
figure. Its time is that of all three columns together.

"Where it does not pay" compares "{ROWS["finetune"]}" and "{ROWS["probe"]}" with the rows from
scratch, seed by seed: runs of one seed have the same labels. A difference has its 95% interval
(Student's t, {figures.SEEDS} seeds). Where this holds 0, MAE is within the noise: no gain was
shown. One in 20 comparisons of equal methods would be ahead or behind. The interval is that of the
seeds. The choice of held-out images comes on top: an accuracy of 80% has a sampling error of 0.9
points on 2,000 of them and 0.4 on 10,000, and a difference on the same images less. The long rows
are a weak opponent: their settings, such as no RandAugment, were chosen by trials of 15 epochs, and
they have many more.

"""


def section(table):
    shown = TABLES[table]
    title, settings = shown.title, shown.settings
    cells = figures.read(table)
    sections = [transfer_table(table, model, cells) for model in shown.models]
    repeated = [f"{n} times at {percent}%" for percent, n in settings.copies.items() if n > 1]
    text = "".join(text for text, _ in sections)
    text += f"{title}: {shown.about} An epoch of a classifier holds each labelled image once"
    text += f", but {' and '.join(repeated)}. " if repeated else ". "
    held_out = folders.WATCHED * settings.classify["nb_classes"]
    text += (
        f"A picture's held-out figures are those of {held_out} images, and its k-NN has "
        f"at most {settings.pretrain['knn_images']:,} labelled ones to choose from: it is coarser "
        "than the table's.\n\n"
    )
    if table == "cifar10":
        text += "Published results, theirs and not ours, with other models and budgets.\n\n"
        head = ["accuracy (%), CIFAR-10", "pre-training", "fine-tuned", "from scratch", "source"]
        text += grid(head, PUBLISHED) + "\n"
    return text + figures.ran_by(shown.command, cells), [
        chart for _, charts in sections for chart in charts
    ]


def transfer_table(table, model, cells):
    """A model's tables and picture."""
    title, settings = TABLES[table].title, TABLES[table].settings
    heading = f"### {title}, {model}\n\n" + accuracy_table(cells, model, plots.ACCURACY) + "\n"
    if not figures.select(cells, model=model):
        return heading, []
    pretrained = figures.select(cells, what="pretrain", model=model)
    hours = figures.core_hours(pretrained)
    picture, charts = plots.shown(curve_chart(table, model, pretrained), pretrained)
    parts = [
        cost_table(cells, model),
        f"Pre-training, {settings.pretrain['epochs']} epochs: "
        + (f"{duration(hours)}.\n" if pretrained else f"{figures.NOT_RUN}.\n"),
        f"#### Where it does not pay: {title}, {model}\n",
        pays(cells, model) + picture,
    ]
    return heading + "\n".join(parts) + "\n", charts


def accuracies(cells, model, what, percent):
    """(an accuracy for each seed, how many seeds are to run) of a row and a share of the labels."""
    if what == "knn":
        found = figures.select(cells, what=what, model=model)
        expected = knn.SEEDS if percent < 100 else 1
        return [a for cell in found for a in figures.neighbours(cell, percent)], expected
    found = figures.select(cells, what=what, model=model, labels=percent)
    return [figures.evaluated(cell) for cell in found], knn.SEEDS


def label_columns():
    return [f"{percent}% of the labels" for percent in transfer.PERCENTS]


def accuracy_table(cells, model, title):
    rows = []
    for what, label in ROWS.items():
        found = [accuracies(cells, model, what, percent) for percent in transfer.PERCENTS]
        rows.append([label, *(figures.mean_and_std(*values) for values in found)])
    return grid([title, *label_columns()], rows)


def cost_table(cells, model):
    """Epochs and core-hours of a run, of the pre-trained also with the pre-training."""
    pretraining = figures.core_hours(figures.select(cells, what="pretrain", model=model))
    rows = []
    for what, label in ROWS.items():
        row = [label]
        for percent in transfer.PERCENTS:
            about = {} if what == "knn" else {"labels": percent}
            found = figures.select(cells, what=what, model=model, **about)
            row.append(cost(found, None if what.startswith("scratch") else pretraining))
        rows.append(row)
    return grid(["epochs; time (with the pre-training)", *label_columns()], rows)


def cost(cells, pretraining):
    if not cells:
        return figures.NOT_RUN
    hours = figures.core_hours(cells)
    epochs = sorted({cell["about"].get("epochs") for cell in cells} - {None})
    text = "".join(f"{number}; " for number in epochs) + duration(hours)
    if hours is None or pretraining is None:
        return text
    return f"{text} ({duration(hours + pretraining)})"


def duration(hours):
    if hours is None:
        return figures.NO_TIME
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def pays(cells, model):
    """Where MAE is ahead of the rows from scratch: a table and a sentence."""
    rows, verdicts = [], []
    pairs = [(own, other) for own in COMPARED for other in ("scratch", "scratch_long")]
    for (own, other), percent in itertools.product(pairs, transfer.PERCENTS):
        accuracies_of = [accuracies(cells, model, what, percent)[0] for what in (own, other)]
        compared = figures.difference(*accuracies_of)
        if compared:
            found = figures.verdict(compared)
        else:
            found = TOO_FEW if all(accuracies_of) else figures.NOT_RUN
        numbers = ["", ""]
        if compared:
            points, half = compared
            ends = f"{bound(points - half)} to {bound(points + half)}"
            numbers = [f"{points:+.1f}", ends]
        rows.append([ROWS[own], ROWS[other], f"{percent}%", *numbers, found])
        verdicts.append(found)
    head = ["row", "compared with", "labels", "difference, points", "95% interval", "it is"]
    return grid(head, rows) + "\n" + conclusion(verdicts)


def bound(points):
    """An interval's end, with a second digit where the first would hide its sign."""
    return f"{points:+.{2 if abs(points) < 0.05 else 1}f}"


TOO_FEW = "too few seeds"


def conclusion(verdicts):
    """A sentence: how many comparisons have each verdict."""
    order = ("ahead", "behind", figures.NOISE, TOO_FEW, figures.NOT_RUN)
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in order if verdict in verdicts]
    return f"Of {len(verdicts)} comparisons: {', '.join(counts)}.\n\n"


def curve_chart(table, model, cells):
    """The losses and the k-NN accuracy over a pre-training."""
    log = [entries for cell in cells for entries in figures.output(cell, "log.txt")]

    def line(entry, label, style=0):
        points = [(entries["epoch"] + 1, entries[entry]) for entries in log if entry in entries]
        x, y = ([point[axis] for point in points] for axis in (0, 1))
        return {"label": label, "x": x, "y": y, "style": style}

    def panel(title, y, *lines):
        return {"title": title, "x": "epoch", "y": y, "lines": list(lines)}

    losses = [line("train_loss", "training images"), line("val_loss", "held-out images", 1)]
    row = [panel("loss", "loss", *losses)]
    row.append(panel("k-NN", plots.ACCURACY, line("knn_acc1", "held-out images", 1)))
    row[-1]["span"] = CURVE_SPAN
    return {
        "name": f"{table}-{model}-pretraining".replace("_", "-"),
        "alt": f"{TABLES[table].title}, {model}: losses and k-NN accuracy by epoch of pre-training",
        "rows": [row],
    }


def measured_lines(cells):
    """What the nano model's commands with all labels lead to, and how long they take."""
    lines = []
    for what in COMPARED:
        lines.append(
            f"{ROWS[what]} (%): {figures.mean_and_std(*accuracies(cells, 'nano', what, 100))}"
        )
    for what, label in (("pretrain", "pre-training"), ("finetune", "fine-tuning")):
        about = {"labels": 100} if what == "finetune" else {}
        found = figures.select(cells, what=what, model="nano", **about)
        hours = figures.core_hours(found)
        time = duration(hours)
        if hours is not None:
            timed = next(cell for cell in found if cell["timed"])
            time += f" of a core, {timed['hardware']['cpu']}"
        lines.append(f"{label}: {time if found else figures.NOT_RUN}")
    return lines
