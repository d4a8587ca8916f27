"""What a classifier says of each image, gathered from all processes into one CSV file."""

import csv
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.checkpoint import write_whole
from util.distributed import Process, gather
from util.errors import UserError
from util.image_files import Images

LISTED = 5  # classes of an image
BATCH = 32  # images that are computed together, whatever --batch_size says


def likeliest_classes(logits: Tensor) -> Tensor:
    """The classes [N, 5] with the highest logits [N, K], or all K if they are fewer.

    The likeliest comes first; among equals, that of the lower number.
    """
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :LISTED]


class Predictions:
    """The likeliest classes of a process's images, with their probabilities.

    A matrix product's last bits depend on its size. So that the file does not depend on how images
    fell into batches, all batches are filled up to `BATCH` images.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def fill(self, imgs: Tensor) -> Tensor:
        """`imgs` [N, bands, height, width] and as many copies of the last as make `BATCH`."""
        return torch.cat([imgs, imgs[-1:].expand(BATCH - len(imgs), -1, -1, -1)])

    def add(self, indices: Tensor, logits: Tensor) -> None:
        """Note the float32 logits [N, K] of the images with these indices [N]."""
        classes = likeliest_classes(logits)
        probabilities = logits.softmax(dim=1).gather(1, classes)
        self._parts.append((indices.numpy(), classes.cpu().numpy(), probabilities.cpu().numpy()))

    def write(
        self,
        path: Path,
        process: Process,
        images: Images,
        classes: Sequence[str],
        nb_classes: int,
    ) -> int:
        """Write a line for every image, in their order, whole or not at all; by rank 0.

        Args:
            path: the file.
            process: this process; all of them take part.
            images: those of all processes; without labels if their `classes` are empty.
            classes: names of the first labels; the rest are named by their numbers.
            nb_classes: how many labels there are.

        Returns:
            how many images have no prediction, because they are unreadable.

        Raises:
            UserError: the file can't be written, or a probability is not finite; in every process.
        """
        rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for parts in gather(self._parts):
            for indices, *likeliest in parts:  # classes and their probabilities
                rows |= zip(indices.tolist(), zip(*likeliest, strict=True), strict=True)
        if any(not np.isfinite(probabilities).all() for _, probabilities in rows.values()):
            raise UserError("the classes' probabilities are not finite: the weights are of no use")
        problem = ""
        if process.is_main:
            names = [*classes, *map(str, range(len(classes), nb_classes))]
            try:
                write_whole(path, _table(rows, images, names))
            except OSError as error:
                problem = str(error)
        if problem := gather(problem)[0]:
            raise UserError(problem)
        return len(images) - len(rows)


def _table(
    rows: dict[int, tuple[np.ndarray, np.ndarray]], images: Images, names: Sequence[str]
) -> bytes:
    """A CSV file of all images; those without a row have empty fields."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    numbers = range(1, min(LISTED, len(names)) + 1)
    columns = [f"{what}_{number}" for number in numbers for what in ("class", "probability")]
    table.writerow(["file", "label", "predicted", *columns])
    for index in range(len(images)):
        fields = [""] * (1 + len(columns))
        if index in rows:
            pairs = [
                (names[c], f"{probability:.6g}")
                for c, probability in zip(*rows[index], strict=True)
            ]
            fields = [pairs[0][0], *itertools.chain(*pairs)]
        label = names[images.labels[index]] if images.classes else ""
        table.writerow([images.name(index), label, *fields])
    return text.getvalue().encode("utf-8", "surrogateescape")  # a file's name can hold any bytes
