"""Does pre-training pay? The cells of the tables that recipes/cifar10.py and fashion_mnist.py run.

One pre-training; its encoder fine-tuned, probed and searched by neighbours; and the same classifier
from scratch, with as many epochs as fine-tuning, and with as much computing as pre-training and
fine-tuning together. With less than all labels each seed draws its own.
"""

from dataclasses import dataclass

import folders
import knn
import running

PERCENTS = (100, 10, 1)


@dataclass
class Settings:
    """A table's settings.

    Attributes:
        pretrain, classify: flags of the pre-training, and those of all classifiers.
        finetune, scratch, probe: further flags of each kind of classifier.
        epochs: {percent of the labels: epochs of fine-tuning}.
        probe_epochs: {percent of the labels: epochs of the probe}.
        copies: {percent of the labels: how often an image stands in an epoch}.
        image_cost: computing for an image in pre-training, as a share of that in fine-tuning; by
            first runs, and how near it was is in the table of times.
    """

    pretrain: dict
    classify: dict
    finetune: dict
    scratch: dict
    probe: dict
    epochs: dict
    probe_epochs: dict
    copies: dict
    image_cost: float


def long_epochs(settings, percent):
    """Epochs from scratch that cost what pre-training and fine-tuning cost together."""
    images = percent / 100 * settings.copies[percent]  # of an epoch, as a share of all
    pretraining = settings.pretrain["epochs"] * settings.image_cost / images
    return settings.epochs[percent] + round(pretraining)


def make_cells(table, name, source, model, settings):
    """The cells of one model, cheap ones first.

    Args:
        table: the table's name.
        name: of the images, for their folders of links.
        source: folder {train,val}/CLASS of the images, below the project's folder.
        model: nano or tiny.
        settings: the `Settings`.
    """
    labelled = {
        (percent, seed): folders.with_labels(name, source, percent, seed, settings.copies[percent])
        for percent in PERCENTS
        for seed in range(knn.SEEDS)
    }
    pretrained = f"{model}-pretrain"
    encoder = running.output(table, pretrained) / "encoder.safetensors"
    epochs = settings.pretrain["epochs"]
    pretrain = settings.pretrain | {"data_path": labelled[100, 0], "seed": 0}
    pretrain |= {"model": f"mae_vit_{model}_patch4", "output_dir": encoder.parent}
    about = {"what": "pretrain", "model": model, "epochs": epochs}
    cells = [running.Cell(pretrained, [["main_pretrain.py", *running.flags(pretrain)]], about)]
    found = f"{model}-knn"
    commands = search_neighbours(source, source, encoder, running.output(table, found), PERCENTS)
    about = {"what": "knn", "model": model}
    cells.append(running.Cell(found, commands, about, needs=[pretrained]))

    def classifier(what, percent, seed, epochs, command, changes):
        cell = f"{model}-{what}-{percent}-seed{seed}"
        train = settings.classify | changes | {"model": f"vit_{model}_patch4", "seed": seed}
        train |= {"data_path": labelled[percent, seed], "epochs": epochs}
        needs = [] if what.startswith("scratch") else [pretrained]
        if needs:
            train["finetune"] = encoder
        about = {"what": what, "model": model, "labels": percent, "epochs": epochs}
        commands = train_and_evaluate(command, train, source, running.output(table, cell))
        return running.Cell(cell, commands, about, seed, needs)

    for percent in reversed(PERCENTS):
        for seed in range(knn.SEEDS):
            short = settings.epochs[percent]
            kinds = [
                ("finetune", short, "main_finetune.py", settings.finetune),
                ("scratch", short, "main_finetune.py", settings.scratch),
                ("probe", settings.probe_epochs[percent], "main_linprobe.py", settings.probe),
            ]
            cells += [
                classifier(what, percent, seed, epochs, command, changes)
                for what, epochs, command, changes in kinds
            ]
    for percent in PERCENTS:
        for seed in range(knn.SEEDS):
            long = long_epochs(settings, percent)
            cell = classifier(
                "scratch_long", percent, seed, long, "main_finetune.py", settings.scratch
            )
            cells.append(cell)
    return cells


def search_neighbours(bank, queries, encoder, out, percents=(100,)):
    """Commands that write OUT/knn.json: bank/train's images classify those of queries/val."""
    files = {"train": out / "bank.npz", "val": out / "queries.npz"}
    commands = []
    for source, (split, path) in zip((bank, queries), files.items(), strict=True):
        embed = {"checkpoint": encoder, "data_path": source, "split": split, "output": path}
        commands.append(["main_embed.py", *running.flags(embed | {"num_workers": 0})])
    search = {"bank": files["train"], "queries": files["val"]}
    search |= {"percents": list(percents), "output": out / "knn.json"}
    return [*commands, ["recipes/knn.py", *running.flags(search)]]


def train_and_evaluate(command, train, source, out, name=""):
    """Commands that train a classifier and evaluate its last epoch on all held-out images.

    Args:
        command: main_finetune.py or main_linprobe.py.
        train: its flags, all but the output folder.
        source: folder of the images.
        out: the cell's output folder, which holds NAMEtrain and NAMEeval.
        name: beginning of these folders' names.
    """
    trained = out / f"{name}train"
    evaluate = {k: train[k] for k in ("model", "nb_classes", "input_size", "num_workers")}
    evaluate |= {"eval": True, "data_path": source, "output_dir": out / f"{name}eval"}
    evaluate |= {"resume": trained / "checkpoint-last.pth", "global_pool": True}
    if command == "main_linprobe.py":
        evaluate["finetune"] = train["finetune"]
    return [
        [command, *running.flags(train | {"output_dir": trained})],
        [command, *running.flags(evaluate)],
    ]
