"""Image files of any kind to tensors: what they declare, and their samples on a stated scale."""

import contextlib
import functools
import importlib.util
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import features
from torch import Tensor

from util import c_messages, formats, tiff
from util.errors import printable
from util.formats import Description, StoredImage, UnreadableImage, UnsuitableImage
from util.pixels import RGB, PixelFormat


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

    def size(self) -> int:
        """In bytes."""
        return os.path.getsize(self.path or "") if self.content is None else len(self.content)


def describe(
    source: str | Path | ImageSource, pixels: PixelFormat = RGB, *, count_pages: bool = True
) -> Description:
    """What a file's header declares; no pixels are decoded. To count many pages takes longest.

    Raises:
        UnreadableImage: the file is missing, or its header is torn or that of no image.
    """
    with _opened(source, pixels) as stored:
        pages = stored.pages() if count_pages else 1
        if pages > max(1, stored.size):
            raise ValueError(f"claims {pages} pages, more than its {stored.size} bytes can hold")
        orientation = stored.orientation()
        return stored.description._replace(pages=pages, orientation=orientation, full=stored.full)


def read_image(
    source: str | Path | ImageSource,
    pixels: PixelFormat = RGB,
    reduction: Callable[[int, int], int] | None = None,
) -> Tensor:
    """Decode an image; of several pages or frames, the first.

    An unsigned type's range, or `pixels.value_range`, becomes 0 to 1; grey becomes three equal
    bands for a model of three, which doesn't see an alpha band.

    Args:
        reduction: asked, with the height and width of a JPEG that is to be 8-bit RGB, by how much
            to divide them, 1, 2, 4 or 8; they are rounded up. Other files are read in full.

    Returns:
        [pixels.in_chans, H, W]: uint8 where the file has at most 8 bits a sample and neither a
        value range nor a nodata value is given, else float32 on the scale from 0 to 1, with the
        band's mean where there is no data.

    Raises:
        UnreadableImage: the file is missing, torn or no image, or claims too many pixels.
        UnsuitableImage: it needs other flags or a package.
    """
    source = _as_source(source)
    image = _read_reduced_jpeg(source, pixels, reduction) if reduction else None
    if image is None:
        image = _read_plain_jpeg(source, pixels)
    if image is not None:
        return image
    with _opened(source, pixels) as stored:
        if stored.full is None and pixels.value_range is None:
            raise _unsuitable(
                f"holds {stored.description}, a type without a scale of its own",
                "add --value_range LO HI",
                pixels,
            )
        samples = _scaled(_chosen_samples(stored, pixels), stored.full, pixels)
        return torch.from_numpy(np.require(samples, requirements=["C", "W"])).permute(2, 0, 1)


def _read_reduced_jpeg(
    source: ImageSource, pixels: PixelFormat, reduction: Callable[[int, int], int]
) -> Tensor | None:
    """A JPEG by libjpeg's reduced DCT; None leaves it, and every error, to reading in full."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, repeated for each file
        with _open_file(source) as file:
            return formats.decode_reduced_rgb(file, pixels, reduction)
    return None


def _read_plain_jpeg(source: ImageSource, pixels: PixelFormat) -> Tensor | None:
    """A JPEG as RGB, in hardly more time than its decoder takes.

    None for other files and on errors: the general path reads those, or says what is wrong.
    """
    if pixels.in_chans != 3 or pixels.exif_orientation:
        return None
    if not source.name.lower().endswith((".jpg", ".jpeg", ".jpe", ".jfif")):
        return None
    if pixels.bands is not None or pixels.value_range is not None or pixels.nodata is not None:
        return None
    with contextlib.suppress(Exception):
        content = source.content
        if content is None:
            with _open_file(source, buffering=0) as file:
                if file.read(2) != b"\xff\xd8":
                    return None
                content = b"\xff\xd8" + file.read()
        frame = formats.jpeg_frame(content)
        _, height, width, _ = frame or (0, 0, 0, 0)
        if 0 < height * width <= min(formats.SMALL // 3, pixels.max_pixels):
            with c_messages.Caught() as messages:
                image = formats.decode_rgb(content, height, width)
            if not formats.DAMAGE.search(messages.text):
                return image
    return None


def read_samples(source: str | Path | ImageSource, pixels: PixelFormat = RGB) -> np.ndarray:
    """An image's samples in the file's own units and type.

    Returns:
        [H, W, bands]: `pixels.bands`, or all that are stored; neither scaled nor clipped; where 0
        is white, inverted.

    Raises:
        UnreadableImage, UnsuitableImage: as `read_image`, but a type without a scale is read.
    """
    with _opened(source, pixels) as stored:
        samples = _chosen_samples(stored, replace(pixels, in_chans=stored.description.bands))
        return np.require(samples, samples.dtype.newbyteorder("="), ["C", "W"])


@contextlib.contextmanager
def _opened(source: str | Path | ImageSource, pixels: PixelFormat) -> Iterator[StoredImage]:
    """A file whose header is read. All errors until it is closed become `UnreadableImage`s that
    begin with its name."""
    source = _as_source(source)
    try:
        with (
            warnings.catch_warnings(),
            _open_file(source) as file,
            c_messages.Caught() as messages,
        ):
            warnings.simplefilter("ignore")  # about metadata, repeated for each file
            yield _read_header(file, source, pixels)
        if damage := formats.DAMAGE.search(messages.text):
            raise ValueError(damage[0])
    except UnsuitableImage as error:
        raise UnsuitableImage(f"{printable(source.name)} {error}") from error
    except Exception as error:  # decoders raise anything on broken files
        raise UnreadableImage(f"{printable(source.name)}: {reason(error)}") from error


def _as_source(source: str | Path | ImageSource) -> ImageSource:
    return source if isinstance(source, ImageSource) else ImageSource(str(source), str(source))


def _open_file(source: ImageSource, buffering: int = -1) -> BinaryIO:
    if source.content is not None:
        return io.BytesIO(source.content)
    assert source.path is not None
    mode = os.stat(source.path).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError("is a folder" if stat.S_ISDIR(mode) else "is no regular file")
    return open(source.path, "rb", buffering)


def _read_header(file: BinaryIO, source: ImageSource, pixels: PixelFormat) -> StoredImage:
    head = file.read(32)
    file.seek(0)
    if not head:
        raise ValueError("is empty")
    stored = None
    if head.startswith(b"\x93NUMPY"):
        path = source.path if source.content is None else None
        stored = formats.open_npy(file, path, pixels.layout)
    elif head.startswith(tiff.MAGIC):
        stored = tiff.open_tiff(file)
    elif head.startswith(formats.JPEG_2000):
        stored = formats.open_jpeg_2000(file)
    elif head[:1] == b"P":
        stored = formats.open_pnm(file)
    if stored is None:
        file.seek(0)
        stored = formats.open_with_pillow(file, head)
        if stored is None:
            hint = missing_support(os.path.splitext(source.name)[1])
            raise ValueError(hint or "is damaged, or no image of a known format")
    return stored._replace(size=_size(file))


def _size(file: BinaryIO) -> int:
    """A file's size in bytes; its position, on which decoders rely, stays."""
    position = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(position)
    return size


def _chosen_samples(stored: StoredImage, pixels: PixelFormat) -> np.ndarray:
    """[H, W, pixels.in_chans], in the file's units and maybe read-only; checked to be finite."""
    _, height, width, *_ = stored.description
    claim = stored.description
    if stored.is_mapped:  # bands that are not chosen cost nothing
        claim = claim._replace(bands=1)
    formats.check_claim(claim, stored.size, pixels.max_pixels)
    bands = _chosen_bands(stored.description, pixels)
    samples = stored.read()
    if samples.shape != stored.description[1:4] or samples.dtype.name != stored.description.dtype:
        raise ValueError(
            f"declares {stored.description} of {width} x {height}, but decodes to "
            f"{samples.dtype.name} of shape {samples.shape}"
        )
    if pixels.exif_orientation:
        samples = formats.turn(samples, stored.orientation())
    if bands == list(range(len(bands))):
        samples = samples[..., : len(bands)]
    elif len(set(bands)) == 1:  # grey, that is not copied here
        samples = np.broadcast_to(samples[..., bands[:1]], (*samples.shape[:2], len(bands)))
    else:
        samples = samples[..., bands]
    if samples.dtype.kind == "f":
        unusable = ~np.isfinite(samples)
        if pixels.nodata is not None:
            unusable &= ~is_nodata(samples, pixels.nodata)
        if np.isnan(samples[unusable]).any():
            raise _unsuitable("holds NaN", "add --nodata nan if that stands for no data", pixels)
        if unusable.any():
            raise ValueError(
                "holds infinite samples, which --nodata nan doesn't cover: replace them"
            )
    return samples


def _chosen_bands(description: Description, pixels: PixelFormat) -> list[int]:
    count = description.bands
    if pixels.bands is not None:
        outside = [band for band in pixels.bands if not 0 <= band < count]
        if outside:
            raise _unsuitable(
                f"holds {description}, no band {outside[0]}",
                f"--bands takes 0 to {count - 1}",
                pixels,
            )
        return list(pixels.bands)
    if count == pixels.in_chans:
        return list(range(count))
    colours = count - description.alpha
    if pixels.in_chans == colours:
        return list(range(colours))
    if pixels.in_chans == 3 and colours == 1:
        return [0, 0, 0]
    advice = f"add --in_chans {count}, or choose with --bands"
    if description.format == "NPY" and pixels.layout == "hwc" and description.height < count:
        advice += f", or add --layout chw if it is {description.height} bands"
    raise _unsuitable(f"holds {description}", advice, pixels)


def _unsuitable(what: str, advice: str, pixels: PixelFormat) -> UnsuitableImage:
    """An error with advice on flags, which a checkpoint's format doesn't leave open."""
    if pixels.origin:
        what += f", and {pixels.origin} was trained on images of {pixels.in_chans} bands"
        advice = "give it files like those"
    return UnsuitableImage(f"{what}: {advice}")


def _scaled(samples: np.ndarray, full: int | None, pixels: PixelFormat) -> np.ndarray:
    """Samples [H, W, bands] as `read_image` returns them."""
    if pixels.value_range is None and samples.dtype == np.uint8 and pixels.nodata is None:
        return samples if full == 255 else _to_8_bits(full)[samples]
    # In place, as an image may be large.
    if pixels.value_range is not None:
        low, high = pixels.value_range
        scaled = samples.astype(np.float64, "C")
        scaled -= low
        scaled /= high - low
    else:
        scaled = samples.astype(np.float32, "C")
        scaled /= np.float32(full)
    scaled = scaled.clip(0, 1, out=scaled).astype(np.float32, copy=False)
    if pixels.nodata is not None:
        missing = is_nodata(samples, pixels.nodata)
        np.copyto(scaled, np.array(pixels.mean, np.float32), where=missing)
    return scaled


def is_nodata(samples: np.ndarray, nodata: float) -> np.ndarray:
    """Where samples are `nodata`, which may be nan."""
    if np.isnan(nodata):
        return np.isnan(samples)
    if np.issubdtype(samples.dtype, np.floating):
        nodata = samples.dtype.type(nodata)  # as it was written; numpy 1 compares in float64
    return samples == nodata


@functools.cache
def _to_8_bits(full: int) -> np.ndarray:
    """What samples from 0 to `full` become, by Pillow's rule for PGM files."""
    return np.array([min(255, round(value / full * 255)) for value in range(256)], np.uint8)


def reason(error: Exception) -> str:
    """An error in one short line without terminal codes and object addresses."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "needs more memory than there is: a lower --max_pixels refuses it at its header"
    text = re.sub(r"\x1b\[[\d;]*m|<?[\w.]+ object at 0x\w+>?", "", str(error))
    text = printable(" ".join(text.split()))[:200]
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    return f"can't be decoded ({type(error).__name__}: {text})"


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """The suffixes of files that can be read here, which depends on Pillow's libraries."""
    suffixes = (
        ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .gif .bmp .dib .tif .tiff "
        ".ppm .pgm .pbm .pnm .pfm .tga .qoi .npy"
    )
    available = features.get_supported()
    if "avif" in available:
        suffixes += " .avif .avifs"
    if "jpg_2000" in available:
        suffixes += " .jp2 .j2k .j2c .jpc .jpf .jpx"
    if importlib.util.find_spec("pillow_heif"):
        suffixes += " .heic .heif .hif"
    return tuple(suffixes.split())


def missing_support(suffix: str) -> str | None:
    """How files with a known suffix that can't be read here become readable, else None."""
    suffix = suffix.lower()
    if suffix in image_suffixes():
        return None
    if suffix in (".heic", ".heif", ".hif"):
        return "pip install pillow-heif"
    if suffix in (".avif", ".avifs"):
        return "pip install --upgrade pillow (11.3 or later reads AVIF)"
    if suffix in (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"):
        return "install a Pillow that is built with OpenJPEG"
    others = (
        ".dcm .nii .mha .mhd .nrrd .czi .nd2 .lif .lsm .svs .vsi .mat .npz .h5 .hdf5 .nc .zarr "
        ".fits .fit .cr2 .cr3 .nef .dng .arw .raf .orf .rw2 .exr .hdr .jxl .jxr .psd .ecw .sid"
    )
    return "convert to .tif or .npy" if suffix in others.split() else None
