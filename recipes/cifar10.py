"""Does pre-training pay on CIFAR-10?

    python recipes/cifar10.py --data_path CIFAR10

CIFAR10 is an image folder: CIFAR10/{train,val}/CLASS/*.png. The settings were chosen by
recipes/cifar10_trials.py.
"""

import folders
import running
import transfer

PRETRAIN = {
    "input_size": 32,
    "batch_size": 128,
    "epochs": 100,
    "warmup_epochs": 5,
    "blr": 2e-3,
    "norm_pix_loss": True,
    "decoder_depth": 1,
    "crop_scale": [0.2, 1],
    "num_workers": 1,
    "save_every": 1000,
    "knn_every": 10,
    "knn_images": 5000,
    "log_every": 100,
}
CLASSIFY = {
    "nb_classes": 10,
    "input_size": 32,
    "batch_size": 128,
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
    epochs={100: 10, 10: 30, 1: 10},
    probe_epochs={100: 10, 10: 30, 1: 10},
    copies={100: 1, 10: 1, 1: 10},
    image_cost=0.46,
)


def make_cells(args):
    source = images(args)
    return [
        cell
        for model in ("nano", "tiny")
        for cell in transfer.make_cells("cifar10", "cifar10", source, model, SETTINGS)
    ]


def images(args):
    """The folder of --data_path, as commands call it."""
    return folders.source("cifar10", args.data_path)


def add_flags(parser):
    parser.add_argument("--data_path", required=True, metavar="DIR", help="CIFAR-10's image folder")


if __name__ == "__main__":
    running.main(__doc__, make_cells, "cifar10", add_flags, folders.make_planned)
