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


_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm".split()


class Description(NamedTuple):
    """A stand-in."""

    format: str
    height: int
    width: int
    bands: int
    dtype: str = "uint8"
    bits: int = 8
    pages: int = 1
    alpha: bool = False
    orientation: int = 1
    lost: str = ""

    def __str__(self) -> str:
        names = {1: "grey", 2: "grey + alpha", 3: "RGB", 4: "RGBA" if self.alpha else "CMYK"}
        if self.dtype == "float32":
            return f"float32 {names[self.bands]}"
        return f"{self.bits}-bit {names[self.bands]}"


def image_suffixes() -> tuple[str, ...]:
    """A stand-in."""
    return tuple(_SUFFIXES)


def missing_support(suffix: str) -> str | None:
    """A stand-in."""
    return {".heic": "pip install pillow-heif", ".cr2": "convert to .tif or .npy"}.get(suffix)


def describe(source: ImageSource, pixels: PixelFormat = RGB) -> Description:
    """A stand-in."""
    try:
        with Image.open(io.BytesIO(_content(source))) as image:
            dtype, bits = {"F": ("float32", 32), "I;16": ("uint16", 16)}.get(
                image.mode, ("uint8", 8)
            )
            if dtype == "float32" and pixels.value_range is None:
                raise UnsuitableImage(f"{source.name} holds float32: add --value_range LO HI")
            bands = 3 if image.mode == "P" else len(image.getbands())
            orientation = image.getexif().get(0x0112, 1)
            return Description(
                image.format or "",
                image.height,
                image.width,
                bands,
                dtype,
                bits,
                getattr(image, "n_frames", 1),
                "A" in image.mode,
                orientation,
            )
    except UnsuitableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"{source.name}: {error}") from error


def read_samples(source: ImageSource, pixels: PixelFormat = RGB) -> np.ndarray:
    """A stand-in."""
    samples = np.asarray(Image.open(io.BytesIO(_content(source))))
    return samples if samples.ndim == 3 else samples[:, :, None]


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
