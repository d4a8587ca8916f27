"""From image files to batches, against Pillow, torchvision's Pillow transforms and hand counts."""

import gc
import itertools
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    difference,
    encode,
    fill,
    photograph,
    pixels,
    relative_names,
    resize_in_passes,
)
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from util import data, decoding, image_files, loading
from util.distributed import Process

ALONE = Process(0, 1, CPU)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- images and folders to test on


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


# ---- reading one file, of which test_decoding.py tests the rest


@pytest.mark.parametrize("suffix", decoding.image_suffixes())
def test_every_suffix_is_found_and_the_content_decides_how_it_is_read(tmp_path, suffix):
    encoded = encode("PNG")
    names = [f"1{suffix.upper()}", f"2{suffix}", f"3{suffix.title()}"]
    paths = image_files.ImagePaths(fill(tmp_path, names, encoded))
    assert relative_names(paths) == names
    for path in paths:
        assert torch.equal(decoding.read_image(path), pixels(photograph(61, 47)))


def test_a_damaged_png_crashes_no_worker(tmp_path):
    """Read in a worker process, so that a decoder that crashes fails this test alone."""
    whole = encode("PNG")
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    fill(tmp_path, ["1.jpg"])
    fill(tmp_path, ["2.png"], damaged)
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
