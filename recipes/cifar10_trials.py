"""Small trials that choose the settings of recipes/cifar10.py, without its held-out images.

    python recipes/cifar10_trials.py --data_path CIFAR10

A tenth of the training images are held out. The pre-trainings take 4 epochs of the other nine
tenths, and are compared by neighbours, and by fine-tuning with a tenth of these labels. Classifiers
are compared with these labels, too; fine-tuned and probed ones start from the first pre-training.
"""

import functools

import cifar10
import folders
import running
import transfer

TABLE = "cifar10_trials"

PRETRAININGS = {
    "base": {},
    "raw": {"norm_pix_loss": False},
    "crop50": {"crop_scale": [0.5, 1]},
    "blr2e-3": {"blr": 2e-3},
    "decoder1": {"decoder_depth": 1},
    "batch128": {"batch_size": 128, "blr": 2e-3},
}
PRETRAIN = {
    "model": "mae_vit_nano_patch4",
    "input_size": 32,
    "batch_size": 256,
    "epochs": 4,
    "warmup_epochs": 1,
    "blr": 1e-3,
    "norm_pix_loss": True,
    "crop_scale": [0.2, 1],
    "num_workers": 1,
    "save_every": 1000,
    "knn_every": 4,
    "log_every": 100,
}
FINETUNE = {
    "model": "vit_nano_patch4",
    "nb_classes": 10,
    "input_size": 32,
    "batch_size": 128,
    "global_pool": True,
    "epochs": 15,
    "warmup_epochs": 2,
    "lr": 1e-3,
    "crop_scale": [0.5, 1],
    "aa": "none",
    "reprob": 0,
    "drop_path": 0,
    "num_workers": 1,
    "save_every": 1000,
    "log_every": 100,
}
NOT_OF_PROBE = ("aa", "reprob", "drop_path")
CLASSIFIERS = {
    "finetune": {
        "lr5e-4": {"lr": 5e-4},
        "lr2e-3": {"lr": 2e-3},
        "lr4e-3": {"lr": 4e-3},
        "decay90": {"layer_decay": 0.9},
        "crop20": {"crop_scale": [0.2, 1]},
        "policy": {"aa": "rand-m9-mstd0.5-inc1"},
    },
    "scratch": {
        "lr2.5e-4": {"lr": 2.5e-4},
        "lr5e-4": {"lr": 5e-4},
        "lr1e-3": {},
        "lr2e-3": {"lr": 2e-3},
        "crop20": {"crop_scale": [0.2, 1]},
        "policy": {"aa": "rand-m9-mstd0.5-inc1"},
    },
    "probe": {"lr3": {"lr": 3}, "lr10": {"lr": 10}, "lr30": {"lr": 30}, "lr100": {"lr": 100}},
}
# Cells whose changes recipes/cifar10.py has.
CHOSEN = {
    "pretrain-batch128",
    "pretrain-decoder1",
    "finetune-lr2e-3",
    "scratch-lr5e-4",
    "probe-lr30",
}


def make_cells(args):
    source = cifar10.images(args)
    all_images = folders.for_trials("cifar10", source)
    tenth = folders.for_trials("cifar10", source, 10)
    outputs = functools.partial(running.output, TABLE)
    encoder = outputs("pretrain-base") / "pretrain" / "encoder.safetensors"
    cells = []
    for name, changes in PRETRAININGS.items():
        out = outputs(f"pretrain-{name}")
        pretrain = PRETRAIN | changes | {"data_path": all_images, "output_dir": out / "pretrain"}
        finetune = FINETUNE | {"finetune": out / "pretrain" / encoder.name, "data_path": tenth}
        commands = [["main_pretrain.py", *running.flags(pretrain)]]
        commands += transfer.train_and_evaluate("main_finetune.py", finetune, all_images, out)
        about = {"kind": "pretrain", "changes": changes}
        cells.append(running.Cell(f"pretrain-{name}", commands, about))
    for kind, trials in CLASSIFIERS.items():
        for name, changes in trials.items():
            train = FINETUNE | {"finetune": encoder, "data_path": tenth}
            command, needs = "main_finetune.py", ["pretrain-base"]
            if kind == "scratch":
                train |= {"finetune": False, "layer_decay": 1}
                needs = []
            elif kind == "probe":
                train |= dict.fromkeys(NOT_OF_PROBE, False)
                command = "main_linprobe.py"
            out = outputs(f"{kind}-{name}")
            commands = transfer.train_and_evaluate(command, train | changes, all_images, out)
            about = {"kind": kind, "changes": changes}
            cells.append(running.Cell(f"{kind}-{name}", commands, about, needs=needs))
    return cells


if __name__ == "__main__":
    running.main(__doc__, make_cells, TABLE, cifar10.add_flags, folders.make_planned)
