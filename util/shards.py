"""Tar shards by WebDataset's names, read at random by an index of where their members lie."""

import contextlib
import errno
import fcntl
import functools
import itertools
import json
import os
import re
import sys
import tarfile
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from util.decoding import ImageSource, UnreadableImage, image_suffixes
from util.errors import UserError, printable, say, warn
from util.searching import SYSTEM_NAMES, Found

COMPRESSED = "is compressed, which can't be read at random: decompress it (gunzip, unxz, unzstd)"
CLASSES = "classes.txt"  # the names of the classes 0, 1, ..., a line each
PACK = "pack.json"  # where packing notes how far it is


class ShardImages:
    """The images in shards, with the interface of `ImagePaths`: by shard, then by place in it.

    Names and places are in tensors that processes share. The index of them is kept beside the
    shards, and built anew when a shard has another size or time.

    Attributes:
        root: the folder.
        origin: the shards, as messages call them.
        classes: the names of the classes with images, as classes.txt orders them, or sorted if
            .cls members hold names; all numbers to the largest if there are no names. "" stands
            for images without a class.
        labels: int64 tensor [number of images], the index of each image's class.
        fingerprint: a checksum of the names, that of the folder from which shards were packed.
        found: images and other members by suffix, and images beside the shards, for the survey.
        has_8_bits: as in `ImagePaths`.

    Raises:
        UserError: a shard is torn, compressed or can't be read; it holds links or sparse files, two
            images of one sample or a .cls that is no class; there are no images.
    """

    has_8_bits = True

    def __init__(self, folder: str | Path, split: str, shards: list[str]) -> None:
        self.root = os.fsencode(folder)
        self.origin = os.path.join(folder, f"{split}-*.tar")
        try:
            states = [(state.st_size, state.st_mtime_ns) for state in map(os.stat, shards)]
        except OSError as error:
            raise UserError(f"{error.filename} can't be read: {error.strerror}") from error
        self._shards = [(path, *state) for path, state in zip(shards, states, strict=True)]
        basis = [1, list(image_suffixes()), [[os.path.basename(p), *s] for p, *s in self._shards]]
        file = Path(folder) / f".{split}.index.npz"
        with _one_at_a_time(folder):
            index = _load(file, basis) or _build(shards)
            if "basis" not in index:
                _save(file, index | {"basis": basis})
        others = Counter(index["passed_over"])
        hidden = others.pop("hidden", 0)
        self.found = Found(images=Counter(index["counts"]), others=others, hidden_files=hidden)
        self.fingerprint = index["fingerprint"]
        self._places, self._ends, self._names = (
            torch.from_numpy(index[name]).share_memory_() for name in ("places", "ends", "names")
        )
        if not len(self):
            raise UserError(f"{self.origin} hold no images ({' '.join(image_suffixes())})")
        self.classes, labels = _name_classes(Path(folder), index["classes"], index["labels"])
        self.labels = torch.from_numpy(labels).share_memory_()
        unlabelled = np.flatnonzero(index["labels"] < 0)
        if 0 < len(unlabelled) < len(self):
            first = self[unlabelled[0].item()]
            warn(f"{len(unlabelled)} of {len(self)} images have no .cls, such as {first}")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        return f"{self._shards[self._places[index, 0]][0]}: {self.name(index)}"

    def name(self, index: int) -> str:
        """The image's name in its shard, or that of the file from which it was packed."""
        start = self._ends[index - 1].item() if index else 0
        return os.fsdecode(self._names[start : self._ends[index].item()].numpy().tobytes())

    def source(self, index: int) -> ImageSource:
        """The image, to be decoded.

        Raises:
            UnreadableImage: its shard can't be read any more.
        """
        name = self[index]
        shard, offset, size = self._places[index].tolist()
        try:
            file = _opened(*self._shards[shard])
            content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise UnreadableImage(f"{printable(name)}: {error.strerror}") from error
        if len(content) != size:
            raise UnreadableImage(f"{printable(name)}: the shard has become shorter")
        return ImageSource(name, content=content)


@functools.lru_cache(maxsize=256)  # a process may not open any number of files
def _opened(shard: str, size: int, time: int) -> BinaryIO:
    """A shard of the indexed size and time. One that leaves the cache is closed after its use."""
    file = open(shard, "rb", buffering=0)  # noqa: SIM115
    state = os.fstat(file.fileno())
    if (state.st_size, state.st_mtime_ns) != (size, time):
        file.close()
        raise OSError(errno.ESTALE, "the shard has changed since the start")
    return file


def find_shards(folder: str | Path, split: str) -> ShardImages | None:
    """The images in the shards folder/SPLIT-*.tar, or None without any.

    Raises:
        UserError: as `ShardImages`.
    """
    if not os.path.isdir(folder):
        return None
    is_shard = re.compile(rf"{re.escape(split)}-.*\.(tar(\.\w+)?|t[gbx]z2?)", re.DOTALL).fullmatch
    names = sorted(filter(is_shard, os.listdir(folder)), key=os.fsencode)
    shards = [os.path.join(folder, name) for name in names]
    if not shards:
        return None
    for shard in shards:
        if not shard.endswith(".tar"):
            raise UserError(f"{shard} {COMPRESSED}")
    images = ShardImages(folder, split, shards)
    suffixes = (os.path.splitext(name)[1].lower() for name in os.listdir(folder))
    images.found.others.update(suffix for suffix in suffixes if suffix in image_suffixes())
    numbers = sorted({int(end[1]) for name in names if (end := re.search(r"(\d+)\.tar$", name))})
    for number, following in itertools.pairwise(numbers):
        if following != number + 1:
            warn(f"{images.origin}: there is no shard {number + 1}, though there is {following}")
            break
    if numbers and numbers[0] > 1:
        warn(f"{images.origin}: the first shard is number {numbers[0]}")
    missing: list[str] = []
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        packed = json.loads((Path(folder) / PACK).read_bytes())
        missing = [shard["name"] for shard in packed["shards"] if shard["split"] == split]
        missing = [name for name in missing if name not in names]
        if not packed["finished"]:
            warn(f"{folder} isn't packed to its end: repeat the main_data.py pack that began it")
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing[:5])}, which {PACK} lists: fetch what is missing, "
            f"or remove {PACK} to train without it"
        )
    return images


# ---- the index: what JSON holds, and arrays
# places: int64 [images, 3], the number of the shard, offset and size; ends: int64 [images], of
# their names in the array of bytes `names`; labels: int64 [images], -1 without a .cls; classes:
# those that labels are indices of, None if they are the numbers in .cls.

_ARRAYS = ("places", "ends", "names", "labels")


@contextlib.contextmanager
def _one_at_a_time(folder: str | Path) -> Iterator[None]:
    """Let one process build an index, which the rest of them then load."""
    if not os.access(folder, os.W_OK):  # it can't be kept, so that each has to build its own
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _load(file: Path, basis: list[Any]) -> dict[str, Any] | None:
    """The index in a file, or None if it is missing, damaged or of another basis."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            index = json.loads(arrays["json"].tobytes())
            if index["basis"] == basis:
                return index | {name: arrays[name] for name in _ARRAYS}
    except Exception:  # numpy raises anything on broken files
        pass
    return None


def _save(file: Path, index: dict[str, Any]) -> None:
    """Keep the index, where the folder can be written."""
    arrays = {name: index.pop(name) for name in _ARRAYS}
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as opened:
            np.savez(opened, json=np.frombuffer(json.dumps(index).encode(), np.uint8), **arrays)
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        warn(f"{file} can't be written ({error.strerror}): every command will index these shards")


def _build(shards: list[str]) -> dict[str, Any]:
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        folder = printable(os.path.dirname(shards[0]))
        say(f"indexing {len(shards)} shards in {folder}, once", sys.stderr)
    counts: Counter[str] = Counter()
    passed_over: Counter[str] = Counter()
    names: list[bytes] = []
    tables = [np.empty((0, 4), np.int64)]
    texts: dict[str | None, tuple[int, str]] = {None: (-1, "")}  # a number for each, and the first
    for number, shard in enumerate(tqdm(shards, leave=False, disable=None if is_main else True)):
        rows = []
        for offset, size, name, suffix, text in _read_shard(shard, passed_over):
            label, _ = texts.setdefault(text, (len(texts) - 1, f"{shard}: {name}"))
            rows.append((number, offset, size, label))
            names.append(os.fsencode(name))
            counts[suffix] += 1
        tables.append(np.array(rows, np.int64).reshape(-1, 4))
    table = np.concatenate(tables)
    values, classes = _read_classes({t: first for t, (_, first) in texts.items() if t is not None})
    return {
        "places": table[:, :3].copy(),
        "ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "names": np.frombuffer(bytearray(b"".join(names)), np.uint8),
        "labels": np.array([*values, -1], np.int64)[table[:, 3]],
        "classes": classes,
        "counts": counts,
        "passed_over": passed_over,
        "fingerprint": zlib.crc32(b"\0".join(names)),
    }


def _read_shard(
    shard: str, passed_over: Counter[str]
) -> list[tuple[int, int, str, str, str | None]]:
    """A shard's images in their order: offset, size, name, suffix, and the text of its .cls."""
    images: dict[str, list[tuple[int, int, str, str]]] = {}
    texts: dict[str, str] = {}
    names: dict[str, str] = {}
    suffixes = image_suffixes()
    for member, descriptor in _members(shard):
        path = member.name.removeprefix("./")
        folder, slash, base = path.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = f"{folder}{slash}{stem}", extension.lower()
        suffix = os.path.splitext(base)[1].lower()
        parts = os.fsencode(path.lower()).split(b"/")
        if any(part.startswith(b".") or part in SYSTEM_NAMES for part in parts):
            passed_over["hidden"] += 1
        elif extension not in ("cls", "json") and suffix not in suffixes:
            passed_over[suffix] += 1
        elif not member.isreg() or member.issparse():
            raise UserError(
                f"{shard}: {path} is a link or a sparse file: write the shard by tar with "
                "--dereference --hard-dereference, without --sparse"
            )
        elif suffix in suffixes:
            images.setdefault(key, []).append((member.offset_data, member.size, path, extension))
        else:
            content = os.pread(descriptor, min(member.size, 1 << 20), member.offset_data)
            if extension == "cls":
                texts[key] = content.decode(errors="replace").strip()
            else:
                names[key] = _name_in_json(content) or ""
    samples = []
    for key, found in images.items():
        # KEY.jpg is the sample's image, KEY.mask.png a part beside it.
        chosen = [image for image in found if "." not in image[3]] or found
        if len(chosen) > 1:
            raise UserError(
                f"{shard} holds {len(chosen)} images of the sample {key} ({chosen[0][2]}, "
                f"{chosen[1][2]}): a name up to its first dot must be one image's only"
            )
        passed_over.update(f".{image[3]}" for image in found if image not in chosen)
        offset, size, path, _ = chosen[0]
        suffix = os.path.splitext(path)[1].lower()
        samples.append((offset, size, names.get(key) or path, suffix, texts.get(key)))
    return sorted(samples, key=lambda sample: sample[0])


def _name_in_json(content: bytes) -> str | None:
    """The name of the file that a sample was packed from, if its .json tells."""
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(content)
        if isinstance(fields, dict) and isinstance(fields.get("name"), str):
            os.fsencode(fields["name"])  # not every string of JSON is text
            page = fields.get("page")
            return fields["name"] if page is None else f"{fields['name']} page {page}"
    return None


def _members(shard: str) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """A tar's members but for folders, and its file descriptor; a UserError if it isn't whole.

    tarfile takes a damaged header, or the end of the file, for the end of the tar.
    """
    try:
        with open(shard, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
                raise UserError(f"{shard} {COMPRESSED}")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # 1 GB for a million
                    if member.offset_data + member.size > size and not member.issparse():
                        raise ValueError(f"ends within {member.name}")
                    if not member.isdir():
                        yield member, file.fileno()
                file.seek(tar.offset)
            end = file.read(1 << 20)
            if len(end) < 1024 or size % 512:
                raise ValueError("ends without the blocks of zeros that end a tar")
            if end.strip(b"\0") or file.read(1):
                raise ValueError(f"goes on after its last whole member, at byte {tar.offset}")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{shard} can't be read: {error.strerror}") from error
    except Exception as error:  # tarfile raises anything on broken files
        raise UserError(f"{shard} is torn ({error}): fetch or write it anew") from error


# ---- classes


def _read_classes(texts: dict[str, str]) -> tuple[list[int], list[str] | None]:
    """For each text of a .cls, which `texts` tells where to find, its label; and the classes.

    Classes are None if the texts are numbers, which are then the labels.
    """
    numbers = {text for text in texts if re.fullmatch("[0-9]{1,6}", text)}
    if len(numbers) == len(texts):
        return [int(text) for text in texts], None
    for text, where in texts.items():
        if text not in numbers and (numbers or not text or re.fullmatch(r"[-+.\de]+", text)):
            raise UserError(f"the .cls of {where} holds {text[:40]!r}, no number from 0 to 999999")
    classes = sorted(texts, key=os.fsencode)
    label = {name: number for number, name in enumerate(classes)}
    return [label[text] for text in texts], classes


def _name_classes(
    folder: Path, classes: list[str] | None, labels: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """The classes and labels of `ShardImages`, from those of its index."""
    largest = labels.max()
    file = folder / CLASSES
    if classes is None and largest >= 0 and file.exists():
        lines = file.read_bytes().removesuffix(b"\n").split(b"\n")
        classes = [os.fsdecode(line.removesuffix(b"\r")) for line in lines]
        if largest >= len(classes) or len(set(classes)) < len(classes):
            raise UserError(
                f"{file} must name each class in a line of its own: there are "
                f"{len(set(classes))} different names, and labels up to {largest}"
            )
    if classes is None and largest >= 0:
        unlabelled = [""] if labels.min() < 0 else []
        return [*unlabelled, *map(str, range(largest + 1))], labels + len(unlabelled)
    present, labels = np.unique(labels, return_inverse=True)
    return [classes[n] if classes and n >= 0 else "" for n in present.tolist()], labels
