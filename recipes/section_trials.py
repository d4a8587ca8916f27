"""docs/results.md: the trials of cifar10_trials.py."""

import cifar10_trials
import figures

from benchmarks.table import grid

KINDS = {
    "pretrain": "pre-training",
    "finetune": "fine-tuning",
    "probe": "linear probe",
    "scratch": "from scratch",
}

INTRODUCTION = f"""## Trials

Small trials that chose the settings for CIFAR-10, with nano, one run each. A tenth of the training
images are held out, the last ones of each class, and accuracies are those on this tenth after the
last epoch. The other nine tenths pre-train for {cifar10_trials.PRETRAIN["epochs"]} epochs. A tenth
of those, with labels, train a classifier for {cifar10_trials.FINETUNE["epochs"]} epochs.

Each pre-training's classifier starts from it. Those of fine-tuning and of the probe start from the
first pre-training, whose row is also that of fine-tuning with nothing changed. The chosen settings
were not tried together.

One run can't tell small differences from noise: at 60%, the sampling error of 5,000 held-out images
is 0.7 points, and that of the seed comes on top. The runs at 4e-3 and 2.5e-4 were made later on
another processor, the former from a pre-training that was repeated there. Five of the others began
under a commit before the one that they name.

"""


def section():
    cells = figures.read("cifar10_trials")
    done = {cell["cell"]: cell for cell in cells}
    trials = {"pretrain": cifar10_trials.PRETRAININGS} | cifar10_trials.CLASSIFIERS
    rows = [
        [KINDS[kind], figures.changed(changes), *trial_figures(done.get(f"{kind}-{name}"))]
        for kind, settings in trials.items()
        for name, changes in settings.items()
    ]
    head = ["trial", "changed", "k-NN", "accuracy of the classifier", "core-minutes", ""]
    text = INTRODUCTION + grid(head, rows) + "\n"
    return text + figures.ran_by("python recipes/cifar10_trials.py --data_path CIFAR10", cells), []


def trial_figures(cell):
    if cell is None:
        return [figures.NOT_RUN]
    neighbours = ""
    if cell["about"]["kind"] == "pretrain":
        neighbours = f"{figures.output(cell, 'pretrain/log.txt')[-1]['knn_acc1']:.1f}"
    return [
        neighbours,
        f"{figures.evaluated(cell):.1f}",
        "at least " * bool(cell["attempts_without_times"]) + f"{cell['cpu_s'] / 60:.1f}",
        "chosen" if cell["cell"] in cifar10_trials.CHOSEN else "",
    ]
