"""Images a second that the pre-training loader delivers, compared with a Pillow pipeline.

    python -m benchmarks.data_loading
    python -m benchmarks.data_loading --photographs IMAGENET/val --workers 8

The images are JPEGs of 500 x 375 pixels, ImageNet's usual size: random crops of the photographs
given, or of the two in benchmarks/photographs. Both sides make a random resized crop of 224 pixels
from each and flip half of them. The Pillow side is torchvision's classic pipeline: Pillow decodes,
crops and flips, ToTensor and Normalize make floats.

Measured are one core (this process, one torch thread), decoding only on one core, and batches of 64
from --workers processes, normalised, on the device.
"""

import os
import tempfile
import time
from pathlib import Path

import util.threads  # noqa: F401  before torch, whose threads it sets

# isort: split
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image

from benchmarks import report, table
from util import cli, loading, speed
from util.data import pretrain_transform
from util.decoding import UnreadableImage, read_image
from util.distributed import Process, select_device
from util.errors import UserError
from util.image_files import ImagePaths

PHOTOGRAPHS = Path(__file__).parent / "photographs"
WIDTH, HEIGHT = 500, 375
DIFFERENT_IMAGES = 1024  # further ones are links to these, which take as long to decode
INPUT_SIZE = 224
BATCH_SIZE = 64
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
        kilobytes = make_jpegs(Path(folder), args.photographs, args.images)
        paths = ImagePaths(folder)
        ours = loading.ImageDataset(paths, pretrain_transform(INPUT_SIZE), seed=0)
        peer = ImageFolder(folder, pillow_transform())
        our_batches = loading.train_loader(
            paths,
            ours.transform,
            process,
            batch_size=BATCH_SIZE,
            accum_iter=1,
            seed=0,
            num_workers=args.workers,
            pin_mem=True,
        )
        peer_batches = torch.utils.data.DataLoader(
            peer,
            BATCH_SIZE,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
            pin_memory=process.device.type == "cuda",
            persistent_workers=True,
        )
        different = range(min(len(paths), DIFFERENT_IMAGES))
        turns = {
            "one core": {
                "ours": lambda: rate(ours[0, index] for index in different),
                "pillow": lambda: rate(peer[index] for index in different),
                "only decoding": lambda: rate(read_image(paths[index]) for index in different),
            },
            f"{args.workers} workers": {
                "ours": lambda: BATCH_SIZE * rate(our_batches.train_batches(0)),
                "pillow": lambda: BATCH_SIZE * rate(x.to(process.device) for x, _ in peer_batches),
            },
        }
        rates = {where: report.take_turns(sides, args.pairs) for where, sides in turns.items()}
    results = {
        where: {
            side: {
                "images_per_s": report.median_and_range(values, digits=0),
                "times_as_fast_as_pillow": report.ratio(values, sides["pillow"]),
            }
            for side, values in sides.items()
        }
        for where, sides in rates.items()
    }
    written = report.write(
        f"data_loading{report.on(process.device)}",
        results,
        bytes_to_the_device_per_image={"ours": 3 * INPUT_SIZE**2, "pillow": 4 * 3 * INPUT_SIZE**2},
        images=args.images,
        mean_kilobytes_of_a_jpeg=kilobytes,
    )
    print(table.loading_table(written))


def rate(items):
    """Items made per second."""
    started = time.perf_counter()
    count = sum(1 for _ in items)
    return count / (time.perf_counter() - started)


def make_jpegs(folder, photographs, count):
    """Write `count` JPEGs into one class's folder; returns their mean size in kB."""
    paths = ImagePaths(photographs)
    size, aspect = (HEIGHT, WIDTH), WIDTH / HEIGHT
    crop = transforms.RandomResizedCrop(size, (0.45, 0.85), (aspect, aspect), BICUBIC)
    torch.manual_seed(0)
    (folder / "class").mkdir()
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


def pillow_transform():
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(INPUT_SIZE, scale=(0.2, 1.0), interpolation=BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )


if __name__ == "__main__":
    cli.run(main, get_args_parser())
