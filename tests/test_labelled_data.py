"""Labels and the augmentations of classifiers, against ImageFolder, timm, Pillow and arithmetic."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import CPU, ROOT, difference, fill, photograph, pixels, resize_in_passes
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.layers import to_2tuple
from torchvision.datasets import ImageFolder

from util import cli, data, flags, image_files, loading
from util.distributed import Process
from util.seeding import seed_generators

# ---- classes and labels of folders


def assert_labels_are_those_of(image_folder, paths):
    assert {name: index for index, name in enumerate(paths.classes)} == image_folder.class_to_idx
    labels = dict(zip(paths, paths.labels.tolist(), strict=True))
    assert labels == dict(image_folder.samples)
    assert paths.labels.dtype == torch.int64


@pytest.mark.parametrize(
    "names",
    [
        ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"],
        ["a/z/1.jpg", "a/b/c/2.jpg", "a/3.jpg", "b/a/4.jpg"],
        ["a/1.jpg", "a-b/1.jpg", "a b/1.jpg", "a.b/1.jpg", "a!/1.jpg", "aa/1.jpg", "A/1.jpg"],
        ["10/1.jpg", "9/1.jpg", "09/1.jpg", "n.jpg/1.jpg"],
        ["\u65e5\u672c/1.jpg", "\u00e4/1.jpg", "z/1.jpg", "\U0001f408/1.jpg", "e\u0301/1.jpg"],
        ["a/1.JPG", "b/2.JpEg", "c/3.PNG", "d/4.TIFF"],
        ["only/1.jpg"],
    ],
    ids=str,
)
def test_labels_are_those_of_image_folder(tmp_path, names):
    fill(tmp_path, names)
    assert_labels_are_those_of(ImageFolder(tmp_path), image_files.ImagePaths(tmp_path))


def test_a_linked_folder_is_a_class(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", ["z/1.jpg", "z/nested/2.jpg"])
    root = fill(tmp_path / "train", ["b/1.jpg", "c/1.jpg"])
    (root / "a").symlink_to(elsewhere / "z")
    (root / "c/more").symlink_to(fill(tmp_path / "more", ["3.jpg"]))
    assert_labels_are_those_of(ImageFolder(root), image_files.ImagePaths(root))


def test_a_folder_without_images_is_no_class(tmp_path):
    fill(tmp_path, ["b/1.jpg", "d/1.jpg"])
    expected = ImageFolder(tmp_path)
    for name in ("a", "c/nested", "e"):
        (tmp_path / name).mkdir(parents=True)
    fill(tmp_path, ["c/notes.txt"], b"none")
    assert_labels_are_those_of(expected, image_files.ImagePaths(tmp_path))


def data_path(root, train, val):
    """A folder of one image for each of these classes."""
    fill(root, [f"train/{name}/1.jpg" for name in train])
    return fill(root, [f"val/{name}/1.jpg" for name in val])


def test_labelled_images_are_those_of_train_and_val(tmp_path, capfd):
    data_path(tmp_path, "cab", "abc")
    fill(tmp_path, ["train/b/2.jpg", "val/a/x/3.jpg"])
    found = image_files.find_labelled_images(tmp_path, 3)
    (alone,) = image_files.find_labelled_images(tmp_path, 3, ["val"])
    for split, paths in zip(("train", "val", "val"), (*found, alone), strict=True):
        assert_labels_are_those_of(ImageFolder(tmp_path / split), paths)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_in_no_class_is_the_users_error(tmp_path, user_error, split):
    data_path(tmp_path, "ab", "ab")
    fill(tmp_path, [f"{split}/0.txt", f"{split}/aa.jpg"])
    message = user_error(lambda: image_files.find_labelled_images(tmp_path, 2))
    assert message.startswith(f"{tmp_path}/{split}/aa.jpg is in no class")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_the_users_error(tmp_path, user_error, split):
    data_path(tmp_path, "ab", "ab")
    (tmp_path / split).rename(tmp_path / "elsewhere")
    message = user_error(lambda: image_files.find_labelled_images(tmp_path, 2))
    assert message.startswith(f"{tmp_path}/{split} does not exist")
    (tmp_path / split).mkdir()
    message = user_error(lambda: image_files.find_labelled_images(tmp_path, 2))
    assert message.startswith(f"{tmp_path}/{split} has no images")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_with_no_readable_image_is_the_users_error(tmp_path, user_error, split):
    data_path(tmp_path, "ab", "ab")
    fill(tmp_path, [f"{split}/a/1.jpg", f"{split}/b/1.jpg"], b"torn")
    message = user_error(lambda: image_files.find_labelled_images(tmp_path, 2))
    assert message.startswith(f"{tmp_path}/{split} has no readable images")


@pytest.mark.parametrize("broken", ["torn", "missing"])
def test_a_held_out_image_that_cannot_be_read_is_the_users_error(tmp_path, user_error, broken):
    """Of training images it is a warning."""
    data_path(tmp_path, "ab", "ab")
    fill(tmp_path, ["train/a/2.jpg", "val/a/2.jpg"], b"torn")
    if broken == "missing":
        for split in ("train", "val"):
            (tmp_path / split / "a/2.jpg").unlink()
            (tmp_path / split / "a/2.jpg").symlink_to("gone.jpg")
    (images,) = image_files.find_labelled_images(tmp_path, 2, ["train"])
    assert len(images) == (2 if broken == "missing" else 3)
    message = user_error(lambda: image_files.find_labelled_images(tmp_path, 2))
    if broken == "missing":
        expected = f"{tmp_path}/val: a/2.jpg is unreadable (no such file)"
    else:
        expected = f"{tmp_path}/val/a/2.jpg is unreadable ("
    assert message.startswith(expected)
    assert message.endswith("): evaluation needs every image, repair it")


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (["a"], "there is only one class (a): nothing can be learned"),
        (["images/cat", "images/dog"], "the classes are images, not the folders below (cat, dog)"),
        (["0/cat", "1/cat", "0/dog", "1/dog"], "the classes are 0, 1, not the folders below (cat"),
        (["a/one", "b/two"], None),
        (["a/one", "b/one"], None),
        (["a/one", "a/two", "b/three", "b/four"], None),
        (["a", "a/one", "a/two"], "only one class"),
        (["a", "b", "a/one", "a/two", "b/one", "b/two"], None),
        (["train/cat", "val/cat"], "it holds train and val: it may be what --data_path should"),
        (["train", "car"], None),
    ],
    ids=str,
)
def test_classes_at_another_level_are_warned_of(tmp_path, capfd, train, told):
    data_path(tmp_path, train, [])
    image_files.find_labelled_images(tmp_path, 1000, ["train"])
    *doubts, _ = capfd.readouterr().err.splitlines()
    assert len(doubts) == (told is not None)
    for doubt in doubts:
        assert doubt.startswith(f"warning: {tmp_path}/train: ")
        assert told in doubt


MANY = [f"{number:02d}" for number in range(9)]


@pytest.mark.parametrize(
    ("train", "val", "told"),
    [
        ("abc", "ac", "they lack b"),
        ("ac", "abc", "they add b"),
        ("abcd", "axdy", "they lack b, c and add x, y"),
        ("A", "a", "they lack A and add a"),
        (["a", *MANY[:5]], "a", "they lack 00, 01, 02, 03, 04"),
        (["a", *MANY], "a", "they lack 00, 01, 02, 03, 04 and 4 more"),
        ("a", ["a", *MANY], "they add 00, 01, 02, 03, 04 and 4 more"),
    ],
    ids=str,
)
def test_splits_of_different_classes_are_the_users_error(tmp_path, user_error, train, val, told):
    data_path(tmp_path, train, val)
    message = user_error(lambda: image_files.find_labelled_images(tmp_path, len(train)))
    assert message == f"the classes in {tmp_path}/val are not those of {tmp_path}/train: {told}"


def test_classes_beyond_nb_classes_are_refused_and_fewer_warned_of(tmp_path, user_error, capfd):
    data_path(tmp_path, "abc", "abc")
    message = user_error(lambda: image_files.find_labelled_images(tmp_path, 2))
    assert message == f"--nb_classes 2 is below the 3 classes in {tmp_path}/train (a, b, c)"
    image_files.find_labelled_images(tmp_path, 3)
    assert capfd.readouterr().err == ""
    image_files.find_labelled_images(tmp_path, 4)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: --nb_classes 4 is above the 3 classes")


def test_a_part_of_the_classes_is_labelled_by_name(tmp_path, user_error, capfd):
    """In the order of the classifier's own labels."""
    data_path(tmp_path, "", "dbc")
    fill(tmp_path, ["val/b/2.jpg"])

    def find(classes):
        return image_files.find_images_to_evaluate(tmp_path, 4, classes, "some.pth")

    images = find(["z", "d", "c", "b"])
    names = [path.removeprefix(f"{tmp_path}/val/") for path in images]
    assert names == ["b/1.jpg", "b/2.jpg", "c/1.jpg", "d/1.jpg"]
    assert images.labels.tolist() == [3, 3, 2, 1]
    assert images.labels.dtype == torch.int64
    assert images.labels.is_shared()
    assert images.classes == ["z", "d", "c", "b"]
    assert capfd.readouterr().err == (
        f"warning: {tmp_path}/val has 3 of the 4 classes of some.pth: accuracy is over these "
        "images\n"
    )
    assert find(["b", "c", "d"]).labels.tolist() == [0, 0, 1, 2]
    assert capfd.readouterr().err == ""
    message = user_error(lambda: find(["d", "z", "c"]))
    assert message == f"the classes in {tmp_path}/val are not those of some.pth: they add b"


def test_a_part_of_unknown_classes_is_the_users_error(tmp_path, user_error):
    data_path(tmp_path, "", "ab")

    def find(nb_classes):
        return image_files.find_images_to_evaluate(tmp_path, nb_classes, None, "bare.pth")

    assert find(2).labels.tolist() == [0, 1]
    for nb_classes in (1, 3, 1000):
        message = user_error(lambda number=nb_classes: find(number))
        assert message.startswith(f"{tmp_path}/val has 2 classes (a, b), not {nb_classes} as ")
        assert "bare.pth doesn't name its classes" in message


# ---- labels of samples and batches


def paint(root, sizes):
    """Images of as many classes as there are `sizes`, each of one grey: {grey: label}."""
    labels = {}
    for label, size in enumerate(sizes):
        (root / f"{label}").mkdir(parents=True)
        for index in range(size):
            grey = 2 * len(labels) + 1
            Image.new("RGB", (9, 7), (grey,) * 3).save(root / f"{label}/{index:02d}.png")
            labels[grey] = label
    return labels


def greys(imgs):
    """The greys of normalised images."""
    return (data.denormalize(imgs) * 255).mean((1, 2, 3)).round().int().tolist()


def loader_of(paths, *, world_size=1, **options):
    """A loader for the first of some processes."""
    process = Process(0, world_size, CPU)
    defaults = {"batch_size": 4, "accum_iter": 1, "seed": 0, "num_workers": 0, "pin_mem": False}
    return loading.train_loader(paths, data.probe_transform(6), process, **defaults | options)


def test_the_label_of_a_replaced_image_is_that_of_its_replacement(tmp_path):
    labels = paint(tmp_path, (3, 5, 4))
    paths = image_files.ImagePaths(fill(tmp_path, ["0/00.png", "2/01.png"], b"torn"))
    dataset = loading.ImageDataset(paths, torch.nn.Identity(), seed=0)
    changed = set()
    for epoch in range(10):
        for index in (0, 9):
            image, label, returned, problem = dataset[epoch, index]
            assert returned == index
            assert problem.startswith(f"{paths[index]}: ")
            assert label == labels[image[0, 0, 0].item()]
            changed.add(label.item() != paths.labels[index].item())
    assert changed == {True, False}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_yields_the_labels_of_the_images_it_yields(tmp_path, num_workers):
    labels = paint(tmp_path, (3, 5, 4))
    fill(tmp_path, ["0/00.png", "1/01.png", "2/01.png"], b"torn")
    loader = loader_of(image_files.ImagePaths(tmp_path), num_workers=num_workers)
    for epoch in range(3):
        batches = list(loader.train_batches(epoch))
        assert len(batches) == 3
        assert sum(batch.unreadable for batch in batches) == 3
        for batch in batches:
            assert batch.labels.tolist() == [labels[grey] for grey in greys(batch.imgs)]


def test_fewer_images_than_an_update_takes_are_the_users_error(tmp_path, user_error):
    paint(tmp_path, (5, 6))
    paths = image_files.ImagePaths(tmp_path)
    for options in (
        {"batch_size": 12},
        {"batch_size": 3, "accum_iter": 4},
        {"batch_size": 2, "accum_iter": 2, "world_size": 3},
    ):
        message = user_error(lambda options=options: loader_of(paths, **options))
        assert message.startswith(f"{tmp_path} has 11 training images, fewer than one global batch")
        assert " 12 " in message
    assert len(loader_of(paths, batch_size=11)) == 1
    fill(tmp_path, ["1/more.png"])
    paths = image_files.ImagePaths(tmp_path)
    assert len(loader_of(paths, batch_size=2, accum_iter=2, world_size=3)) == 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_takes_every_image_and_its_label_once(tmp_path, world_size):
    labels = paint(tmp_path, (40, 1, 60))
    paths = image_files.ImagePaths(tmp_path)
    seen = []
    for rank in range(world_size):
        process = Process(rank, world_size, CPU)
        options = {"batch_size": 8, "seed": 0, "num_workers": 0, "pin_mem": False}
        loader = loading.eval_loader(paths, 5, process, **options)
        for imgs, found, indices, readable in loader.eval_batches():
            assert imgs.shape[1:] == (3, 5, 5)
            assert readable.all()
            assert greys(imgs) == [2 * index + 1 for index in indices.tolist()]
            assert found.tolist() == [labels[grey] for grey in greys(imgs)]
            seen += indices.tolist()
    assert sorted(seen) == list(range(101))


# ---- augmentation of fine-tuning


DEFAULT = "rand-m9-mstd0.5-inc1"
TRANSFORMS = {"probe": data.probe_transform, "finetune": data.finetune_transform}


@pytest.mark.parametrize("size", [24, (20, 36)], ids=str)
@pytest.mark.parametrize(
    ("options", "aa", "color_jitter"),
    [
        ({}, DEFAULT, None),
        ({"color_jitter": 0.4}, DEFAULT, None),
        ({"aa": "none", "color_jitter": 0.4}, None, 0.4),
        ({"aa": "None"}, None, None),
        ({"aa": ""}, None, None),
        ({"aa": "augmix-m3"}, "augmix-m3", None),
        ({"aa": "original"}, "original", None),
        ({"aa": "v0"}, "v0", None),
    ],
    ids=str,
)
def test_finetune_transform_is_timms(size, options, aa, color_jitter):
    """As pixels, where timm's is normalised."""
    if aa == "augmix-m3" and size != 24:
        pytest.skip("timm 1.0.12 mixes squares alone")
    opened = photograph(61, 47)
    transform = data.finetune_transform(size, **options)
    expected = create_transform(
        to_2tuple(size),
        is_training=True,
        color_jitter=color_jitter,
        auto_augment=aa,
        interpolation="bicubic",
        re_prob=0,
    )
    for seed in range(20):
        seed_generators(seed)
        image = transform(pixels(opened))
        assert image.dtype == torch.uint8
        assert image.shape == (3, *to_2tuple(size))
        seed_generators(seed)
        torch.testing.assert_close(
            data.normalize(image[None])[0], expected(opened), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("aa", [DEFAULT, "rand-m10-inc1", "v0-mstd9"])
def test_no_policy_trips_over_a_draw(aa):
    """Pillow 13 raises an error at 0 bits of colour, to which policies of timm come."""
    transform = data.finetune_transform(16, aa=aa)
    for seed in range(300):
        seed_generators(seed)
        assert transform(pixels(photograph(61, 47))).shape == (3, 16, 16)


@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing", "PosterizeOriginal"])
def test_posterize_keeps_the_highest_bits_also_if_these_are_none(name):
    image = photograph(61, 47)
    data.finetune_transform(16)
    posterize = auto_augment.NAME_TO_OP[name]
    for bits in range(9):
        kept = posterize(image, bits, fillcolor=(1, 2, 3), resample=Image.BICUBIC)
        assert torch.equal(pixels(kept), pixels(image) & (0xFF00 >> bits & 0xFF))
        if bits:
            assert torch.equal(pixels(kept), pixels(auto_augment.posterize(image, bits)))


def test_timm_is_changed_only_for_a_policy_under_pillow_13():
    """In a process of its own, as this one may have made a policy before."""
    code = """
import PIL
from timm.data import auto_augment
from util import data
original = auto_augment.NAME_TO_OP["Posterize"]
data.finetune_transform(16, aa="none")
data.probe_transform(16)
assert auto_augment.NAME_TO_OP["Posterize"] is original
data.finetune_transform(16)
changed = auto_augment.NAME_TO_OP["Posterize"] is not original
assert changed == (int(PIL.__version__.split(".")[0]) >= 13)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "aa",
    ["foo", "v1", "rand-x3", "rand-m9.5", "randaugment-m9", "augmix-z1", "original-m9", "-"],
)
def test_an_unknown_policy_is_the_users_error(user_error, aa):
    assert f"timm can't use --aa {aa} (" in user_error(lambda: data.finetune_transform(16, aa=aa))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_augmentation_is_a_function_of_its_seeds(name):
    transform, image = TRANSFORMS[name](24), pixels(photograph(61, 47))
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    samples = []
    for repeat in range(2):
        torch.rand(3), np.random.rand(repeat + 1)
        for key in keys:
            seed_generators(*key)
            samples.append(transform(image))
    for index, sample in enumerate(samples):
        same = [torch.equal(sample, other) for other in samples]
        assert same == [other % 4 == index % 4 for other in range(8)]


# ---- crops of the linear probe


@pytest.fixture
def boxes(monkeypatch):
    """The boxes (top, left, height, width) of all crops that are resized from here on."""
    found, resized_crop = [], data.resized_crop

    def spy(image, top, left, height, width, *args, **options):
        found.append((top, left, height, width))
        return resized_crop(image, top, left, height, width, *args, **options)

    monkeypatch.setattr(data, "resized_crop", spy)
    return found


def crop(width, height, count):
    """Make `count` crops of an image for the linear probe."""
    transform, image = data.probe_transform(2), pixels(photograph(width, height))
    seed_generators(0)
    for _ in range(count):
        assert transform(image).shape == (3, 2, 2)


def test_probe_crops_are_uniform_in_area_logarithm_of_aspect_and_place(boxes):
    """Areas above 3/4 of a square image may be clipped, to no less than 3/4."""
    crop(400, 400, 3000)
    assert len(boxes) == 3000
    top, left, height, width = np.array(boxes).T
    area, aspect = height * width / 400**2, width / height
    assert 0.078 < area.min() < 0.085
    assert 0.97 < area.max() <= 1
    for share in np.arange(0.1, 0.75, 0.08):
        assert np.mean(area < share) == pytest.approx((share - 0.08) / 0.92, abs=0.03)
    small = area < 0.75
    assert aspect[small].min() == pytest.approx(3 / 4, rel=0.02)
    assert aspect[small].max() == pytest.approx(4 / 3, rel=0.02)
    for share in (0.25, 0.5, 0.75):
        below = (3 / 4) ** (1 - 2 * share)
        assert np.mean(aspect[small] < below) == pytest.approx(share, abs=0.04)
    places = np.array([top / (400.001 - height), left / (400.001 - width)])[:, small]
    for share in (0.02, 0.25, 0.5, 0.75, 0.98):
        assert np.mean(places < share, axis=1) == pytest.approx(share, abs=0.03)
    assert abs(np.corrcoef(places)[0, 1]) < 0.1


def test_probe_crops_are_drawn_once_and_clipped(boxes):
    """Clipped where a side is over 1: in (1 - (1 - 3/4) / log(4/3)) / 0.92 of squares."""
    crop(400, 400, 3000)
    clipped = [height == 400 or width == 400 for _, _, height, width in boxes]
    assert np.mean(clipped) == pytest.approx(0.142, abs=0.02)


@pytest.mark.parametrize("width_height", [(200, 10), (10, 200), (1, 1), (1, 50), (7, 5)], ids=str)
def test_probe_crops_lie_within_images_of_any_shape_and_reach_their_edges(boxes, width_height):
    crop(*width_height, 2000)
    top, left, height, width = np.array(boxes).T
    for start, side, whole in zip((left, top), (width, height), width_height, strict=True):
        assert side.min() >= 1
        assert start.min() == 0
        assert (start + side).max() == whole
        shorter = side < whole
        assert not shorter.any() or (start + side)[shorter].max() == whole
        if whole == 200:  # sqrt(2000 pixels x area x aspect) of them
            assert 10 < side.min() < 15
            assert 45 < side.max() < 53
        elif 200 in width_height:
            assert (side == whole).all()


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (32, 32)], ids=str)
@pytest.mark.parametrize("width_height", [(500, 375), (28, 28), (200, 10)], ids=str)
def test_probe_transform_agrees_with_pillow(boxes, width_height, size):
    opened = photograph(*width_height)
    transform = data.probe_transform(size)
    flips = set()
    for seed in range(8):
        seed_generators(seed)
        image = transform(pixels(opened))
        top, left, height, width = boxes.pop()
        box = (left, top, left + width, top + height)
        expected = pixels(resize_in_passes(opened.crop(box), *size))
        levels = {flip: difference(image.flip(2) if flip else image, expected) for flip in (0, 1)}
        flips.add(min(levels, key=levels.get))
        largest, mean = min(levels.values())
        assert largest <= 2
        assert mean <= 0.05
    assert flips == {0, 1}


def test_half_of_the_probes_images_are_flipped():
    image = torch.arange(0, 240, 4, dtype=torch.uint8).expand(3, 60, 60)
    transform = data.probe_transform(8)
    seed_generators(0)
    flips = [
        (sample[0, 0, 0] > sample[0, 0, -1]).item() for sample in map(transform, [image] * 400)
    ]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.08)


# ---- flags


@pytest.fixture
def parse():
    parser = cli.ArgumentParser(prog="main.py")
    flags.add_augmentation_flags(parser)
    return lambda words: vars(parser.parse_args(words.split()))


def test_defaults_of_augmentation_flags_are_those_of_the_recipe(parse):
    assert parse("") == {
        "color_jitter": None,
        "aa": DEFAULT,
        "smoothing": 0.1,
        "reprob": 0.25,
        "remode": "pixel",
        "recount": 1,
        "mixup": 0.0,
        "cutmix": 0.0,
        "cutmix_minmax": None,
        "mixup_prob": 1.0,
        "mixup_switch_prob": 0.5,
        "mixup_mode": "batch",
    }


def test_augmentation_flags_take_the_ends_of_their_ranges(parse):
    words = "--smoothing 0 --reprob 1 --recount 3 --mixup 0.8 --cutmix_minmax 0 1 --mixup_prob 0"
    for word, value in {
        "smoothing": 0,
        "reprob": 1,
        "recount": 3,
        "mixup": 0.8,
        "cutmix_minmax": [0, 1],
        "mixup_prob": 0,
    }.items():
        assert parse(words)[word] == value


@pytest.mark.parametrize(
    "words",
    [
        "--smoothing 1",
        "--smoothing -0.1",
        "--smoothing nan",
        "--reprob 1.1",
        "--reprob -0.1",
        "--recount 0",
        "--recount 1.5",
        "--remode foo",
        "--mixup -1",
        "--mixup inf",
        "--cutmix -1",
        "--cutmix_minmax 0.5",
        "--cutmix_minmax 0.5 2",
        "--cutmix_minmax -1 0.5",
        "--mixup_prob 1.1",
        "--mixup_switch_prob 1.1",
        "--mixup_mode foo",
        "--color_jitter -0.4",
    ],
)
def test_augmentation_flags_out_of_range_are_the_users_error(parse, capsys, words):
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: argument {words.split()[0]}: ")
