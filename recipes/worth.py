"""A short pre-training and what it is worth: the cells of ablations.py and efficient.py."""

import cifar10
import folders
import running
import transfer

PERCENT = 10  # of the labels, for classifiers and neighbours
CLASSIFIER_EPOCHS = 8


def make_cell(table, name, source, about, seed, changes):
    """A nano model's pre-training on CIFAR-10, then its k-NN, probe and fine-tuned accuracy.

    Args:
        table, name: of the cell.
        source: CIFAR-10's folder.
        about: the cell's, see `running.Cell`.
        seed: of the pre-training, the draw of the labels, and the classifiers.
        changes: flags of the pre-training that differ from recipes/cifar10.py's.
    """
    out = running.output(table, name)
    settings = cifar10.SETTINGS
    all_images = folders.with_labels("cifar10", source, 100, 0)
    labelled = folders.with_labels("cifar10", source, PERCENT, seed)
    encoder = out / "pretrain" / "encoder.safetensors"
    pretrain = settings.pretrain | {"model": "mae_vit_nano_patch4", "data_path": all_images}
    pretrain |= {"warmup_epochs": 0.5, "knn_every": 0, "seed": seed}
    pretrain |= changes | {"output_dir": encoder.parent}
    classify = settings.classify | {"model": "vit_nano_patch4", "seed": seed, "finetune": encoder}
    classify |= {"data_path": labelled, "epochs": CLASSIFIER_EPOCHS}
    commands = [["main_pretrain.py", *running.flags(pretrain)]]
    commands += transfer.search_neighbours(labelled, source, encoder, out)
    for command, kind, flags in (
        ("main_linprobe.py", "probe_", settings.probe),
        ("main_finetune.py", "", settings.finetune),
    ):
        commands += transfer.train_and_evaluate(command, classify | flags, source, out, kind)
    return running.Cell(name, commands, about, seed)
