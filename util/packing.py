"""Packing images into tar shards by WebDataset's names, which `util.shards` reads."""

import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from util import decoding, pages
from util.checkpoint import write_whole
from util.decoding import ImageSource, UnreadableImage, UnsuitableImage
from util.errors import UserError, printable, say, warn
from util.image_files import Images
from util.loading import MAX_UNREADABLE_SHARE, MIN_UNREADABLE, map_in_order
from util.pixels import MAX_PIXELS, PixelFormat
from util.shards import CLASSES, PACK


@dataclass(frozen=True)
class Packing:
    """What is made of the files.

    Attributes:
        max_side: 8-bit images are resized to at most so many pixels on their longer side.
        shard_mb: a shard's size in megabytes, 10^6 bytes, unless a single image is larger.
        pages: "each" makes an image of every page of a file, and "bands" one image whose bands
            the pages are; "first" copies the file.
        layout, max_pixels: as in `PixelFormat`.
    """

    max_side: int | None = None
    shard_mb: int = 500
    pages: str = "first"
    layout: str = "hwc"
    max_pixels: int = MAX_PIXELS

    @property
    def pixels(self) -> PixelFormat:
        """How files are read. Nodata is not known here; a resize blends it."""
        return PixelFormat(nodata=math.nan, layout=self.layout, max_pixels=self.max_pixels)


class Sample(NamedTuple):
    """What becomes of a file, or of a page."""

    suffix: str = ""
    content: bytes = b""
    too_large: bool = False  # it keeps its size above max_side
    problem: str = ""  # why it is unreadable


def pack(splits: dict[str, Images], output: Path, packing: Packing, num_workers: int) -> None:
    """Write each split's images as output/SPLIT-000000.tar, ..., and say what became of them.

    After an interruption it goes on behind the last whole shard, and ends in the same bytes.

    Raises:
        UserError: the folder can't be written, or holds something else; there is no tifffile, which
            pages need; at the end, if many files are unreadable.
    """
    if packing.pages != "first" and not importlib.util.find_spec("tifffile"):
        raise UserError(
            f"--pages {packing.pages} needs a package: pip install tifffile imagecodecs"
        )
    names = {os.fsencode(name) for images in splits.values() for name in images.classes} - {b""}
    if any(b"\n" in name for name in names):
        raise UserError("the name of a class has a line break in it: rename its folder")
    classes = {os.fsdecode(name): number for number, name in enumerate(sorted(names))}
    settings = asdict(packing) | {s: [len(i), i.fingerprint] for s, i in splits.items()}
    try:
        progress = _begin(output, settings)
        if classes:
            write_whole(output / CLASSES, b"".join(name + b"\n" for name in sorted(names)))
        for split, images in splits.items():
            _pack_split(split, images, classes, output, packing, progress, num_workers)
        write_whole(output / PACK, json.dumps(progress | {"finished": True}).encode())
    except OSError as error:
        raise UserError(
            f"{output} can't be written ({error.strerror}): mend that, and repeat the command to "
            "continue"
        ) from error
    finally:
        _remove_torn(output)
    _sum_up(splits, output, progress["shards"])


def _begin(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """How far a pack with these settings is: its whole shards."""
    _remove_torn(output)
    if not (output / PACK).exists():
        if any(output.glob("*.tar")):
            raise UserError(f"{output} holds shards of another origin: choose another --output")
        return {"settings": settings, "shards": [], "finished": False}
    try:
        progress = json.loads((output / PACK).read_bytes())
        old, _ = progress["settings"], progress["shards"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{output / PACK} is damaged: empty {output}, or choose another --output"
        ) from error
    for name in sorted(old.keys() | settings.keys()):
        if old.get(name) != settings.get(name):
            raise UserError(
                f"{output} was begun with another {name} ({old.get(name)}, now "
                f"{settings.get(name)}): restore it, or choose another --output"
            )
    whole = []
    for shard in progress["shards"]:
        path = output / shard["name"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            break  # what follows is written again, to the same bytes
        whole.append(shard)
    return progress | {"shards": whole, "finished": False}


def _remove_torn(output: Path) -> None:
    for shard in output.glob(".*.tar.tmp"):
        shard.unlink()


def _pack_split(
    split: str,
    images: Images,
    classes: dict[str, int],
    output: Path,
    packing: Packing,
    progress: dict[str, Any],
    num_workers: int,
) -> None:
    """Write a split's shards that are not in `progress`, and add them to it."""
    items = _list_items(images, packing, num_workers)
    done = [shard for shard in progress["shards"] if shard["split"] == split]
    first = done[-1]["next"] if done else 0
    bar = tqdm(total=len(items), initial=first, desc=split, unit=" images", disable=None)
    tally = {"unreadable": 0, "too_large": 0}

    def readable() -> Iterator[tuple[int, dict[str, bytes], bool]]:
        """Each readable item: its number, members by extension, and whether it is too large."""
        read = functools.partial(_read, images, packing)
        for number, sample in enumerate(
            map_in_order(_Mapped(read, items[first:]), num_workers), first
        ):
            bar.update()
            tally["unreadable"] += bool(sample.problem)
            if sample.problem:
                with bar.external_write_mode(file=sys.stderr):
                    warn(f"left out as unreadable: {sample.problem}")
                continue
            index, page = items[number].tolist()
            name = images[index].removeprefix(os.path.join(os.fsdecode(images.root), ""))
            origin = {"name": name} if page < 0 else {"name": name, "page": page}
            members = {sample.suffix: sample.content, "json": json.dumps(origin).encode()}
            if name_of_class := images.classes[images.labels[index]]:
                members["cls"] = str(classes[name_of_class]).encode()
            yield number, members, sample.too_large

    samples = readable()
    waiting = next(samples, None)
    while waiting:
        path = output / f"{split}-{len(done):06d}.tar"
        temporary = path.with_name(f".{path.name}.tmp")
        count = 0
        # Its default members have neither times nor owners, which would change the bytes.
        with tarfile.open(temporary, "w:", format=tarfile.GNU_FORMAT) as tar:
            while waiting:
                number, members, too_large = waiting
                size = sum(512 * (1 - (-len(content) // 512)) for content in members.values())
                if count and tar.offset + size + 1024 > packing.shard_mb * 10**6:
                    break
                for extension, content in sorted(members.items()):
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                tar.members.clear()  # type: ignore[attr-defined]
                tally["too_large"] += too_large
                count += 1
                waiting = next(samples, None)
        os.truncate(temporary, tar.offset)  # without padding, so that no loss goes unnoticed
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        shard = {"name": path.name, "split": split, "images": count, "bytes": tar.offset}
        done.append(shard | tally | {"next": waiting[0] if waiting else len(items)})
        progress["shards"].append(done[-1])
        tally |= dict.fromkeys(tally, 0)
        write_whole(output / PACK, json.dumps(progress).encode())
        if bar.disable:
            say(printable(f"{path}: {count} images, {tar.offset / 1e6:.1f} MB"), sys.stdout)
    bar.close()
    if not done:
        raise UserError(f"{images.origin} has no readable images")


def _sum_up(splits: dict[str, Images], output: Path, shards: list[dict[str, Any]]) -> None:
    def total(of: str, split: str = "") -> int:
        return sum(shard[of] for shard in shards if shard["split"].startswith(split))

    numbers = " and ".join(f"{total('images', split)} {split}" for split in splits)
    size, unreadable, too_large = total("bytes"), total("unreadable"), total("too_large")
    line = f"{output}: {numbers} images in {len(shards)} shards, {size / 1e6:,.1f} MB"
    if unreadable:
        line += f"; {unreadable} unreadable files left out"
    if too_large:
        line += f"; {too_large} images above --max_side keep their size: not 8-bit grey or RGB"
    say(printable(line), sys.stdout)
    say(printable(f"train on it: python main_pretrain.py --data_path {output}"), sys.stdout)
    limit = MAX_UNREADABLE_SHARE * (total("images") + unreadable)
    if unreadable >= MIN_UNREADABLE and unreadable > limit:
        raise UserError(f"{output} lacks {unreadable} unreadable files, more than 1%: see above")


# ---- reading, in workers


class _Mapped(torch.utils.data.Dataset):
    def __init__(self, function: Callable[..., Any], items: np.ndarray) -> None:
        self.function = function
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.function(*self.items[number].tolist())


def _list_items(images: Images, packing: Packing, num_workers: int) -> np.ndarray:
    """The images to write: int64 [items, 2] of a file's index and a page, -1 for all."""
    indices = np.arange(len(images))
    counts = np.ones_like(indices)
    if packing.pages == "each":
        count = functools.partial(_count_pages, images, packing)
        pages_of = map_in_order(_Mapped(count, indices[:, None]), num_workers)
        bar = tqdm(pages_of, "pages", len(images), disable=None, leave=False)
        counts = np.fromiter(bar, np.int64, len(images))
    page = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    page[np.repeat(counts, counts) == 1] = -1
    return np.column_stack([np.repeat(indices, counts), page])


def _count_pages(images: Images, packing: Packing, index: int) -> int:
    try:
        return decoding.describe(images.source(index), packing.pixels).pages
    except UnreadableImage:
        return 1  # which is going to be named


def _read(images: Images, packing: Packing, index: int, page: int) -> Sample:
    """A file, or a page of it, as it is packed."""
    try:
        source = images.source(index)
        if packing.pages == "bands":
            count = decoding.describe(source, packing.pixels).pages
            if count > 1:
                content = pages.join(source, count, packing.pixels)
                return Sample("npy", content)
        if page >= 0:
            source = pages.read_page(source, page, packing.pixels)
        return _sample(source, packing, is_page=page >= 0)
    except UnreadableImage as error:
        return Sample(problem=str(error))
    except OSError as error:
        return Sample(problem=f"{images[index]}: {error.strerror or error}")


def _sample(source: ImageSource, packing: Packing, is_page: bool) -> Sample:
    stored = decoding.describe(source, packing.pixels)
    too_large = max(stored.height, stored.width) > (packing.max_side or np.inf)
    mode = {(1, False): "L", (2, True): "LA", (3, False): "RGB", (4, True): "RGBA"}.get(
        (stored.bands, stored.alpha)
    )
    if mode and stored.bits <= 8 and stored.dtype == "uint8" and stored.format != "NPY":
        is_jpeg = stored.format in ("JPEG", "MPO")
        if too_large or (is_page and stored.format == "TIFF"):
            pixels = replace(packing.pixels, in_chans=stored.bands, nodata=None)
            bands = [Image.fromarray(b) for b in decoding.read_image(source, pixels).numpy()]
            if too_large:
                assert packing.max_side
                scale = packing.max_side / max(stored.height, stored.width)
                size = [max(1, round(side * scale)) for side in (stored.width, stored.height)]
                # Each by itself: Pillow would blacken what alpha hides.
                bands = [band.resize(size, Image.Resampling.LANCZOS) for band in bands]
            image = Image.merge(mode, bands)
            return Sample(
                "jpg" if is_jpeg else "png", pages.encode(image, stored.orientation, is_jpeg)
            )
    if not is_page:
        with contextlib.suppress(UnsuitableImage):  # it is whole, and needs a package
            decoding.read_samples(source, packing.pixels)
    content = source.content
    if content is None:
        content = Path(source.path or "").read_bytes()
    suffix = os.path.splitext(source.name)[1].lower().removeprefix(".")
    if is_page:
        suffix = "tif" if stored.format == "TIFF" else "png"
    return Sample(suffix, content, too_large)
