"""From image files to batches, against Pillow, torchvision's Pillow transforms and hand counts."""

import gc
import io
import itertools
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from helpers import CPU, difference, encode, fill, photograph, pixels, resize_in_passes
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from util import data, decoding, image_files, loading
from util.distributed import Process
from util.errors import UserError

ALONE = Process(0, 1, CPU)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- images and folders to test on


def png_file(width, height, depth, color_type, compressed):
    """The bytes of a PNG with a content that Pillow would not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + compressed, b"IEND"]
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def relative_names(paths):
    """What an ImagePaths lists, without its folder."""
    return [os.path.relpath(path, os.fsdecode(paths.root)) for path in paths]


@pytest.fixture(scope="session")
def album(tmp_path_factory):
    """Twelve photographs."""
    root = tmp_path_factory.mktemp("album")
    for index in range(12):
        photograph(30, 24, seed=index).save(root / f"{index:02d}.jpg")
    return root


@pytest.fixture
def torn_album(album, tmp_path):
    """The album with three of its twelve images (1, 5 and 6) unreadable."""
    root = tmp_path / "torn"
    shutil.copytree(album, root)
    return fill(root, ["01.jpg", "05.jpg", "06.jpg"], b"torn")


def image_loader(root, *, batch_size=4, num_workers=0, seed=0):
    """A loader of training batches of 16 x 16 pixels for a single process."""
    paths = image_files.ImagePaths(root)
    dataset = loading.ImageDataset(paths, data.pretrain_transform(16), seed)
    batches = loading.ShuffledBatches(len(paths), batch_size, ALONE, seed)
    return loading.ImageLoader(dataset, batches, ALONE, num_workers=num_workers, pin_mem=False)


# ---- reading one file


@pytest.mark.parametrize(
    ("suffix", "image_format", "mode", "options"),
    [
        ("jpg", "JPEG", "RGB", {}),
        ("jpeg", "JPEG", "RGB", {"subsampling": 0, "quality": 95}),
        ("jpe", "JPEG", "L", {}),
        ("jfif", "JPEG", "CMYK", {}),
        ("jpg", "JPEG", "RGB", {"progressive": True}),
        ("png", "PNG", "RGB", {}),
        ("png", "PNG", "RGB", {"transparency": (10, 20, 30)}),
        ("png", "PNG", "L", {}),
        ("png", "PNG", "P", {}),
        ("png", "PNG", "P", {"transparency": 3}),
        ("png", "PNG", "RGBA", {}),
        ("png", "PNG", "LA", {}),
        ("png", "PNG", "1", {}),
        ("webp", "WEBP", "RGB", {}),
        ("webp", "WEBP", "RGB", {"lossless": True}),
        ("webp", "WEBP", "RGBA", {}),
        ("webp", "WEBP", "RGB", {"save_all": True}),
        ("gif", "GIF", "RGB", {}),
        ("gif", "GIF", "P", {"transparency": 3}),
        ("gif", "GIF", "RGB", {"save_all": True}),
        ("bmp", "BMP", "RGB", {}),
        ("bmp", "BMP", "P", {}),
        ("tif", "TIFF", "RGB", {}),
        ("tiff", "TIFF", "CMYK", {}),
        ("tiff", "TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("ppm", "PPM", "RGB", {}),
        ("pgm", "PPM", "L", {}),
        ("pbm", "PPM", "1", {}),
        ("pnm", "PPM", "RGB", {}),
    ],
    ids=str,
)
def test_every_format_is_found_and_reads_as_pillow_converts_it(
    tmp_path, suffix, image_format, mode, options
):
    encoded = encode(image_format, mode, **options)
    expected = pixels(Image.open(io.BytesIO(encoded)))
    names = [f"1.{suffix.upper()}", f"2.{suffix}", f"3.{suffix.capitalize()}"]
    paths = image_files.ImagePaths(fill(tmp_path, names, encoded))
    assert relative_names(paths) == names
    for path in paths:
        image = decoding.read_image(path)
        assert image.dtype == torch.uint8
        assert torch.equal(image, expected)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_lossless_formats_give_back_the_pixels_that_were_saved(tmp_path, suffix):
    image = photograph(61, 47)
    image.save(tmp_path / f"image.{suffix}")
    assert torch.equal(decoding.read_image(tmp_path / f"image.{suffix}"), pixels(image))


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"animation.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        assert torch.equal(decoding.read_image(path), pixels(frames[0]))


def deep_values(channels):
    """uint16 [47, 61, channels] over the whole range, of which few bytes repeat."""
    return np.random.default_rng(channels).integers(0, 2**16, (47, 61, channels), dtype=np.uint16)


def deep_gray(image_format, byte_order="<u2"):
    """`deep_values` in a file as Pillow writes it."""
    mode = "I;16" if byte_order == "<u2" else "I;16B"
    buffer = io.BytesIO()
    pixel_bytes = deep_values(1).astype(byte_order).tobytes()
    Image.frombytes(mode, (61, 47), pixel_bytes).save(buffer, image_format)
    return buffer.getvalue()


def deep_png(color_type):
    """`deep_values` in a PNG of a type that Pillow does not write."""
    channels = {2: 3, 4: 2, 6: 4}[color_type]
    rows = (b"\0" + row.tobytes() for row in deep_values(channels).astype(">u2"))
    return png_file(61, 47, 16, color_type, zlib.compress(b"".join(rows)))


@pytest.mark.parametrize(
    ("channels", "encoded"),
    [
        pytest.param(1, deep_gray("PNG"), id="grey PNG"),
        pytest.param(1, deep_gray("TIFF"), id="grey TIFF"),
        pytest.param(1, deep_gray("TIFF", ">u2"), id="big-endian grey TIFF"),
        pytest.param(1, deep_gray("PPM"), id="PGM"),
        pytest.param(2, deep_png(4), id="grey PNG with alpha"),
        pytest.param(3, deep_png(2), id="RGB PNG"),
        pytest.param(4, deep_png(6), id="RGBA PNG"),
    ],
)
def test_16_bits_are_scaled_to_8(tmp_path, channels, encoded):
    path = tmp_path / "deep"
    path.write_bytes(encoded)
    colors = deep_values(channels)[..., : 3 if channels > 2 else 1]
    expected = torch.from_numpy((colors >> 8).astype(np.uint8)).permute(2, 0, 1).expand(3, -1, -1)
    assert torch.equal(decoding.read_image(path), expected)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not an image\n", id="text"),
        pytest.param(bytes(1000), id="zeros"),
        pytest.param(PNG_SIGNATURE, id="PNG signature alone"),
        *(
            pytest.param(encode(*kind)[: int(part * len(encode(*kind)))], id=f"{part} of {kind}")
            for kind in (("JPEG",), ("JPEG", "CMYK"), ("PNG",), ("PNG", "P"), ("WEBP",), ("TIFF",))
            for part in (0.01, 0.3, 0.6, 0.95)
        ),
        pytest.param(encode("JPEG")[:-2], id="JPEG without its end mark"),
    ],
)
def test_a_broken_file_is_unreadable_by_name(tmp_path, content):
    path = tmp_path / "broken image.jpg"
    path.write_bytes(content)
    with pytest.raises(decoding.UnreadableImage, match=r"broken image\.jpg"):
        decoding.read_image(path)


def test_a_missing_file_and_a_folder_are_unreadable_by_name(tmp_path):
    for path in (tmp_path / "missing.jpg", fill(tmp_path / "folder.jpg", ["1.jpg"])):
        with pytest.raises(decoding.UnreadableImage, match=path.name):
            decoding.read_image(path)


def flip_a_bit(encoded):
    """The bytes of a file of which one bit has changed, in the middle."""
    middle = len(encoded) // 2
    return encoded[:middle] + bytes([encoded[middle] ^ 4]) + encoded[middle + 1 :]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(flip_a_bit(encode("PNG")), id="flipped bit"),
        pytest.param(flip_a_bit(encode("PNG", "P")), id="flipped bit, palette"),
        pytest.param(png_file(61, 47, 8, 2, b"not deflated"), id="checksums right, content not"),
        pytest.param(png_file(61, 47, 8, 2, b""), id="no content"),
    ],
)
def test_a_damaged_png_is_unreadable_and_crashes_no_worker(tmp_path, content):
    """Read in a worker process, so that a decoder that crashes fails this test alone."""
    fill(tmp_path, ["1.jpg"])
    fill(tmp_path, ["2.png"], content)
    loader = image_loader(tmp_path, batch_size=2, num_workers=1)
    (batch,) = loader.train_batches(0)
    assert batch.unreadable == 1


# ---- transforms


@pytest.fixture(params=[(500, 375), (640, 427), (375, 500), (28, 28)], ids=str)
def photograph_file(request, tmp_path):
    path = tmp_path / "photograph.jpg"
    photograph(*request.param).save(path, quality=90)
    return path


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (32, 32)], ids=str)
def test_pretrain_transform_agrees_with_the_pillow_pipeline(photograph_file, size):
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    bicubic = transforms.InterpolationMode.BICUBIC
    pillow_pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale, ratio, bicubic),
            transforms.RandomHorizontalFlip(),
        ]
    )
    transform = data.pretrain_transform(size)
    image, opened = decoding.read_image(photograph_file), Image.open(photograph_file)
    flips = set()
    for seed in range(6):
        torch.manual_seed(seed)
        cropped, next_draw = transform(image), torch.rand(())

        torch.manual_seed(seed)
        largest, _ = difference(cropped, pixels(pillow_pipeline(opened)))
        assert largest <= 2
        assert torch.rand(()) == next_draw

        torch.manual_seed(seed)
        top, left, h, w = transforms.RandomResizedCrop.get_params(opened, scale, ratio)
        expected = resize_in_passes(opened.crop((left, top, left + w, top + h)), *size)
        flip = torch.rand(()).item() < 0.5
        if flip:
            expected = expected.transpose(Image.FLIP_LEFT_RIGHT)
        largest, mean = difference(cropped, pixels(expected))
        assert largest <= 2
        assert mean <= 0.05
        flips.add(flip)
    assert flips == {True, False}


@pytest.mark.parametrize("width_height", [(500, 375), (40, 40), (200, 10), (10, 200)], ids=str)
def test_crops_are_torchvisions_to_the_bit(width_height):
    image = pixels(photograph(*width_height))
    bicubic = transforms.InterpolationMode.BICUBIC
    expected = v2.RandomResizedCrop((32, 48), (0.2, 1.0), interpolation=bicubic, antialias=True)
    for seed in range(50):
        crops = []
        for crop in (data.FastResizedCrop((32, 48), (0.2, 1.0)), expected):
            torch.manual_seed(seed)
            crops.append(crop(image))
        assert torch.equal(*crops)


@pytest.mark.parametrize(
    ("size", "resized"), [(224, 256), (192, 219), (28, 32), (225, 225), (384, 384)]
)
def test_eval_transform_agrees_with_the_pillow_pipeline(photograph_file, size, resized):
    """With a margin of 256 / 224 up to 224, without one above."""
    image, opened = decoding.read_image(photograph_file), Image.open(photograph_file)
    center_crop = transforms.CenterCrop(size)
    whole = transforms.Resize(resized, transforms.InterpolationMode.BICUBIC)(opened)
    cropped = data.eval_transform(size)(image)
    largest, _ = difference(cropped, pixels(center_crop(whole)))
    assert largest <= 2
    expected = center_crop(resize_in_passes(opened, whole.height, whole.width))
    largest, mean = difference(cropped, pixels(expected))
    assert largest <= 2
    assert mean <= 0.05


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (160, 96), (384, 32)], ids=str)
@pytest.mark.parametrize("source", [(1, 1), (3, 200), (200, 3), (61, 47)], ids=str)
def test_images_of_any_shape_become_the_size_asked_for(source, size):
    image = pixels(photograph(*source))
    for transform in (data.pretrain_transform(size), data.eval_transform(size)):
        assert transform(image).shape == (3, *size)


@pytest.mark.parametrize(
    ("source", "resized"),
    [((300, 200), (184, 122)), ((100, 300), (184, 552)), ((366, 150), (265, 109))],
    ids=str,
)
def test_eval_transform_to_a_rectangle_keeps_the_aspect_ratio(source, resized):
    """To 161 x 96 pixels of the smallest image that covers 184 x 109, 256 / 224 of that."""
    image = photograph(*source[::-1])
    expected = transforms.CenterCrop((161, 96))(resize_in_passes(image, *resized))
    largest, mean = difference(data.eval_transform((161, 96))(pixels(image)), pixels(expected))
    assert largest <= 2
    assert mean <= 0.05


def test_normalize_agrees_with_torchvision_and_denormalize_inverts_it():
    image = photograph(61, 47)
    expected = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )(image)
    normalized = data.normalize(pixels(image)[None])
    torch.testing.assert_close(normalized, expected[None], rtol=0, atol=1e-6)
    colors = data.denormalize(normalized)
    torch.testing.assert_close(colors[0], transforms.ToTensor()(image), rtol=0, atol=1e-6)


def test_denormalize_clamps_to_colors():
    colors = data.denormalize(torch.tensor([-9.0, 9.0])[:, None, None, None].expand(2, 3, 2, 2))
    assert colors[0].eq(0).all()
    assert colors[1].eq(1).all()


# ---- folders


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg"], ["cat/1.jpg", "dog/2.jpg"]),
        (["train/2.jpg", "train/1.jpg", "3.jpg"], ["1.jpg", "2.jpg"]),
        (
            ["train/a/b/c/1.jpg", "train/a/2.jpg", "train/3.jpg"],
            ["3.jpg", "a/2.jpg", "a/b/c/1.jpg"],
        ),
        (["2.jpg", "1.jpg"], ["1.jpg", "2.jpg"]),
        (["cat/1.jpg", "dog/2.jpg"], ["cat/1.jpg", "dog/2.jpg"]),
        (["a/b/c/1.jpg", "a/2.jpg", "3.jpg"], ["3.jpg", "a/2.jpg", "a/b/c/1.jpg"]),
    ],
    ids=["labelled", "flat train", "nested train", "flat", "labelled without train", "nested"],
)
def test_training_images_are_those_below_train_or_else_all(tmp_path, names, expected):
    paths = image_files.find_images(fill(tmp_path, names), "train")
    assert relative_names(paths) == expected
    assert len(paths) == len(expected)
    assert all(decoding.read_image(path).shape == (3, 47, 61) for path in paths)


def test_held_out_images_are_those_below_val_or_none(tmp_path):
    fill(tmp_path, ["train/cat/1.jpg", "2.jpg"])
    assert image_files.find_images(tmp_path, "val") is None
    fill(tmp_path, ["val/cat/3.jpg"])
    assert relative_names(image_files.find_images(tmp_path, "val")) == ["cat/3.jpg"]


def test_hidden_files_and_other_files_are_ignored(tmp_path):
    fill(tmp_path, [".1.jpg", "._2.jpg", ".cache/3.jpg", "a/.b/4.jpg", "a/._5.jpg"])
    fill(tmp_path, ["labels.csv", "a/notes.txt", "a/6.jpg.txt", "a/jpg", "a/7jpg", "Thumbs.db"])
    fill(tmp_path, ["a/8.jpg", "folder.jpg/9.jpg"])
    assert relative_names(image_files.ImagePaths(tmp_path)) == ["a/8.jpg", "folder.jpg/9.jpg"]


def test_links_in_circles_count_an_image_once_and_a_pipe_is_unreadable(tmp_path):
    fill(tmp_path, ["a/1.jpg", "2.jpg"])
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to(tmp_path / "a")
    assert relative_names(image_files.ImagePaths(tmp_path)) == ["2.jpg", "a/1.jpg"]
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(decoding.UnreadableImage, match=r"pipe\.jpg"):
        decoding.read_image(tmp_path / "pipe.jpg")


def test_32_bit_integers_of_8_bits_are_kept_and_of_16_are_scaled(tmp_path):
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    for scale in (1, 256):
        Image.fromarray(values * scale).save(tmp_path / "deep.tif")
        assert np.array_equal(decoding.read_image(tmp_path / "deep.tif")[0], values)


def test_symlinked_folders_and_files_are_followed(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", ["cats/1.jpg", "2.jpg"])
    fill(tmp_path / "images", ["train/dog/3.jpg"])
    (tmp_path / "images/train/cat").symlink_to(elsewhere / "cats")
    (tmp_path / "images/train/dog/4.jpg").symlink_to(elsewhere / "2.jpg")
    paths = image_files.find_images(tmp_path / "images", "train")
    assert relative_names(paths) == ["cat/1.jpg", "dog/3.jpg", "dog/4.jpg"]
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    assert relative_names(image_files.find_images(tmp_path / "linked", "train")) == relative_names(
        paths
    )


@pytest.mark.parametrize(
    "name",
    [
        "with space .jpg",
        "a folder/it's.jpg",
        "na\u00efve \u65e5\u672c.jpg",
        "new\nline.jpg",
        pytest.param(
            b"caf\xe9/\xff.jpg",
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses such names"),
        ),
    ],
    ids=ascii,
)
def test_any_name_is_found_and_read(tmp_path, name):
    (path,) = image_files.find_images(fill(tmp_path, [name]), "train")
    assert os.fsencode(path) == os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    assert decoding.read_image(path).shape == (3, 47, 61)


def test_paths_are_in_the_order_of_their_bytes(tmp_path):
    names = ["b/1.jpg", "a/9.jpg", "a/10.jpg", "a b/1.jpg", "a.jpg", "Z.jpg", "\u00e4.jpg", "z.jpg"]
    paths = image_files.ImagePaths(fill(tmp_path, names))
    expected = sorted(names, key=os.fsencode)
    assert relative_names(paths) == expected
    for index in (5, 0, 7, 4):
        assert paths[index] == str(tmp_path / expected[index])


def test_the_fingerprint_is_that_of_the_names(tmp_path):
    """Wherever the folder is and in whatever order its files were written."""
    names = ["a/1.jpg", "a/2.jpg", "b/1.jpg"]
    fingerprint = image_files.ImagePaths(fill(tmp_path / "original", names)).fingerprint
    copy = fill(tmp_path / "copy", reversed(names))
    assert image_files.ImagePaths(copy).fingerprint == fingerprint
    seen = {fingerprint}
    for number, changed in enumerate(
        [
            [*names, "b/2.jpg"],
            names[:-1],
            ["a/1.jpg", "a/2.jpg", "b/3.jpg"],
            ["a/1.jpg", "b/1.jpg", "b/2.jpg"],
            ["a/1.jpga/2.jpg", "b/1.jpg"],
        ],
        start=1,
    ):
        seen.add(image_files.ImagePaths(fill(tmp_path / str(number), changed)).fingerprint)
        assert len(seen) == 1 + number


@pytest.mark.parametrize("split", ["train", "val"])
def test_folders_without_images_are_the_users_error(tmp_path, split):
    (tmp_path / split).mkdir()
    with pytest.raises(UserError, match=f"{split} has no images"):
        image_files.find_images(tmp_path, split)
    fill(tmp_path, [f"{split}/notes.txt", f"{split}/.1.jpg"])
    with pytest.raises(UserError, match=f"{split} has no images"):
        image_files.find_images(tmp_path, split)


def test_a_missing_path_and_a_file_are_the_users_error(tmp_path):
    with pytest.raises(UserError, match="missing does not exist"):
        image_files.find_images(tmp_path / "missing", "train")
    fill(tmp_path, ["1.jpg"])
    with pytest.raises(UserError, match=r"1\.jpg is a file"):
        image_files.find_images(tmp_path / "1.jpg", "train")


@pytest.mark.parametrize("count", [1, 30, 100])
def test_a_folder_with_no_readable_image_is_the_users_error(tmp_path, count):
    names = [f"{index:03d}.jpg" for index in range(count)]
    fill(tmp_path, names, b"torn")
    with pytest.raises(UserError, match=r"no readable images.*000\.jpg"):
        image_files.find_images(tmp_path, "train")


@pytest.mark.parametrize("readable", range(0, 20, 3))
def test_one_readable_image_in_a_small_folder_is_enough(tmp_path, readable):
    fill(tmp_path, [f"{index:03d}.jpg" for index in range(20)], b"torn")
    fill(tmp_path, [f"{readable:03d}.jpg"])
    assert len(image_files.find_images(tmp_path, "train")) == 20


# ---- samples


@pytest.fixture
def copies(tmp_path):
    """Four files of one image, whose samples differ by their augmentation alone."""
    return image_files.ImagePaths(fill(tmp_path / "copies", [f"{index}.jpg" for index in range(4)]))


def test_a_sample_is_a_function_of_seed_epoch_and_index(copies):
    transform = data.pretrain_transform(16)
    datasets = [loading.ImageDataset(copies, transform, seed) for seed in (0, 1)]
    keys = list(itertools.product((0, 1), (0, 1, 2), range(4)))
    samples = {}
    for seed, epoch, index in keys:
        image, _, returned, problem = datasets[seed][epoch, index]
        assert (returned, problem) == (index, "")
        samples[seed, epoch, index] = image
    for one, other in itertools.combinations(samples.values(), 2):
        assert not torch.equal(one, other)
    for seed, epoch, index in reversed(keys):
        torch.rand(index + 1), np.random.rand(2)
        again, *_ = loading.ImageDataset(copies, transform, seed)[epoch, index]
        assert torch.equal(again, samples[seed, epoch, index])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_yields_the_samples_of_its_batches(torn_album, num_workers):
    """The same ones whatever the number of workers, also where images are unreadable."""
    loader = image_loader(torn_album, num_workers=num_workers)
    dataset, batches = loader.dataset, loading.ShuffledBatches(12, 4, ALONE, seed=0)
    for epoch, first_step in ((0, 0), (1, 2), (2, 1)):
        batches.epoch = epoch
        found = list(loader.train_batches(epoch, first_step))
        assert [batch.step for batch in found] == list(range(first_step, 3))
        for batch, keys in zip(found, list(batches)[first_step:], strict=True):
            expected = data.normalize(torch.stack([dataset[key][0] for key in keys]))
            assert torch.equal(batch.imgs, expected)


def test_an_unreadable_image_is_replaced_by_a_readable_one(torn_album):
    paths = image_files.ImagePaths(torn_album)
    album = {index: decoding.read_image(paths[index]) for index in (0, 2, 3, 4, *range(7, 12))}
    datasets = [loading.ImageDataset(paths, torch.nn.Identity(), seed=0) for _ in range(2)]
    replacements = set()
    for epoch, index in itertools.product(range(4), (1, 5, 6)):
        image, _, returned, problem = datasets[0][epoch, index]
        assert returned == index
        assert problem.startswith(f"{paths[index]}: ")
        (source,) = (source for source in album if torch.equal(album[source], image))
        replacements.add(source)
        assert torch.equal(datasets[1][epoch, index][0], image)
    assert len(replacements) > 3


def test_a_sample_of_unreadable_images_alone_is_black_and_flagged(tmp_path):
    paths = image_files.ImagePaths(fill(tmp_path, ["1.jpg", "2.jpg"], b"torn"))
    dataset = loading.ImageDataset(paths, data.pretrain_transform(16), seed=0)
    for epoch, index in itertools.product(range(5), (0, 1)):
        image, _, returned, problem = dataset[epoch, index]
        assert torch.equal(image, torch.zeros(3, 16, 16, dtype=torch.uint8))
        assert returned == index
        assert problem.startswith(f"{paths[index]}: ")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_counted_an_epoch_and_warned_of_once(torn_album, num_workers, capfd):
    loader = image_loader(torn_album, num_workers=num_workers)
    for epoch in (0, 1):
        assert sum(batch.unreadable for batch in loader.train_batches(epoch)) == 3
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 3
    for name in ("01.jpg", "05.jpg", "06.jpg"):
        assert sum(str(torn_album / name) in line for line in warnings) == 1


def test_evaluation_batches_say_which_images_were_readable(torn_album):
    paths = image_files.ImagePaths(torn_album)
    dataset = loading.ImageDataset(paths, data.eval_transform(16), seed=0)
    batches = loading.OrderedBatches(len(paths), 5, ALONE)
    loader = loading.ImageLoader(dataset, batches, ALONE, num_workers=0, pin_mem=False)
    images, _, indices, readable = (
        torch.cat(parts) for parts in zip(*loader.eval_batches(), strict=True)
    )
    assert images.shape == (12, 3, 16, 16)
    assert indices.tolist() == list(range(12))
    assert indices[~readable].tolist() == [1, 5, 6]


# ---- batches


def keys_by_step(num_images, batch_size, world_size, *, seed=0, epoch=0, first_step=0):
    """The keys of every step of an epoch: a list of one batch a process."""
    ranks = []
    for rank in range(world_size):
        batches = loading.ShuffledBatches(
            num_images, batch_size, Process(rank, world_size, CPU), seed
        )
        batches.epoch, batches.first_step = epoch, first_step
        ranks.append(list(batches))
        assert len(batches) == num_images // (batch_size * world_size)
    return list(zip(*ranks, strict=True))


@pytest.mark.parametrize("num_images", [32, 37, 39])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shuffled_batches_are_disjoint_and_full(num_images, world_size):
    for epoch in (0, 3):
        steps = keys_by_step(num_images, 8 // world_size, world_size, epoch=epoch)
        assert len(steps) == 4
        batches = [batch for step in steps for batch in step]
        assert {len(batch) for batch in batches} == {8 // world_size}
        keys = [key for batch in batches for key in batch]
        assert len(set(keys)) == 32
        assert set(keys) <= set(itertools.product([epoch], range(num_images)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_takes_the_same_images_on_any_number_of_processes(world_size):
    for epoch in (0, 1):
        alone = keys_by_step(37, 8, 1, epoch=epoch)
        together = keys_by_step(37, 8 // world_size, world_size, epoch=epoch)
        for (expected,), batches in zip(alone, together, strict=True):
            assert sorted(expected) == sorted(key for batch in batches for key in batch)


def test_shuffled_batches_are_a_function_of_seed_and_epoch():
    orders = []
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        steps = keys_by_step(37, 8, 1, seed=seed, epoch=epoch)
        assert steps == keys_by_step(37, 8, 1, seed=seed, epoch=epoch)
        orders.append([index for (batch,) in steps for _, index in batch])
    for one, other in itertools.combinations(orders, 2):
        assert one != other
        assert sorted(one) != list(one)


@pytest.mark.parametrize("world_size", [1, 2])
def test_first_step_skips_exactly_the_steps_before_it(world_size):
    whole = keys_by_step(37, 4, world_size, epoch=5)
    for first_step in range(len(whole) + 1):
        rest = keys_by_step(37, 4, world_size, epoch=5, first_step=first_step)
        assert rest == whole[first_step:]


def test_fewer_images_than_a_step_takes_make_no_batch():
    assert keys_by_step(7, 8, 1) == keys_by_step(7, 4, 2) == []


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 8, 101, 200])
def test_ordered_batches_take_every_image_once(world_size, batch_size):
    seen = []
    for rank in range(world_size):
        batches = loading.OrderedBatches(101, batch_size, Process(rank, world_size, CPU))
        assert len(list(batches)) == len(batches)
        assert all(0 < len(batch) <= batch_size for batch in batches)
        seen += [key for batch in batches for key in batch]
    assert sorted(seen) == [(0, index) for index in range(101)]


# ---- worker processes


@pytest.fixture(params=["fork", "forkserver"])
def start_method(request):
    """How Python starts processes where nobody says how: its default has changed in 3.14."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture
def working_loader(album, start_method):
    """A loader, in a list that holds its only reference, and its two worker processes."""
    # A shell starts background jobs with SIGINT ignored, which workers would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    others = set(multiprocessing.active_children())
    holder = [image_loader(album, num_workers=2)]
    assert len(list(holder[0].train_batches(0))) == 3
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    yield holder, workers
    holder.clear()
    signal.signal(signal.SIGINT, before)


def send(signal_number, process):
    """Signal a process from another one than this."""
    subprocess.run(["kill", f"-{int(signal_number)}", str(process.pid)], check=True)


def wait_for_the_end_of(processes, seconds=5):
    deadline = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(process.is_alive() for process in processes)


@pytest.mark.skipif(sys.platform == "darwin", reason="SIGTERM ends workers on macOS")
def test_workers_outlive_the_signals_of_others_and_end_with_the_loader(working_loader):
    holder, workers = working_loader
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        for worker in workers:
            send(number, worker)
        time.sleep(0.1)
        assert len(list(holder[0].train_batches(1))) == 3
        assert all(worker.is_alive() for worker in workers)
    batches = holder[0].train_batches(2)
    next(batches)
    batches.close()
    holder.clear()
    gc.collect()
    wait_for_the_end_of(workers)


def test_workers_end_when_the_main_process_terminates_them(working_loader):
    _, workers = working_loader
    for worker in workers:
        worker.terminate()
    wait_for_the_end_of(workers)


def test_too_little_shared_memory_is_said_before_workers_fill_it(album, monkeypatch, user_error):
    """Docker gives 64 MB: a worker would die of it, or leave the run waiting."""
    four = 2 * 2 * 4 * (3 * 16 * 16)  # two workers prefetch two batches of four images each
    free = {"free": four}
    usage = lambda _: type("Usage", (), free)  # noqa: E731
    monkeypatch.setattr(loading.shutil, "disk_usage", usage)
    assert len(list(image_loader(album, num_workers=2).train_batches(0))) == 3
    free["free"] -= 1
    message = user_error(lambda: next(image_loader(album, num_workers=2).train_batches(0)))
    assert message.startswith("/dev/shm has 0 MiB free, and 2 workers for each of 1 processes")
    assert "--shm-size=1g" in message
    assert len(list(image_loader(album, num_workers=0).train_batches(0))) == 3
