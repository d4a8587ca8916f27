"""What a folder holds, said at the start of a command: a line or two, and warnings."""

import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Protocol

import numpy as np

from util import decoding
from util.decoding import Description, ImageSource, UnreadableImage, UnsuitableImage
from util.errors import UserError, printable, say, warn
from util.pixels import RGB, PixelFormat
from util.searching import Found

SAMPLED_FILES = 32
DECODED_VALUES = 150_000_000  # of the sample: a second or two. A time would differ by process.
RANGE_FILES = 8
PART = 1 << 24  # samples
Range = tuple[float, float, int, int]  # lowest, highest, how many are clipped, of how many


class Surveyed(Protocol):
    """What `image_files.ImagePaths` and its like have in common."""

    origin: str
    classes: list[str]
    found: Found

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...

    def source(self, index: int, /) -> ImageSource: ...


def survey(
    images: Surveyed,
    pixels: PixelFormat = RGB,
    *,
    labelled: bool = False,
    held_out: bool = False,
    as_stored: bool = False,
) -> bool:
    """Say what was found, read a sample of the files, and warn of what looks wrong.

    All processes raise the same errors; only the main one prints.

    Args:
        images: one or more.
        pixels: how they are read.
        labelled: whether they are a classifier's.
        held_out: whether they are not trained on. A classifier needs each of those.
        as_stored: whether they are only to be measured, and need no flags for a model.

    Returns:
        whether the sampled files have at most 8 bits.

    Raises:
        UserError: a file needs other flags; none is readable; one that is needed is not.
    """
    described, unreadable, ranges = _read_sample(images, pixels, as_stored)
    if not described:
        name, reason = next(iter(unreadable.items()))
        raise UserError(
            f"{images.origin} has no readable images: each of {len(unreadable)} tried failed, "
            f"such as {name}: {reason}"
        )
    _tell(_summary(images, described, labelled))
    _tell(passed_over(images.found))
    if labelled and held_out:
        missing = {f"{images.origin}: {name}": "no such file" for name in images.found.missing}
        for name, reason in (unreadable | missing).items():
            raise UserError(
                f"{name} is unreadable ({reason}): evaluation needs every image, repair it"
            )
    for name, reason in list(unreadable.items())[:5]:
        warn(f"will be skipped as unreadable: {name}: {reason}")
    if len(unreadable) > 5:
        warn(f"{images.origin}: so will {len(unreadable) - 5} more of the files sampled")
    for doubt in (
        *_doubts_about_places(images, labelled and not held_out),
        *_doubts_about_files(described, pixels),
        *_doubts_about_range(described, ranges, pixels),
    ):
        warn(f"{images.origin}: {doubt}")
    return all(description.dtype == "uint8" for description in described)


def _read_sample(
    images: Surveyed, pixels: PixelFormat, as_stored: bool
) -> tuple[list[Description], dict[str, str], list[Range]]:
    """Describe files spread over all images, and decode as many of them as is quick.

    Returns:
        descriptions; why files are unreadable, by name; ranges of some of them.
    """
    described: list[Description] = []
    unreadable: dict[str, str] = {}
    ranges: list[Range] = []
    left = DECODED_VALUES
    spread = np.linspace(0, len(images) - 1, SAMPLED_FILES).astype(int)
    for index in np.unique(spread).tolist():
        try:
            source = images.source(index)
            description = decoding.describe(source, pixels)
            if left > 0:
                read = decoding.read_samples if as_stored else decoding.read_image
                read(source, pixels)
                left -= description.height * description.width * description.bands
                if not as_stored and len(ranges) < RANGE_FILES:
                    found = _range(decoding.read_samples(source, pixels), pixels)
                    ranges += [found] if found else []
            described.append(description)
        except UnsuitableImage as error:
            raise UserError(str(error)) from error
        except UnreadableImage as error:
            name = printable(images[index])
            unreadable[name] = str(error).removeprefix(f"{name}: ")
    return described, unreadable, ranges


def _range(samples: np.ndarray, pixels: PixelFormat) -> Range | None:
    """The range of a file's samples, if it has any but those that stand for no data."""
    low, high = pixels.value_range or (-np.inf, np.inf)
    lowest, highest, clipped, count = np.inf, -np.inf, 0, 0
    # In parts, so that a large file needs no copies of its samples.
    for part in np.array_split(samples, 1 + samples.size // PART):
        valid = part[np.isfinite(part)]
        if pixels.nodata is not None:
            valid = valid[valid != pixels.nodata]
        if valid.size:
            lowest, highest = min(lowest, valid.min().item()), max(highest, valid.max().item())
            clipped += int(((valid < low) | (valid > high)).sum())
            count += valid.size
    return (lowest, highest, clipped, count) if count else None


def _summary(images: Surveyed, described: list[Description], labelled: bool) -> str:
    types = Counter(map(str, described)).most_common()
    kinds = ", ".join(name if len(types) == 1 else f"{name} {number}" for name, number in types)
    sizes = sorted((d.width * d.height, d.width, d.height) for d in described)
    middle, *ends = (f"{w} x {h}" for _, w, h in (sizes[len(sizes) // 2], sizes[0], sizes[-1]))
    notes = [f"of {len(described)} sampled"] if len(described) < len(images) else []
    notes += [" to ".join(ends)] if ends[0] != ends[1] else []
    summary = f"{images.origin}: {count(len(images), 'image')} ({_by_suffix(images.found.images)})"
    summary += f", {kinds}, {middle}"
    summary += f" ({': '.join(notes)})" if notes else ""
    if labelled:
        names = first_names(images.classes)
        summary += f"; {count(len(images.classes), 'class', 'classes')} ({names})"
    return summary


def passed_over(found: Found) -> str:
    """What is passed over or there twice, in one line; "" if nothing is."""
    over = [_counted(found.held_out, "held-out folder")]
    if found.others:
        files = count(found.others.total(), "other file")
        over.append(f"{files} ({_by_suffix(found.others, '; ')})")
    if found.hidden_files:
        over.append(count(found.hidden_files, "hidden or system file"))
    over.append(_counted(found.hidden_folders, "hidden or system folder"))
    over.append(_counted(found.circles, "circular link"))
    parts = [f"passed over: {', '.join(filter(None, over))}"] if any(over) else []
    if found.again:
        parts.append(f"reached more than once: {_counted(found.again, 'folder')}")
    if found.duplicates:
        parts.append(f"{count(found.duplicates, 'line')} repeating another one")
    return "; ".join(parts)


def _doubts_about_places(images: Surveyed, need_classes: bool) -> Iterator[str]:
    found = images.found
    if found.closed:
        yield f"{_counted(found.closed, 'folder')} can't be read: check the permissions"
    if found.missing:
        yield (
            f"{_counted(found.missing, 'name')} passed over, without a file behind: repair or "
            "remove them"
        )
    if found.lookalikes:
        yield (
            f"among the images to train on are {first_names(found.lookalikes)}: if these are held "
            "out, keep those to train on in a folder named train, and these in val"
        )
    below: dict[str, set[str]] = {}  # the second level of folders, by the first
    for folder in found.folders:
        upper, _, name = folder.partition("/")
        below.setdefault(upper, set()).add(name)
    if below and below.keys() <= {"train", "val", "test"}:
        yield f"it holds {' and '.join(sorted(below))}: it may be what --data_path should name"
    lower = next(iter(below.values()), set())
    same_in_all = all(names == lower for names in below.values())
    if need_classes and same_in_all and len(lower) > 1 and "" not in lower:
        yield (
            f"the classes are {first_names(sorted(below))}, not the folders below "
            f"({first_names(sorted(lower))}): move these up if they should be"
        )
    elif need_classes and len(images.classes) == 1:
        yield f"there is only one class ({first_names(images.classes)}): nothing can be learned"


def _doubts_about_files(described: list[Description], pixels: PixelFormat) -> Iterator[str]:
    def of_sampled(files: Collection[Description]) -> str:
        return f"{len(files)} of {len(described)} sampled"

    paged = [d for d in described if d.pages > 1]
    if paged:
        numbers = sorted({d.pages for d in paged})
        pages = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
        yield (
            f"{of_sampled(paged)} have {pages} pages, of which the first is read: python "
            "main_data.py pack makes an image of each (--pages each) or a band (--pages bands)"
        )
    alpha = [d for d in described if d.alpha and pixels.bands is None and d.bands > 1]
    alpha = [d for d in alpha if d.bands != pixels.in_chans]
    if alpha:
        bands = " ".join(map(str, range(alpha[0].bands)))
        keep = f", or read it by --in_chans {alpha[0].bands} --bands {bands}"
        yield (
            f"{of_sampled(alpha)} have an alpha band, which is dropped: flatten them if what it "
            f"hides should stay hidden{keep if len(alpha) == len(described) else ''}"
        )
    for lost in sorted({d.lost for d in described if d.lost}):
        yield f"{of_sampled([d for d in described if d.lost == lost])}: {lost}"
    types = {(d.dtype, max(d.bits, 8)) for d in described}
    if len(types) > 1 and pixels.value_range is None:
        yield "files of different types, each on the scale of its own: check that they belong here"
    turned = [d for d in described if d.orientation != 1]
    if turned and not pixels.exif_orientation:
        yield (
            f"{of_sampled(turned)} have an EXIF orientation, which is not applied: "
            "--exif_orientation turns them upright"
        )


def _doubts_about_range(
    described: list[Description], ranges: list[Range], pixels: PixelFormat
) -> Iterator[str]:
    if not ranges:
        return
    lows, highs, clipped, samples = zip(*ranges, strict=True)
    low, high, share_clipped = min(lows), max(highs), sum(clipped) / sum(samples)
    start, end = pixels.value_range or (0, 2 ** max(d.bits for d in described) - 1)
    if share_clipped > 0.01:
        yield (
            f"{share_clipped:.0%} of the sampled values are clipped: they reach from {low:g} to "
            f"{high:g}, --value_range from {start:g} to {end:g}"
        )
    share = (high - low) / (end - start)
    if share < 0.1 and high > low:
        yield (
            f"the sample uses {low:.7g} to {high:.7g} of {start:.7g} to {end:.7g}, "
            f"{f'{share:.0%}' if share >= 0.01 else 'under 1%'} of the range: --value_range "
            f"{low:.7g} {high:.7g} would use it all, or see python main_data.py stats"
        )


def count(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun, "1 file" or "1,200 files"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def first_names(names: Collection[str], most: int = 3) -> str:
    """The first few names, "a, b, c, ...", in characters that can be printed on one line."""
    shown = ", ".join([*names][:most]) + (", ..." if len(names) > most else "")
    return printable(shown)


def _counted(names: Collection[str], noun: str) -> str:
    """Like "2 folders (a, b)", or "" where there are none."""
    return f"{count(len(names), noun)} ({first_names(names)})" if names else ""


def _by_suffix(numbers: Counter[str], separator: str = ", ", most: int = 5) -> str:
    """The numbers of files, ".png 12, .jpg 3", with what it takes to read them."""
    ordered = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    parts = []
    for suffix, number in ordered[:most]:
        help_ = decoding.missing_support(suffix)
        shown = first_names([suffix]) or "no suffix"
        parts.append(f"{shown} {number:,}{f': {help_}' if help_ else ''}")
    if len(ordered) > most:
        rest = sum(number for _, number in ordered[most:])
        parts.append(f"{count(len(ordered) - most, 'other suffix', 'other suffixes')} {rest:,}")
    return separator.join(parts)


def _tell(line: str) -> None:
    """A line on stdout, from the main process only."""
    if line and os.environ.get("RANK", "0") == "0":
        encoding, line = sys.stdout.encoding or "utf-8", printable(line)
        say(line.encode(encoding, "backslashreplace").decode(encoding), sys.stdout)
