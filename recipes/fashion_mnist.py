"""Does pre-training pay on 8,000 small images? Runs offline on the bundled Fashion-MNIST.

python recipes/fashion_mnist.py
"""

import subprocess
import sys

import folders
import running
import transfer

PRETRAIN = {
    "input_size": 28,
    "batch_size": 128,
    "epochs": 24,
    "warmup_epochs": 3,
    "blr": 2e-3,
    "norm_pix_loss": True,
    "decoder_depth": 1,
    "crop_scale": [0.2, 1],
    "num_workers": 1,
    "save_every": 1000,
    "knn_every": 4,
    "knn_images": 2000,
    "log_every": 100,
}
CLASSIFY = {
    "nb_classes": 10,
    "input_size": 28,
    "batch_size": 64,
    "global_pool": True,
    "num_workers": 1,
    "save_every": 1000,
    "log_every": 100,
}
AUGMENT = {"crop_scale": [0.5, 1], "aa": "none", "reprob": 0, "drop_path": 0}
SETTINGS = transfer.Settings(
    pretrain=PRETRAIN,
    classify=CLASSIFY,
    finetune=AUGMENT | {"blr": 4e-3, "layer_decay": 0.75, "warmup_epochs": 1},
    scratch=AUGMENT | {"blr": 1e-3, "layer_decay": 1, "warmup_epochs": 1},
    probe={"crop_scale": [0.5, 1], "blr": 60, "warmup_epochs": 1},
    epochs={100: 8, 10: 20, 1: 20},
    probe_epochs={100: 10, 10: 20, 1: 20},
    copies={100: 1, 10: 1, 1: 10},
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
