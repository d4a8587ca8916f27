"""The README's tables of speed, made from the files in benchmarks/results.

python -m benchmarks.table            write them into README.md
python -m benchmarks.table --check    only see whether they are there
"""

import json
from pathlib import Path

from benchmarks.report import RESULTS
from util import cli
from util.errors import UserError

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- made by python -m benchmarks.table -->\n", "<!-- end -->\n"


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    return parser


def main(args):
    before, found, after = parts()
    if not args.check:
        README.write_text(before + BEGIN + tables() + END + after)
    elif found != tables():
        raise UserError("README.md has other tables than the results make: leave --check out")


def parts():
    """README.md before, between and after the marks of the tables."""
    before, _, rest = README.read_text().partition(BEGIN)
    found, _, after = rest.partition(END)
    return before, found, after


def tables():
    """All tables, in Markdown."""
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    steps = [r for name, r in reports.items() if name.startswith(("pretrain_", "finetune_"))]
    steps.sort(key=lambda report: (report["task"] != "pretrain", -report["gflop_per_image"]))
    made = [step_table(report) for report in steps]
    made.append(loading_table(reports["data_loading"]))
    made.append(whole_run_table(reports["whole_run"]))
    return "\n".join(made)


def step_table(report):
    """Sides by lines: images a second, MFU, memory, and how many times the peers' speed."""
    results = report["results"]
    peers = [side for side in results if not side.startswith("ours")]
    task = {"pretrain": "pre-training", "finetune": "fine-tuning"}[report["task"]]
    title = f"{task} `{report['model']}`, {report['input_size']} px, batch {report['batch_size']}"
    head = [title, "images/s", "MFU", "peak memory", *(f"times {label(peer)}" for peer in peers)]
    lines = []
    for side, figures in results.items():
        ratios = [figures["times_as_fast_as"].get(peer) for peer in peers]
        lines.append(
            [
                label(side),
                three_digits(figures["images_per_s"]["median"]),
                f"{figures['mfu']['median']:.0%}",
                f"{figures['peak_memory_gib']:.1f} GiB",
                *(spread(ratio) if ratio else "" for ratio in ratios),
            ]
        )
    return markdown(head, lines) + source(report)


def loading_table(report):
    head = ["loading JPEGs of 500 x 375", "images/s", "times Pillow", "bytes to the device"]
    lines = [
        [
            f"{where}, {'Pillow and floats' if side == 'pillow' else side}",
            f"{figures['images_per_s']['median']:.0f}",
            "" if side == "pillow" else spread(figures["times_as_fast_as_pillow"]),
            f"{report['bytes_to_the_device_per_image'].get(side, '')}",
        ]
        for where, sides in report["results"].items()
        for side, figures in sides.items()
    ]
    return markdown(head, lines) + source(report)


def whole_run_table(report):
    title = f"`main_pretrain.py`, `{report['model']}`, JPEGs, batch {report['batch_size']}"
    results = report["results"]
    lost, waited = (results[name] for name in ("share_lost", "data_wait"))
    lines = [
        [name, three_digits(speed["median"]), ""] for name, speed in results["images_per_s"].items()
    ]
    lines[0][-1] = (
        f"{lost['median']:.1%} ({lost['lowest']:.1%} to {lost['highest']:.1%}), "
        f"{waited['median']:.1%} in waiting for images"
    )
    return markdown([title, "images/s", "share of time lost"], lines) + source(report)


def label(side):
    """A side in words: ours:bf16:compile is "ours, bf16, compiled"."""
    words = {"plain": "the plain way", "off": "float32", "compile": "compiled"}
    return ", ".join(words.get(part, part) for part in side.split(":"))


def three_digits(value):
    return f"{float(f'{value:.3g}'):g}"


def spread(ratio):
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"


def markdown(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def source(report):
    """The line below a table that says where its figures come from."""
    versions = ", ".join(
        f"{package} {report['versions'][package]}"
        for package in ("torch", "transformers", "lightly", "torchvision", "pillow")
        if package in report["versions"]
    )
    hardware = "; ".join(report["hardware"].values())
    return f"\n*`{report['command']}` at {report['commit']}; {hardware}; {versions}.*\n"


if __name__ == "__main__":
    cli.run(main, get_args_parser())
