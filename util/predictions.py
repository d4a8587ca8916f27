"""What a classifier says of each image, gathered from all processes into one CSV file."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util import distributed
from util.checkpoint import write_whole
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

    def write(self, path: Path, images: Images, classes: Sequence[str], nb_classes: int) -> int:
        """Write a line for every image, in their order, whole or not at all; by rank 0.

        Args:
            path: the file.
            images: those of all processes; their labels are unknown if their `classes` are empty.
            classes: names of the first labels; the rest are named by their numbers.
            nb_classes: how many labels there are.

        Returns:
            how many images have no prediction, because they are unreadable.

        Raises:
            UserError: the file can't be written, or a probability is not finite; in every process.
        """
        rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for parts in distributed.gather(self._parts):
            for indices, likeliest, probabilities in parts:
                rows |= zip(
                    indices.tolist(), zip(likeliest, probabilities, strict=True), strict=True
                )
        if any(not np.isfinite(probabilities).all() for _, probabilities in rows.values()):
            raise UserError("the classes' probabilities are not finite: the weights are of no use")
        names = [*classes, *map(str, range(len(classes), nb_classes))]
        numbers = range(1, min(LISTED, nb_classes) + 1)
        problem = ""
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            text = io.StringIO(newline="")
            table = csv.writer(text, lineterminator="\n")
            columns = [
                f"{what}_{number}" for number in numbers for what in ("class", "probability")
            ]
            table.writerow(["file", "label", "predicted", *columns])
            for index in range(len(images)):
                label = names[images.labels[index]] if images.classes else ""
                row = [images.name(index), label]
                if index in rows:
                    likeliest, probabilities = rows[index]
                    row.append(names[likeliest[0]])
                    for number, probability in zip(likeliest, probabilities, strict=True):
                        row += [names[number], f"{probability:.6g}"]
                else:
                    row += [""] * (1 + len(columns))
                table.writerow(row)
            try:  # a file's name can hold any bytes
                write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))
            except OSError as error:
                problem = str(error)
        if problem := distributed.gather(problem)[0]:
            raise UserError(problem)
        return len(images) - len(rows)
