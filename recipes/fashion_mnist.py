"""Does pre-training pay on 8,000 small images?

    python recipes/fashion_mnist.py

Runs offline, on the bundled images. What it doesn't set is as recipes/cifar10.py has it.
"""

import dataclasses
import subprocess
import sys

import cifar10
import folders
import running
import transfer

SETTINGS = dataclasses.replace(
    cifar10.SETTINGS,
    pretrain=cifar10.PRETRAIN
    | {"input_size": 28, "epochs": 24, "warmup_epochs": 3, "knn_every": 4, "knn_images": 2000},
    classify=cifar10.CLASSIFY | {"input_size": 28, "batch_size": 64},
    epochs={100: 8, 10: 20, 1: 20},
    probe_epochs={100: 10, 10: 20, 1: 20},
    image_cost=0.55,
)


def unpack(folder):
    """Write the bundled images, 8,000 for training and 2,000 held out, as image folders."""
    program = running.ROOT / "demo" / "unpack.py"
    subprocess.run([sys.executable, program, folder], check=True)


def make_cells(args):
    source = folders.plan("fashion_mnist", "the bundled images", unpack)
    return transfer.make_cells("fashion_mnist", "fashion_mnist", source, "nano", SETTINGS)


if __name__ == "__main__":
    running.main(__doc__, make_cells, "fashion_mnist", prepare=folders.make_planned)
