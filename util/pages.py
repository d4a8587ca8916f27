"""Pages of files that hold several, one by one or as bands: TIFF stacks, animations."""

import functools
import io
import logging
import warnings
from typing import Any

import numpy as np
from PIL import Image

from util import c_messages
from util.decoding import ImageSource, UnreadableImage, describe, printable, read_samples, reason
from util.formats import Description, check_claim
from util.pixels import PixelFormat

ORIENTATION = 0x0112  # the EXIF tag


def encode(image: Image.Image, orientation: int, is_jpeg: bool = False) -> bytes:
    """A JPEG or PNG file of an image, with an EXIF orientation."""
    options: dict[str, Any] = {"format": "JPEG", "quality": 95} if is_jpeg else {"format": "PNG"}
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def read_page(source: ImageSource, page: int, pixels: PixelFormat) -> ImageSource:
    """A page of a file as a file of its own: a TIFF's as TIFF, any other's as PNG.

    Raises:
        UnreadableImage: the page is torn, or of a kind that would lose bits.
    """
    stored = describe(source, pixels, count_pages=False)
    name = f"{source.name} page {page}"
    try:
        with c_messages.Caught(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if stored.format == "TIFF":
                return ImageSource(name, content=_read_tiff_page(source, page, pixels.max_pixels))
            if stored.dtype != "uint8":
                raise ValueError(f"{stored.dtype} pages can be read from TIFF only")
            image = _read_frame(source, page, stored, pixels.max_pixels)
            if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                image = image.convert("RGB")
            return ImageSource(name, content=encode(image, stored.orientation))
    except Exception as error:  # decoders raise anything on broken files
        raise UnreadableImage(f"{printable(name)}: {reason(error)}") from error


def join(source: ImageSource, count: int, pixels: PixelFormat) -> bytes:
    """A .npy file whose bands are those of all `count` pages, in `pixels.layout`.

    Raises:
        UnreadableImage: a page is torn, or not like the first one.
    """
    try:
        first = describe(source, pixels, count_pages=False)
        bands = first._replace(bands=count * first.bands)
        check_claim(bands, source.size(), pixels.max_pixels)
    except ValueError as error:
        raise UnreadableImage(f"{printable(source.name)}: {error}") from error
    arrays = []
    for page in range(count):
        single = read_page(source, page, pixels)
        bits = describe(single, pixels, count_pages=False).bits
        arrays.append(read_samples(single, pixels))
        if bits != 8 * arrays[0].itemsize or arrays[-1].dtype != arrays[0].dtype:
            raise UnreadableImage(
                f"{printable(single.name)}: is of {bits} bits, which .npy can't say: "
                "use --pages each"
            )
        if arrays[-1].shape != arrays[0].shape:
            raise UnreadableImage(f"{printable(single.name)}: has another size than the first page")
    joined = np.concatenate(arrays, axis=2)
    buffer = io.BytesIO()
    np.save(buffer, np.moveaxis(joined, 2, 0) if pixels.layout == "chw" else joined)
    return buffer.getvalue()


def _read_frame(source: ImageSource, page: int, first: Description, max_pixels: int) -> Image.Image:
    check_claim(first, source.size(), max_pixels)
    image = _open_animation(source, first.format)
    # Pillow enlarges the canvas of a GIF for a frame that reaches beyond it.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, first.width * first.height
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        image.seek(page)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError("is a frame that reaches beyond the image") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    check_claim(first._replace(width=image.width, height=image.height), source.size(), max_pixels)
    return image


@functools.lru_cache(maxsize=1)  # a worker reads some pages of a file, one after another
def _open_animation(source: ImageSource, image_format: str) -> Image.Image:
    file = io.BytesIO(source.content) if source.content else source.path or ""
    return Image.open(file, formats=(image_format,))


@functools.lru_cache(maxsize=1)
def _open_tiff(source: ImageSource) -> tuple[Any, list[Any]]:
    """A TIFF file and its pages that are neither thumbnails nor masks."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors are raised as well
    file: Any = tifffile.TiffFile(
        io.BytesIO(source.content) if source.content else source.path or ""
    )
    return file, [page for page in file.pages if not page.is_reduced and not page.is_mask]


def _read_tiff_page(source: ImageSource, number: int, max_pixels: int) -> bytes:
    import tifffile

    file, pages = _open_tiff(source)
    page = pages[min(number, len(pages) - 1)]
    height, width = page.imagelength, page.imagewidth
    if page.is_tiled:
        height, width = max(height, page.tilelength), max(width, page.tilewidth)
    claim = Description("TIFF", height, width, page.samplesperpixel, page.dtype.name)
    check_claim(claim, source.size(), max_pixels)
    if number < len(pages):
        samples = page.asarray(maxworkers=1)
    else:  # ImageJ describes one page of a large stack, and lets the other ones follow
        page = pages[0]
        file.filehandle.seek(page.dataoffsets[0] + number * page.nbytes)
        content = file.filehandle.read(page.nbytes)
        samples = np.frombuffer(content, file.byteorder + page.dtype.char).reshape(page.shape)
    photometric = page.photometric
    if photometric == tifffile.PHOTOMETRIC.YCBCR:
        if page.compression != tifffile.COMPRESSION.JPEG:
            raise ValueError("holds YCbCr without JPEG compression: convert it to RGB")
        photometric = tifffile.PHOTOMETRIC.RGB  # as it is decoded
    tag = page.tags.get(ORIENTATION)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        samples,
        photometric=photometric,
        planarconfig=page.planarconfig if page.samplesperpixel > 1 else None,
        extrasamples=page.extrasamples or None,
        colormap=page.colormap,
        bitspersample=page.bitspersample,
        extratags=[(ORIENTATION, "H", 1, tag.value, True)] if tag else (),
        metadata=None,
    )
    return buffer.getvalue()
