"""Image files of any kind to tensors: what they declare, and their samples on a stated scale."""

import io
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
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


def read_image(source: str | Path | ImageSource, pixels: PixelFormat = RGB) -> Tensor:
    """Decode an image.

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
