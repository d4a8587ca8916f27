"""TIFF files: their tags are read first and decide which decoder is asked.

Pillow shows noise for some kinds of TIFF and cuts others to 8 bits. It gets those whose samples it
is known to return; tifffile, an optional package, gets the rest.
"""

import io
import logging
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2

from util.formats import (
    SMALL,
    Description,
    StoredImage,
    UnsuitableImage,
    full_scale,
    jpeg_frame,
    pillow_samples,
    turn,
)

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
NAMES = {PALETTE: "palette", CMYK: "CMYK", YCBCR: "YCbCr", LAB: "LAB", 32803: "raw camera"}
# (photometric interpretation, bits, bands without alpha) that Pillow reads rightly.
FOR_PILLOW = {
    *((kind, bits, 1) for kind in (WHITE_IS_ZERO, BLACK_IS_ZERO, PALETTE) for bits in (1, 2, 4, 8)),
    *((kind, 8, 3) for kind in (RGB, YCBCR, LAB)),
    *((BLACK_IS_ZERO, bits, 1) for bits in (12, 16)),
    (CMYK, 8, 4),
}

# WebP, and in old versions Zstandard: the libtiff in Pillow's packages can't decode them.
NOT_IN_PILLOW = (50001,) if int(PIL.__version__.split(".")[0]) >= 12 else (50000, 50001)


def open_tiff(file: BinaryIO) -> StoredImage:
    """The first page that is neither a thumbnail nor a mask. Where 0 is white, samples are
    inverted; colours that were multiplied by alpha are divided by it."""
    header = file.read(4)
    pages = enumerate(_pages(file))
    index, tags = next((page for page in pages if _is_image(page[1])), (0, None))
    if tags is None:
        raise ValueError("holds no page, or only thumbnails and masks")
    width, height = tags.get(256, 0), tags.get(257, 0)
    compression, photometric = tags.get(259, 1), tags.get(262, WHITE_IS_ZERO)
    bands = tags.get(277, 3 if compression == 7 and photometric in (RGB, YCBCR) else 1)
    bits, kind = _common(tags, 258, 1), _common(tags, 339, 1)
    extra = _values(tags, 338)
    alpha = bool(extra) and extra[-1] in (1, 2)
    orientation = tags.get(274, 1) if tags.get(274, 1) in range(1, 9) else 1
    if not width or not height:
        raise ValueError("declares no width and height")
    tile_width, tile_height = tags.get(322, 0), tags.get(323, 0)
    if tile_width * tile_height * bands * bits > 8 * SMALL and (
        tile_width > width or tile_height > height
    ):
        raise ValueError(f"claims tiles of {tile_width} x {tile_height} pixels")
    if tags.get(32997, 1) > 1:
        raise ValueError(f"holds a volume of {tags[32997]} planes: save them as pages")
    if kind not in (1, 2, 3, 4) or not (16 if kind == 3 else 1) <= bits <= 64:
        raise ValueError("holds samples that are neither integers nor floats: convert it")
    size = next(size for size in (8, 16, 32, 64) if size >= bits)
    dtype = f"{'int' if kind == 2 else 'float' if kind == 3 else 'uint'}{size}"

    in_planes = bands > 1 and tags.get(284, 1) == 2
    parts = _values(tags, 324 if tile_width else 273), _values(tags, 325 if tile_width else 279)
    rows = math.ceil(height / min(height, tile_height or tags.get(278) or height))
    needed = rows * (math.ceil(width / tile_width) if tile_width else 1)
    needed *= bands if in_planes else 1
    raw_bytes = height * math.ceil(width * bands * bits / 8) if compression == 1 else 0
    by_pillow = (
        (photometric, bits, bands - alpha) in FOR_PILLOW
        and dtype.startswith("uint")
        and compression in COMPRESSION_INFO
        and compression not in NOT_IN_PILLOW
        and not in_planes
        and not (alpha and (bits != 8 or len(extra) > 1 or photometric not in (BLACK_IS_ZERO, RGB)))
        and not (bits > 8 and (compression == 7 or tags.get(266, 1) == 2))
        and not (header.startswith(b"MM") and (bits == 12 or b"+" in header))
    )
    if photometric == YCBCR and compression == 1 and _values(tags, 530) != (1, 1):
        raise ValueError("holds subsampled YCbCr without compression: convert it to RGB")
    if photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
        if not by_pillow:
            name = NAMES.get(photometric, f"photometric {photometric}")
            raise ValueError(f"holds {bits}-bit {name} of {bands} bands: convert it to RGB")
        bands, bits, alpha = 3, 8, False
    if alpha and extra[-1] == 1 and not dtype.startswith("uint"):
        raise ValueError(f"holds {dtype} multiplied by alpha: divide it, or leave alpha out")
    if photometric == WHITE_IS_ZERO and not dtype.startswith("uint"):
        raise ValueError(f"holds {dtype} of which 0 is white: convert it to 0 is black")
    description = Description("TIFF", height, width, bands, dtype, bits, alpha=alpha)

    def read() -> np.ndarray:
        jpeg_width = (tile_width or width) if compression == 7 else 0
        _check_parts(file, *parts, needed, raw_bytes, jpeg_width)
        if by_pillow:
            image = Image.open(file, formats=("TIFF",))
            image.seek(index)
            # Pillow has turned it as the tag says: turned back.
            return turn(pillow_samples(image, bits), {6: 8, 8: 6}.get(orientation, orientation))
        samples = _read_with_tifffile(file, index, description, in_planes)
        colours = samples[..., : bands - alpha]
        full = 2**bits - 1
        if photometric == WHITE_IS_ZERO:
            colours[:] = full - colours
        if alpha and extra[-1] == 1:
            opacity = np.maximum(samples[..., -1:], 1) / full
            colours[:] = np.minimum(np.rint(colours / opacity), full)
        return samples

    return StoredImage(
        description,
        full_scale(dtype, bits),
        read,
        lambda: max(sum(map(_is_image, _pages(file))), _images_in_description(tags)),
        lambda: orientation,
    )


def _check_parts(
    file: BinaryIO,
    starts: tuple[int, ...],
    sizes: tuple[int, ...],
    needed: int,
    raw_bytes: int,
    jpeg_width: int,
) -> None:
    """Refuse strips or tiles that are not in the file, which decoders may show as black or grey.

    Those that start nowhere are meant to be empty.

    Args:
        starts, sizes: where strips or tiles are, in bytes; old files may lack or misstate sizes.
        needed: how many the image has.
        raw_bytes: of all, if they aren't compressed, else 0.
        jpeg_width: theirs, if they are JPEGs, else 0.
    """
    if len(starts) < needed:
        raise ValueError(f"lists {len(starts)} of its {needed} strips or tiles")
    if 0 < sum(sizes) < raw_bytes:
        raise ValueError(f"holds {sum(sizes)} of the {raw_bytes} bytes that it claims")
    end = file.seek(0, io.SEEK_END)
    for start, size in zip(starts, sizes, strict=False):
        if start + size > end or (start and not size and not raw_bytes):
            raise ValueError("is truncated: a strip or tile is not all there")
        if jpeg_width and size:
            file.seek(start)
            content = file.read(size)
            frame = jpeg_frame(content)
            if b"\xff\xd9" not in content[-8:] or (frame and frame[2] < jpeg_width):
                raise ValueError("is truncated: a strip or tile is part of a JPEG")


def _read_with_tifffile(
    file: BinaryIO, index: int, description: Description, in_planes: bool
) -> np.ndarray:
    file.seek(0)
    try:
        import tifffile

        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors are raised as well
        samples = tifffile.TiffFile(file).pages[index].asarray(maxworkers=1)
    except Exception as error:
        if isinstance(error, ImportError) or "imagecodecs" in str(error):
            raise UnsuitableImage(
                f"holds {description}, which needs tifffile: pip install tifffile imagecodecs"
            ) from error
        raise
    if samples.dtype == bool:
        samples = samples.view(np.uint8)
    if samples.ndim == 2:
        samples = samples[..., None]
    return np.moveaxis(samples, 0, 2) if in_planes else samples


def _pages(file: BinaryIO) -> Iterator[ImageFileDirectory_v2]:
    """The tags of each page; the next one's replace them in the same object."""
    file.seek(0)
    header = file.read(16)
    if b"+" in header[2:4]:  # BigTIFF, of which Pillow only knows the little-endian header
        tags = ImageFileDirectory_v2(b"II+\0" + header[4:], header[:2])
    else:
        tags = ImageFileDirectory_v2(header[:8])
    left = file.seek(0, io.SEEK_END)
    seen = {0}
    while tags.next not in seen:
        seen.add(tags.next)
        start = file.seek(tags.next)
        tags.load(file)
        left -= file.tell() - start
        if left < 0:
            raise ValueError("has pages whose tags overlap")
        yield tags


def _is_image(tags: ImageFileDirectory_v2) -> bool:
    return not tags.get(254, 0) & (1 | 4)  # NewSubfileType: a reduced image, a mask


def _values(tags: ImageFileDirectory_v2, tag: int) -> tuple[Any, ...]:
    values = tags.get(tag, ())
    return values if isinstance(values, tuple) else (values,)


def _common(tags: ImageFileDirectory_v2, tag: int, default: int) -> int:
    """The value that all bands have of a tag."""
    values = set(_values(tags, tag)) or {default}
    if len(values) > 1:
        raise ValueError("has bands of different types: convert it to one type")
    return values.pop()


def _images_in_description(tags: ImageFileDirectory_v2) -> int:
    """ImageJ, and tifffile if told to truncate, describe a stack's first page only, and say there
    how many images follow."""
    text = str(tags.get(270, ""))
    if found := re.match(r"ImageJ=.*?\bimages=(\d+)", text, re.DOTALL):
        return int(found[1])
    if '"truncated": true' in text and (found := re.search(r'"shape": \[([\d, ]+)\]', text)):
        values = math.prod(map(int, found[1].split(",")))
        return values // max(1, tags.get(256, 1) * tags.get(257, 1) * tags.get(277, 1))
    return 1
