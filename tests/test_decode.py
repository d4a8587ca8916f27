"""--decode scaled, against full decoding, block means in numpy, and reductions by hand."""

import io
import random
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import CPU, difference, photograph, pixels
from PIL import Image, JpegImagePlugin
from torchvision.transforms import v2

from util import data, decoding, image_files, loading
from util.distributed import Process
from util.pixels import PixelFormat

ALONE = Process(0, 1, CPU)
TRANSFORMS = {
    "pretrain": data.pretrain_transform,
    "probe": data.probe_transform,
    "finetune": lambda size: data.finetune_transform(size, aa="none"),
    "eval": data.eval_transform,
    "picture": data.picture_transform,
}


def jpeg(width, height, mode="RGB", orientation=1, **options):
    """A photograph as the bytes of a JPEG file."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image = photograph(width, height).convert(mode)
    image.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif, **options)
    return buffer.getvalue()


def folder(path, contents):
    """The files of these contents, by name, as image paths."""
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return image_files.ImagePaths(path)


def block_means(image, side):
    """Means of an image's blocks of side x side pixels, [3, H / side, W / side], rounded."""
    channels, height, width = image.shape
    blocks = image.numpy().reshape(channels, height // side, side, width // side, side)
    return torch.from_numpy(blocks.mean((2, 4)).round().astype(np.uint8))


@pytest.fixture
def drafts(monkeypatch):
    """By how much the JPEGs that are read from now on are reduced."""
    divisors, draft = [], JpegImagePlugin.JpegImageFile.draft

    def spy(self, mode, size):
        width = self.width
        found = draft(self, mode, size)
        divisors.append(round(width / self.width))
        return found

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    return divisors


# ---- the divisor


@pytest.mark.parametrize(
    ("height", "width", "divisor"),
    [
        (64, 6400, 1),
        (127, 6400, 1),
        (128, 192, 2),
        (128, 191, 1),
        (255, 6400, 2),
        (256, 384, 4),
        (6400, 767, 4),
        (512, 768, 8),
        (99999, 99999, 8),
    ],
)
def test_a_region_stays_twice_as_large_as_its_resized_image(height, width, divisor):
    view = data.View((5, 7, height, width), (32, 48), (99999, 99999))
    assert view.reduction() == divisor


# ---- reading


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_a_reduced_image_is_the_means_of_blocks(divisor, mode, options, drafts):
    content = jpeg(640, 480, mode, **options)
    full = pixels(Image.open(io.BytesIO(content)))
    source = decoding.ImageSource("a.jpg", content=content)
    reduced = decoding.read_image(source, reduction=lambda height, width: divisor)
    largest, mean = difference(reduced, block_means(full, divisor))
    assert largest <= 12
    assert mean < 1
    assert drafts == [divisor]


@pytest.mark.parametrize("size", [(4001, 2667), (67, 33), (8, 9), (17, 15)], ids=str)
@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_sides_are_asked_for_as_stored_and_rounded_up(size, divisor):
    asked = []
    source = decoding.ImageSource("a.jpg", content=jpeg(*size))
    image = decoding.read_image(source, reduction=lambda *sides: asked.append(sides) or divisor)
    assert asked == [size[::-1]]
    assert image.shape == (3, -(-size[1] // divisor), -(-size[0] // divisor))
    if divisor == 1:
        assert torch.equal(image, decoding.read_image(source))


@pytest.mark.parametrize("orientation", range(10))
def test_the_exif_orientation_is_applied_where_it_is_asked_for(orientation):
    content = jpeg(640, 480, orientation=orientation)
    turned = np.asarray(Image.open(io.BytesIO(content)))
    turns = {2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (3, 1), 6: (3, 0), 7: (1, 1), 8: (1, 0)}
    quarters, flip = turns.get(orientation, (0, 0))
    turned = np.rot90(turned, quarters)
    turned = torch.from_numpy((turned[:, ::-1] if flip else turned).copy()).permute(2, 0, 1)
    source, asked = decoding.ImageSource("a.jpg", content=content), []

    def reduction(*sides):
        asked.append(sides)
        return 4

    as_stored = decoding.read_image(source, reduction=reduction)
    assert as_stored.shape == (3, 120, 160)
    image = decoding.read_image(source, PixelFormat(exif_orientation=True), reduction)
    assert asked == [(480, 640), tuple(turned.shape[1:])]
    assert difference(image, block_means(turned, 4))[1] < 1


def test_a_turned_image_with_part_of_a_block_at_its_edge_is_not_reduced():
    for orientation, width, height in ((6, 641, 480), (3, 640, 481)):
        source = decoding.ImageSource("a.jpg", content=jpeg(width, height, orientation=orientation))
        decoding.read_image(source, PixelFormat(exif_orientation=True), pytest.fail)


def test_a_jpeg_of_too_many_pixels_is_refused():
    source = decoding.ImageSource("a.jpg", content=jpeg(640, 480))
    with pytest.raises(decoding.UnreadableImage, match="claims 640 x 480"):
        decoding.read_image(source, PixelFormat(max_pixels=640 * 479), lambda *_: 8)


def test_of_several_images_in_a_jpeg_the_first_is_read():
    buffer = io.BytesIO()
    first, second = photograph(640, 480), photograph(640, 480, seed=1)
    first.save(buffer, "MPO", save_all=True, append_images=[second], quality=95, subsampling=0)
    source = decoding.ImageSource("a.jpg", content=buffer.getvalue())
    reduced = decoding.read_image(source, reduction=lambda height, width: 8)
    assert difference(reduced, block_means(pixels(first), 8))[1] < 1


@pytest.mark.parametrize("kept", [3, 20, 300, 20_000])
def test_a_torn_jpeg_is_as_unreadable_as_in_full(kept, tmp_path):
    paths = folder(tmp_path, {"a.jpg": jpeg(640, 480)[:kept]})
    problems = []
    for decode in ("full", "scaled"):
        dataset = loading.ImageDataset(paths, data.eval_transform(32), 0, decode=decode)
        problems.append(re.sub("0x[0-9a-f]+", "", dataset[0, 0][3]))
    assert problems[0]
    assert problems[0] == problems[1]


# ---- samples


@pytest.mark.parametrize(
    ("width", "height", "size"), [(1201, 803, 64), (803, 1201, (96, 48)), (4001, 2667, 224)]
)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_region_is_seen_as_in_full(name, width, height, size, tmp_path, drafts):
    paths = folder(tmp_path, {"a.jpg": jpeg(width, height)})
    transform = TRANSFORMS[name](size)
    for seed in range(20 if width < 4000 else 2):
        samples, draws = [], []
        for decode in ("full", "scaled"):
            samples.append(loading.ImageDataset(paths, transform, seed, decode=decode)[0, 0][0])
            draws.append((torch.rand(()).item(), random.random()))
        largest, mean = difference(*samples)
        assert largest <= 20  # at the edges, which see a part of a reduced pixel more
        assert mean < 1
        assert draws[0] == draws[1]
    assert {2, 4} & {*drafts}


def test_a_policy_changes_the_same_region_in_the_same_way(tmp_path):
    """Some of its changes, such as posterize, make more of a small difference."""
    paths = folder(tmp_path, {"a.jpg": jpeg(1201, 803)})
    transform, means = data.finetune_transform(64), []
    for seed in range(20):
        full, scaled = (
            loading.ImageDataset(paths, transform, seed, decode=decode)[0, 0][0]
            for decode in ("full", "scaled")
        )
        means.append(difference(full, scaled)[1])
    assert np.median(means) < 1


@pytest.mark.parametrize("name", TRANSFORMS)
def test_other_files_and_small_images_are_read_as_in_full(name, tmp_path, drafts):
    contents = {"small.jpg": jpeg(63, 63), "tiny.jpg": jpeg(1, 1), "grey.jpg": jpeg(60, 40, "L")}
    for image_format in ("PNG", "WEBP", "BMP"):
        buffer = io.BytesIO()
        photograph(320, 240).save(buffer, image_format)
        contents[f"large.{image_format.lower()}"] = buffer.getvalue()
    paths = folder(tmp_path, contents)
    full, scaled = (
        loading.ImageDataset(paths, TRANSFORMS[name](32), 0, decode=decode)
        for decode in ("full", "scaled")
    )
    for index in range(len(paths)):
        assert torch.equal(full[0, index][0], scaled[0, index][0])
    assert not drafts


def test_samples_are_the_same_in_workers_and_here(tmp_path):
    paths = folder(tmp_path, {f"{index}.jpg": jpeg(400, 300) for index in range(4)})
    options = {"batch_size": 2, "accum_iter": 1, "seed": 3, "pin_mem": False, "decode": "scaled"}
    loaders = [
        loading.train_loader(
            paths, data.pretrain_transform(16), ALONE, num_workers=workers, **options
        )
        for workers in (0, 2)
    ]
    for epoch in (0, 1):
        here, there = (list(loader.train_batches(epoch)) for loader in loaders)
        assert all(torch.equal(a.imgs, b.imgs) for a, b in zip(here, there, strict=True))
        assert not any(torch.equal(a.imgs, b.imgs) for a, b in pairwise(here))


@pytest.mark.parametrize(
    "pixel_format",
    [
        PixelFormat(in_chans=1, mean=(0.5,), std=(0.5,)),
        PixelFormat(bands=(2, 1, 0)),
        PixelFormat(value_range=(0, 100)),
        PixelFormat(nodata=0.0),
    ],
    ids=str,
)
def test_other_pixels_are_read_in_full_with_a_warning(pixel_format, tmp_path, capsys):
    paths = folder(tmp_path, {"a.jpg": jpeg(64, 48)})
    loader = loading.train_loader(
        paths,
        data.pretrain_transform(8),
        ALONE,
        batch_size=1,
        accum_iter=1,
        seed=0,
        num_workers=0,
        pin_mem=False,
        pixels=pixel_format,
        decode="scaled",
    )
    assert not loader.dataset.reduces
    assert capsys.readouterr().err.startswith("warning: --decode scaled is for the three bands of ")


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_the_layout_of_an_image_changes_no_bit_of_its_crop(bands, dtype):
    planar = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (bands, 90, 120)))
    planar = planar.to(dtype) if dtype == torch.uint8 else planar.to(dtype) / 255
    interleaved = planar.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for size in ((16, 24), (100, 130)):
        crops = [data.resized_crop(image, 5, 9, 71, 93, size) for image in (planar, interleaved)]
        expected = v2.functional.resized_crop(
            planar, 5, 9, 71, 93, list(size), data.BICUBIC, antialias=True
        )
        assert torch.equal(*crops)
        assert torch.equal(crops[0], expected if dtype == torch.uint8 else expected.clamp(0, 1))


# ---- commands


@pytest.mark.parametrize("command", ["pretrain", "finetune", "linprobe"])
def test_a_training_resumes_only_as_its_images_were_decoded(
    command, pretrain_flags, classify_flags, request, user_error, drafts, tmp_path
):
    """Both training and evaluation decode as the flag says; in full, if it isn't given."""
    root = tmp_path / "images"
    for part in ("train/a", "train/b", "val/a", "val/b"):
        (root / part).mkdir(parents=True)
        (root / part / "1.jpg").write_bytes(jpeg(200, 160))
    flags = pretrain_flags if command == "pretrain" else classify_flags
    flags = flags | {"data_path": root, "warmup_epochs": 0, "save_every": 1}
    run = request.getfixturevalue(command)
    run(flags | {"epochs": 1})
    assert not drafts
    message = user_error(lambda: run(flags | {"epochs": 1, "decode": "scaled"}))
    assert "decode (full -> scaled)" in message
    run(flags | {"epochs": 1, "decode": "scaled", "output_dir": tmp_path / "scaled"})
    assert len(drafts) >= 4
