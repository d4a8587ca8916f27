"""Write benchmarks/RESULTS.md and docs/memory.md: tables that benchmarks/results make.

python -m benchmarks.table
"""

import json

from benchmarks.report import RESULTS

PAGE = RESULTS.parent / "RESULTS.md"
MEMORY_PAGE = RESULTS.parent.parent / "docs" / "memory.md"
INTRODUCTION = """# Measured speed

The sides of a comparison take turns on an otherwise idle machine. A first round warms up. Figures
are medians over the rounds after it, with the lowest and the highest in brackets; "times" compares
turns of the same round. *MFU* is the share of the machine's peak that the method's operations need;
the peak is measured by products of large square matrices. *The plain loop* trains this project's
model eagerly, with an explicit softmax, unfused AdamW, float images and a wait for the device in
each step; *transformers* and *lightly* have SDPA and fused AdamW. *Compiled* sides have compiled
transformer blocks. *Time lost*, compared with bare steps on synthetic images, includes writing a
checkpoint every 5 minutes, as if training waited for it.{no_gpu}

The tables at commit 55aa76d, on Zen 5, were measured with code that is gone: float32 linear layers
were convolutions there, and the model had a shorter path for training, worth about 1%.

Below each table are its command, commit (`+` marks uncommitted changes), hardware and versions.
`python -m benchmarks.table` writes this page; [README.md](README.md) says how to measure again.

"""
MEMORY_INTRODUCTION = """# What fits into a GPU's memory

These figures are counted, not measured. The engines' training step runs on tensors that have a
shape but no values. A test compares such counts with real allocations on a CPU. On an
H100 the peaks were at most those counted, and from 1% to 12% below them: benchmarks/README.md.

    peak memory in GiB = fixed + batch size x MiB per image / 1024

- **Batch size** is `--batch_size`: images per process and step. `--accum_iter` does not change it.
- **Fixed** holds the weights, AdamW's state, the gradients, and the weights' copies in bf16. With
  several GPUs, or `--accum_iter` above 1, the gradients are there all the time, and are counted so.
  One GPU without accumulation may need less, by up to 4 bytes per parameter.
- **Type**: `--amp bf16` with flash attention, which holds no matrix of tokens x tokens. Older cards
  (T4, V100) compute in fp16, with a different attention. That was not counted.
- **ckpt** is `--grad_checkpointing`.
- **GFLOP** are the matrix products of layers and attention for one image, forward and backward, as
  this code computes them. Flash attention's backward pass counts 2.5 times its forward pass. *MFU*
  in RESULTS.md counts it twice; for base, large and huge in pre-training the sums differ by less
  than 1%.
- **Parameters** are those that are trained. Classifiers have 1000 classes, and drop path.
- **Two batches** (8 and 4096) are counted. The other figures follow from the line through them. The
  count is never above that line. Where tried, it was on it, with ckpt up to about 5% below.
- `--mask_ratio` is 0.75. Evaluation needs less for the same batch, as does the linear probe: the
  encoder keeps nothing for a backward pass.

The columns on the right show the largest batch that a card takes: a multiple of 64, or of 8 below
64. They end at 4096, the paper's batch. A dash means that a batch of 8 does not fit. A card's
usable memory is its memory less 8% for fragmentation and 1 GiB for CUDA and its libraries. These
two are assumptions, as is the memory of a card:

"""
ESTIMATE_INTRODUCTION = """## Images a second: an estimate

**This is an estimate. Nothing in this table was measured.** It is for one GPU, bf16, without
`--compile`, with images that are always ready. It is too high where it was put to the test:
an H100 made 0.74 of it with `mae_vit_base_patch16` (3,190 images a second), 0.69 with large
(1,730), 0.55 with huge (665) and 0.84 with `vit_base_patch16` (2,280), see
[RESULTS.md](../benchmarks/RESULTS.md), with batches of 256, 128, 64 and 128. A step's time is the
sum of

- layers' matrix products, by their operations,
- attention, by its operations,
- everything else, by the bytes it reads and writes: each operation reads its inputs and writes its
  outputs once, and nothing stays in a cache.

Time to launch kernels is left out: small batches are slower. The rates are assumptions:

"""


def page():
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    steps = [r for name, r in reports.items() if name.startswith(("pretrain_", "finetune_"))]
    steps.sort(key=lambda report: (report["task"] != "pretrain", -report["gflop_per_image"]))
    tables = [step_table(report) for report in steps]
    for benchmark, make in (
        ("data_loading", loading_table),
        ("whole_run", whole_run_table),
        ("load", load_tables),
    ):
        tables += [make(report) for name, report in reports.items() if name.startswith(benchmark)]
    has_gpu = any("cuda" in name for name in reports)
    introduction = INTRODUCTION.format(no_gpu="" if has_gpu else " No GPU results yet.")
    return introduction + "\n".join(tables)


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
            f"{figures['mfu']['median']:.0%}" if "mfu" in figures else "",
            f"{figures['peak_memory_gib']:.1f} GiB",
            *(spread(figures["times_as_fast_as"].get(peer)) for peer in peers),
        ]
        for side, figures in results.items()
    ]
    return markdown(head, rows, report)


def loading_table(report):
    head = [
        "loading (JPEGs of 500 x 375 unless stated)",
        "images/s",
        "times Pillow",
        "bytes to the device",
    ]
    rows = [
        [
            f"{where}, {side.replace('pillow', 'Pillow and floats')}",
            three_digits(figures["images_per_s"]["median"]),
            "" if side == "pillow" else spread(figures.get("times_as_fast_as_pillow")),
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


def load_tables(report):
    """How long a run takes to start; memory and open files over the steps of two runs."""
    results = report["results"]
    head = [f"{report['files']:,} files on {report['file_system']}; seconds until", "first step"]
    rows = [
        [kind, *(f"{seconds:.1f}" for seconds in figures.values())]
        for kind, figures in results["starts"].items()
    ]
    tables = [markdown([*head, "found", "surveyed"], rows, report)]
    for run in ("one epoch", "many epochs"):
        figures = results[run]
        samples = figures["samples"]
        epochs = "1 epoch" if figures["epochs"] == 1 else f"{figures['epochs']} epochs"
        head = [f"{epochs}; after step", *(f"{sample['step']:,}" for sample in samples)]
        head += ["KiB per 1,000 steps", "rise, MiB", "scatter, MiB", "flat"]
        rows = []
        for whose, line in figures["lines"].items():
            slope = f"{line['kib_per_1000_steps']:.1f} ± {line['standard_error']:.1f}"
            rise, scatter = (f"{line[name]:.2f}" for name in ("rise_mib", "scatter_mib"))
            memory = [f"{sample[f'mib_of_{whose}']:.1f}" for sample in samples]
            flat = "yes" if line["is_flat"] else "no"
            rows.append([f"MiB, {whose}", *memory, slope, rise, scatter, flat])
        rows.append(["MiB, shared once", *(f"{s['mib_shared_once']:.1f}" for s in samples)])
        rows.append(["open files", *(f"{sample['open_files']}" for sample in samples)])
        tables.append(markdown(head, rows, report))
    return "\n".join(tables)


def memory_page():
    report = json.loads((RESULTS / "memory.json").read_text())
    assumed = report["assumed"]
    cards = [f"{gb} GB" for gb in assumed["card_gib"]]
    sizes = {"GiB": assumed["card_gib"], "usable GiB": assumed["usable_gib"]}
    rows = [[name, *(f"{gib:g}" for gib in gibs.values())] for name, gibs in sizes.items()]
    tables = [
        "## Pre-training\n\n" + memory_table(report, "pretrain"),
        "## Fine-tuning\n\n" + memory_table(report, "finetune"),
        ESTIMATE_INTRODUCTION + rates_table(assumed) + estimate_table(report),
    ]
    return MEMORY_INTRODUCTION + grid(["card", *cards], rows) + "\n" + "\n".join(tables)


def memory_table(report, task):
    """A row for each model with and without gradient checkpointing."""
    cards = report["assumed"]["card_gib"]
    rows = []
    for name, model in report["results"][task].items():
        for way in ("plain", "grad_checkpointing"):
            figures = model[way]
            checkpoints = way == "grad_checkpointing"
            rows.append(
                [
                    "ckpt" if checkpoints else f"`{name}`, {model['input_size']} px",
                    "" if checkpoints else f"{model['parameters'] / 1e6:.1f} M",
                    three_digits(figures["gflop_per_image"]),
                    f"{figures['fixed_gib']:.2f}",
                    three_digits(figures["mib_per_image"]),
                    *(f"{gib:.2f}" for gib in figures["peak_gib"].values()),
                    *(str(figures["largest_batch"][gb] or "-") for gb in cards),
                ]
            )
    peaks = [f"GiB at {batch}" for batch in figures["peak_gib"]]
    head = ["model", "parameters", "GFLOP an image", "fixed GiB", "MiB an image", *peaks]
    return markdown([*head, *(f"{gb} GB" for gb in cards)], rows, report)


def rates_table(assumed):
    rows = [
        [
            f"encoder of width {width}",
            f"{flop / 1e12:.0f} TFLOP/s",
            f"{attention / 1e12:.0f} TFLOP/s",
        ]
        for (width, flop), attention in zip(
            assumed["product_flop_per_s"].items(),
            assumed["attention_flop_per_s"].values(),
            strict=True,
        )
    ]
    rest = " and ".join(
        f"{b / 1e12:.1f} TB/s on an {c}" for c, b in assumed["rest_bytes_per_s"].items()
    )
    return grid(["", "products", "attention"], rows) + f"\nThe rest moves at {rest}.\n\n"


def estimate_table(report):
    rows = []
    for models in report["results"].values():
        for name, model in models.items():
            if figures := model.get("estimate"):
                cards = [figures[card] for card in report["assumed"]["rest_bytes_per_s"]]
                rows.append(
                    [
                        f"`{name}`, batch {figures['batch_size']}",
                        f"{sum(figures['gb_moved'].values()):.0f}",
                        f"{figures['products_ms']:.0f}",
                        f"{figures['attention_ms']:.0f}",
                        *(f"{card['rest_ms']:.0f}" for card in cards),
                        *(f"{round(card['images_per_s'], -2)}" for card in cards),
                    ]
                )
    names = report["assumed"]["rest_bytes_per_s"]
    head = ["estimated, not measured", "GB moved", "ms products", "ms attention"]
    head += [f"ms rest, {card}" for card in names] + [f"images/s, {card}" for card in names]
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
    versions = ", ".join(" ".join(item) for item in report["versions"].items())
    origin = "; ".join([report["commit"], *report["hardware"].values(), versions])
    return f"{grid(head, rows)}\n*`{report['command']}` at {origin}.*\n"


def put_between(text, start, end, section):
    """The page with this section between its two comments, each on a line of its own."""
    assert text.count(start) == text.count(end) == 1, f"a page needs one {start}and one {end}"
    before, _, rest = text.partition(start)
    return before + start + section + end + rest.partition(end)[2]


def grid(head, rows):
    """A table; rows may end before the head does."""
    rows = [head, ["---"] * len(head), *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page())
    MEMORY_PAGE.write_text(memory_page())
