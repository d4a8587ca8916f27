"""Write benchmarks/RESULTS.md, the tables that the files in benchmarks/results make.

python -m benchmarks.table
"""

import json

from benchmarks.report import RESULTS

PAGE = RESULTS.parent / "RESULTS.md"
INTRODUCTION = """# Measured speed

The sides of a comparison take turns on an otherwise idle machine. A first round warms up. Figures
are medians over the rounds after it, with the lowest and the highest in brackets; "times" compares
turns of the same round. *MFU* is the share of the machine's peak that the method's operations need;
the peak is measured by products of large square matrices. *transformers* has SDPA and fused AdamW.
*Time lost*, compared with bare steps on synthetic images, includes a checkpoint every 5 minutes. No
GPU results yet.

The tables at commit 55aa76d, on Zen 5, were measured with code that is gone: float32 linear layers
were convolutions there, and the model had a shorter path for training, worth about 1%. *The plain
loop* in them trains this project's model eagerly, with an explicit softmax, unfused AdamW, float
images and a host sync in each step.

Below each table are its command, commit (`+` marks uncommitted changes), hardware and versions.
`python -m benchmarks.table` writes this page; [README.md](README.md) says how to measure again.

"""


def page():
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    steps = [r for name, r in reports.items() if name.startswith(("pretrain_", "finetune_"))]
    steps.sort(key=lambda report: (report["task"] != "pretrain", -report["gflop_per_image"]))
    tables = [step_table(report) for report in steps]
    tables += [loading_table(reports["data_loading"]), whole_run_table(reports["whole_run"])]
    return INTRODUCTION + "\n".join(tables)


def step_table(report):
    results, auto = report["results"], report.get("amp_auto")
    peers = [side for side in results if not side.startswith("ours")]
    task = {"pretrain": "pre-training", "finetune": "fine-tuning"}[report["task"]]
    title = f"{task} `{report['model']}`, {report['input_size']} px, batch {report['batch_size']}"
    head = [title, "images/s", "MFU", "peak memory", *(f"times {words(peer)}" for peer in peers)]
    rows = [
        [
            words(side) + " (`--amp auto`)" * (side == f"ours:{auto}"),
            three_digits(figures["images_per_s"]["median"]),
            f"{figures['mfu']['median']:.0%}",
            f"{figures['peak_memory_gib']:.1f} GiB",
            *(spread(figures["times_as_fast_as"].get(peer)) for peer in peers),
        ]
        for side, figures in results.items()
    ]
    return markdown(head, rows, report)


def loading_table(report):
    head = ["loading JPEGs of 500 x 375", "images/s", "times Pillow", "bytes to the device"]
    rows = [
        [
            f"{where}, {'Pillow and floats' if side == 'pillow' else side}",
            three_digits(figures["images_per_s"]["median"]),
            "" if side == "pillow" else spread(figures["times_as_fast_as_pillow"]),
            f"{report['bytes_to_the_device_per_image'].get(side, '')}",
        ]
        for where, sides in report["results"].items()
        for side, figures in sides.items()
    ]
    return markdown(head, rows, report)


def whole_run_table(report):
    title = f"pre-training `{report['model']}` on JPEGs, 224 px, batch {report['batch_size']}"
    head = [title, "images/s", "times the quiet run", "time lost", "time waiting for images"]
    results = report["results"]
    rows = [[run, three_digits(speed["median"])] for run, speed in results["images_per_s"].items()]
    quiet, busy, *_ = rows
    quiet += ["", spread(results["share_lost"], ".1%"), f"{results['data_wait']['median']:.1%}"]
    busy += [spread(results["busy_to_quiet"])]
    return markdown(head, rows, report)


def words(side):
    """ours:bf16:compile is "ours, bf16, compiled"."""
    names = {"plain": "the plain loop", "off": "float32", "compile": "compiled"}
    return ", ".join(names.get(part, part) for part in side.split(":"))


def three_digits(value):
    return f"{float(f'{value:.3g}'):g}"


def spread(figures, form=".2f"):
    """Median, lowest and highest; nothing where nothing was measured."""
    if figures is None:
        return ""
    median, lowest, highest = (format(value, form) for value in figures.values())
    return f"{median} ({lowest} to {highest})"


def markdown(head, rows, report):
    """A table, and the line below it that says where its figures come from."""
    rows = [head, ["---"] * len(head), *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    versions = ", ".join(" ".join(item) for item in report["versions"].items())
    origin = "; ".join([report["commit"], *report["hardware"].values(), versions])
    return f"{table}\n*`{report['command']}` at {origin}.*\n"


if __name__ == "__main__":
    PAGE.write_text(page())
