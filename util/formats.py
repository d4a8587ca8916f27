"""Image files of each format but TIFF: what their headers declare, and their samples as stored."""

import contextlib
import functools
import importlib.util
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from util.pixels import PixelFormat

Image.MAX_IMAGE_PIXELS = None  # one limit for all formats instead, PixelFormat.max_pixels

# Formats for which Pillow's samples are known to be those in the file, or handled below.
PILLOW_FORMATS = "JPEG MPO PNG WEBP GIF BMP DIB PPM TGA QOI AVIF HEIF".split()
PNG, JPEG_2000 = b"\x89PNG\r\n\x1a\n", (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")
BLANKS = rb"(?:\s|#[^\n]*\n)+"
PNM_HEADER = re.compile(rb"P([2356])" + 3 * (BLANKS + rb"(\d{1,9})") + rb"\s")

# What a file may claim. Flat images are small files: deflate reaches 8,256 one-bit pixels a byte.
BYTES_PER_PIXEL = 8  # of --max_pixels: four bands of 16 bits
PIXELS_PER_BYTE = 10_000  # of a file
SMALL = 1 << 27  # bytes that any file may claim, such as a blank page of a fax
STRIP = 1 << 20  # pixels that are copied out of Pillow at a time

# What libjpeg says of lost pixels, which it fills with grey or noise. It says only its first
# warning. Others are of bytes that nothing needs, as bytes too many before the end are, but not
# those before a scan's next part.
DAMAGE = re.compile(
    r"(Corrupt JPEG data: (?!bad ICC|\d+ extraneous bytes before marker 0x(?!d[0-7]|c4|da))"
    r"|Premature end of JPEG file|premature end of data segment).*"
)


class UnreadableImage(Exception):
    """A file that can't be read; the text is "NAME: reason"."""


class UnsuitableImage(UnreadableImage):
    """A whole file that needs other flags or a package; the text says what it holds, and which."""


class Description(NamedTuple):
    """What a file's header declares.

    Attributes:
        format: Pillow's name, or "NPY".
        height, width: as stored, before any orientation.
        bands: as stored, alpha included; those of palette and CMYK files are their RGB.
        dtype: numpy's name of the samples' type.
        bits: declared per sample.
        pages: frames of an animation, pages of a TIFF without thumbnails and masks.
        alpha: whether the last band is declared as alpha.
        orientation: EXIF's, 1 to 8. Always 1 for HEIC, which libheif turns by its own boxes.
        lost: what reading drops because no decoder keeps it, or "".
        full: the sample that is 1 on the scale from 0 to 1; None if its type doesn't say.
    """

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
    full: int | None = None

    def __str__(self) -> str:
        kinds = {1: "grey", 3: "RGB"} if not self.alpha else {2: "grey with alpha", 4: "RGBA"}
        if self.bands not in kinds:
            return f"{self.bands} bands of {self.dtype}"
        known_scale = self.dtype in ("uint8", "uint16")
        return f"{f'{self.bits}-bit' if known_scale else self.dtype} {kinds[self.bands]}"


class StoredImage(NamedTuple):
    """A file whose header is read; its functions read on.

    Attributes:
        description: without pages, orientation and full.
        full: the sample that is 1 on the scale from 0 to 1; None if its type doesn't say.
        is_mapped: whether `read` allocates nothing.
        size: the file's, in bytes.
        read: gives the samples [H, W, bands], maybe read-only, in the file's own units.
        pages, orientation: give these parts of the description; after `read`, orientation also
            knows what stands behind the pixels.
    """

    description: Description
    full: int | None
    read: Callable[[], np.ndarray]
    pages: Callable[[], int] = lambda: 1
    orientation: Callable[[], int] = lambda: 1
    is_mapped: bool = False
    size: int = 0


def check_claim(claim: Description, size: int, max_pixels: int) -> None:
    """Refuse, with a ValueError, what is too large, or more than a file of `size` bytes can hold.

    Decoders allocate what a header claims before they find that the file ends.
    """
    area, name = claim.width * claim.height, f"claims {claim.width} x {claim.height}"
    if area > max_pixels:
        raise ValueError(
            f"{name} = {area} pixels, more than --max_pixels {max_pixels}: raise it, or shrink the "
            "file"
        )
    samples = area * claim.bands * np.dtype(claim.dtype).itemsize
    if samples > BYTES_PER_PIXEL * max_pixels:
        raise ValueError(
            f"{name} pixels of {claim}, {samples} bytes: more than {BYTES_PER_PIXEL} times "
            f"--max_pixels {max_pixels}: raise it, or shrink the file"
        )
    if samples > SMALL and area > PIXELS_PER_BYTE * size:
        raise ValueError(f"{name} pixels, more than a file of {size} bytes can hold")


def full_scale(dtype: str, bits: int) -> int | None:
    """The largest sample of an unsigned type up to 16 bits; None for every other type."""
    return 2**bits - 1 if dtype in ("uint8", "uint16") else None


def turn(samples: np.ndarray, orientation: int) -> np.ndarray:
    """An image [H, W, bands] turned and mirrored as its EXIF orientation says."""
    if orientation > 4:
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return samples


def open_npy(file: BinaryIO, path: str | None, layout: str) -> StoredImage:
    """A numpy array [H, W] or, as `layout` says, [H, W, bands] or [bands, H, W]; mapped, so that
    only the chosen bands are read of a file, all of which `path` is."""
    header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(np.lib.format.read_magic(file))
    if not header:
        raise ValueError("is of an unknown .npy version: save it anew with np.save")
    shape, is_fortran, dtype = header(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"holds {dtype}, not integers or floats")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"has shape {shape}: save [H, W] or [H, W, bands]")
    start = file.tell()
    needed, found = math.prod(shape) * dtype.itemsize, file.seek(0, io.SEEK_END) - start
    if needed > found:
        raise ValueError(f"is truncated: claims {needed} bytes of samples, and holds {found}")
    file.seek(start)
    content = np.memmap(path, np.uint8, "r", start) if path else file.read(needed)
    array = np.ndarray(shape, dtype, content, order="F" if is_fortran else "C")
    bits = 8 * array.dtype.itemsize
    if array.dtype.kind == "b":
        array, bits = array.view(np.uint8), 1
    if array.ndim == 2:
        array = array[..., None]
    elif layout == "chw":
        array = np.moveaxis(array, 0, 2)
    height, width, bands = array.shape
    description = Description("NPY", height, width, bands, array.dtype.name, bits)
    full = full_scale(array.dtype.name, bits)
    return StoredImage(description, full, lambda: array, is_mapped=True)


def jpeg_frame(content: bytes) -> tuple[int, int, int, int] | None:
    """Bits, height, width and bands in a JPEG's first frame header (T.81, B.2.2); None if none."""
    position = 2 if content.startswith(b"\xff\xd8") else len(content)
    while content[position : position + 1] == b"\xff" and position + 10 <= len(content):
        marker = content[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack_from(">BHHB", content, position + 4)
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return None


def open_pnm(file: BinaryIO) -> StoredImage | None:
    """A PGM or PPM, whose header names the sample that is 1; None for its relatives."""
    content = file.read()
    header = PNM_HEADER.match(content)
    if not header:
        return None
    kind, width, height, full = map(int, header.groups())
    if not 0 < full < 2**16:
        raise ValueError(f"declares {full} as its largest sample, not 1 to 65535")
    dtype = np.dtype(np.uint8 if full < 256 else ">u2")
    shape = (height, width, 1 if kind in (2, 5) else 3)
    count = math.prod(shape)

    def read() -> np.ndarray:
        if kind > 3:
            return np.frombuffer(content, dtype, count, header.end()).reshape(shape)
        body = re.sub(rb"#[^\n]*", b"", content[header.end() :])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy's, of anything but numbers
            numbers = np.fromstring(body, np.int64, sep=" ")[:count]
        if len(numbers) < count or numbers.min() < 0 or numbers.max() > full:
            raise ValueError(f"is truncated, or holds other numbers than 0 to {full}")
        return numbers.astype(dtype).reshape(shape)

    return StoredImage(Description("PPM", *shape, dtype.name, full.bit_length()), full, read)


def open_jpeg_2000(file: BinaryIO) -> StoredImage:
    """By Pillow, which shifts samples to the top of 8 or 16 bits, or, where it would cut them to
    8 bits or knows no such number of bands, by imagecodecs."""
    content = file.read()
    start = content.find(JPEG_2000[0])  # the codestream and its SIZ marker: ISO 15444-1, A.5.1
    if start < 0:
        raise ValueError("holds no JPEG 2000 codestream")
    _check_tiles(content, start)
    right, bottom, left, top = struct.unpack_from(">4I", content, start + 8)
    (bands,) = struct.unpack_from(">H", content, start + 40)
    depths = set(content[start + 42 : start + 42 + 3 * bands : 3])
    if len(depths) != 1:
        raise ValueError("has bands of different types: convert it to .tif or .npy")
    (depth,) = depths
    signed, bits = depth >= 128, depth % 128 + 1
    dtype = f"{'int' if signed else 'uint'}{8 if bits <= 8 else 16 if bits <= 16 else 32}"
    box = content.find(b"cdef", 0, start)  # I.5.3.6: entries of channel, kind, association
    channels = struct.iter_unpack(">3H", content[box + 6 : box + 6 + 6 * bands]) if box > 0 else ()
    alpha = bands in (2, 4) and any(kind in (1, 2) for _, kind, _ in channels)
    by_pillow = bits <= 16 and (bands == 1 or (bands <= 4 and bits <= 8 and not signed))
    if by_pillow:
        # Of deep grey, the codestream: Pillow takes 9 bits in a container for 8.
        container = content[start:] if bits > 8 else content
        image = Image.open(io.BytesIO(container), formats=("JPEG2000",))
        if image.size != (right - left, bottom - top):
            raise ValueError("has a container that claims other sides than its content")
        if image.mode in ("P", "PA", "CMYK"):
            return _stored_by_pillow(image, file)
    description = Description(
        "JPEG2000", bottom - top, right - left, bands, dtype, bits, alpha=alpha
    )

    def read() -> np.ndarray:
        if by_pillow:
            samples = pillow_samples(image)
            if samples.dtype == dtype and bits in (8, 16):
                return samples
            samples = samples >> (8 * (1 + (bits > 8)) - bits)
            return (samples.astype(np.int32) - signed * 2 ** (bits - 1)).astype(dtype)
        try:
            import imagecodecs
        except ImportError as error:
            raise UnsuitableImage(
                f"holds {description}, which needs imagecodecs: pip install imagecodecs"
            ) from error
        return imagecodecs.jpeg2k_decode(content).reshape(bottom - top, right - left, bands)

    return StoredImage(description, full_scale(dtype, bits), read)


def _check_tiles(content: bytes, position: int) -> None:
    """Refuse a codestream that ends before its tiles do, which OpenJPEG may fill with grey."""
    position, tiles = position + 2, 0
    while content[position : position + 1] == b"\xff" and position + 12 <= len(content):
        marker, length = struct.unpack_from(">2H", content, position)
        if marker == 0xFFD9:
            break
        if marker == 0xFF90:  # a part of a tile, and its length (A.4.2); 0 if it is the rest
            (length,) = struct.unpack_from(">I", content, position + 6)
            length = (length or len(content) - position) - 2
            tiles += 1
        position += 2 + length
    if position > len(content) or not tiles:
        raise ValueError("is truncated")


def open_with_pillow(file: BinaryIO, head: bytes) -> StoredImage | None:
    """Any other format; None if Pillow doesn't know it."""
    try:
        image = Image.open(file, formats=_formats(heif=head[4:8] == b"ftyp"))
    except UnidentifiedImageError as error:
        file.seek(0)
        frame = jpeg_frame(file.read())
        if not frame or frame[0] == 8:
            return None
        raise ValueError(
            f"is a JPEG of {frame[0]} bits a sample: convert it to .tif or .png"
        ) from error
    return _stored_by_pillow(image, file, head)


def _stored_by_pillow(image: Image.Image, file: BinaryIO, head: bytes = b"") -> StoredImage:
    mode, bits, dtype, lost = image.mode, 8, "uint8", ""
    bands = 1 if mode in ("1", "L", "I", "F") or mode.startswith("I;") else 3
    bands = {"LA": 2, "La": 2, "RGBA": 4, "RGBa": 4}.get(mode, bands)
    if image.format == "PNG" and head[24] == 16:  # bits, and in the next byte the type of colour
        bands, bits, dtype = {0: 1, 2: 3, 4: 2, 6: 4}[head[25]], 16, "uint16"
    elif image.format == "PNG" and mode == "L":
        bits = head[24]
    elif mode == "1":
        bits = 1
    elif mode == "F":
        bits, dtype = 32, "float32"
    elif image.format in ("AVIF", "HEIF"):
        bits = _coded_bits(file)
        if mode.startswith("I;16"):  # of grey HEIC, at the top of 16 bits
            dtype = "uint16"
        elif bits > 8:
            lost = f"{bits} bits a sample, of which 8 are read"
    if "transparency" in image.info and bands in (1, 3):
        lost = "transparent colours are shown as they are stored"
    alpha = bands in (2, 4)
    description = Description(
        str(image.format), image.height, image.width, bands, dtype, bits, alpha=alpha, lost=lost
    )

    def read() -> np.ndarray:
        if image.format == "PNG":
            image.load()
            last = image.crop((0, image.height - 1, image.width, image.height))
            if bits == 16 and bands > 1:
                return _read_deep_png(file)
            if image.info.get("interlace") or not last.getbbox():
                _png_rows(file)  # Pillow leaves missing ones black
        if image.format in ("JPEG", "MPO", "WEBP") and bands != 4:
            file.seek(0)
            with contextlib.suppress(RuntimeError):  # animations, and what Pillow may still read
                colours = decode_rgb(file.read(), image.height, image.width)
                return colours.permute(1, 2, 0).numpy()[..., :bands]
        samples = pillow_samples(image, bits)
        return samples >> (16 - bits) if dtype == "uint16" else samples

    return StoredImage(
        description,
        full_scale(dtype, 8 if dtype == "uint8" and bits > 8 else bits),
        read,
        lambda: getattr(image, "n_frames", 1),
        lambda: _orientation(image),
    )


@functools.cache
def _formats(heif: bool) -> tuple[str, ...]:
    """Those of `PILLOW_FORMATS` that are installed."""
    Image.init()
    if heif and importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in PILLOW_FORMATS if name in Image.OPEN)


def pillow_samples(image: Image.Image, bits: int = 8) -> np.ndarray:
    """The samples [H, W, bands] of an image that Pillow has opened.

    Palette, CMYK, YCbCr and LAB images become RGB; colours that were multiplied by alpha are
    divided by it. `bits` under 8 are what the file has, and Pillow has scaled up to 255.
    """
    width, height = image.size
    rows = max(1, STRIP // width)
    if rows >= height:
        return _samples(image, bits)
    first = _samples(image.crop((0, 0, width, rows)), bits)
    samples = np.empty((height, width, first.shape[2]), first.dtype)
    samples[:rows] = first
    for top in range(rows, height, rows):
        bottom = min(top + rows, height)
        samples[top:bottom] = _samples(image.crop((0, top, width, bottom)), bits)
    return samples


def _samples(image: Image.Image, bits: int) -> np.ndarray:
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    elif image.mode not in ("L", "LA", "RGB", "RGBA", "F") and not image.mode.startswith("I"):
        image = image.convert("RGB")
    samples = np.asarray(image)
    if image.mode == "I":  # 16-bit PNGs, before Pillow had a mode for them
        samples = samples.astype(np.uint16)
    if bits < 8:
        samples = samples // (255 // (2**bits - 1))
    return samples.reshape(*samples.shape[:2], -1)


def decode_rgb(
    content: bytes, height: int, width: int, mode: ImageReadMode = ImageReadMode.RGB
) -> Tensor:
    """A JPEG or WebP as uint8 [3, H, W] by torchvision: faster than Pillow, equal to the bit."""
    if height * width * 3 > SMALL:
        np.empty((height, width, 3), np.uint8)  # where that fails, libtorch prints its stack
    return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode)


def decode_reduced_rgb(
    file: BinaryIO, pixels: PixelFormat, reduction: Callable[[int, int], int]
) -> Tensor | None:
    """A JPEG as uint8 [3, H, W], its sides divided as `decoding.read_image` says; None where they
    stay as they are."""
    image: Image.Image = Image.open(file, formats=("JPEG",))
    width, height = image.size
    orientation = _orientation(image) if pixels.exif_orientation else 1
    if orientation > 1 and (width % 8 or height % 8):
        return None  # a last row or column that is part of a pixel would become the first
    claim = Description("JPEG", height, width, 3)
    check_claim(claim, file.seek(0, io.SEEK_END), pixels.max_pixels)
    divisor = reduction(width, height) if orientation > 4 else reduction(height, width)
    if divisor == 1:
        return None
    image.draft(image.mode, (max(1, width // divisor), max(1, height // divisor)))
    last = np.asarray(image)[-1, -1]
    if np.isin(last, (127, 128)).all():
        return None  # maybe the grey, or inverted grey, of a torn file: read in full, it is noticed
    samples = turn(np.asarray(image.convert("RGB")), orientation)
    return torch.from_numpy(np.require(samples, requirements=["C", "W"])).permute(2, 0, 1)


def _read_deep_png(file: BinaryIO) -> np.ndarray:
    """A 16-bit PNG in colour or with alpha, of which Pillow would keep 8 bits, by torchvision.

    torchvision 0.29 ends the process at a damaged PNG. So it gets the rows, which Pillow has
    checked, in a new file.
    """
    file.seek(0)
    header, rows = file.read(33), _png_rows(file)  # the signature and IHDR
    clean = bytearray(header)
    for chunk in (b"IDAT" + zlib.compress(rows, 1), b"IEND"):
        clean += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    width, height = struct.unpack_from(">2I", header, 16)
    decoded = decode_rgb(bytes(clean), height, width, ImageReadMode.UNCHANGED)
    return decoded.permute(1, 2, 0).numpy()


def _png_rows(file: BinaryIO) -> bytes:
    """A PNG's filtered rows, in the passes of an interlaced one; refused if some are missing."""
    file.seek(0)
    content = file.read()
    width, height, depth, kind, *_, interlaced = struct.unpack_from(">2I5B", content, 16)
    passes = [(0, 0, 1, 1)]  # first column and row, and the steps to the next ones
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
        passes += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    needed = 0
    for left, top, right, down in passes:
        columns, lines = -((left - width) // right), -((top - height) // down)
        bits = columns * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
        needed += lines * (1 + math.ceil(bits / 8)) if columns > 0 else 0
    parts, position = [], len(PNG)
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        if content[position + 4 : position + 8] == b"IDAT":
            parts.append(content[position + 8 : position + 8 + length])
        position += length + 12
    rows = zlib.decompressobj().decompress(b"".join(parts), needed)
    if len(rows) < needed:
        raise ValueError(f"holds {len(rows)} of the {needed} bytes of rows that it claims")
    return rows


def _coded_bits(file: BinaryIO) -> int:
    """Bits a sample of an AVIF or HEIC file, by the boxes that configure its decoder."""
    file.seek(0)
    content = file.read()
    av1 = re.findall(rb"av1C..(.)", content, re.DOTALL)
    hevc = re.findall(rb"hvcC.{17}(.)", content, re.DOTALL)
    bits = [{0x40: 10, 0x60: 12}.get(byte[0] & 0x60, 8) for byte in av1]
    return max([8, *bits, *(8 + byte[0] % 8 for byte in hevc)])


def _orientation(image: Image.Image) -> int:
    # Without EXIF before its pixels, a PNG would be decoded to look for some behind them.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    orientation = image.getexif().get(0x0112, 1)
    return orientation if orientation in range(1, 9) else 1
