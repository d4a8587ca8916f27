"""Image files: finding them below a folder."""

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from util.decoding import ImageSource, UnreadableImage, read_image
from util.errors import UserError, warn

IMAGE_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm".split()


class ImagePaths:
    """The sorted paths of all images below a folder, in two tensors that processes share.

    Each worker would end up with its own copy of a list of strings, as Python writes to their
    reference counts. These tensors stay shared, however a worker was started.

    Attributes:
        classes: sorted names of the folders in `root` with images in or below them; "" stands for
            `root` itself.
        labels: int64 tensor [number of images], the index of each image's class.
        fingerprint: a checksum of the names.

    Raises:
        UserError: the folder is missing, not a folder or without images.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.is_dir():
            kind = "is a file, not a folder" if root.exists() else "does not exist"
            raise UserError(f"{root} {kind}: give a folder of images")
        self.root = os.fsencode(root)
        names = sorted(_image_names(self.root))
        if not names:
            raise UserError(f"{root} has no images ({' '.join(IMAGE_SUFFIXES)}) in it or below")
        self.fingerprint = zlib.crc32(b"\0".join(names))
        folders = [name.partition(b"/")[0] if b"/" in name else b"" for name in names]
        number = {folder: index for index, folder in enumerate(sorted(set(folders)))}
        self.classes = [os.fsdecode(folder) for folder in number]
        self.labels = torch.tensor([number[folder] for folder in folders]).share_memory_()
        self._ends = torch.tensor([len(name) for name in names]).cumsum(0).share_memory_()
        self._names = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        self._names.share_memory_()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1].item() if index else 0
        name = self._names[start : self._ends[index].item()].numpy().tobytes()
        return os.fsdecode(os.path.join(self.root, name))

    def source(self, index: int) -> ImageSource:
        """The image, to be decoded."""
        path = self[index]
        return ImageSource(path, path)


def _image_names(root: bytes) -> Iterator[bytes]:
    """Paths of the image files below `root`, relative to it; hidden ones are passed over."""
    suffixes = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
    walked: set[bytes] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real_folder = os.path.realpath(folder)
        if real_folder in walked:  # links may lead in circles
            subfolders.clear()
            continue
        walked.add(real_folder)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(b"."))
        below_root = os.path.relpath(folder, root)
        for name in files:
            if name.lower().endswith(suffixes) and not name.startswith(b"."):
                yield name if below_root == b"." else os.path.join(below_root, name)


def find_images(data_path: str, split: str) -> ImagePaths | None:
    """The images in data_path/`split`, or None if there is no such folder.

    data_path itself stands in for a missing folder "train": pre-training needs no labels.

    Raises:
        UserError: there are no images, or none of a sample of them is readable.
    """
    folder = Path(data_path) / split
    if not folder.is_dir():
        if split != "train":
            return None
        folder = Path(data_path)
    paths = ImagePaths(folder)
    _check_readable(paths, folder)
    return paths


def find_labelled_images(
    data_path: str, nb_classes: int, splits: Sequence[str] = ("train", "val")
) -> list[ImagePaths]:
    """The images in data_path/SPLIT/CLASS, for each of `splits`.

    Raises:
        UserError: a folder is missing or has images outside of its classes; none of a sample of
            them is readable; the splits' classes differ, or are more than `nb_classes`.
    """
    found: list[ImagePaths] = []
    for split in splits:
        folder = Path(data_path) / split
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist: classes are folders of images in it")
        paths = ImagePaths(folder)
        if "" in paths.classes:
            stray = paths[paths.labels.tolist().index(0)]
            raise UserError(f"{stray} is in no class: {folder} must hold a folder for each class")
        if found:
            check_classes(paths, found[0].classes, Path(data_path) / splits[0])
        _check_readable(paths, folder)
        found.append(paths)
    count = len(found[0].classes)
    if count > nb_classes:
        raise UserError(f"--nb_classes {nb_classes} is below the {count} classes in {folder}")
    if count < nb_classes:
        warn(f"--nb_classes {nb_classes} is above the {count} classes in {folder}")
    return found


def check_classes(paths: ImagePaths, classes: Iterable[str], source: object) -> None:
    """Refuse, with a UserError, images whose classes are not the `classes` of `source`."""
    found, expected = set(paths.classes), set(classes)
    differences = [
        f"{verb} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for verb, names in (("lack", sorted(expected - found)), ("add", sorted(found - expected)))
        if names
    ]
    if differences:
        raise UserError(
            f"the classes in {os.fsdecode(paths.root)} are not those of {source}: they "
            f"{' and '.join(differences)}"
        )


def _check_readable(paths: ImagePaths, folder: Path) -> None:
    """Refuse, with a UserError, a folder if no image of a sample is readable."""
    probes = np.unique(np.linspace(0, len(paths) - 1, 32).astype(int))
    for index in probes.tolist():
        try:
            read_image(paths[index])
            return
        except UnreadableImage:
            continue
    raise UserError(
        f"{folder} has no readable images: each of {len(probes)} tried, such as {paths[0]}, failed"
    )
