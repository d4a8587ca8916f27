"""What several GPUs and nodes would gain: compute, all-reduce and loading, on paper.

    python -m benchmarks.scaling

Nothing is run: parameters and operations are those that benchmarks/memory.py has counted, all
rates are assumptions. Prints the section of docs/clusters.md between two comments, and writes it.
"""

import json
from dataclasses import dataclass

from benchmarks import table
from benchmarks.report import RESULTS
from benchmarks.whole_run import ROOT
from util import cli

PAGE = ROOT / "docs" / "clusters.md"
START = "<!-- python -m benchmarks.scaling writes from here -->\n"
END = "<!-- to here -->\n"

GPUS, GPUS_A_NODE = (8, 64, 512), 8
EFFECTIVE_BATCH = {"pretrain": 4096, "finetune": 1024}  # the paper's, appendix A
MODELS = {
    "pretrain": ["mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14"],
    "finetune": ["vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"],
}
FLOP_PER_S, A100_FLOP_PER_S = 0.4 * 989e12, 0.4 * 312e12
BACKWARD = 2 / 3  # of the compute: twice the forward pass
REACHED = 0.8  # share of a link's rate
BUCKET = 25 * 2**20  # bytes that DDP reduces at a time
BUCKET_SECONDS = 50e-6  # for a bucket's all-reduce to start
IMAGES_PER_S_A_CORE = (569, 1100)
BYTES_AN_IMAGE = 110e3  # ImageNet's mean


@dataclass(frozen=True)
class Cluster:
    """Bytes a second, in one direction, of a GPU's links in its node, and of a node's to others."""

    gpu: float
    node: float


INFINIBAND = Cluster(gpu=450e9, node=8 * 400e9 / 8)
ETHERNET = Cluster(gpu=450e9, node=25e9 / 8)

STEPS_HEAD = ["model, trained parameters, gradients", "GPUs", "images a GPU", "ms compute"]
for network in ("", " by Ethernet"):
    STEPS_HEAD += [f"ms all-reduce{network}", "share without overlap", "ms added with overlap"]
LOADING_HEAD = [
    "model",
    "images/s a GPU",
    "images/s a node",
    "GB/s a node",
    "cores a GPU",
    "cores a node",
]

INTRODUCTION = """## Scaling on paper

**Not run**: no more than one GPU has been tried. This is arithmetic on counted sizes and assumed
rates.

- **Batch**: the paper's, 4096 in pre-training and 1024 in fine-tuning, divided among H100s, 8 a
  node. (512 images of huge take `--accum_iter 2`, see [memory.md](memory.md).)
- **Compute**: forward and backward pass, counted as in memory.md, at 40% of 989
  TFLOP/s, an H100's dense bf16 ([data sheet](https://www.nvidia.com/en-us/data-center/h100/)). That
  is faster than memory.md's estimate (26% to 35%) and than what one H100 did (19% to 24%, from
  RESULTS.md's images/s, uncompiled). So communication and loading look worse here, not better. The
  optimizer and the launches of kernels are left out. They weigh most where a GPU has 8 images or
  fewer.
- **All-reduce**: DDP adds up float32 gradients, 4 bytes for each trained parameter, once a step. A
  ring moves 2 (n - 1) / n times as much out of each of n GPUs ([Patarasuk and Yuan,
  2009](https://doi.org/10.1016/j.jpdc.2008.09.002)). Within a node it goes by NVLink, 450 GB/s in
  each direction (same data sheet). Several rings leave a node by all of its network cards: 8 x 400
  Gb/s InfiniBand are 400 GB/s ([DGX H100](https://www.nvidia.com/en-us/data-center/dgx-h100/)). One
  card of 25 Gb/s Ethernet is 3.1 GB/s. 80% of these rates are reached, and each bucket of 25 MiB
  takes 0.05 ms more.
- **Share without overlap**: the all-reduce's time, divided by that of compute and all-reduce.
- **Added with overlap**: what a step takes beyond its compute if buckets travel during the backward
  pass, two thirds of the compute, as in DDP ([Li et al., 2020](https://arxiv.org/abs/2006.15704)).
  The last bucket never overlaps.
"""
NOTES = """### A fixed batch per GPU, and other GPUs

With as many images per GPU however many GPUs there are (weak scaling), little changes from 64 GPUs
on: 2 (n - 1) / n is 1.97 there and never more than 2. So pre-training's rows of 64 GPUs, with 64
images each, hold for more nodes too. `--accum_iter` computes more images between two all-reduces.
On A100s (312 TFLOP/s, NVLink 300 GB/s, 8 x 200 Gb/s a node) the compute takes {slower:.1f} times as
long and the all-reduce at most twice, so its share is smaller.

### Images for these GPUs

What the compute above takes, if nothing else limits it. A file has 110 kB, ImageNet's mean. A core
decodes, crops and flips {slow:,} to {fast:,} JPEGs of 500 x 375 a second, measured on two kinds of
processor. Fine-tuning's augmentation takes more time, which is not counted.

"""
CONCLUSION = """
A DGX H100 has 14 cores per GPU. `--num_workers` is at most 10 for each process unless it is given.
For base, loading may be the limit before communication is: give more workers, or store smaller
images (`main_data.py pack --max_side`).
"""


def main(_args):
    print(section())
    PAGE.write_text(table.put_between(PAGE.read_text(), START, END, section()))


def section():
    """The text between the comments."""
    counted = json.loads((RESULTS / "memory.json").read_text())["results"]
    parts, loading = [INTRODUCTION], []
    for task, title in (("pretrain", "Pre-training"), ("finetune", "Fine-tuning")):
        batch = EFFECTIVE_BATCH[task]
        models = {name: counted[task][name] for name in MODELS[task]}
        parts.append(f"### {title}, {batch} images a step\n")
        parts.append(
            table.grid(STEPS_HEAD, [r for m in models.items() for r in step_rows(*m, batch)])
        )
        parts.append("".join(conclusion(name, model, batch) for name, model in models.items()))
        loading += [loading_row(name, model) for name, model in models.items()]
    slow, fast = IMAGES_PER_S_A_CORE
    parts.append(NOTES.format(slower=FLOP_PER_S / A100_FLOP_PER_S, slow=slow, fast=fast))
    return "\n".join(parts) + table.grid(LOADING_HEAD, loading) + CONCLUSION


def step_rows(name, model, batch):
    """A model's rows: a number of GPUs each."""
    size = f"{model['parameters'] / 1e6:.0f} M, {gradient_bytes(model) / 1e9:.2f} GB"
    rows = []
    for gpus in GPUS:
        images = batch // gpus
        figures = [step(model, images, gpus, cluster) for cluster in (INFINIBAND, ETHERNET)]
        row = [f"`{name}`, {size}" if gpus == GPUS[0] else "", f"{gpus}", f"{images}"]
        row.append(ms(figures[0][0]))
        for compute, reduce_, added in figures[: 1 + (gpus > GPUS_A_NODE)]:
            row += [ms(reduce_), f"{reduce_ / (compute + reduce_):.0%}", f"{ms(added)}"]
        rows.append(row)
    return rows


def conclusion(name, model, batch):
    """A sentence: how many times as fast as a node more of them are, with overlap."""

    def seconds(gpus, cluster):
        compute, _, added = step(model, batch // gpus, gpus, cluster)
        return compute + added

    node, *more = GPUS
    by_infiniband, by_ethernet = (
        " and ".join(f"{seconds(node, c) / seconds(gpus, c):.2g}" for gpus in more)
        for c in (INFINIBAND, ETHERNET)
    )
    return (
        f"- `{name}`: {' and '.join(map(str, more))} GPUs are {by_infiniband} times as fast as "
        f"{node} by InfiniBand, with overlap, and {by_ethernet} times by Ethernet.\n"
    )


def loading_row(name, model):
    images = FLOP_PER_S / flop(model)
    slow, fast = (images / rate for rate in IMAGES_PER_S_A_CORE)
    return [
        f"`{name}`",
        f"{images:,.0f}",
        f"{GPUS_A_NODE * images:,.0f}",
        f"{GPUS_A_NODE * images * BYTES_AN_IMAGE / 1e9:.1f}",
        f"{fast:.1f} to {slow:.1f}",
        f"{GPUS_A_NODE * fast:.0f} to {GPUS_A_NODE * slow:.0f}",
    ]


def ms(seconds):
    return table.three_digits(1e3 * seconds)


def step(model, images, gpus, cluster):
    """Seconds of a step's parts, by the assumptions.

    Args:
        model: its entry in results/memory.json.
        images: per GPU.

    Returns:
        (compute, all-reduce, what the all-reduce adds to the compute if they overlap)
    """
    compute = images * flop(model) / FLOP_PER_S
    bytes_ = gradient_bytes(model)
    reduce_ = all_reduce(bytes_, gpus, cluster)
    last = all_reduce(min(BUCKET, bytes_), gpus, cluster)
    return compute, reduce_, last + max(0, reduce_ - last - BACKWARD * compute)


def all_reduce(bytes_, gpus, cluster):
    """Seconds of a ring all-reduce, in buckets."""
    rate = cluster.gpu if gpus <= GPUS_A_NODE else min(cluster.gpu, cluster.node)
    moved = 2 * (gpus - 1) / gpus * bytes_
    return moved / (REACHED * rate) + -(-bytes_ // BUCKET) * BUCKET_SECONDS


def flop(model):
    """Of an image, forward and backward."""
    return model["plain"]["gflop_per_image"] * 1e9


def gradient_bytes(model):
    return 4 * model["parameters"]


if __name__ == "__main__":
    cli.run(main, cli.ArgumentParser(description=__doc__))
