"""Images a second that the pre-training loader delivers, compared with a Pillow pipeline.

    python -m benchmarks.data_loading
    python -m benchmarks.data_loading --photographs IMAGENET/val --workers 8

Most images are JPEGs of 500 x 375 pixels, ImageNet's usual size: random crops of the photographs
given, or of the two in benchmarks/photographs. Large ones, of 4000 x 2667, are mosaics of these,
with as much detail a pixel. All sides make a random resized crop of 224 pixels from each image and
flip half of them. The Pillow side is torchvision's classic pipeline: Pillow decodes, crops and
flips, ToTensor and Normalize make floats. With draft mode it decodes large JPEGs at the reduced
size that `--decode scaled` takes, too.

Measured are one core (this process, one torch thread), decoding only on one core, and batches of 64
from --workers processes, normalised, on the device.
"""

import math
import os
import tempfile
import time
from pathlib import Path

import util.threads  # noqa: F401  before torch, whose threads it sets

# isort: split
import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image

from benchmarks import report, table
from util import cli, loading, packing, speed
from util.data import pretrain_transform
from util.decoding import UnreadableImage, read_image
from util.distributed import Process, select_device
from util.errors import UserError
from util.image_files import ImagePaths
from util.pixels import PixelFormat
from util.shards import find_shards

PHOTOGRAPHS = Path(__file__).parent / "photographs"
WIDTH, HEIGHT = 500, 375
LARGE_WIDTH, LARGE_HEIGHT = 4000, 2667
LARGE_IMAGES = 16
BANDS, BANDS_SIDE = 13, 256  # of .npy files, as satellites' tiles
DIFFERENT_IMAGES = 1024  # further ones are links to these, which take as long to decode
INPUT_SIZE = 224
BATCH_SIZE = 64
CROP_SCALE = (0.2, 1.0)
BICUBIC = transforms.InterpolationMode.BICUBIC


def get_args_parser():
    parser = report.parser(__doc__, pairs=7)
    parser.add_argument(
        "--photographs", default=PHOTOGRAPHS, metavar="DIR", help="searched for images"
    )
    parser.add_argument(
        "--images", type=cli.integer(BATCH_SIZE), default=1024, help="JPEGs made of them"
    )
    parser.add_argument("--workers", type=cli.integer(1), default=len(os.sched_getaffinity(0)))
    return parser


def main(args):
    torch.set_num_threads(1)
    process = Process(0, 1, select_device(args.device))
    if process.device.type == "cpu":
        speed.keep_freed_memory()  # as in training; the other side is no slower for it
    with tempfile.TemporaryDirectory() as folder:
        usual, large = Path(folder) / "usual", Path(folder) / "large"
        kilobytes = make_jpegs(usual, args.photographs, args.images)
        large_kilobytes = make_large_jpegs(large, ImagePaths(usual))
        # What takes turns: by the place in the table, functions that return images a second.
        turns = {
            "one core": sides_of_one_core(usual),
            f"{args.workers} workers": sides_of_workers(usual, args.workers, process),
            f"one core, {LARGE_WIDTH} x {LARGE_HEIGHT}": sides_of_large_images(large),
            "one core, tar shards": sides_of_shards(usual, Path(folder) / "shards"),
            f"one core, {BANDS} bands of uint16, {BANDS_SIDE} x {BANDS_SIDE}": sides_of_bands(
                Path(folder) / "bands"
            ),
        }
        rates = {where: report.take_turns(sides, args.pairs) for where, sides in turns.items()}
    results = {
        where: {side: figures(values, sides.get("pillow")) for side, values in sides.items()}
        for where, sides in rates.items()
    }
    sent = dict.fromkeys(("ours", "--decode scaled"), 3 * INPUT_SIZE**2)
    written = report.write(
        f"data_loading{report.on(process.device)}",
        results,
        bytes_to_the_device_per_image=sent
        | dict.fromkeys(("pillow", "pillow, draft mode"), 4 * 3 * INPUT_SIZE**2)
        | {"ours, floats": 4 * BANDS * INPUT_SIZE**2},
        images=args.images,
        mean_kilobytes_of_a_jpeg=kilobytes,
        mean_kilobytes_of_a_large_jpeg=large_kilobytes,
    )
    print(table.loading_table(written))


def figures(rates, pillow):
    """A side's images a second, and how they compare with Pillow's, if it reads such images."""
    compared = {"times_as_fast_as_pillow": report.ratio(rates, pillow)} if pillow else {}
    return {"images_per_s": report.median_and_range(rates, digits=1)} | compared


def sides_of_one_core(folder):
    paths = ImagePaths(folder)
    peer = ImageFolder(folder, pillow_transform())
    different = range(min(len(paths), DIFFERENT_IMAGES))
    return {
        "ours": lambda: rate(our_images(paths)),
        "pillow": lambda: rate(peer[index] for index in different),
        "only decoding": lambda: rate(read_image(paths[index]) for index in different),
    }


def sides_of_workers(folder, workers, process):
    ours = loading.train_loader(
        ImagePaths(folder),
        pretrain_transform(INPUT_SIZE, CROP_SCALE),
        process,
        batch_size=BATCH_SIZE,
        accum_iter=1,
        seed=0,
        num_workers=workers,
        pin_mem=True,
    )
    peer = torch.utils.data.DataLoader(
        ImageFolder(folder, pillow_transform()),
        BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=process.device.type == "cuda",
        persistent_workers=True,
    )
    return {
        "ours": lambda: BATCH_SIZE * rate(ours.train_batches(0)),
        "pillow": lambda: BATCH_SIZE * rate(x.to(process.device) for x, _ in peer),
    }


def sides_of_large_images(folder):
    paths = ImagePaths(folder)
    peer = ImageFolder(folder, pillow_transform())
    peer_draft = ImageFolder(folder, pillow_transform(draft_crop), loader=Image.open)
    return {
        "ours": lambda: rate(our_images(paths)),
        "--decode scaled": lambda: rate(our_images(paths, decode="scaled")),
        "pillow": lambda: rate(peer[index] for index in range(len(peer))),
        "pillow, draft mode": lambda: rate(peer_draft[index] for index in range(len(peer))),
        "only decoding": lambda: rate(map(read_image, paths)),
    }


def sides_of_shards(folder, packed):
    packed.mkdir()
    splits = {"train": ImagePaths(folder)}
    packing.pack(splits, packed, packing.Packing(), num_workers=0)
    paths, shards = splits["train"], find_shards(packed, "train")
    return {"files": lambda: rate(our_images(paths)), "shards": lambda: rate(our_images(shards))}


def sides_of_bands(folder):
    folder.mkdir()
    for number in range(64):
        noise = np.random.default_rng(number).integers(0, 2**16, (BANDS_SIDE, BANDS_SIDE, BANDS))
        np.save(folder / f"{number:02d}.npy", noise.astype(np.uint16))
    paths, pixels = ImagePaths(folder), PixelFormat(BANDS, mean=(0.5,) * BANDS, std=(0.5,) * BANDS)
    return {
        "ours, floats": lambda: rate(our_images(paths, pixels=pixels)),
        "only decoding": lambda: rate(read_image(path, pixels) for path in paths),
    }


def our_images(paths, **options):
    """As pre-training makes them, in this process."""
    transform = pretrain_transform(INPUT_SIZE, CROP_SCALE)
    dataset = loading.ImageDataset(paths, transform, seed=0, **options)
    return (dataset[0, index] for index in range(min(len(paths), DIFFERENT_IMAGES)))


def rate(items):
    """Items made per second."""
    started = time.perf_counter()
    count = sum(1 for _ in items)
    return count / (time.perf_counter() - started)


def make_jpegs(folder, photographs, count):
    """Write `count` JPEGs into one class's new folder; returns their mean size in kB."""
    paths = ImagePaths(photographs)
    size, aspect = (HEIGHT, WIDTH), WIDTH / HEIGHT
    crop = transforms.RandomResizedCrop(size, (0.45, 0.85), (aspect, aspect), BICUBIC)
    torch.manual_seed(0)
    (folder / "class").mkdir(parents=True)
    sizes = []
    for number in range(count):
        path = folder / "class" / f"{number:05d}.jpg"
        if number >= DIFFERENT_IMAGES:
            os.link(path.with_name(f"{number % DIFFERENT_IMAGES:05d}.jpg"), path)
            continue
        try:
            photograph = to_pil_image(read_image(paths[number % len(paths)]))
        except UnreadableImage as error:
            raise UserError(f"--photographs: {error}") from error
        crop(photograph).save(path, quality=95)
        sizes.append(path.stat().st_size)
    return round(sum(sizes) / len(sizes) / 1000, 1)


def make_large_jpegs(folder, paths):
    """Write mosaics of images into one class's new folder; returns their mean size in kB."""
    (folder / "class").mkdir(parents=True)
    columns, rows = LARGE_WIDTH // WIDTH, -(-LARGE_HEIGHT // HEIGHT)
    sizes = []
    for number in range(LARGE_IMAGES):
        mosaic = Image.new("RGB", (LARGE_WIDTH, LARGE_HEIGHT))
        for tile in range(columns * rows):
            row, column = divmod(tile, columns)
            path = paths[(number * columns * rows + tile) % len(paths)]
            mosaic.paste(Image.open(path), (column * WIDTH, row * HEIGHT))
        path = folder / "class" / f"{number:05d}.jpg"
        mosaic.save(path, quality=95)
        sizes.append(path.stat().st_size)
    return round(sum(sizes) / len(sizes) / 1000, 1)


def pillow_transform(crop=None):
    return transforms.Compose(
        [
            crop or transforms.RandomResizedCrop(INPUT_SIZE, CROP_SCALE, interpolation=BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )


def draft_crop(image):
    """A random resized crop of a JPEG that is opened and not decoded, by Pillow alone.

    It decodes at the smallest size that leaves the crop twice as large as the result.
    """
    crop = transforms.RandomResizedCrop.get_params(image, CROP_SCALE, (3 / 4, 4 / 3))
    width, height = image.size
    enlarged = 2 * INPUT_SIZE / min(crop[2:])
    image.draft("RGB", (math.ceil(width * enlarged), math.ceil(height * enlarged)))
    divisor = round(width / image.width)
    top, left, height, width = (side / divisor for side in crop)
    box = (left, top, left + width, top + height)
    return image.resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC, box, reducing_gap=2)


if __name__ == "__main__":
    cli.run(main, get_args_parser())
