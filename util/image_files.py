"""Image files: finding them below a folder, or by a list of their paths."""

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from util.decoding import ImageSource, image_suffixes, printable
from util.errors import UserError, warn
from util.pixels import RGB, PixelFormat
from util.searching import Found, read_list, search_folder
from util.shards import ShardImages, find_shards
from util.survey import count, first_names, passed_over, survey

HELD_OUT = ("val", "test")


class ImagePaths:
    """The paths of all images below a folder, sorted, or of a list, in its order.

    They are in two tensors that processes share. Each worker would end up with its own copy of a
    list of strings, as Python writes to their reference counts. These tensors stay shared, however
    a worker was started.

    Attributes:
        root: the folder that the names are relative to.
        origin: the folder or the list, as messages call it.
        classes: sorted names of the folders in `root` with images in or below them; "" stands for
            `root` itself. In a list, the names of the folders that hold the images.
        labels: int64 tensor [number of images], the index of each image's class.
        fingerprint: a checksum of the names.
        found: what else was there.
        has_8_bits: whether its files have at most 8 bits a sample, so far as is known.

    Raises:
        UserError: the path is missing, is neither a folder nor a list, or has no images.
    """

    has_8_bits = True

    def __init__(self, root: str | Path, leave_out: Sequence[str] = ()) -> None:
        """Search a folder, but for the folders in it that `leave_out` names; or read a list."""
        place = Path(root)
        self.origin = str(place)
        if os.path.isdir(place):
            self.root = os.fsencode(place)
            names, self.found = search_folder(self.root, leave_out)
            folders = [name.partition(b"/")[0] if b"/" in name else b"" for name in names]
        elif os.path.isfile(place):
            self.root = os.fsencode(place.parent)
            names, self.found = read_list(place)
            folders = _holding_folders(self.root, names)
        else:
            raise UserError(f"{_absence(place)}: give a folder of images, or a list of their paths")
        if not names:
            suffixes = " ".join(image_suffixes())
            also = passed_over(self.found)
            raise UserError(
                f"{root} has no images ({suffixes}) in it or below{also and f'; {also}'}"
            )
        self._keep(names, folders)

    @classmethod
    def named(cls, files: Sequence[str], origin: str) -> "ImagePaths":
        """Files that are named one by one, in no class; their names are as they are given.

        Args:
            files: their paths.
            origin: what messages call them all.

        Raises:
            UserError: one is missing, or no file.
        """
        for file in files:
            if not os.path.isfile(file):
                problem = "is a folder: use --data_path" if os.path.isdir(file) else "doesn't exist"
                raise UserError(f"{origin} {printable(file)} {problem}")
        self = cls.__new__(cls)
        self.origin, self.root = origin, b""
        self.found = Found(images=Counter(os.path.splitext(file)[1].lower() for file in files))
        self._keep([os.fsencode(file) for file in files], [b""] * len(files))
        return self

    def _keep(self, names: list[bytes], folders: list[bytes]) -> None:
        """Store the names, relative to `root`, and for each the folder that is its class."""
        self.fingerprint = zlib.crc32(b"\0".join(names))
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

    def name(self, index: int) -> str:
        """The image's path relative to `root`; as it stands in the list, if there is one."""
        return self[index].removeprefix(os.path.join(os.fsdecode(self.root), ""))

    def source(self, index: int) -> ImageSource:
        """The image, to be decoded."""
        path = self[index]
        return ImageSource(path, path)


Images = ImagePaths | ShardImages


def _holding_folders(root: bytes, names: list[bytes]) -> list[bytes]:
    """For each file, the name of the folder that holds it."""
    folders = [name.rpartition(b"/")[0] for name in names]
    base = {f: os.path.basename(os.path.abspath(os.path.join(root, f))) for f in set(folders)}
    return [base[folder] for folder in folders]


def _absence(path: Path) -> str:
    """That it does not exist, and which folder above it does, unless it is the next one."""
    parents = [parent for parent in path.absolute().parents if os.path.isdir(parent)]
    nearest = "" if parents[0] == path.absolute().parent else f" (of it there is only {parents[0]})"
    return f"{path} does not exist{nearest}"


def _find(data_path: str | Path, split: str) -> Images | None:
    """The images in the folder of a split, in its list or in its shards, if there is one."""
    folder, names = Path(data_path) / split, Path(data_path) / f"{split}.txt"
    shards = f"{split}-*.tar"
    if not os.path.isdir(folder) and not os.path.isfile(names):
        return find_shards(data_path, split)
    chosen = folder if os.path.isdir(folder) else names
    for other, is_there in (
        (names, chosen == folder and os.path.isfile(names)),
        (Path(data_path) / shards, any(Path(data_path).glob(shards))),
    ):
        if is_there:
            warn(f"{other} is passed over, as there is {chosen}")
    return ImagePaths(chosen)


def find_images(
    data_path: str | Path, split: str, pixels: PixelFormat = RGB, *, as_stored: bool = False
) -> Images | None:
    """The images of a split, or None without any.

    They are in the folder data_path/SPLIT, the list data_path/SPLIT.txt or the tar shards
    data_path/SPLIT-*.tar.

    In place of a missing "train" stands data_path itself, a folder, without its `HELD_OUT` ones, or
    a list: pre-training needs no labels. What is found is said, see `survey.survey`.

    Args:
        as_stored: whether files are only to be measured, and need no flags for a model.

    Raises:
        UserError: there are no images, none of a sample of them is readable, or one needs other
            flags.
    """
    images = _find(data_path, split)
    if images is None and split != "train":
        return None
    if images is None:
        place = Path(data_path)
        for name in HELD_OUT:
            if os.path.isfile(place / f"{name}.txt"):
                raise UserError(
                    f"{place / name}.txt lists images that are held out: list those to train on in "
                    f"{place / 'train.txt'}, or keep them in {place / 'train'}"
                )
        images = ImagePaths(place, HELD_OUT)
    images.has_8_bits = survey(images, pixels, held_out=split != "train", as_stored=as_stored)
    return images


def find_images_to_embed(
    data_path: str | Path, split: str | None = None, pixels: PixelFormat = RGB
) -> Images:
    """The images of a split as `find_images` finds them, or all that a folder or a list has.

    Without a `split`, a folder with one named val or train stands for that split. What is found is
    said, see `survey.survey`.

    Raises:
        UserError: as `find_images`; there is no such split.
    """
    place = Path(data_path)
    if split is not None and os.path.isfile(place):
        raise UserError(f"{place} is a list of images, which has no splits: leave out --split")
    images = None
    for name in ("val", "train") if split is None else (split,):
        images = images or _find(place, name)
    if images is None and split is not None:
        raise UserError(f"{_absence(place / split)}: choose an existing --split")
    images = images or ImagePaths(place)
    images.has_8_bits = survey(images, pixels)
    return images


def find_labelled_images(
    data_path: str | Path,
    nb_classes: int,
    splits: Sequence[str] = ("train", "val"),
    pixels: PixelFormat = RGB,
) -> list[Images]:
    """The images of each split, in data_path/SPLIT/CLASS, in its list or in its tar shards.

    What is found is said, see `survey.survey`.

    Raises:
        UserError: a split is missing or has images outside of its classes; none of a sample of
            them is readable, or one of a held-out sample is not; the splits' classes differ, or are
            more than `nb_classes`.
    """
    found: list[Images] = []
    for split in splits:
        images = _find_labelled(data_path, split, pixels)
        if found:
            check_classes(images, found[0].classes, found[0].origin)
        found.append(images)
    number, classes = len(found[0].classes), found[0].classes
    where = f"the {count(number, 'class', 'classes')} in {found[0].origin} ({first_names(classes)})"
    if number > nb_classes:
        raise UserError(f"--nb_classes {nb_classes} is below {where}")
    if number < nb_classes:
        warn(f"--nb_classes {nb_classes} is above {where}")
    return found


def find_images_to_evaluate(
    data_path: str | Path,
    nb_classes: int,
    classes: Sequence[str] | None,
    source: object,
    split: str = "val",
    pixels: PixelFormat = RGB,
    may_lack_labels: bool = False,
) -> Images:
    """A split's images for the classifier in the file `source`, under its labels.

    Args:
        data_path, nb_classes, pixels: as in `find_labelled_images`.
        classes: names of the classifier's classes in the order of its labels; the split may have
            images of some of them only. None where they are unknown.
        source: what messages call the classifier.
        split: which images.
        may_lack_labels: whether images without labels will do. These are all images of a list, of
            a folder without the split, or of a split without a class; their `classes` are empty.

    Raises:
        UserError: as `find_labelled_images`; a class is not among `classes`; these are unknown and
            the split's are not `nb_classes`.
    """
    found = None
    if may_lack_labels:
        found = None if os.path.isfile(data_path) else _find(data_path, split)
        if found is None or found.classes == [""]:
            images = found or ImagePaths(data_path)
            images.has_8_bits = survey(images, pixels)
            images.classes = []
            return images
    images = _find_labelled(data_path, split, pixels, found)
    if classes is not None:
        relabel(images, classes, source)
    elif len(images.classes) != nb_classes:
        number = count(len(images.classes), "class", "classes")
        raise UserError(
            f"{images.origin} has {number} ({first_names(images.classes)}), not {nb_classes} as "
            f"--nb_classes says: {source} doesn't name its classes, so which of them these are "
            "is unknown; evaluate on images of all of them"
        )
    return images


def _find_labelled(
    data_path: str | Path, split: str, pixels: PixelFormat, found: Images | None = None
) -> Images:
    """A split's images, which may have been found before, with a class each."""
    if os.path.isfile(data_path):
        raise UserError(
            f"{data_path} is a file: a classifier takes a folder that holds train and val, folders "
            "of a folder for each class, or the lists train.txt and val.txt"
        )
    images = found or _find(data_path, split)
    if images is None:
        raise UserError(f"{_absence(Path(data_path) / split)}: classes are folders of images in it")
    if "" in images.classes:
        stray = images[images.labels.tolist().index(images.classes.index(""))]
        need = f"{images.origin} must hold a folder for each class"
        if isinstance(images, ShardImages):
            need = "each needs a .cls in its shard"
        raise UserError(f"{stray} is in no class: {need}")
    images.has_8_bits = survey(images, pixels, labelled=True, held_out=split != "train")
    return images


def relabel(images: Images, classes: Sequence[str], source: object) -> None:
    """Let `classes`, those of `source`, be the images' classes: labels become their indices.

    Raises:
        UserError: an image's class is not among them.
    """
    check_classes(images, classes, source, some=True)
    if len(images.classes) < len(classes):
        warn(
            f"{images.origin} has {len(images.classes)} of the {len(classes)} classes of {source}: "
            "accuracy is over these images"
        )
    index = torch.tensor([list(classes).index(name) for name in images.classes])
    images.labels = index[images.labels].share_memory_()
    images.classes = list(classes)


def check_classes(
    images: Images, classes: Iterable[str], source: object, some: bool = False
) -> None:
    """Refuse, with a UserError, images whose classes are not all or `some` of those of `source`."""
    found, expected = set(images.classes), set(classes)
    if some:
        expected &= found
    differences = [
        f"{verb} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for verb, names in (("lack", sorted(expected - found)), ("add", sorted(found - expected)))
        if names
    ]
    if differences:
        raise UserError(
            f"the classes in {images.origin} are not those of {source}: they "
            f"{' and '.join(differences)}"
        )


def why_unlabelled(train: Images, val: Images | None) -> str:
    """Why held-out images can't be classified by training images' labels, or "" if they can."""
    if val is None:
        return f"{train.origin} has no held-out images beside it"
    for images in (train, val):
        if "" in images.classes:
            return f"{images.origin} has images in no class folder"
    if len(train.classes) < 2:
        return f"{train.origin} has fewer than two classes"
    try:
        check_classes(val, train.classes, train.origin)
    except UserError as error:
        return str(error)
    return ""
