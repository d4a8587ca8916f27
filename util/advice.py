"""What statistics advise: flags for main_pretrain.py, and what looks wrong."""

import math

import numpy as np

from util.pixels import MAX_PIXELS, PixelFormat
from util.statistics import Statistics, band_numbers

NODATA_LIKE = (-9999, -99999, -32768, -(2**31))  # and anything beyond 1e20


def flags_to_paste(found: Statistics, pixels: PixelFormat) -> str:
    """Flags of main_pretrain.py with which every band has mean 0 and std 1, in one line.

    A constant band, which has no std, is given 1.
    """
    flags = [] if found.bands == 3 else [f"--in_chans {found.bands}"]
    if pixels.bands is not None:
        flags.append(f"--bands {' '.join(map(str, pixels.bands))}")
    low, high = 0.0, float(found.full_scale or 1)
    suggested = value_range(found)
    if suggested is not None:
        low, high = suggested
        flags.append(f"--value_range {_sample(low, found)} {_sample(high, found)}")
    means, stds = [], []
    for mean, std in zip(found.mean, found.std, strict=True):
        std = std / (high - low) or 1.0
        places = 4 - math.floor(math.log10(std))  # of five digits of the std
        means.append(_decimal(max(0.0, round((mean - low) / (high - low), places))))
        stds.append(_decimal(round(std, places)))
    flags += [f"--mean {' '.join(means)}", f"--std {' '.join(stds)}"]
    if pixels.nodata is not None:
        flags.append(f"--nodata {_decimal(pixels.nodata)}")
    if pixels.layout != "hwc":
        flags.append(f"--layout {pixels.layout}")
    if pixels.exif_orientation:
        flags.append("--exif_orientation")
    if pixels.max_pixels != MAX_PIXELS:
        flags.append(f"--max_pixels {pixels.max_pixels}")
    return " ".join(flags)


def _sample(value: float, found: Statistics) -> str:
    """The shortest decimal that is this sample in the files' type."""
    dtype = np.dtype(found.dtype)
    return _decimal(dtype.type(value)) if dtype.kind == "f" else str(int(value))


def _decimal(value: float) -> str:
    """The shortest decimal, without an exponent."""
    return np.format_float_positional(value, trim="-")


def value_range(found: Statistics) -> tuple[float, float] | None:
    """The samples to map to 0 and 1, where the type doesn't say them, or says far too many."""
    low, high = min(found.min), max(found.max)
    if found.full_scale is None:
        return (low, high) if low < high else (min(low, 0.0), max(high, 0.0) if high else 1.0)
    if found.full_scale > 255 and high < found.full_scale / 2:
        return 0.0, 2.0 ** max(1, int(high).bit_length()) - 1
    return None


def doubts(found: Statistics, pixels: PixelFormat) -> list[str]:
    """What looks wrong, a line each, with what to do."""
    bands = band_numbers(pixels, found.bands)
    outliers: dict[tuple[str, float], list[int]] = {}
    for band, low, high, p01, p99 in zip(
        bands, found.min, found.max, found.p01, found.p99, strict=True
    ):
        reach = 10 * (p99 - p01)
        if high - p99 > reach or high >= 1e20:
            outliers.setdefault(("maximum", high), []).append(band)
        if p01 - low > reach or low <= -1e20 or low in NODATA_LIKE:
            outliers.setdefault(("minimum", low), []).append(band)
    lines = [
        f"{_names(names)}: the {side} {_sample(value, found)} may stand for no data, or for "
        f"saturation: if so, measure again with --nodata {_sample(value, found)}"
        for (side, value), names in outliers.items()
    ]
    constant = [band for band, std in zip(bands, found.std, strict=True) if std == 0]
    if constant:
        lines.append(
            f"{_names(constant)}: constant, so that std is 0 and can't normalise; the flags say "
            "1 instead, or leave out such bands with --bands"
        )
    return lines


def _names(bands: list[int]) -> str:
    return f"band{'s' * (len(bands) > 1)} {', '.join(map(str, bands))}"


def table(found: Statistics, pixels: PixelFormat) -> str:
    """Every band's figures in the files' own units, a row a band."""
    columns = ("min", "max", "p01", "p99", "mean", "std")
    rows = [["band", *columns]]
    for index, band in enumerate(band_numbers(pixels, found.bands)):
        rows.append([str(band), *(f"{getattr(found, column)[index]:.6g}" for column in columns)])
    return "\n".join(f"{row[0]:>4}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows)
