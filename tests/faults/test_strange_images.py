"""Images from strangers: files that claim too much, hold too little, or are named to mislead.

Thousands of damaged files of every format are read in processes of their own: each is either an
image or refused by name, in bounded memory and time, in silence, and nothing but reading happens.
"""

import contextlib
import ctypes
import functools
import io
import os
import random
import re
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import threading
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FORKS, photograph
from PIL import Image

import main_data
from util import c_messages, cli, image_files, packing
from util.decoding import ImageSource, UnreadableImage, describe, read_image, read_samples
from util.pixels import PixelFormat

imagecodecs = pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")

WIDTH, HEIGHT = 24, 16
SECONDS = 20  # of CPU time for a file, a guard against hangs
MIB = 1 << 20


# ---- whole files to damage


def by_pillow(image_format, mode="RGB", **options):
    Image.init()
    if image_format not in Image.SAVE:
        pytest.skip(f"Pillow, being old, writes no {image_format}")
    image = photograph(WIDTH, HEIGHT)
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    if "save_all" in options:
        options["append_images"] = [photograph(WIDTH, HEIGHT, seed=1).copy()]
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def array(bands=3, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 200, (HEIGHT, WIDTH, bands)).astype(dtype)


def tiff(samples, **options):
    buffer = io.BytesIO()
    try:
        tifffile.imwrite(buffer, samples, **options)
    except NotImplementedError as error:  # by old versions
        pytest.skip(f"imagecodecs: {error}")
    return buffer.getvalue()


def npy(samples):
    buffer = io.BytesIO()
    np.save(buffer, samples)
    return buffer.getvalue()


def png(depth, color_type, rows, *chunks, size=(WIDTH, HEIGHT)):
    """A PNG of these compressed rows, which may be wrong; `chunks` before them."""
    header = struct.pack(">IIBBBBB", *size, depth, color_type, 0, 0, 0)
    parts = [b"IHDR" + header, *chunks, b"IDAT" + rows, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in parts
    )


def plain(kind, samples):
    numbers = " ".join(map(str, samples.flat))
    return f"P{kind}\n{WIDTH} {HEIGHT}\n255\n{numbers}\n".encode()


def heic(**options):
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(photograph(64, 64)).save(buffer, **options)
    return buffer.getvalue()


def deep_png_rows():
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in array(3, ">u2")))


FORMATS = {
    "jpg": lambda: [
        by_pillow("JPEG"),
        by_pillow("JPEG", progressive=True),
        by_pillow("JPEG", "CMYK"),
        by_pillow("JPEG", "L", restart_marker_blocks=1, comment=b"c" * 20),
    ],
    "mpo": lambda: [by_pillow("MPO", save_all=True)],
    "png": lambda: [
        by_pillow("PNG"),
        by_pillow("PNG", "P", transparency=3),
        by_pillow("PNG", "LA"),
        png(16, 2, deep_png_rows(), b"zTXtTitle\0\0" + zlib.compress(b"x" * 50)),
    ],
    "apng": lambda: [by_pillow("PNG", save_all=True), by_pillow("PNG", "RGBA", save_all=True)],
    "webp": lambda: [
        by_pillow("WEBP"),
        by_pillow("WEBP", lossless=True),
        by_pillow("WEBP", "RGBA"),
        by_pillow("WEBP", save_all=True),
    ],
    "gif": lambda: [by_pillow("GIF", "P"), by_pillow("GIF", save_all=True)],
    "bmp": lambda: [by_pillow("BMP"), by_pillow("BMP", "P"), by_pillow("DIB")],
    "tif": lambda: [
        by_pillow("TIFF"),
        by_pillow("TIFF", compression="tiff_lzw"),
        by_pillow("TIFF", compression="jpeg"),
        by_pillow("TIFF", "1", compression="group4"),
        by_pillow("TIFF", "P", compression="packbits"),
        by_pillow("TIFF", save_all=True),
    ],
    "tifffile.tif": lambda: [
        tiff(array(3, np.uint16), photometric="rgb", compression="deflate", predictor=True),
        tiff(array(5, np.float32), photometric="minisblack", planarconfig="contig", tile=(16, 16)),
        tiff(array(3, np.uint16).transpose(2, 0, 1), planarconfig="separate", bigtiff=True),
        tiff(array(3, np.uint16), photometric="rgb", compression="lzw", byteorder=">"),
        tiff(array(1, np.int32)[..., 0], rowsperstrip=4, compression="zstd"),
    ],
    "ppm": lambda: [by_pillow("PPM"), plain(3, array()), by_pillow("PPM", "1")],
    "pgm": lambda: [
        by_pillow("PPM", "L"),
        plain(2, array(1)),
        b"P5 # c\n24 16 4095\n" + array(1, ">u2").tobytes(),
        b"P1\n24 16\n" + b"10" * 192,
    ],
    "pfm": lambda: [b"Pf\n24 16\n-1.0\n" + array(1, np.float32).tobytes()],
    "tga": lambda: [by_pillow("TGA"), by_pillow("TGA", "P", compression="tga_rle")],
    "qoi": lambda: [by_pillow("QOI"), by_pillow("QOI", "RGBA")],
    "npy": lambda: [npy(array()), npy(array(1, np.uint16)[..., 0]), npy(array(5, np.float32))],
    "avif": lambda: [by_pillow("AVIF"), by_pillow("AVIF", "RGBA")],
    "heic": lambda: [heic()],
    "jp2": lambda: [
        by_pillow("JPEG2000"),
        by_pillow("JPEG2000", "RGBA", no_jp2=True),
        by_pillow("JPEG2000", "L"),
        imagecodecs.jpeg2k_encode(array(3, np.uint16), level=0, reversible=True),
    ],
}


@functools.cache
def whole_files(name):
    return FORMATS[name]()


# ---- damage

EXTREMES = (0, 1, 2, 127, 255, 13000, 32767, 65535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)


def damaged(content, others, random):
    """The file after one to three changes."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = random.choice(CHANGES)(content, others, random)
    return bytes(content)


def _place(content, random):
    """Somewhere in a file, half of the time near its start, where headers are."""
    return int(len(content) * random.random() ** random.choice((1, 3)))


def flip(content, others, random):
    for _ in range(random.choice((1, 2, 8, 30))):
        if content:
            content[_place(content, random)] ^= 1 << random.randrange(8)
    return content


def truncate(content, others, random):
    return content[: _place(content, random)]


def splice(content, others, random):
    """A part of another file, or of this one, in place of one or between two bytes."""
    other = random.choice(others)
    start, at = random.randrange(len(other)), _place(content, random)
    piece = other[start : start + random.choice((1, 4, 16, 100, 1000))]
    content[at : at + random.choice((0, len(piece)))] = piece
    return content


def edit_length(content, others, random):
    """Another number where a length, a count or an offset may stand."""
    at, size = _place(content, random), random.choice((1, 2, 4, 4, 8))
    number = random.choice((*EXTREMES, random.getrandbits(32))) % (1 << 8 * size)
    content[at : at + size] = number.to_bytes(size, random.choice(("big", "little")))
    return content


def edit_side(content, others, random):
    """Another width or height, in text or in bytes."""
    side = random.choice((WIDTH, HEIGHT, 64, WIDTH - 1, HEIGHT - 1))
    number = random.choice((0, 1, side + 1, 2 * side, 200, 3000, 12000, 65535, 1 << 31))
    spellings = [(str(side).encode(), str(number).encode())]
    for size in (2, 4):
        for order in ("big", "little"):
            new = (number % (1 << 8 * size)).to_bytes(size, order)
            spellings.append((side.to_bytes(size, order), new))
    spellings = [(old, new) for old, new in spellings if old in content]
    if spellings:
        old, new = random.choice(spellings)
        places = [found.start() for found in re.finditer(re.escape(old), content)]
        at = random.choice(places[:6])
        content[at : at + len(old)] = new
    return content


def fix_checksums(content, others, random):
    """A PNG's checksums, so that damage gets behind them."""
    at = 8
    while content.startswith(b"\x89PNG") and at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
        if at > len(content):
            break
    return content


CHANGES = (flip, truncate, splice, edit_length, edit_side, edit_side)


def mutation(name, seed):
    files = whole_files(name)
    generator = random.Random(f"{name} {seed}")
    content = damaged(generator.choice(files), files, generator)
    if name in ("png", "apng") and generator.random() < 0.7:
        content = bytes(fix_checksums(bytearray(content), files, generator))
    return content


# ---- reading them, in a process of its own

FORBIDDEN = (
    "os.system os.exec os.fork os.forkpty os.posix_spawn os.spawn subprocess.Popen pty.spawn "
    "socket.connect socket.bind pickle.find_class os.remove os.rename os.rmdir shutil.rmtree"
).split()


def forbid(event, arguments):
    if event in FORBIDDEN:
        raise SystemExit(f"{event} {arguments}")


class OneImage:
    """As much of `ImagePaths` as packing needs."""

    def __init__(self, image):
        self.image = image

    def source(self, index):
        return self.image

    def __getitem__(self, index):
        return self.image.name


def ways_to_read(source, path):
    """All that commands do with a file; each raises or has a `problem`."""
    images = OneImage(source)
    yield lambda: read_image(source)
    yield lambda: read_samples(source)
    yield lambda: read_image(source, reduction=lambda height, width: 2)
    yield lambda: read_image(path)
    yield lambda: packing._read(images, packing.Packing(pages="each"), 0, 1)
    yield lambda: packing._read(images, packing.Packing(pages="bands", max_side=10), 0, -1)


def look(name, content, folder):
    """Read a file in each way, also from this folder; returns in how many it is an image."""
    suffix = name.rpartition(".")[2]
    path = f"{folder}/i.{suffix}"
    with open(path, "wb") as file:
        file.write(content)
    source = ImageSource(f"i.{suffix}", content=content)
    count = 0
    try:
        describe(source)
    except UnreadableImage as error:
        check_message(str(error))
    for read in ways_to_read(source, path):
        try:
            problem = getattr(read(), "problem", "")
        except UnreadableImage as error:
            problem = str(error)
        check_message(problem)
        count += not problem
    return count


def check_message(message):
    """It is a line of ours, and not on memory that ran out, which hides how much was needed."""
    assert not message or re.match(r"(/.*/)?i\.", message), message
    assert is_one_harmless_line(message) and len(message) < 400, message
    assert "memory" not in message and "alloc" not in message, message


def read_all(name, make, first, last, growth, folder):
    """Read files that `make` makes of a name and a number, which is noted before each."""
    os.dup2(os.open(f"{folder}/stderr", os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    note = os.open(f"{folder}/progress", os.O_WRONLY)
    for content in whole_files(name):
        look(name, content, folder)
    sys.addaudithook(forbid)
    with open("/proc/self/statm") as file:  # spares the machine; a test allows less
        size = int(file.read().split()[0]) * resource.getpagesize() + 3072 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = 0
    for number in range(first, last):
        os.pwrite(note, b"%8d %8d" % (number, images), 0)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        images += look(name, make(name, number), folder) > 0
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024
        if grown > growth:
            raise SystemExit(f"number {number} takes {grown} MiB")
    os.pwrite(note, b"%8d %8d" % (last, images), 0)


def read_in_own_process(name, make, number, growth=1024):
    """Read so many files of a format, by name; returns how many are images.

    A file that ends the process is named, and the others are read by another one.

    Args:
        make: makes the content of each.
        growth: MiB that they may add to the process.
    """
    whole_files(name)  # skips the test without the packages
    faults, first, images = [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        progress, stderr = Path(folder, "progress"), Path(folder, "stderr")
        while first < number and len(faults) < 5:
            progress.write_text(f"{first:8} {0:8}")
            reader = FORKS.Process(
                target=read_all, args=(name, make, first, number, growth, folder)
            )
            reader.start()
            reader.join(600)
            reader.kill()
            reader.join()
            last, count = map(int, progress.read_text().split())
            images += count
            if reader.exitcode:
                faults.append(f"{name} {last} ends the process by {reader.exitcode}")
            first = last + 1
        assert (faults, stderr.read_text()) == ([], "")
    return images


# ---- damage of every kind


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_an_image_or_refused(name):
    assert 0 < read_in_own_process(name, mutation, 40) < 40


@pytest.mark.thorough
@pytest.mark.parametrize("name", FORMATS)
def test_2000_damaged_files_are_images_or_refused(name):
    assert 100 < read_in_own_process(name, mutation, 2000) < 1500


# ---- claims


def with_sides(content, width, height):
    """A file that claims another width and height, however its format spells them."""
    old, new = (WIDTH, HEIGHT), (width, height)
    changes = [(b"%d %d" % old, b"%d %d" % new), (b"(%d, %d" % old[::-1], b"(%d, %d" % new[::-1])]
    for order in "<>":
        for letters in ("HH", "II"):
            for step in (1, -1):
                code = order + letters
                changes.append((struct.pack(code, *old[::step]), struct.pack(code, *new[::step])))
        for tag, side, other in ((256, WIDTH, width), (257, HEIGHT, height)):  # of TIFF
            for kind, letters in ((3, "IH"), (4, "II"), (3, "QH"), (4, "QI")):
                code = f"{order}HH{letters}"
                changes.append(
                    [struct.pack(code, tag, kind, 1, number) for number in (side, other)]
                )
    changes.append((struct.pack(">II", 64, 64), struct.pack(">II", *new)))  # HEIC's smallest
    # WebP's canvas, and its lossless frame
    changes.append([b"".join((s - 1).to_bytes(3, "little") for s in pair) for pair in (old, new)])
    changes.append([struct.pack("<I", w - 1 | h - 1 << 14) for w, h in (old, new)])
    for before, after in changes:
        content = content.replace(before, after)
    return bytes(fix_checksums(bytearray(content), (), None))


def claim(name, number):
    """A whole file that claims more pixels than it holds, or than anything may."""
    files = whole_files(name)
    sides = ((12000, 13000), (16000, 16000))[number % 2]
    content = with_sides(files[number // 2], *sides)
    assert content != files[number // 2]
    return content


@pytest.mark.parametrize("name", FORMATS)
def test_a_claim_is_refused_before_anything_is_allocated(name):
    assert read_in_own_process(name, claim, 2 * len(whole_files(name)), growth=64) == 0


@functools.cache
def zeros():
    """100 MiB of them, deflated to a thousandth, without ever being whole."""
    compressor = zlib.compressobj()
    parts = [compressor.compress(bytes(MIB)) for _ in range(100)]
    return b"".join(parts) + compressor.flush()


def heavy(name, number):
    """Small files of which some part grows to a hundred megabytes, or says so."""
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in array()))
    whole = by_pillow("TIFF")
    entries = int.from_bytes(whole[4:8], "little") + 2
    entry = struct.pack("<HHII", 270, 2, (1 << 32) - 16, 8)  # a text of 4 GiB
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0" + entry + bytes(4)
    if number < 5:
        grown = zeros()
        return (
            png(8, 2, rows, b"zTXtTitle\0\0" + grown),
            png(8, 2, rows, b"iTXtTitle\0\1\0\0\0" + grown),
            png(8, 2, rows, b"iCCPname\0\0" + grown),
            png(8, 2, grown),
            png(16, 2, grown),
        )[number]
    frames = by_pillow("PNG", save_all=True).replace(b"acTL\0\0\0\2", b"acTL\x7f\0\0\2")
    return (
        by_pillow("JPEG", exif=exif),
        by_pillow("PNG", exif=exif),
        whole[:entries] + entry + whole[entries + 12 :],
        bytes(fix_checksums(bytearray(frames), (), None)),
        tiff(array(1)[..., 0], description="ImageJ=1.11a\nimages=999999999\n", metadata=None),
    )[number - 5]


def test_what_grows_or_claims_to_takes_no_memory():
    assert read_in_own_process("png", heavy, 10, growth=64) >= 2


def test_a_large_png_takes_what_pillow_and_the_samples_need():
    """100 MB and 75 MB, where it was 100 and three times 75."""
    compressor = zlib.compressobj()
    rows = b"".join(compressor.compress(b"\0" + b"\x55" * 15000) for _ in range(5000))
    content = png(8, 2, rows + compressor.flush(), size=(5000, 5000))
    with FORKS.Pool(1) as pool:
        assert pool.apply(growth_of_reading, (content,)) < 250


def growth_of_reading(content):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_image(ImageSource("i.png", content=content)).shape == (3, 5000, 5000)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024


def test_the_limit_counts_all_bands_of_a_file():
    samples = np.zeros((HEIGHT, WIDTH, 9), np.uint8)
    pixels = PixelFormat(max_pixels=WIDTH * HEIGHT, bands=(8, 0, 1))
    file = ImageSource(
        "i.tif", content=tiff(samples, planarconfig="contig", photometric="minisblack")
    )
    with pytest.raises(UnreadableImage, match="9 bands of uint8, 3456 bytes: more than 8 times"):
        read_image(file, pixels)
    # A .npy is mapped: bands that aren't chosen cost nothing.
    assert read_image(ImageSource("i.npy", content=npy(samples)), pixels).shape[0] == 3


def test_a_frame_that_outgrows_its_animation_is_refused():
    gif = by_pillow("GIF", save_all=True)
    frame = gif.rindex(b"," + struct.pack("<4H", 0, 0, WIDTH, HEIGHT))
    gif = gif[: frame + 5] + struct.pack("<2H", 60000, 60000) + gif[frame + 9 :]
    source = ImageSource("i.gif", content=gif)
    assert read_image(source).shape == (3, HEIGHT, WIDTH)
    problem = packing._read(OneImage(source), packing.Packing(pages="each"), 0, 1).problem
    assert problem == "i.gif page 1: is a frame that reaches beyond the image"


def test_a_tiff_whose_directories_overlap_is_refused():
    """Thousands of them, of 65,535 tags each, would fit into a megabyte, and take hours."""
    whole = by_pillow("TIFF")
    directories = int.from_bytes(whole[4:8], "little")
    next_at = directories + 2 + 12 * int.from_bytes(whole[directories : directories + 2], "little")
    start, tags = len(whole), 60_000
    more = bytearray(12 * tags + 100)
    more[0:2] = more[4:6] = struct.pack("<H", tags)
    more[2 + 12 * tags : 6 + 12 * tags] = struct.pack("<I", start + 4)
    content = whole[:next_at] + struct.pack("<I", start) + whole[next_at + 4 :] + bytes(more)
    with pytest.raises(UnreadableImage, match="has pages whose tags overlap"):
        describe(ImageSource("i.tif", content=content))


# ---- files that hold less than they claim


def reads(content, suffix, **options):
    try:
        return read_image(ImageSource(f"i.{suffix}", content=content), **options)
    except UnreadableImage:
        return None


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_truncated_file_is_refused_unless_it_has_all_pixels(name, step):
    suffix = name.rpartition(".")[2]
    for content in whole_files(name):
        whole = read_samples(ImageSource(f"i.{suffix}", content=content))
        # A last number in text may lose a digit.
        end = len(content) - 4 * content.startswith((b"P2", b"P3"))
        for length in range(end - 1, 0, -step):
            with contextlib.suppress(UnreadableImage):
                part = read_samples(ImageSource(f"i.{suffix}", content=content[:length]))
                assert np.array_equal(part, whole), length


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_with_a_hole_is_refused_with_libjpegs_reason(mode, capfd):
    """Its end mark is there. libjpeg fills it with grey, and says so on stderr only."""
    image = photograph(150, 100).convert(mode)
    image.save(buffer := io.BytesIO(), "JPEG")
    whole = buffer.getvalue()
    for length in range(whole.index(b"\xff\xda") + 20, len(whole) - 100, 97):
        torn = whole[:length] + b"\xff\xd9"
        with pytest.raises(UnreadableImage) as caught:
            read_image(ImageSource("i\n.jpg", content=torn))
        assert str(caught.value).startswith(r"i\n.jpg: Corrupt JPEG data: ")
        assert reads(torn, "jpg", reduction=lambda height, width: 2) is None
    assert capfd.readouterr() == ("", "")


def test_a_jpeg_with_bytes_that_nothing_needs_is_read_in_silence(capfd):
    whole = by_pillow("JPEG")
    padded = whole[:-2] + bytes(5) + whole[-2:]
    assert torch.equal(reads(padded, "jpg"), reads(whole, "jpg"))
    assert capfd.readouterr() == ("", "")


def test_most_zeroed_blocks_of_a_progressive_jpeg_are_noticed():
    """Of 4 KiB, as a disk loses them. What libjpeg decodes without a warning is read."""
    buffer = io.BytesIO()
    photograph(500, 375).save(buffer, "JPEG", quality=90, progressive=True)
    content = buffer.getvalue()
    starts = range(700, len(content) - 5000, len(content) // 40)
    refused = 0
    for start in starts:
        damaged = content[:start] + bytes(4096) + content[start + 4096 :]
        try:
            read_image(ImageSource("torn.jpg", content=damaged))
        except UnreadableImage:
            refused += 1
    assert refused > 0.8 * len(starts)


def test_a_png_with_too_few_rows_is_refused():
    """Pillow shows the missing ones as black, if the deflated stream ends well."""
    for depth, kind in ((8, 2), (16, 2), (8, 0), (8, 6), (1, 0), (8, 4)):
        bits = depth * {0: 1, 2: 3, 4: 2, 6: 4}[kind]
        rows = (b"\0" + b"\x55" * (WIDTH * bits // 8)) * HEIGHT
        assert reads(png(depth, kind, zlib.compress(rows)), "png", pixels=bands(kind)) is not None
        short = zlib.compress(rows[: -1 - WIDTH * bits // 8])
        assert reads(png(depth, kind, short), "png", pixels=bands(kind)) is None


def bands(kind):
    count = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    return PixelFormat(in_chans=count, mean=(0.5,) * count, std=(0.5,) * count)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "jpeg", "lerc"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_a_tiff_with_short_strips_or_tiles_is_refused(compression, tile):
    samples = np.tile(array(), (4, 4, 1))
    rows = None if tile else 8
    content = tiff(
        samples, photometric="rgb", compression=compression, tile=tile, rowsperstrip=rows
    )
    tag = tifffile.TiffFile(io.BytesIO(content)).pages[0].tags[325 if tile else 279]
    width = tag.valuebytecount // tag.count
    place = slice(tag.valueoffset + width, tag.valueoffset + 2 * width)  # of the second
    for size in (tag.value[1] // 2, tag.value[1] * 9 // 10, 0, (1 << 8 * width) - 1):
        short = bytearray(content)
        short[place] = size.to_bytes(width, "little")
        image = reads(bytes(short), "tif")
        # Sizes of what isn't compressed are known without the tag.
        assert image is None or (compression is None and torch.equal(image, reads(content, "tif")))


# ---- messages


def test_messages_of_c_are_caught_and_those_of_python_are_not(capfd):
    libc = ctypes.CDLL(None)
    stderr = ctypes.c_void_p.in_dll(libc, "stderr")
    for number in range(3):
        with c_messages.Caught() as messages:
            libc.fprintf(stderr, b"from C %d\n", number)
            print("from Python", file=sys.stderr)
            os.write(2, b"from a thread\n")
        assert messages.text == f"from C {number}\n"
    libc.fprintf(stderr, b"afterwards\n")
    expected = "from Python\nfrom a thread\n" * 3 + "afterwards\n"
    assert capfd.readouterr().err == expected
    with FORKS.Pool(1) as pool:  # each process has its own
        assert pool.apply(catch_one) == "in a worker"


def catch_one():
    libc = ctypes.CDLL(None)
    with c_messages.Caught() as messages:
        libc.fputs(b"in a worker", ctypes.c_void_p.in_dll(libc, "stderr"))
    return messages.text


def test_threads_that_decode_at_once_leave_stderr_as_it_was():
    with FORKS.Pool(1) as pool:
        assert pool.apply(print_in_threads) == (4000 * [1], True)
        assert pool.apply(read_in_threads) == ("", True)


def in_threads(function):
    """Call a function with 0, ..., 7 in threads that take turns as often as Python lets them.

    Returns:
        whether C's stderr is the usual one afterwards.
    """
    stderr = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stderr")
    usual, start = stderr.value, threading.Barrier(8)
    threads = [
        threading.Thread(target=lambda number=number: (start.wait(), function(number)))
        for number in range(8)
    ]
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stderr.value == usual


def read_in_threads():
    """What is on stderr after threads read broken JPEGs, and whether it is the usual one."""
    whole = by_pillow("JPEG")
    broken = ImageSource("broken.jpg", content=whole[: len(whole) // 2] + b"\xff\xd9")

    def read(_):
        for _ in range(50):
            with contextlib.suppress(UnreadableImage):
                read_image(broken)

    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        is_usual = in_threads(read)
        file.seek(0)
        return file.read().decode(), is_usual


def print_in_threads():
    """How often each line is caught that threads print once, and whether stderr is the usual."""
    libc, caught = ctypes.CDLL(None), []
    stderr = ctypes.c_void_p.in_dll(libc, "stderr")

    def catch(number):
        for line in range(500):
            with c_messages.Caught() as messages:
                libc.fprintf(stderr, b"%d of %d\n", line, number)
            caught.append(messages.text)

    is_usual = in_threads(catch)
    return list(Counter("".join(caught).splitlines()).values()), is_usual


def test_a_fork_within_a_context_has_the_usual_stderr(capfd):
    libc = ctypes.CDLL(None)
    stderr = ctypes.c_void_p.in_dll(libc, "stderr")
    usual = stderr.value
    with c_messages.Caught() as messages:
        libc.fputs(b"of the parent", stderr)
        if os.fork() == 0:
            outcome = stderr.value == usual
            with c_messages.Caught() as inner:
                libc.fputs(b"of the child", stderr)
            outcome &= inner.text == "of the child" and stderr.value == usual
            messages.__exit__()
            outcome &= not messages.text and stderr.value == usual
            os._exit(not outcome)
        _, status = os.wait()
    assert status == 0
    assert messages.text == "of the parent" and stderr.value == usual
    assert capfd.readouterr() == ("", "")


def is_one_harmless_line(text):
    """Nothing in it moves a terminal's cursor, reorders its line, or can't be encoded."""
    return not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF")
        or unicodedata.bidirectional(c) in ("LRI", "RLI", "FSI", "PDI")
        for c in text
    )


NAMES = ["new\nline", "\x1b[31mred", "bell\a\r", os.fsdecode(b"caf\xe9"), "\u202eback"]


def test_names_are_escaped_in_every_message(tmp_path, capfd, monkeypatch):
    """In those of the survey, of reading, of packing and of errors."""
    data = tmp_path / "a\nb"
    for name in NAMES:
        folder = data / "train" / name
        folder.mkdir(parents=True)
        (folder / f"{name}.jpg").write_bytes(by_pillow("JPEG"))
        (folder / f"{name}.png").write_bytes(b"torn")
        (folder / f"{name}.{name}").write_bytes(b"another")
        os.symlink("nowhere", folder / f"{name}-link.jpg")
    tar = tmp_path / "packed"
    for flags in (
        ["stats", "--data_path", str(data)],
        ["stats", "--data_path", str(data / "nothing")],
        ["pack", "--data_path", str(data), "--output", str(tar), "--num_workers", "0"],
        ["pack", "--data_path", str(data / "\x1b[31m"), "--output", str(tar / "\x1b[1m")],
    ):
        monkeypatch.setattr(sys, "argv", ["main_data.py", *flags])
        with contextlib.suppress(SystemExit):
            cli.run(main_data.main, main_data.get_args_parser())
    out, err = capfd.readouterr()
    assert "caf\\xe9" in out + err and "\\x1b[31mred" in err
    for line in (out + err).splitlines():
        assert is_one_harmless_line(line), line
    assert len(re.findall("^(warning|error): ", err, re.MULTILINE)) == len(err.splitlines())


def test_a_shard_may_say_any_name(tmp_path, capfd):
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for name, content in {
            "0.jpg": by_pillow("JPEG"),
            "0.json": b'{"name": "\\ud800"}',
            "1.jpg": b"torn",
            "1.json": b'{"name": "a\\n\\u001b[31m"}',
            "2.npy": npy(array())[:-1],
            "\x1b[31m.jpg": b"torn",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    images = image_files.find_images(tmp_path, "train")
    assert [images.name(index) for index in range(4)][:2] == ["0.jpg", "a\n\x1b[31m"]
    with pytest.raises(UnreadableImage, match=r"2\.npy: is truncated: claims 1152 bytes"):
        read_image(images.source(2))
    out, err = capfd.readouterr()
    assert all(map(is_one_harmless_line, (out + err).splitlines()))
    assert r"a\n\x1b[31m" in err


if __name__ == "__main__":  # to debug: FORMAT and the number of a mutation
    print(look(sys.argv[1], mutation(sys.argv[1], int(sys.argv[2])), "/tmp"))
