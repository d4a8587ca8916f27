"""docs/results.md: the ablations and the cheap recipe. Reads the cells that worth.py makes."""

from statistics import mean

import ablations
import cifar10
import efficient
import figures
import plots
import worth

from benchmarks.table import grid

MEASURES = {
    "k-NN": lambda cell: figures.neighbours(cell)[0],
    "linear probe": lambda cell: figures.evaluated(cell, "probe_eval"),
    "fine-tuned": figures.evaluated,
}
DEFAULTS = {"mask_ratio": 0.75, "decoder_depth": 2}  # of main_pretrain.py, of nano
BASE = {flag: cifar10.PRETRAIN.get(flag, value) for flag, value in DEFAULTS.items()}
BASE["target"] = "normalised" if cifar10.PRETRAIN["norm_pix_loss"] else "raw"
TARGETS = ["raw", "normalised"]
ABLATIONS = {  # how they are called, and their settings
    "mask_ratio": ("mask ratio", sorted({BASE["mask_ratio"], *ablations.VARIED["mask_ratio"]})),
    "decoder_depth": (
        "decoder blocks",
        sorted({BASE["decoder_depth"], *ablations.VARIED["decoder_depth"]}),
    ),
    "target": ("pixels to predict", TARGETS),
}
# Printed in arXiv 2111.06377, in Table 1 if nothing else is said.
PAPER = {
    "mask_ratio": {"linear probe": {0.1: 54.6, 0.75: 73.5}},  # section 4.1: the ends of a rise
    "decoder_depth": {
        "linear probe": {1: 65.5, 2: 70.0, 4: 71.9, 8: 73.5, 12: 73.3},
        "fine-tuned": {1: 84.8, 2: 84.9, 4: 84.9, 8: 84.9, 12: 84.4},
    },
    "target": {
        "linear probe": {"raw": 73.5, "normalised": 73.9},
        "fine-tuned": {"raw": 84.9, "normalised": 85.4},
    },
}
LABELS = {"paper": "the usual one", "cheap": "the cheap one"}
WORTH = f"""A cell pre-trains nano on CIFAR-10's training images, without labels. Then, with
{worth.PERCENT}% of the labels, its encoder is used for k-NN, probed and fine-tuned, the
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
    "mask ratio up to 75%, from 54.6, which we take for the lowest ratio of the figure, to 73.5. "
    "Fine-tuning depends less on it: from 40% to 80% all work well. The other figures stand "
    "only in the paper's picture, which is not copied here.",
    "decoder_depth": "The paper (Table 1a): the linear probe needs a deep decoder, fine-tuning "
    "hardly does.",
    "target": "The paper (Table 1d): normalised pixels are better by 0.4 points (linear probe) "
    "and 0.5 points (fine-tuned).",
}
CHEAP_INTRODUCTION = f"""## The cheap recipe

A higher mask ratio and a shallower decoder make an epoch cheaper, so the same cost pays for more
epochs. Wei et al. (CVPRW 2024) reach 82.9% on ImageNet with ViT-B in about 9 hours on one A100.
That is their figure. `recipes/efficient.sh` follows their recipe. Its values are our guess, and it
was not run here.

Here is a miniature, with {len(efficient.BUDGETS)} budgets and {efficient.SEEDS} seeds. A budget of
1 is what {efficient.RECIPES["paper"][1][0]} epochs of the usual recipe cost, or about
{efficient.RECIPES["cheap"][1][0]} of the cheap one; the core-minutes say how near that is. The
recipes differ in two settings, and the miniature can't tell which of them matters. {WORTH}

"""


def measured(cells, measure):
    return [MEASURES[measure](cell) for cell in cells]


def minutes(cells):
    """The mean core-minutes of the pre-trainings of `timed` cells, None without one."""
    known = [figures.pretraining_minutes(cell) for cell in cells if cell["timed"]]
    return mean(known) if known else None


def minutes_text(cells):
    if not cells:
        return figures.NOT_RUN
    found = minutes(cells)
    return figures.NO_TIME if found is None else f"{found:.1f}"


def groups_of(vary, cells):
    """{setting: its cells} of an ablation, also of settings that only the paper has."""
    values = {*ABLATIONS[vary][1], *(v for theirs in PAPER[vary].values() for v in theirs)}
    values = sorted(values, key=lambda value: TARGETS.index(value) if vary == "target" else value)
    groups = {value: figures.select(cells, vary=vary, value=value) for value in values}
    groups[BASE[vary]] += figures.select(cells, vary="base")
    return groups


def ablation_section(vary, cells):
    name, _ = ABLATIONS[vary]
    groups, paper = groups_of(vary, cells), PAPER[vary]
    head = [name, *MEASURES, "core-minutes of pre-training", *(f"paper: {m}" for m in paper)]
    rows = []
    for value, group in groups.items():
        ours = [figures.mean_and_std(measured(group, m), ablations.SEEDS) for m in MEASURES]
        ours.append(minutes_text(group))
        if value not in ABLATIONS[vary][1]:
            ours = ["not planned"] * len(ours)
        printed = [f"{theirs[value]:.1f}" if value in theirs else "" for theirs in paper.values()]
        rows.append([f"{value}", *ours, *printed])
    picture, charts = plots.shown(ablation_chart(vary, groups), any(groups.values()))
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
        scatters.append(figures.pooled_std(samples.values()))
    text = f"Here the highest means are at {listed(highest)}. "
    if None in scatters:  # of one seed each
        return text
    return (
        text + f"The seeds of one setting scatter by {listed([f'{s:.1f}' for s in scatters])} "
        "points (pooled standard deviation). "
    )


def listed(texts):
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def ablation_chart(vary, groups):
    """Three panels of ours and, where the paper prints figures, the paper's below them."""
    name, _ = ABLATIONS[vary]
    paper = PAPER[vary]
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
        if vary == "mask_ratio":  # the figures between these are not printed
            line["apart"] = True
        return {"title": f"paper: {measure}", **axes, "lines": [line]}

    return {
        "name": f"ablation-{vary}".replace("_", "-"),
        "alt": f"Accuracy by {name}: {', '.join(MEASURES)}; below, the paper's",
        "rows": [
            [ours(measure) for measure in MEASURES],
            [theirs(measure) if measure in paper else None for measure in MEASURES],
        ],
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
    text += figures.ran_by("python recipes/ablations.py --data_path CIFAR10", cells)
    return text, [chart for _, charts in sections for chart in charts]


def cheap_section():
    cells = figures.read("efficient")
    axes = {"x": "core-minutes of pre-training", "y": plots.ACCURACY}
    panels = {measure: {"title": measure, **axes, "lines": []} for measure in MEASURES}
    rows = []
    for style, (recipe, label) in enumerate(LABELS.items()):
        plotted = []
        changes, lengths = efficient.RECIPES[recipe]
        for budget, epochs in zip(efficient.BUDGETS, lengths, strict=True):
            group = figures.select(cells, recipe=recipe, budget=budget)
            texts = [figures.mean_and_std(measured(group, m), efficient.SEEDS) for m in MEASURES]
            rows.append(
                [
                    f"{label}, {figures.changed(changes)}",
                    f"{budget}",
                    f"{epochs}",
                    minutes_text(group),
                    *texts,
                ]
            )
            plotted += [group] if minutes(group) is not None else []
        for measure, panel in panels.items() if plotted else ():
            samples = {minutes(group): measured(group, measure) for group in plotted}
            line = seeds_and_mean(f"{label}: mean; open marks: seeds", samples, style)
            panel["lines"].append(line)
    chart = {
        "name": "cheap-recipe",
        "alt": f"Accuracy by core-minutes of pre-training, two recipes: {', '.join(MEASURES)}",
        "rows": [list(panels.values())],
    }
    picture, charts = plots.shown(chart, any(panel["lines"] for panel in panels.values()))
    head = ["recipe", "budget", "epochs", axes["x"], *MEASURES]
    text = CHEAP_INTRODUCTION + grid(head, rows) + "\n" + picture + "\n"
    return text + figures.ran_by("python recipes/efficient.py --data_path CIFAR10", cells), charts
