"""Image folders for the recipes, made of links to a folder DIR/{train,val}/CLASS.

The training images that keep their labels are a draw of the seed, the same share of each class.
Folders are planned when cells are made, and made when cells are run.
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
from running import ROOT, shown

from util.errors import UserError
from util.image_files import ImagePaths

DATA = ROOT / "recipes" / "data"
WATCHED = 20  # held-out images of each class that are evaluated after every epoch
MADE_FROM = "made_from.json"
planned = {}  # {folder: (what it is made from, the function that writes it to a path)}


def source(name, path):
    """recipes/data/NAME, by which commands know the user's folder PATH wherever it is.

    Raises:
        UserError: the folder lacks train or val, or the name stands for another one.
    """
    for part in ("train", "val"):
        if not (Path(path) / part).is_dir():
            raise UserError(f"{path}/{part} is missing: give the folder that holds train and val")
    link, target = DATA / name, Path(path).resolve()
    DATA.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # it is there, or another runner is faster
        link.symlink_to(target)
    if not link.is_symlink():
        raise UserError(f"{shown(link)} is to become a link to the images: move it elsewhere")
    if link.resolve() != target:
        raise UserError(
            f"{shown(link)} is a link to {link.resolve()}: for the same images in another place, "
            f"delete it and {shown(link)}-*; for others, the outputs and results of its cells, too"
        )
    return link.relative_to(ROOT)


def plan(name, about, write):
    """recipes/data/NAME, which `make_planned` makes.

    Args:
        name: of the folder.
        about: JSON of what it is made from; a folder that was made from something else is refused.
        write: function that writes the folder to the path that it is given.
    """
    planned[DATA / name] = about, write
    return shown(DATA / name)


def make_planned():
    """Make the planned folders that aren't there.

    Raises:
        UserError: one was made from something else.
    """
    for folder, (about, write) in planned.items():
        if is_made(folder, about):
            continue
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            write(temporary)
            (temporary / MADE_FROM).write_text(json.dumps(about))
            temporary.rename(folder)
        except OSError:
            if not is_made(folder, about):  # by another runner meanwhile
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_made(folder, about):
    """Whether a planned folder is there; a UserError if it was made from something else."""
    if not folder.exists():
        return False
    file = folder / MADE_FROM
    found = json.loads(file.read_text()) if file.exists() else "an unknown source"
    if found != about:
        raise UserError(f"{shown(folder)} was made from {found}, not {about}: delete it")
    return True


def classes_of(folder):
    """{class: paths of its images, in the commands' order} of a folder of class folders."""
    images = ImagePaths(folder)
    found = {name: [] for name in images.classes}
    for index, label in enumerate(images.labels.tolist()):
        found[images.classes[label]].append(Path(images[index]))
    if len(found) < 2 or "" in found:
        raise UserError(f"{folder} should hold a folder of images for each class, and no others")
    return found


def link(parts, folder):
    """Write links to the files of `parts`, {part: {class: paths}}, as FOLDER/PART/CLASS/NAME."""
    for part, classes in parts.items():
        for name, paths in classes.items():
            (folder / part / name).mkdir(parents=True)
            for number, path in enumerate(paths):
                os.symlink(path.resolve(), folder / part / name / f"{number:05d}-{path.name}")


def watched(source):
    """The first held-out images of each class."""
    return {name: paths[:WATCHED] for name, paths in classes_of(ROOT / source / "val").items()}


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
        train = classes_of(ROOT / source / "train")
        for number, (label, paths) in enumerate(train.items()):
            train[label] = [paths[i] for i in draw(len(paths), percent, seed, number)] * copies
        return {"train": train, "val": watched(source)}

    about = {"images": str((ROOT / source).resolve()), "percent": percent, "seed": seed}
    about |= {"copies": copies, "watched": WATCHED}
    if percent == 100:
        del about["seed"]
    seeded = f"-seed{seed}" if percent < 100 else ""
    return plan(f"{name}-{percent}{seeded}", about, lambda folder: link(parts(), folder))


def for_trials(name, source, percent=100):
    """A folder that never uses the source's held-out images.

    A tenth of the training images, the last ones of each class, are held out instead. Of the
    others, `percent` of each class train, the first ones; if these aren't all, `WATCHED` images of
    each class are held out.
    """

    def parts():
        train = classes_of(ROOT / source / "train")
        cut = {label: len(paths) * 9 // 10 for label, paths in train.items()}
        return {
            "train": {k: p[: cut[k] * percent // 100] for k, p in train.items()},
            "val": {k: p[cut[k] :][: WATCHED if percent < 100 else None] for k, p in train.items()},
        }

    about = {"images": str((ROOT / source).resolve()), "trials": percent, "watched": WATCHED}
    return plan(f"{name}-trials-{percent}", about, lambda folder: link(parts(), folder))
