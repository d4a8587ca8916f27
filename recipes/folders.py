"""Image folders for the recipes, made of links to a folder DIR/{train,val}/CLASS.

The training images that keep their labels are a draw of the seed, equally many of each class.
"""

import os
from pathlib import Path

import numpy as np
from running import ROOT

from util.errors import UserError

DATA = ROOT / "recipes" / "data"
WATCHED = 20  # held-out images of each class that are evaluated after every epoch


def classes_of(folder):
    """{class: its files, sorted} of a folder of class folders."""
    found = {path.name: sorted(path.iterdir()) for path in sorted(Path(folder).iterdir())}
    if len(found) < 2 or not all(found.values()):
        raise UserError(f"{folder} should hold a folder of images for each class")
    return found


def check(source):
    """Refuse, with a UserError, a folder without DIR/train and DIR/val."""
    for part in ("train", "val"):
        if not (Path(source) / part).is_dir():
            raise UserError(f"{source}/{part} is missing: give the folder that holds train and val")


def link(files, folder):
    """Write links to `files`, {class: paths}, as FOLDER/CLASS/NAME."""
    for name, paths in files.items():
        (folder / name).mkdir(parents=True)
        for number, path in enumerate(paths):
            os.symlink(path.resolve(), folder / name / f"{number:05d}-{path.name}")


def make(name, parts):
    """recipes/data/NAME/{part}/CLASS with links to the files of `parts`, if it isn't there."""
    folder = DATA / name
    if not folder.exists():
        temporary = folder.with_name(folder.name + f".{os.getpid()}")
        for part, files in parts().items():
            link(files, temporary / part)
        temporary.rename(folder)
    return folder.relative_to(ROOT)


def watched(source):
    """The first held-out images of each class."""
    return {name: paths[:WATCHED] for name, paths in classes_of(Path(source) / "val").items()}


def draw(count, percent, seed, number):
    """The indices of the images of a class, the `number`-th, that keep their labels, sorted."""
    order = np.random.default_rng([seed, number]).permutation(count)
    return np.sort(order[: round(count * percent / 100)])


def with_labels(name, source, percent, seed, copies=1):
    """A folder whose training images are this percentage of the source's, drawn by the seed.

    Its held-out images are `WATCHED` of each class. Each training image stands there `copies`
    times, so that a few images make an epoch that is longer than its evaluation.
    """

    def parts():
        train = classes_of(Path(source) / "train")
        for number, (label, paths) in enumerate(train.items()):
            train[label] = [paths[i] for i in draw(len(paths), percent, seed, number)] * copies
        return {"train": train, "val": watched(source)}

    return make(f"{name}-{percent}" + (f"-seed{seed}" if percent < 100 else ""), parts)


def for_trials(name, source, percent=100):
    """A folder that leaves the source's held-out images alone.

    A tenth of the training images, the last ones of each class, are held out instead. Of the
    others, `percent` of each class train, the first ones; if these aren't all, `WATCHED` images of
    each class are held out.
    """

    def parts():
        train = classes_of(Path(source) / "train")
        cut = {label: len(paths) * 9 // 10 for label, paths in train.items()}
        return {
            "train": {k: p[: cut[k] * percent // 100] for k, p in train.items()},
            "val": {k: p[cut[k] :][: WATCHED if percent < 100 else None] for k, p in train.items()},
        }

    return make(f"{name}-trials-{percent}", parts)
