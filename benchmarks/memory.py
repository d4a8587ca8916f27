"""What fits into a GPU's memory: a training step's memory and work, counted without a GPU.

    python -m benchmarks.memory

Counted for every model, in bf16 with flash attention, with and without --grad_checkpointing; see
benchmarks/counting.py. Two batches are counted, others follow by a straight line:

    peak memory in GiB = fixed_gib + batch size x mib_per_image / 1024

At each moment of a step the memory grows in a straight line with the batch. The peak is the highest
of these lines, so between the two batches it is never above the line through them.

Beside it an estimate, not a measurement, of images a second: the time that the counted operations
and bytes take at assumed rates, see docs/memory.md. `python -m benchmarks.table` writes that page.
"""

from dataclasses import replace

import torch

import models_mae
import models_vit
from benchmarks import report
from benchmarks.counting import GPU, count_step
from benchmarks.sides import Setting
from util import cli

BATCHES = (8, 4096)  # the larger one is the paper's, in one step
SHOWN_BATCHES = (64, 128, 256)
# GB in a card's name: GiB that the smallest common one of that name has (T4, A10, A100, H100, H200)
CARDS = {16: 14.5, 24: 22, 40: 39, 80: 79, 141: 139}
CONTEXT_GIB = 1.0  # CUDA's context and the libraries' workspaces
FRAGMENTED = 0.08  # share of a card's memory that the allocator can't use

# Assumed rates on an H100 in bf16: matrix products by the encoder's width, and attention.
PRODUCT_FLOP_PER_S = {768: 600e12, 1024: 650e12, 1280: 680e12}
ATTENTION_FLOP_PER_S = {768: 150e12, 1024: 170e12, 1280: 200e12}
REST_BYTES_PER_S = {"H100": 2.6e12, "H200": 2.6e12 * 4.8 / 3.35}  # as their memories' peaks
ESTIMATED_BATCH = 256
ESTIMATED = {
    "pretrain": ["mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14"],
    "finetune": ["vit_base_patch16", "vit_large_patch16"],
}


def main(_args):
    results = {}
    for task, models in (("pretrain", models_mae.MODELS), ("finetune", models_vit.MODELS)):
        results[task] = {}
        for name in models:
            if not name.endswith("_dec512d8b"):  # another name of the same model
                results[task][name] = count_model(task, name)
                print(name, results[task][name], flush=True)
    report.write(
        "memory",
        results,
        assumed={
            "card_gib": CARDS,
            "usable_gib": {gb: round(usable_gib(gib), 1) for gb, gib in CARDS.items()},
            "product_flop_per_s": PRODUCT_FLOP_PER_S,
            "attention_flop_per_s": ATTENTION_FLOP_PER_S,
            "rest_bytes_per_s": REST_BYTES_PER_S,
        },
    )


def count_model(task, name):
    """A model's row of the tables."""
    setting = Setting(task, name, input_size(name), ESTIMATED_BATCH, GPU, "bf16", False)
    with torch.device("meta"):
        model = setting.build_model()
    figures = {
        "input_size": setting.input_size,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    for way in ("plain", "grad_checkpointing"):
        setting = replace(setting, grad_checkpointing=way != "plain")
        line, gflop = memory_line(setting)
        figures[way] = {
            "gflop_per_image": round(gflop, 3),
            **{key: round(value, 3) for key, value in line.items()},
            "peak_gib": {batch: round(peak_gib(line, batch), 2) for batch in SHOWN_BATCHES},
            "largest_batch": {gb: largest_batch(line, gib) for gb, gib in CARDS.items()},
        }
    if name in ESTIMATED[task]:
        counter, _ = count_step(replace(setting, grad_checkpointing=False))
        figures["estimate"] = estimate(counter, ESTIMATED_BATCH, model.cls_token.shape[-1])
    return figures


def input_size(name):
    """Pixels of a model's images; the nano models are the demo's, for 28 pixels."""
    if name.endswith(("patch14", "patch16")):
        return 224
    return 28 if "nano" in name else 32


def memory_line(setting, batches=BATCHES):
    """The straight line through two batches' peaks, and the GFLOP of an image.

    Returns:
        a dict of held_gib, the weights, AdamW's state and gradients; fixed_gib, where the line
        starts, above it by the weights' copies in bf16; and mib_per_image. Then the GFLOP.
    """
    (small, held), (large, _) = (count_step(replace(setting, batch_size=b)) for b in batches)
    slope = (large.peak - small.peak) / (batches[1] - batches[0])
    fixed = small.peak - slope * batches[0]
    line = {"held_gib": held / 2**30, "fixed_gib": fixed / 2**30, "mib_per_image": slope / 2**20}
    return line, sum(large.flop.values()) / batches[1] / 1e9


def peak_gib(line, batch_size):
    return line["fixed_gib"] + batch_size * line["mib_per_image"] / 1024


def usable_gib(card_gib):
    """What tensors can have of a card's memory."""
    return card_gib * (1 - FRAGMENTED) - CONTEXT_GIB


def largest_batch(line, card_gib):
    """The largest batch that fits: a multiple of 64, or of 8 below 64; 0 if none does."""
    free = usable_gib(card_gib) - line["fixed_gib"]
    images = int(max(0, free) * 1024 / line["mib_per_image"])
    return min(BATCHES[1], images - images % (64 if images >= 64 else 8))


def estimate(counter, batch_size, width):
    """Images a second, and where the time of a step goes, by the assumed rates.

    Products and attention are bound by their operations, the rest by the bytes it moves.
    """
    products = counter.flop["products"] / PRODUCT_FLOP_PER_S[width]
    attention = counter.flop["attention"] / ATTENTION_FLOP_PER_S[width]
    figures = {
        "batch_size": batch_size,
        "gflop": {kind: round(flop / 1e9) for kind, flop in counter.flop.items()},
        "gb_moved": {kind: round(moved / 1e9, 1) for kind, moved in counter.moved.items()},
        "products_ms": round(1e3 * products, 1),
        "attention_ms": round(1e3 * attention, 1),
    }
    for card, rate in REST_BYTES_PER_S.items():
        rest = counter.moved["rest"] / rate
        images_per_s = batch_size / (products + attention + rest)
        figures[card] = {"rest_ms": round(1e3 * rest, 1), "images_per_s": round(images_per_s)}
    return figures


if __name__ == "__main__":
    cli.run(main, cli.ArgumentParser(description=__doc__))
