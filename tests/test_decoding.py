"""Reading image files of every kind: the array that was written decides what is right."""

import io
import os
import struct
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from helpers import encode, fill, photograph
from helpers import pixels as in_rgb
from PIL import Image, features

from util import data
from util.decoding import (
    ImageSource,
    UnreadableImage,
    UnsuitableImage,
    describe,
    image_suffixes,
    missing_support,
    printable,
    read_image,
    read_samples,
)
from util.pixels import RGB, PixelFormat

imagecodecs = pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


# ---- files and formats to test with


def noise(shape, dtype=np.uint8, bits=None, seed=0):
    """Samples over the whole range of a type, or of its lowest bits."""
    random = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return random.normal(0, 1000, shape).astype(dtype)
    if np.dtype(dtype).kind == "b":
        return random.integers(0, 2, shape).astype(bool)
    info = np.iinfo(dtype)
    high = info.max if bits is None else 2**bits - 1
    return random.integers(info.min, high, shape, dtype=dtype, endpoint=True)


def source(content, name="t.tif"):
    return ImageSource(name, content=bytes(content))


def tiff(array, **options):
    buffer = io.BytesIO()
    try:
        tifffile.imwrite(buffer, array, **{"photometric": "minisblack", **options})
    except NotImplementedError as error:  # by old versions
        pytest.skip(f"imagecodecs: {error}")
    return source(buffer.getvalue())


def skip_without(image_format):
    """Skip where Pillow, being old, doesn't write this format."""
    Image.init()
    if image_format not in Image.SAVE:
        pytest.skip(f"Pillow writes no {image_format}")


def saved(image, image_format, **options):
    """By Pillow."""
    skip_without(image_format)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return source(buffer.getvalue(), f"i.{image_format.lower()}")


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return source(buffer.getvalue(), "a.npy")


def png(shape, depth, color_type, compressed, *chunks):
    """A PNG with a content that Pillow would not write; `chunks` before its pixels."""
    height, width = shape
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    chunks = [b"IHDR" + header, *chunks, b"IDAT" + compressed, b"IEND"]
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def png_rows(array):
    """The array's rows, unfiltered and deflated."""
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in array))


def deep_png(array):
    """uint16 [H, W, bands] as a PNG."""
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[2]]
    return png(array.shape[:2], 16, color_type, png_rows(array.astype(">u2")))


def chans(count, **options):
    """The format of a model of so many bands."""
    options = {"mean": (0.5,) * count, "std": (0.25,) * count} | options
    return PixelFormat(in_chans=count, **options)


def hwc(image):
    return image.permute(1, 2, 0).numpy()


def assert_scaled(image, expected):
    """A float image is `expected` [H, W, bands], which is in float64."""
    assert image.dtype == torch.float32
    assert image.shape == (expected.shape[2], *expected.shape[:2])
    np.testing.assert_allclose(hwc(image), expected, rtol=0, atol=1e-7)


def refusal(file, pixels=RGB, error=UnsuitableImage, read=read_image):
    with pytest.raises(UnreadableImage) as caught:
        read(file, pixels)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert "\n" not in message and "\x1b" not in message and "0x" not in message
    return message


# ---- 8-bit images, as they always were


@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"subsampling": 0, "quality": 95}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"exif": b"Exif\0\0" + b"x" * 40000, "comment": b"y" * 9999}),
        ("MPO", "RGB", {"save_all": True}),
        ("PNG", "RGB", {}),
        ("PNG", "RGB", {"transparency": (10, 20, 30)}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("PNG", "1", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"save_all": True}),
        ("GIF", "RGB", {}),
        ("GIF", "L", {}),
        ("GIF", "P", {"transparency": 3}),
        ("GIF", "RGB", {"save_all": True}),
        ("BMP", "RGB", {}),
        ("BMP", "P", {}),
        ("BMP", "1", {}),
        ("DIB", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGBA", {}),
        ("TIFF", "LA", {}),
        ("TIFF", "L", {}),
        ("TIFF", "1", {}),
        ("TIFF", "P", {}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "YCbCr", {}),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "RGB", {"compression": "jpeg"}),
        ("TIFF", "YCbCr", {"compression": "tiff_deflate"}),
        ("PPM", "RGB", {}),
        ("PPM", "L", {}),
        ("PPM", "1", {}),
        ("TGA", "RGB", {}),
        ("TGA", "RGBA", {"compression": "tga_rle"}),
        ("TGA", "L", {}),
        ("TGA", "P", {}),
        ("QOI", "RGB", {}),
        ("QOI", "RGBA", {}),
        ("JPEG2000", "RGB", {}),
        ("JPEG2000", "L", {}),
        ("JPEG2000", "LA", {}),
        ("JPEG2000", "RGBA", {}),
        ("JPEG2000", "RGB", {"no_jp2": True}),
        ("AVIF", "RGB", {}),
        ("AVIF", "RGBA", {}),
        ("AVIF", "RGB", {"save_all": True}),
    ],
    ids=str,
)
def test_8_bit_images_read_as_pillow_converts_them(tmp_path, image_format, mode, options):
    skip_without(image_format)
    encoded = encode(image_format, mode, **options)
    try:
        expected = in_rgb(Image.open(io.BytesIO(encoded)))
    except OSError as error:  # Pillow 11.0 on its own YCbCr
        pytest.skip(f"Pillow: {error}")
    (tmp_path / "image").write_bytes(encoded)
    for file in (tmp_path / "image", str(tmp_path / "image"), source(encoded)):
        image = read_image(file)
        assert image.dtype == torch.uint8
        assert torch.equal(image, expected)
    description = describe(source(encoded))
    assert (description.height, description.width) == (47, 61)
    assert description.pages == (2 if "save_all" in options else 1)
    assert description.alpha == (mode in ("LA", "RGBA"))
    bits = 1 if mode == "1" and image_format in ("PNG", "TIFF", "BMP", "PPM") else 8
    mode = "P" if image_format == "GIF" else mode
    kind = {"1": "grey", "L": "grey", "LA": "grey with alpha", "RGBA": "RGBA"}.get(mode, "RGB")
    assert str(description) == f"{bits}-bit {kind}"
    raw = read_samples(source(encoded), chans(description.bands))
    assert raw.shape == (47, 61, description.bands)
    assert raw.dtype == description.dtype == "uint8"
    assert raw.max() <= 2**bits - 1
    colours = raw[..., : 3 if description.bands > 2 else 1] * (255 // (2**bits - 1))
    assert np.array_equal(np.broadcast_to(colours, (47, 61, 3)), hwc(expected))


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "PPM", "QOI", "TGA"])
def test_lossless_formats_give_back_the_pixels_that_were_saved(image_format):
    image = photograph(61, 47)
    assert torch.equal(read_image(saved(image, image_format)), in_rgb(image))


def test_of_an_animation_or_of_pages_the_first_is_read_and_all_are_counted():
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    for image_format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"save_all": True, "append_images": frames[1:], "lossless": True}
        file = saved(frames[0], image_format, **options)
        assert torch.equal(read_image(file), in_rgb(frames[0]))
        assert describe(file).pages == 3
        assert describe(saved(frames[0], image_format)).pages == 1


@pytest.mark.parametrize(
    ("mode", "bands"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("P", 3), ("CMYK", 3)]
)
def test_a_model_of_as_many_bands_as_the_file_gets_them_all(mode, bands):
    image = Image.open(io.BytesIO(encode("TIFF", mode)))
    expected = np.asarray(image.convert("RGB") if mode in ("P", "CMYK") else image)
    file = source(encode("TIFF", mode))
    assert np.array_equal(hwc(read_image(file, chans(bands))), expected.reshape(47, 61, bands))
    colours = bands - (mode in ("LA", "RGBA"))
    for other in {1, 2, 4, 5} - {bands, colours}:
        assert f"add --in_chans {bands}, or choose with --bands" in refusal(file, chans(other))


def test_a_grey_jpeg_as_one_band_is_each_of_its_three():
    file = source(encode("JPEG", "L"))
    (grey,), three = read_image(file, chans(1)), read_image(file)
    assert all(torch.equal(grey, band) for band in three)


# ---- scale: by the type that a file declares


def test_grey_of_16_bits_keeps_them_as_three_equal_bands_or_as_one():
    array = noise((47, 61, 1), np.uint16)
    grey = array[..., 0]
    files = {
        "PNG": source(deep_png(array)),
        "TIFF": saved(Image.fromarray(grey), "TIFF"),
        "PGM": saved(Image.fromarray(grey), "PPM"),
        "big-endian": tiff(grey, byteorder=">"),
        "tiled": tiff(grey, tile=(16, 16), compression="lzw", predictor=True),
        ".npy": npy(grey),
        "JPEG 2000": source(imagecodecs.jpeg2k_encode(grey, level=0, reversible=True)),
    }
    for name, file in files.items():
        assert str(describe(file)) == "16-bit grey", name
        assert_scaled(read_image(file, chans(1)), array / 65535)
        assert_scaled(read_image(file), np.repeat(array, 3, axis=2) / 65535)
        samples = read_samples(file, chans(1))
        assert samples.dtype == np.uint16 and np.array_equal(samples, array), name


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 15, 16])
def test_jpeg_2000_of_any_bits_has_its_declared_full_scale(bits):
    for shape in ((40, 37), (40, 37, 3)):
        array = noise(shape, np.uint16, bits)
        array.flat[:2] = 0, 2**bits - 1
        for kind in ("jp2", "j2k"):
            encoded = imagecodecs.jpeg2k_encode(
                array, level=0, reversible=True, bitspersample=bits, codecformat=kind
            )
            file = source(encoded, f"i.{kind}")
            expected = array.reshape(40, 37, -1)
            assert_scaled(read_image(file, chans(expected.shape[2])), expected / (2**bits - 1))
            assert describe(file).bits == bits
            assert np.array_equal(read_samples(file, chans(expected.shape[2])), expected)


def test_jpeg_2000_of_few_bits_of_signs_and_of_many_bands():
    def jp2(array, **options):
        return source(imagecodecs.jpeg2k_encode(array, level=0, reversible=True, **options))

    array = noise((40, 37), np.uint8, 4)
    assert np.array_equal(read_image(jp2(array, bitspersample=4), chans(1))[0], array * 17)
    array = noise((40, 37), np.uint16, 12).astype(np.int16) - 2048
    file = jp2(array, bitspersample=12)
    assert "int16 grey" in refusal(file)
    assert np.array_equal(read_samples(file, chans(1))[..., 0], array)
    array = noise((40, 37, 4))
    assert "4 bands of uint8: add --in_chans 4" in refusal(jp2(array))
    assert np.array_equal(hwc(read_image(jp2(array), chans(4))), array)


def test_a_missing_imagecodecs_is_named(monkeypatch):
    file = source(imagecodecs.jpeg2k_encode(noise((40, 37, 3), np.uint16), level=0), "i.jp2")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert refusal(file) == (
        "i.jp2 holds 16-bit RGB, which needs imagecodecs: pip install imagecodecs"
    )


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_png_of_16_bits_in_colour_or_with_alpha_keeps_its_bits(bands):
    array = noise((47, 61, bands), np.uint16)
    file = source(deep_png(array))
    assert_scaled(read_image(file, chans(bands)), array / 65535)
    colours = array[..., :1].repeat(3, axis=2) if bands == 2 else array[..., :3]
    assert_scaled(read_image(file), colours / 65535)
    assert np.array_equal(read_samples(file, chans(bands)), array)


@pytest.mark.parametrize("full", [1, 3, 100, 254, 255, 256, 1000, 1023, 4095, 65534, 65535])
@pytest.mark.parametrize("kind", [2, 3, 5, 6])
def test_pgm_and_ppm_of_any_maxval_have_it_as_full_scale(kind, full):
    bands = 1 if kind in (2, 5) else 3
    random = np.random.default_rng(full)
    array = random.integers(0, full, (7, 9, bands), endpoint=True)
    array.flat[:2] = 0, full
    if kind < 4:
        body = " # c\n".join(" ".join(map(str, row.flat)) for row in array).encode()
    else:
        body = array.astype(">u2" if full > 255 else "u1").tobytes()
    file = source(b"P%d # made by hand\n9 7\n# full\n%d\n" % (kind, full) + body, "i.ppm")
    assert np.array_equal(read_samples(file, chans(bands)), array)
    image = read_image(file, chans(bands))
    if full > 255:
        assert_scaled(image, array / full)
    else:
        assert np.array_equal(hwc(image), np.rint(array / full * 255))
        expected = in_rgb(Image.open(io.BytesIO(file.content)))
        assert torch.equal(read_image(file), expected)
    torn = source(file.content[: -len(body) // 2], "i.ppm")
    refusal(torn, chans(bands), UnreadableImage)


@pytest.mark.parametrize("numbers", [b"1 2 3 999", b"1 2 3 -4", b"1 2 3", b"1 2 x 4"], ids=str)
def test_plain_pgm_with_wrong_numbers_is_unreadable(numbers):
    refusal(source(b"P2 2 2 255\n" + numbers), chans(1), UnreadableImage)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("color_type", [0, 3], ids=["grey", "palette"])
def test_png_of_few_bits(bits, color_type):
    array = noise((8, 16), np.uint8, bits)
    columns = array.reshape(8, -1, 8 // bits)
    packed = sum(columns[..., i] << (8 - bits * (i + 1)) for i in range(8 // bits)).astype(np.uint8)
    palette = noise((2**bits, 3), seed=1)
    chunks = [b"PLTE" + palette.tobytes()] if color_type else []
    file = source(png((8, 16), bits, color_type, png_rows(packed), *chunks))
    if color_type:
        assert np.array_equal(hwc(read_image(file)), palette[array])
    else:
        assert np.array_equal(read_image(file, chans(1))[0], array * (255 // (2**bits - 1)))
        assert np.array_equal(read_samples(file, chans(1))[..., 0], array)
        assert str(describe(file)) == f"{bits}-bit grey"


@pytest.mark.parametrize(
    ("dtype", "options", "full"),
    [
        (bool, {}, 1),
        (np.uint8, {}, 255),
        (np.uint8, {"bitspersample": 4}, 15),
        (np.uint16, {"bitspersample": 10}, 1023),
        (np.uint16, {"bitspersample": 12}, 4095),
        (np.uint16, {}, 65535),
    ],
    ids=str,
)
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("bands", [1, 5])
def test_unsigned_tiffs_have_the_scale_of_their_declared_bits(
    dtype, options, full, photometric, bands
):
    """12 bits of 16 (A2); where 0 is white, by one rule for every depth."""
    array = noise((20, 24, bands), dtype, options.get("bitspersample"))
    options = options | {"photometric": photometric}
    expected = full - array.astype(int) if photometric == "miniswhite" else array.astype(int)
    if bands == 1:
        files = [tiff(array[..., 0], **options)]
    else:
        files = [tiff(np.moveaxis(array, 2, 0), planarconfig="separate", **options)]
    if bands > 1 and dtype is not bool:  # of which tifffile packs several bands wrongly
        files.append(tiff(array, planarconfig="contig", **options))
    for file in files:
        assert np.array_equal(read_samples(file, chans(bands)), expected)
        image = read_image(file, chans(bands))
        if full > 255:
            assert_scaled(image, expected / full)
        else:
            assert np.array_equal(hwc(image), expected * (255 // full))
        assert describe(file).bits == full.bit_length()


@pytest.mark.parametrize(
    "dtype", ["i1", "i2", "i4", "i8", "u4", "u8", "f2", "f4", "f8"], ids=lambda t: np.dtype(t).name
)
@pytest.mark.parametrize("bands", [1, 4])
def test_types_without_a_scale_need_a_value_range(dtype, bands):
    """A3, A4: a ramp beyond the range at both ends."""
    dtype = np.dtype(dtype)
    low, high = (30, 90) if dtype.kind == "u" else (-90.5, 90)
    ramp = np.linspace(low - 20, high + 20, 20 * 24 * bands).reshape(20, 24, bands).astype(dtype)
    squeezed = ramp if bands > 1 else ramp[..., 0]
    files = [npy(squeezed), npy(np.asfortranarray(squeezed).astype(dtype.newbyteorder(">")))]
    files += [tiff(squeezed, planarconfig="contig", byteorder=order) for order in "<>"]
    for file in files:
        holds = f"4 bands of {dtype}" if bands > 1 else f"{dtype} grey"
        message = refusal(file, chans(bands))
        assert message.startswith(f"{file.name} holds {holds}, ")
        assert "--value_range LO HI" in message
        expected = np.clip((ramp.astype(np.float64) - low) / (high - low), 0, 1)
        assert_scaled(read_image(file, chans(bands, value_range=(low, high))), expected)
        samples = read_samples(file, chans(bands))
        assert samples.dtype == dtype and np.array_equal(samples, ramp)


def test_large_integers_are_scaled_without_loss():
    array = np.array([[2**31, 2**31 + 1, 2**31 + 2, 2**31 + 3]], np.uint32)
    image = read_image(tiff(array), chans(1, value_range=(2**31, 2**31 + 3)))
    assert_scaled(image, np.arange(4).reshape(1, 4, 1) / 3)


def test_a_value_range_scales_and_clips_8_bit_files_too():
    array = noise((47, 61, 3))
    for file in (saved(Image.fromarray(array), "PNG"), tiff(array, photometric="rgb"), npy(array)):
        image = read_image(file, PixelFormat(value_range=(50, 200)))
        assert_scaled(image, np.clip((array - 50.0) / 150, 0, 1))
    jpeg = source(encode("JPEG"))
    expected = np.clip((hwc(read_image(jpeg)) - 50.0) / 150, 0, 1)
    assert_scaled(read_image(jpeg, PixelFormat(value_range=(50, 200))), expected)


def test_pfm_is_float_and_upside_down_in_the_file():
    array = noise((7, 9), np.float32)
    file = source(b"Pf\n9 7\n-1.0\n" + array[::-1].astype("<f4").tobytes(), "i.pfm")
    assert "float32 grey" in refusal(file)
    assert np.array_equal(read_samples(file, chans(1))[..., 0], array)


# ---- no data


def test_no_data_is_exactly_0_after_normalisation():
    array = noise((20, 24, 3))
    array[3, 4] = array[5, 6, 1] = 7
    floats = array.astype(np.float32)
    floats[array == 7] = np.nan
    for file, pixels in (
        (npy(array), PixelFormat(nodata=7)),
        (saved(Image.fromarray(array), "PNG"), PixelFormat(nodata=7)),
        (npy(floats), PixelFormat(nodata=float("nan"), value_range=(0, 255))),
        (tiff(floats, photometric="rgb"), PixelFormat(nodata=float("nan"), value_range=(0, 255))),
    ):
        image = read_image(file, pixels)
        expected = np.where(array == 7, np.float32(pixels.mean), array / 255)
        assert_scaled(image, expected)
        normalised = hwc(data.normalize(image[None], pixels.mean, pixels.std)[0])
        assert ((normalised == 0) == (array == 7)).all()


def test_no_data_is_compared_in_the_files_own_units():
    array = noise((20, 24, 1), np.int16)
    array[2:4] = -9999
    options = {"value_range": (0, 100), "nodata": -9999.0, "mean": (0.1, 0.2, 0.3)}
    image = hwc(read_image(tiff(array[..., 0]), PixelFormat(**options)))
    expected = np.clip(array.repeat(3, axis=2) / 100, 0, 1)
    expected[2:4] = 0.1, 0.2, 0.3
    np.testing.assert_allclose(image, expected, atol=1e-7)
    lowest = float(np.finfo(np.float32).min)
    array = np.array([[lowest, 1, 2]], np.float32)
    image = read_image(npy(array), chans(1, value_range=(0, 2), nodata=lowest))
    assert image.flatten().tolist() == [0.5, 0.5, 1]


def test_not_a_number_and_infinity_are_refused():
    array = noise((5, 6), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        array[2, 3] = bad
        for file in (npy(array), tiff(array)):
            for read in (read_image, read_samples):
                error = UnsuitableImage if np.isnan(bad) else UnreadableImage
                refused = {"error": error, "read": read}
                pixels = chans(1, value_range=(0, 1))
                assert "--nodata nan" in refusal(file, pixels, **refused)
                pixels = chans(1, value_range=(0, 1), nodata=-9999)
                assert "--nodata nan" in refusal(file, pixels, **refused)
                pixels = chans(1, value_range=(0, 1), nodata=float("nan"))
                if np.isnan(bad):
                    assert np.isfinite(read_image(file, pixels)).all()
                else:
                    assert "infinite" in refusal(file, pixels, **refused)
    array = np.stack([array, np.ones_like(array)], axis=2)
    assert read_samples(npy(array), chans(1, bands=(1,))).all()


# ---- bands


def test_files_of_other_numbers_of_bands_ask_for_flags(tmp_path):
    """A6, A7: 13 bands, and RGB with near infrared and no mark of alpha."""
    message = " holds 13 bands of uint16: add --in_chans 13, or choose with --bands"
    array = noise((13, 32, 32), np.uint16)
    separate = tiff(array, planarconfig="separate")
    contiguous = tiff(np.moveaxis(array, 0, 2), planarconfig="contig")
    for file in (separate, contiguous, npy(np.moveaxis(array, 0, 2))):
        assert refusal(file) == file.name + message
        assert refusal(file, chans(4)) == file.name + message
        assert_scaled(read_image(file, chans(13)), np.moveaxis(array, 0, 2) / 65535)
    array = noise((32, 32, 4))
    for extra in ("unspecified", ["unspecified"]):
        file = tiff(array, photometric="rgb", extrasamples=extra)
        assert "holds 4 bands of uint8: add --in_chans 4, or choose" in refusal(file)
        assert np.array_equal(hwc(read_image(file, chans(4))), array)
    file = tiff(array[..., :2], planarconfig="contig")
    assert "holds 2 bands of uint8: add --in_chans 2, or choose" in refusal(file)


def test_a_tiff_in_rgb_of_4_samples_without_any_mark_has_no_alpha():
    array = noise((32, 32, 4))
    content = bytearray(tiff(array, photometric="rgb", extrasamples=["unspecified"]).content)
    tag = content.find(struct.pack("<HHI", 338, 3, 1))  # ExtraSamples, as an unknown tag
    content[tag : tag + 2] = struct.pack("<H", 337)
    assert Image.open(io.BytesIO(content)).mode == "RGBA"
    assert "holds 4 bands of uint8" in refusal(source(content))
    assert np.array_equal(hwc(read_image(source(content), chans(4))), array)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_declared_alpha_is_dropped_for_a_model_of_three_bands(dtype):
    full = np.iinfo(dtype).max
    for colours, photometric in ((3, "rgb"), (1, "minisblack")):
        array = noise((20, 24, colours + 1), dtype)
        for layout in ("contig", "separate"):
            written = array if layout == "contig" else np.moveaxis(array, 2, 0)
            options = {"photometric": photometric, "planarconfig": layout}
            file = tiff(written, extrasamples=["unassalpha"], **options)
            assert describe(file).alpha
            expected = np.broadcast_to(array[..., :colours], (20, 24, 3))
            image = hwc(data.to_float(read_image(file)))
            np.testing.assert_allclose(image, expected / full, atol=1e-7)
            samples = read_samples(file, chans(colours + 1))
            assert np.array_equal(samples, array)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_that_alpha_multiplied_are_divided_by_it(dtype):
    full = np.iinfo(dtype).max
    array = noise((20, 24, 4), dtype)
    array[..., :3] = np.minimum(array[..., :3], array[..., 3:])
    array[..., 3] = np.maximum(array[..., 3], 1)
    file = tiff(array, photometric="rgb", extrasamples=["assocalpha"])
    expected = array[..., :3] / array[..., 3:]
    image = hwc(data.to_float(read_image(file)))
    np.testing.assert_allclose(image, expected, atol=1.01 / full)


def test_bands_are_chosen_in_any_order():
    array = noise((20, 24, 13), np.uint16)
    file = tiff(array, planarconfig="contig")
    for bands in ((3, 2, 1), (12, 0, 5), (0, 0, 0), (0, 1, 2)):
        expected = array[..., list(bands)]
        assert_scaled(read_image(file, PixelFormat(bands=bands)), expected / 65535)
        assert np.array_equal(read_samples(file, PixelFormat(bands=bands)), expected)
    assert refusal(file, PixelFormat(bands=(1, 13, 2))) == (
        "t.tif holds 13 bands of uint16, no band 13: --bands takes 0 to 12"
    )
    rgb = source(encode("JPEG"))
    swapped = read_image(rgb, PixelFormat(bands=(2, 1, 0)))
    assert torch.equal(swapped, read_image(rgb).flip(0))
    assert torch.equal(read_image(rgb, chans(1, bands=(1,))), read_image(rgb)[1:2])
    grey = source(encode("PNG", "L"))
    assert torch.equal(read_image(grey, chans(2, bands=(0, 0))), read_image(grey)[:2])


# ---- TIFF


@pytest.mark.parametrize(
    "compression",
    [
        None,
        "lzw",
        "deflate",
        "packbits",
        "zstd",
        "lzma",
        "jpeg2000",
        "png",
        "jpegxl",
        "lerc",
        "jpegxr",
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_separate_planes_and_contiguous_bands_of_any_compression(dtype, compression):
    """A1: Pillow shows noise for uncompressed planes."""
    for bands, tile in ((3, None), (3, (16, 16)), (5, None)):
        array = noise((48, 32, bands), dtype)
        options = {"photometric": "rgb" if bands == 3 else "minisblack", "tile": tile}
        options["compression"] = compression
        files = [tiff(np.moveaxis(array, 2, 0), planarconfig="separate", **options)]
        if bands == 3:
            files.append(tiff(array, planarconfig="contig", **options))
        for file in files:
            assert np.array_equal(read_samples(file, chans(bands)), array)
            image = hwc(data.to_float(read_image(file, chans(bands))))
            np.testing.assert_allclose(image, array / np.iinfo(dtype).max, atol=1e-7)


@pytest.mark.parametrize("byte_order", "<>")
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((40, 37), "u1"),
        ((40, 37), "u2"),
        ((40, 37, 3), "u1"),
        ((40, 37, 3), "u2"),
        ((40, 37), "f4"),
    ],
    ids=str,
)
def test_tiffs_of_either_byte_order_big_tiled_and_predicted(
    byte_order, big, compression, shape, dtype
):
    array = noise(shape, dtype)
    pixels = chans(shape[2] if len(shape) > 2 else 1)
    for tile in (None, (16, 32)):
        for predictor in (False, True) if compression else (False,):
            file = tiff(
                array,
                photometric="rgb" if len(shape) > 2 else "minisblack",
                byteorder=byte_order,
                bigtiff=big,
                compression=compression,
                tile=tile,
                predictor=predictor,
            )
            samples = read_samples(file, pixels)
            assert np.array_equal(samples.reshape(shape), array)
            assert samples.dtype.isnative


@pytest.mark.parametrize("compression", [None, "lzw", "packbits"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((20, 32), "?"), ((20, 32), "u1"), ((20, 32), "u2"), ((20, 32, 5), "u1"), ((20, 32, 5), "u2")],
    ids=str,
)
def test_bytes_of_which_the_lowest_bit_comes_first(shape, dtype, compression):
    reversed_bits = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    array = noise(shape, dtype)
    for order in "<>":
        file = tiff(
            array,
            planarconfig="contig",
            byteorder=order,
            compression=compression,
            extratags=[(265, 3, 1, 2, True)],  # to become FillOrder, which tifffile doesn't write
        )
        content = bytearray(file.content)
        tag = content.find(struct.pack(order + "HHI", 265, 3, 1))
        content[tag : tag + 2] = struct.pack(order + "H", 266)
        page = tifffile.TiffFile(io.BytesIO(file.content)).pages[0]
        for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            content[start : start + count] = content[start : start + count].translate(reversed_bits)
        samples = read_samples(source(content), chans(1 if len(shape) == 2 else 5))
        assert np.array_equal(samples.reshape(shape), array)


@pytest.mark.parametrize(("bits", "bands"), [(1, 1), (1, 5), (4, 3), (12, 1), (12, 5)], ids=str)
def test_samples_are_packed_from_the_highest_bit_in_either_byte_order(bits, bands):
    """Written by hand: tifffile packs some of these in another order than it reads them."""
    array = noise((4, 7, bands), np.uint16, bits)
    packed = b""
    for row in array.reshape(4, -1):
        text = "".join(f"{sample:0{bits}b}" for sample in row)
        packed += bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))
    for order, mark in (("<", b"II"), (">", b"MM")):
        tags = {256: 7, 257: 4, 258: bits, 259: 1, 262: 1, 273: 8, 277: bands, 278: 4}
        tags[279] = len(packed)
        entries = [struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items()]
        content = mark + struct.pack(order + "HI", 42, 8 + len(packed)) + packed
        content += struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
        assert np.array_equal(read_samples(source(content), chans(bands)), array)


def test_pages_are_counted_without_thumbnails_and_masks():
    pages = noise((3, 32, 32), np.uint16)
    for big in (False, True):
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer, bigtiff=big) as writer:
            for page in pages:
                writer.write(page, metadata=None)
                writer.write(page[::2, ::2], subfiletype=1, metadata=None)
                writer.write(page > 0, subfiletype=4, metadata=None)
                writer.write(page[::2, ::2] > 0, subfiletype=5, metadata=None)
        file = source(buffer.getvalue())
        assert describe(file).pages == 3
        assert_scaled(read_image(file, chans(1)), pages[0][..., None] / 65535)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_thumbnail_before_the_first_page_is_passed_over(dtype):
    page = noise((32, 32), dtype)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(page[::2, ::2], subfiletype=1, metadata=None)
        writer.write(page, metadata=None)
    assert np.array_equal(read_samples(source(buffer.getvalue()), chans(1))[..., 0], page)
    with tifffile.TiffWriter(buffer := io.BytesIO()) as writer:
        writer.write(page, subfiletype=1, metadata=None)
    assert "thumbnail" in refusal(source(buffer.getvalue()), error=UnreadableImage)


def test_slices_of_an_imagej_stack_are_pages_even_where_only_one_is_listed():
    stack = noise((5, 16, 16), np.uint16)
    assert describe(tiff(stack, imagej=True)).pages == 5
    description = "ImageJ=1.54f\nimages=700\nslices=700\n"
    assert describe(tiff(stack[0], description=description, metadata=None)).pages == 700


def test_a_volume_of_which_pillow_shows_the_last_plane_is_refused():
    file = tiff(noise((4, 16, 16)), volumetric=True, metadata=None)
    assert "a volume of 4 planes" in refusal(file, chans(1), UnreadableImage)


def test_webp_in_a_tiff():
    array = noise((48, 32, 3))
    options = {"compression": "webp", "compressionargs": {"lossless": True}}
    assert np.array_equal(hwc(read_image(tiff(array, photometric="rgb", **options))), array)


def test_pages_in_a_circle_end():
    content = bytearray(tiff(noise((8, 8)), metadata=None).content)
    (first,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, first)
    struct.pack_into("<I", content, first + 2 + 12 * count, first)
    assert describe(source(content)).pages == 1


def test_colours_of_other_kinds_become_rgb_or_are_refused():
    grey = Image.new("LAB", (4, 4), (128, 128, 128))
    if _lab_is_converted(grey):
        assert np.abs(hwc(read_image(saved(grey, "TIFF"))).astype(int) - 119).max() <= 1
    else:
        refusal(saved(grey, "TIFF"), error=UnreadableImage)
    assert "16-bit CMYK" in refusal(
        tiff(noise((8, 8, 4), np.uint16), photometric="separated"), error=UnreadableImage
    )
    palette = noise((3, 65536), np.uint16)
    file = tiff(noise((8, 8), np.uint16), photometric="palette", colormap=palette)
    assert "16-bit palette" in refusal(file, error=UnreadableImage)
    file = tiff(noise((8, 8), np.float32), photometric="miniswhite")
    assert "0 is white" in refusal(file, error=UnreadableImage)
    file = tiff(noise((8, 8), np.float32).astype(np.complex64))
    assert "neither integers nor floats" in refusal(file, error=UnreadableImage)


def _lab_is_converted(image):
    try:
        image.convert("RGB")
    except ValueError:
        return False
    return True


def test_subsampled_colours_without_compression_are_refused():
    content = bytearray(saved(photograph(16, 16).convert("YCbCr"), "TIFF").content)
    tag = content.find(struct.pack("<HHI", 530, 3, 2))
    struct.pack_into("<HH", content, tag + 8, 2, 2)
    assert "convert it to RGB" in refusal(source(content), error=UnreadableImage)


@pytest.mark.parametrize("module", ["tifffile", "imagecodecs"])
def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch, module):
    file = tiff(noise((13, 32, 32), np.uint16), planarconfig="separate", compression="lzw")
    for name in [name for name in sys.modules if name.split(".")[0] == "tifffile"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert refusal(file, chans(13)) == (
        "t.tif holds 13 bands of uint16, which needs tifffile: pip install tifffile imagecodecs"
    )
    assert refusal(file).endswith("add --in_chans 13, or choose with --bands")
    assert describe(file).bands == 13


def test_grey_of_16_bits_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for order in "<>":
        for compression in (None, "lzw", "deflate"):
            array = noise((20, 24), np.uint16)
            file = tiff(array, byteorder=order, compression=compression)
            assert np.array_equal(read_samples(file, chans(1))[..., 0], array)


# ---- numpy files


def test_npy_from_a_file_or_from_bytes_in_either_layout(tmp_path):
    array = noise((20, 24, 13), np.uint16)
    np.save(tmp_path / "hwc.npy", array)
    np.save(tmp_path / "chw.npy", np.moveaxis(array, 2, 0))
    for layout in ("hwc", "chw"):
        path = tmp_path / f"{layout}.npy"
        for file in (path, source(path.read_bytes())):
            image = read_image(file, chans(13, layout=layout))
            assert_scaled(image, array / 65535)
            description = describe(file, chans(13, layout=layout))
            assert description[:6] == ("NPY", 20, 24, 13, "uint16", 16)
    assert "--layout chw if it is 13 bands" in refusal(tmp_path / "chw.npy")
    grey = npy(array[..., 0])
    assert_scaled(read_image(grey, chans(1, layout="chw")), array[..., :1] / 65535)


def test_npy_of_booleans_and_of_bytes(tmp_path):
    array = noise((20, 24), bool)
    assert np.array_equal(read_image(npy(array))[2], array * 255)
    assert str(describe(npy(array))) == "1-bit grey"
    rgb = noise((20, 24, 3))
    np.save(tmp_path / "rgb.npy", rgb)
    image = read_image(tmp_path / "rgb.npy")
    assert image.dtype == torch.uint8 and np.array_equal(hwc(image), rgb)
    image.zero_()  # a copy, not the file
    assert np.array_equal(hwc(read_image(tmp_path / "rgb.npy")), rgb)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(5),
        np.zeros((2, 3, 4, 5)),
        np.zeros((0, 3)),
        np.zeros((3, 4), np.complex64),
        np.zeros((3, 4), [("a", "f4")]),
        np.array([["a", "b"]]),
        np.array([[{}, None]], dtype=object),
        np.zeros((3, 4), "M8[s]"),
        np.array(1.0),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_npy_of_other_kinds_is_refused(array):
    for read in (read_image, read_samples, describe):
        message = refusal(npy(array), chans(1), UnreadableImage, read)
        assert message.startswith("a.npy: ")


def test_of_a_mapped_npy_only_the_chosen_bands_are_read(tmp_path):
    """Of 400 MB that are a hole in the file, so that reading them all would show."""
    resource = pytest.importorskip("resource")
    np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint8, (400, 1000, 1000)).flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = PixelFormat(bands=(7, 3, 1), layout="chw")
    assert read_image(tmp_path / "large.npy", pixels).shape == (3, 1000, 1000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 100e6


# ---- orientation


def oriented(array, orientation):
    """numpy's own turn of [H, W, bands], by EXIF's definition of each orientation."""
    return {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation](array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "late PNG", "WEBP", "AVIF", "TIFF", "lzw", "deep", "planes"]
)
def test_orientation_is_applied_on_demand_only(kind, orientation):
    """A8: one rule for all formats."""
    array = noise((3, 4, 3)).repeat(8, axis=0).repeat(8, axis=1)[:20]
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow has no AVIF")
    tag = [(274, 3, 1, orientation, True)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind in ("TIFF", "lzw"):
        file = tiff(
            array, photometric="rgb", extratags=tag, compression="lzw" if kind == "lzw" else None
        )
    elif kind == "deep":
        file = tiff(array.astype(np.uint16), photometric="rgb", extratags=tag)
    elif kind == "planes":
        planes = np.moveaxis(array, 2, 0)
        file = tiff(planes, photometric="rgb", planarconfig="separate", extratags=tag)
    elif kind == "late PNG":
        content = png(array.shape[:2], 8, 2, png_rows(array))
        chunk = b"eXIf" + exif.tobytes()[6:]
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        file = source(content[:-12] + chunk + content[-12:])
    else:
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"}
        file = saved(Image.fromarray(array), kind, exif=exif, **options)
    upright = PixelFormat(exif_orientation=True)
    tolerance = 12 if kind in ("JPEG", "AVIF") else 0
    for pixels, expected in ((PixelFormat(), array), (upright, oriented(array, orientation))):
        samples = read_samples(file, pixels)
        assert samples.shape == expected.shape
        assert np.abs(samples.astype(int) - expected).max() <= tolerance
        assert np.array_equal(
            samples,
            (
                hwc(data.to_float(read_image(file, pixels))) * (65535 if kind == "deep" else 255)
            ).round(),
        )
    if kind != "late PNG":  # which is known only after the pixels
        assert describe(file).orientation == orientation
    assert (describe(file).height, describe(file).width) == (20, 32)


# ---- sizes, losses, and what isn't an image


@pytest.mark.parametrize(
    "file",
    [
        source(encode("JPEG")),
        source(encode("PNG")),
        source(encode("WEBP")),
        source(encode("GIF", "P")),
        source(encode("PPM")),
        source(encode("TIFF")),
        source(encode("JPEG2000")),
        tiff(noise((3, 47, 61), np.uint16), planarconfig="separate"),
        npy(noise((47, 61, 3))),
    ],
    ids=lambda file: file.content[:6],
)
def test_one_limit_on_pixels_for_all_formats(file):
    for read in (read_image, read_samples):
        assert read(file, PixelFormat(max_pixels=47 * 61)).shape in ((3, 47, 61), (47, 61, 3))
        assert refusal(file, PixelFormat(max_pixels=47 * 61 - 1), UnreadableImage, read) == (
            f"{file.name}: claims 61 x 47 = 2867 pixels, more than --max_pixels 2866: "
            "raise it, or shrink the file"
        )
    assert describe(file).width == 61


def test_the_limit_is_checked_before_anything_is_decoded():
    """C4: 196 megapixels in a PNG and a JPEG without content, and none with the limit raised."""
    line = b"\0" + bytes(14000 // 8)
    whole = png((14000, 14000), 1, 0, zlib.compress(line * 14000))
    jpeg = bytearray(encode("JPEG"))
    frame = jpeg.find(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 14000, 14000)
    for content in (whole, jpeg):
        assert refusal(source(content, "big"), error=UnreadableImage) == (
            "big: claims 14000 x 14000 = 196000000 pixels, more than --max_pixels 178956970: "
            "raise it, or shrink the file"
        )
    image = read_image(source(whole), chans(1, max_pixels=14000**2))
    assert image.shape == (1, 14000, 14000) and not image.any()
    huge = png((60000, 60000), 8, 2, b"")
    assert "claims 60000 x 60000" in refusal(source(huge), error=UnreadableImage)


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_bits_that_no_decoder_keeps_are_said(monkeypatch, kind, bits):
    array = noise((20, 32, 3), np.uint8 if bits == 8 else np.uint16, bits)
    if kind == "AVIF":
        if not features.check("avif"):
            pytest.skip("Pillow has no AVIF")
        content = imagecodecs.avif_encode(array, bitspersample=bits, level=90)
    else:
        pillow_heif = pytest.importorskip("pillow_heif")
        monkeypatch.setattr(pillow_heif.options, "SAVE_HDR_TO_12_BIT", bits == 12)
        mode, scale = ("RGB", 1) if bits == 8 else ("RGB;16", 2 ** (16 - bits))
        pillow_heif.from_bytes(mode, (32, 20), (array * scale).tobytes()).save(
            buffer := io.BytesIO()
        )
        content = buffer.getvalue()
    description = describe(source(content))
    assert (description.format, description.bits, description.dtype) == (kind, bits, "uint8")
    lost = f"{bits} bits a sample, of which 8 are read" if bits > 8 else ""
    assert description.lost == lost
    image = read_image(source(content))
    assert image.dtype == torch.uint8 and image.shape == (3, 20, 32)


def test_grey_heic_of_10_bits_keeps_them():
    pillow_heif = pytest.importorskip("pillow_heif")
    ramp = np.linspace(0, 1023, 64 * 64).reshape(64, 64).round().astype(np.uint16)
    image = pillow_heif.from_bytes("I;16", (64, 64), (ramp * 64).tobytes())
    image.save(buffer := io.BytesIO(), quality=-1)
    file = source(buffer.getvalue(), "i.heic")
    assert (str(describe(file)), describe(file).lost) == ("10-bit grey", "")
    assert np.abs(hwc(read_image(file, chans(1)))[..., 0] - ramp / 1023).max() < 0.005


def test_heic_is_read_where_its_plug_in_is():
    pillow_heif = pytest.importorskip("pillow_heif")
    image = photograph(64, 48)
    pillow_heif.from_pillow(image).save(buffer := io.BytesIO(), quality=95)
    read = read_image(source(buffer.getvalue(), "i.heic"))
    assert (read.int() - in_rgb(image).int()).abs().float().mean() < 8


def test_jpeg_of_12_bits_is_refused():
    array = noise((16, 16), np.uint16, 12)
    content = imagecodecs.jpeg_encode(array, bitspersample=12)
    message = refusal(source(content, "i.jpg"), error=UnreadableImage)
    assert message == "i.jpg: is a JPEG of 12 bits a sample: convert it to .tif or .png"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not an image\n", id="text"),
        pytest.param(b"P like text\n", id="text that begins with P"),
        pytest.param(bytes(1000), id="zeros"),
        pytest.param(PNG_SIGNATURE, id="PNG signature alone"),
        *(
            pytest.param(content[:length], id=f"{length} bytes of {name}")
            for name, content in (
                ("JPEG", encode("JPEG")),
                ("TIFF", encode("TIFF")),
                ("BigTIFF", tiff(noise((3, 3)), bigtiff=True).content),
                ("npy", npy(noise((3, 3))).content),
                ("JPEG 2000", encode("JPEG2000")),
                ("AVIF", b"\0\0\0\x20ftypavif"),
                ("HEIF", b"\0\0\0\x20ftypheic"),
            )
            for length in (3, 4, 6, 8, 10, 12, 16, 20, 31)
        ),
        *(
            pytest.param(encode(*kind)[: int(part * len(encode(*kind)))], id=f"{part} of {kind}")
            for kind in (
                ("JPEG",),
                ("JPEG", "CMYK"),
                ("PNG",),
                ("PNG", "P"),
                ("WEBP",),
                ("TIFF",),
                ("PPM",),
                ("BMP",),
                ("JPEG2000",),
            )
            for part in (0.01, 0.3, 0.6, 0.95)
            if kind != ("JPEG2000",) or part < 0.9
        ),
        *(
            pytest.param(file[: int(part * len(file))], id=f"{part} of deep {name}")
            for name, file in (
                ("PNG", deep_png(noise((47, 61, 3), np.uint16))),
                ("TIFF", tiff(noise((3, 47, 61), np.uint16), planarconfig="separate").content),
                ("npy", npy(noise((47, 61), np.uint16)).content),
            )
            for part in (0.01, 0.3, 0.6, 0.95)
        ),
        pytest.param(encode("JPEG")[:-2], id="JPEG without its end mark"),
    ],
)
def test_a_broken_file_is_unreadable_by_name(tmp_path, content, capfd):
    path = tmp_path / "broken image.jpg"
    path.write_bytes(content)
    for file in (path, source(content, str(path))):
        for read in (read_image, read_samples):
            message = refusal(file, error=UnreadableImage, read=read)
            assert message.startswith(f"{path}: ") and len(message) > len(f"{path}: ") + 5
    if len(content) < 32:
        assert capfd.readouterr() == ("", "")


def flip_a_bit(encoded):
    """The bytes of a file of which one bit has changed, in the middle."""
    middle = len(encoded) // 2
    return encoded[:middle] + bytes([encoded[middle] ^ 4]) + encoded[middle + 1 :]


DEEP = noise((20, 24, 3), np.uint16)
ROWS = png_rows(DEEP.astype(">u2"))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(flip_a_bit(encode("PNG")), id="flipped bit"),
        pytest.param(flip_a_bit(encode("PNG", "P")), id="flipped bit, palette"),
        pytest.param(png((47, 61), 8, 2, b"not deflated"), id="checksums right, content not"),
        pytest.param(png((47, 61), 8, 2, b""), id="no content"),
        pytest.param(flip_a_bit(deep_png(DEEP)), id="16 bits, flipped bit"),
        pytest.param(png((20, 24), 16, 2, b"not deflated"), id="16 bits, not deflated"),
        pytest.param(png((20, 24), 16, 2, ROWS[: len(ROWS) // 2]), id="16 bits, half the rows"),
        pytest.param(
            png((20, 24), 16, 2, zlib.compress((b"\x09" + bytes(144)) * 20)), id="16 bits, filter 9"
        ),
        pytest.param(png((20, 24), 16, 2, ROWS).replace(b"IHDR", b"IHDX"), id="16 bits, no header"),
    ],
)
def test_a_damaged_png_is_unreadable_and_crashes_no_process(content):
    """Read in a process, so that a decoder that crashes fails this test alone."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        message = pool.submit(refusal, source(content, "i.png"), error=UnreadableImage).result()
    assert message.startswith("i.png: ")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(png((20, 24), 16, 2, ROWS[:-4]), id="no checksum of the rows"),
        pytest.param(
            png((20, 24), 16, 2, ROWS).replace(
                struct.pack(">I", zlib.crc32(b"IDAT" + ROWS)), b"abcd"
            ),
            id="a wrong checksum of the chunk",
        ),
        pytest.param(png((20, 24), 16, 2, ROWS, b"abCD" + b"x"), id="an unknown chunk"),
    ],
)
def test_a_16_bit_png_with_harmless_damage_crashes_no_process(content):
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        image = pool.submit(_hwc_of, source(content, "i.png")).result()
    np.testing.assert_allclose(image, DEEP / 65535, atol=1e-7)


def _hwc_of(file):
    return hwc(read_image(file))


def test_files_that_cannot_be_opened_say_why(tmp_path):
    fill(tmp_path / "folder.jpg", ["1.jpg"])
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in {
        "missing.jpg": "No such file or directory",
        "folder.jpg": "is a folder",
        "pipe.jpg": "is no regular file",
    }.items():
        for read in (read_image, read_samples, describe):
            message = refusal(tmp_path / name, error=UnreadableImage, read=read)
            assert message == f"{tmp_path / name}: {reason}"


def test_a_forbidden_file_says_so(tmp_path, monkeypatch):
    fill(tmp_path, ["1.jpg"])

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "1.jpg")

    monkeypatch.setattr("builtins.open", refuse)
    assert refusal(tmp_path / "1.jpg", error=UnreadableImage).endswith("1.jpg: Permission denied")


def test_names_are_shown_in_one_line_of_text(tmp_path):
    family = "\U0001f468\u200d\U0001f469"  # an emoji of two, and a joiner
    for name in ("a b\u00e9\u65e5", "\u5c71\u7530\u3000\u592a\u90ce", "10\u00a0m", family, "a\tb"):
        assert printable(f"{name}.jpg") == f"{name}.jpg"
    for character in "\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069":
        assert printable(f"a{character}b") == rf"a\u{ord(character):04x}b"
    assert printable("\x00\x7f\x85\x9b\ud800") == r"\x00\x7f\x85\x9b\ud800"
    assert printable("new\nline\x1b[31m.jpg") == r"new\nline\x1b[31m.jpg"
    assert printable(os.fsdecode(b"caf\xe9.jpg")) == r"caf\xe9.jpg"
    message = refusal(tmp_path / os.fsdecode(b"a\n\xff.jpg"), error=UnreadableImage)
    assert message == rf"{tmp_path}/a\n\xff.jpg: No such file or directory"


def test_suffixes_that_are_read_and_advice_for_others(monkeypatch):
    suffixes = image_suffixes()
    for suffix in ".jpg .tif .npy .pfm .apng .mpo .dib .tga .qoi .png .pbm".split():
        assert suffix in suffixes and missing_support(suffix) is None
    assert (".avif" in suffixes) == bool(features.check("avif"))
    assert (".jp2" in suffixes) == features.check("jpg_2000")
    for suffix in ".dcm .nii .czi .nd2 .lif .mat .h5 .fits .cr2 .NEF .dng .arw .exr".split():
        assert missing_support(suffix) == "convert to .tif or .npy"
    assert missing_support(".txt") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("PIL.features.get_supported", list)
    image_suffixes.cache_clear()
    assert not {".heic", ".avif", ".jp2"} & set(image_suffixes())
    assert missing_support(".heic") == "pip install pillow-heif"
    assert "pillow" in missing_support(".avif") and "Pillow" in missing_support(".jp2")
    assert "convert to .tif" in refusal(source(b"DICM", "i.dcm"), error=UnreadableImage)
    image_suffixes.cache_clear()


def test_advice_is_not_on_flags_where_a_checkpoint_says_the_format():
    pixels = chans(8, origin="c.pth")
    expected = "holds 8-bit RGB, and c.pth was trained on images of 8 bands: give it files like"
    assert expected in refusal(source(encode("PNG")), pixels)
    pixels = chans(1, origin="c.pth")
    assert "give it files like" in refusal(npy(np.zeros((4, 4), np.float32)), pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_planes_are_known_by_their_tag_and_not_by_the_shape(dtype):
    cube = noise((13, 13, 13), dtype)
    planes = tiff(cube, planarconfig="separate", photometric="minisblack")
    assert np.array_equal(read_samples(planes, chans(13)), np.moveaxis(cube, 0, 2))
    contiguous = tiff(cube, planarconfig="contig", photometric="minisblack")
    assert np.array_equal(read_samples(contiguous, chans(13)), cube)


def test_a_stack_of_which_only_the_first_page_is_described_has_all_its_pages():
    stack = noise((5, 12, 10), np.uint16)
    assert describe(tiff(stack, truncate=True, photometric="minisblack")).pages == 5


def test_transparent_colours_are_said():
    buffer = io.BytesIO()
    photograph(61, 47).quantize(40).save(buffer, "PNG", transparency=0)
    assert describe(source(buffer.getvalue())).lost.startswith("transparent colours")
    assert describe(source(encode("PNG", "P"))).lost == ""


def test_floats_multiplied_by_alpha_are_refused():
    array = noise((6, 7, 4), np.float32)
    file = tiff(array, photometric="rgb", extrasamples=["assocalpha"])
    pixels = chans(4, value_range=(0, 1))
    assert "multiplied by alpha" in refusal(file, pixels, error=UnreadableImage)
