"""Image files of any kind to tensors: what they declare, and their samples on a stated scale."""

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from util.pixels import RGB, PixelFormat


class UnreadableImage(Exception):
    """A file that can't be read; the text is "NAME: reason"."""


class UnsuitableImage(UnreadableImage):
    """A whole file that needs other flags; the text says what it holds, and which flag."""


class ImageSource(NamedTuple):
    """An image: a file, or a part of one.

    Attributes:
        name: what messages call it.
        path: a file that holds it.
        content: its bytes, where it is not all of a file.
    """

    name: str
    path: str | None = None
    content: bytes | None = None


def read_image(
    source: str | Path | ImageSource,
    pixels: PixelFormat = RGB,
    reduction: Callable[[int, int], int] | None = None,
) -> Tensor:
    """Decode an image.

    Args:
        reduction: asked, with the height and width of a JPEG that is to be 8-bit RGB, by how much
            to divide them, 1, 2, 4 or 8; they are rounded up. Other files are read in full.

    Returns:
        [bands, H, W]: uint8 where the file has at most 8 bits a sample and neither a value range
        nor a nodata value is given, else float32 on the scale from 0 to 1.

    Raises:
        UnreadableImage: the file is missing, torn or no image.
        UnsuitableImage: it needs other flags.
    """
    if not isinstance(source, ImageSource):
        source = ImageSource(str(source), str(source))
    try:
        encoded = _content(source)
        reduced = _decode_reduced(encoded, pixels, reduction) if reduction else None
        if reduced is not None:
            return reduced
        try:
            return _decode_with_torchvision(encoded)
        except (RuntimeError, ValueError):
            return _decode_with_pillow(encoded)
    except Exception as error:  # decoders raise anything on broken files
        raise UnreadableImage(f"{source.name}: {error}") from error


def _content(source: ImageSource) -> bytearray:
    if source.content is not None:
        return bytearray(source.content)
    assert source.path is not None
    if not os.path.isfile(source.path):
        raise FileNotFoundError("no such file")
    with open(source.path, "rb", buffering=0) as file:
        return bytearray(file.readall())


def _decode_reduced(
    encoded: bytearray, pixels: PixelFormat, reduction: Callable[[int, int], int]
) -> Tensor | None:
    """A JPEG by libjpeg's reduced DCT, as `read_image` says; None where it is read in full."""
    if encoded[:3] != b"\xff\xd8\xff":
        return None
    with warnings.catch_warnings(), contextlib.suppress(OSError, Image.DecompressionBombError):
        warnings.simplefilter("ignore")
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=["JPEG"])
        width, height = image.size
        orientation = 1
        if pixels.exif_orientation:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation != 1 and (width % 8 or height % 8):
            return None  # a last row or column of part of a pixel would be turned into a first one
        turned = orientation in range(5, 9)
        divisor = reduction(width, height) if turned else reduction(height, width)
        if divisor == 1:
            return None
        image.draft(image.mode, (width // divisor, height // divisor))
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return None


def _decode_with_torchvision(encoded: bytearray) -> Tensor:
    """JPEG and WebP, faster than Pillow and equal to the bit; a ValueError for other formats."""
    # PNG would be no faster, and a damaged one ends the process in torchvision 0.29.
    if encoded[:4] in (b"\x89PNG", b"GIF8"):
        raise ValueError("left to Pillow")
    return decode_image(torch.frombuffer(encoded, dtype=torch.uint8), mode=ImageReadMode.RGB)


def _decode_with_pillow(encoded: bytearray) -> Tensor:
    """Any format that Pillow reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata and large images, repeated for each file
        image: Image.Image = Image.open(io.BytesIO(encoded))
        if image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max() > 255):
            # 16 bits a pixel, which convert("RGB") would clip at 255.
            gray = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
            image = Image.fromarray(gray)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
