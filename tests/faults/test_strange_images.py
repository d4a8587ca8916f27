"""Images from strangers: files that claim too much, hold too little, or are named to mislead.

Thousands of damaged files of every format are read in processes of their own: each is either an
image or refused by name, in bounded memory and time, in silence, and nothing but reading happens.
"""

import functools
import io
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import zlib

import numpy as np
import pytest
from helpers import FORKS, photograph

from util import packing
from util.decoding import ImageSource, UnreadableImage, describe, read_image, read_samples

imagecodecs = pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")

WIDTH, HEIGHT = 24, 16
SECONDS = 20  # of CPU time for a file, a guard against hangs
MIB = 1 << 20


# ---- whole files to damage


def by_pillow(image_format, mode="RGB", **options):
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
    tifffile.imwrite(buffer, samples, **options)
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
        tiff(array(3, np.uint16).transpose(2, 0, 1).copy(), planarconfig="separate", bigtiff=True),
        tiff(array(3, np.uint16), photometric="rgb", compression="lzw", byteorder=">"),
        tiff(
            array(1, np.int32)[..., 0], photometric="minisblack", rowsperstrip=4, compression="zstd"
        ),
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


def look(name, content):
    """Read a file in each way; returns in how many it is an image."""
    suffix = name.rpartition(".")[2]
    path = f"/tmp/strange-{os.getpid()}.{suffix}"
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
    assert not message or message.startswith(("i.", "/tmp/strange-")), message
    assert message.isprintable() and len(message) < 400, message
    assert "memory" not in message and "alloc" not in message, message


def read_all(name, make, first, last, growth, progress, stderr):
    """Read files that `make` makes of a name and a number, which is noted before each."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    note = os.open(progress, os.O_WRONLY)
    for content in whole_files(name):
        look(name, content)
    sys.addaudithook(forbid)
    with open("/proc/self/statm") as file:  # spares the machine; a test allows less
        size = int(file.read().split()[0]) * resource.getpagesize() + 3072 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = 0
    for number in range(first, last):
        os.pwrite(note, b"%8d %8d" % (number, images), 0)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        images += look(name, make(name, number)) > 0
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
    with tempfile.NamedTemporaryFile("r+") as stderr, tempfile.NamedTemporaryFile("r+") as progress:
        while first < number and len(faults) < 5:
            progress.seek(0)
            progress.write(f"{first:8} {0:8}")
            progress.flush()
            arguments = (name, make, first, number, growth, progress.name, stderr.name)
            reader = FORKS.Process(target=read_all, args=arguments)
            reader.start()
            reader.join(600)
            reader.kill()
            reader.join()
            progress.seek(0)
            last, count = map(int, progress.read().split())
            images += count
            if reader.exitcode:
                faults.append(f"{name} {last} ends the process by {reader.exitcode}")
            first = last + 1
        assert (faults, stderr.read()) == ([], "")
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
