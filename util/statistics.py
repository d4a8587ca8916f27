"""Statistics of a folder's images, band by band, and the flags that a training needs for them."""

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from util.decoding import (
    UnreadableImage,
    UnsuitableImage,
    describe,
    is_nodata,
    read_samples,
)
from util.errors import UserError, warn
from util.image_files import Images
from util.loading import MAX_UNREADABLE_SHARE, MIN_UNREADABLE, map_in_order
from util.pixels import PixelFormat
from util.tallies import Counts, Figures, Moments

MAX_KEPT = 1 << 22  # values a band for the percentiles of types of more than 16 bits
MAX_KEPT_IN_ALL = 1 << 26  # the same for all bands together
SLICE = 1 << 22  # samples to look at together


@dataclass(frozen=True)
class Statistics:
    """Figures of images; the lists have a number a band, in the files' own units.

    Attributes:
        images: how many were read.
        unreadable: how many were left out.
        dtype: numpy's name of a sample's type.
        full_scale: the sample that stands for 1 in unsigned types of at most 16 bits; else None.
        bands: bands an image.
        pixels: of all images together, those without data too.
        kept: values a band that the percentiles are from, where that isn't all of them.
        std: of the population (divided by the number of samples).
    """

    images: int
    unreadable: int
    dtype: str
    full_scale: int | None
    bands: int
    pixels: int
    kept: int | None
    min: list[float]
    max: list[float]
    p01: list[float]
    p99: list[float]
    mean: list[float]
    std: list[float]


class Kind(NamedTuple):
    """What images must have in common."""

    dtype: str
    full_scale: int | None
    bands: int

    def __str__(self) -> str:
        bits = ""
        if self.full_scale and 255 < self.full_scale < 65535:
            bits = f" with {self.full_scale.bit_length()} bits"
        return f"{self.bands} band{'s' * (self.bands > 1)} of {self.dtype}{bits}"

    def tally(self, image: int = 0, thinned: int = 0) -> Counts | Moments:
        """An empty one, for a band."""
        dtype = np.dtype(self.dtype)
        if dtype.itemsize <= 2:
            return Counts(dtype)
        return Moments(min(MAX_KEPT, MAX_KEPT_IN_ALL // self.bands), image, thinned)


GREY_8, RGB_8 = Kind("uint8", 255, 1), Kind("uint8", 255, 3)  # photographs are often both


@dataclass(frozen=True)
class Measured:
    """An image's share of the statistics."""

    name: str
    kind: Kind
    pixels: int
    parts: list  # a band's, as its tally gives and takes them


class Measurements(torch.utils.data.Dataset):
    """Images, measured: [i] is `Measured`, or the error of one that can't be.

    Attributes:
        thinned: how often the values of all bands have been halved so far. Workers see it and send
            no more than needed.
    """

    def __init__(self, paths: Images, chosen: np.ndarray, pixels: PixelFormat) -> None:
        self.paths, self.chosen, self.pixels = paths, chosen, pixels
        self.thinned = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Measured | UnreadableImage | UserError:
        source = self.paths.source(int(self.chosen[index]))
        try:
            samples = read_samples(source, self.pixels)
            description = describe(source, self.pixels, count_pages=False)
        except UnsuitableImage as error:
            return UserError(str(error))
        except UnreadableImage as error:
            return error
        if description.alpha and self.pixels.bands is None:
            samples = samples[..., :-1]
        height, width, bands = samples.shape
        kind = Kind(samples.dtype.name, description.full, bands)
        tallies = [kind.tally(index, int(self.thinned)) for _ in range(bands)]
        for rows in _slices(samples):
            for tally, values in zip(tallies, rows, strict=True):
                values = _with_data(values, self.pixels.nodata)
                tally.add(values)
        return Measured(source.name, kind, height * width, [tally.part() for tally in tallies])


def _slices(samples: np.ndarray) -> Iterator[np.ndarray]:
    """An image [H, W, bands] in parts of some rows, [bands, n], in the machine's byte order."""
    height, width, bands = samples.shape
    step = max(1, SLICE // (width * bands))
    for top in range(0, height, step):
        rows = np.moveaxis(samples[top : top + step], 2, 0).reshape(bands, -1)
        yield rows.astype(rows.dtype.newbyteorder("="), order="C", copy=False)


def _with_data(values: np.ndarray, nodata: float | None) -> np.ndarray:
    if nodata is None:
        return values
    return values[~is_nodata(values, nodata)]


def measure(
    paths: Images, pixels: PixelFormat, *, max_images: int | None = None, num_workers: int = 0
) -> Statistics:
    """Read images once and measure each band; the same figures with any number of workers.

    Args:
        paths: the images.
        pixels: bands, layout, orientation, and the nodata value, which is left out.
        max_images: read only so many, spread evenly over all.
        num_workers: processes that read images; 0 to read them in this one.

    Raises:
        UserError: images differ in bands or type, unless they are 8-bit grey and RGB, which count
            as RGB; a file needs other flags; more than 1% and at least 10 are unreadable, or all; a
            band has nothing but nodata.
    """
    count = min(len(paths), max_images or len(paths))
    chosen = np.arange(count) * (len(paths) - 1) // max(1, count - 1)
    dataset = Measurements(paths, chosen, pixels)
    first, images, unreadable, n_pixels = None, 0, 0, 0
    kinds: set[Kind] = set()
    totals: list = []
    for measured in tqdm(
        map_in_order(dataset, num_workers), total=count, unit="image", disable=None
    ):
        if isinstance(measured, UserError):
            raise measured
        if isinstance(measured, UnreadableImage):
            unreadable += 1
            with tqdm.external_write_mode(sys.stderr):
                warn(f"left out as unreadable: {measured}")
            if unreadable >= MIN_UNREADABLE and unreadable > MAX_UNREADABLE_SHARE * count:
                raise UserError(
                    f"{unreadable} of {count} images are unreadable so far, more than "
                    f"{MAX_UNREADABLE_SHARE:.0%}: mend or remove the files named above"
                )
            continue
        if first is None:
            first, totals = measured, [measured.kind.tally() for _ in measured.parts]
        kinds.add(measured.kind)
        if len(kinds) > 1 and not kinds <= {GREY_8, RGB_8}:
            raise UserError(
                f"{first.name} holds {first.kind}, but {measured.name} holds {measured.kind}: "
                "measure images of one kind, each kind in a folder of its own"
            )
        if len(kinds) > 1 and len(totals) == 1:  # as the default reads them: grey in equal bands
            totals = [copy.deepcopy(totals[0]) for _ in range(3)]
            first = replace(first, kind=RGB_8)
        images, n_pixels = images + 1, n_pixels + measured.pixels
        parts = measured.parts if len(measured.parts) == len(totals) else 3 * measured.parts
        for total, part in zip(totals, parts, strict=True):
            total.merge(part)
        dataset.thinned.fill_(min(total.thinned for total in totals))
    if first is None:
        raise UserError(f"none of {count} images is readable: mend the files named above")
    bands = band_numbers(pixels, len(totals))
    figures = [_figures(total, band) for total, band in zip(totals, bands, strict=True)]
    kept = min(total.kept for total in totals) if any(total.thinned for total in totals) else None
    lists: dict[str, Any] = {
        name: [getattr(band, name) for band in figures] for name in Figures._fields
    }
    return Statistics(
        images=images,
        unreadable=unreadable,
        **first.kind._asdict(),
        pixels=n_pixels,
        kept=kept,
        **lists,
    )


def band_numbers(pixels: PixelFormat, bands: int) -> tuple[int, ...]:
    """The files' numbers of the bands that were read."""
    return pixels.bands or tuple(range(bands))


def _figures(total: Counts | Moments, band: int) -> Figures:
    if not total.count:
        raise UserError(f"band {band} holds nothing but nodata: leave it out with --bands")
    figures = total.figures()
    if not math.isfinite(figures.std):
        raise UserError(
            f"band {band}, from {figures.min:g} to {figures.max:g}, has no finite std: if one of "
            "these values stands for no data, give it as --nodata"
        )
    return figures
