"""Images a second that the pre-training loader delivers, and the Pillow pipeline beside it.

    python -m benchmarks.data_loading
    python -m benchmarks.data_loading --photographs IMAGENET/val --workers 8

The images are JPEGs of 500 x 375 pixels, ImageNet's usual size: random crops of the photographs
given, or of the two in benchmarks/photographs. Both sides make from each a random resized crop of
224 pixels, flipped or not. The other side is the common one of torchvision's first transforms:
Pillow decodes, crops and flips, ToTensor and Normalize make floats of it.

Timed are one core (this process, torch limited to one thread), decoding alone on it, and batches
of 64 on the device from --workers processes, normalised. The sides take turns; a ratio is that of
two turns of one round, shown are the median over --pairs rounds, the lowest and the highest.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks import report
from util import cli, loading, speed
from util.data import pretrain_transform
from util.distributed import Process, select_device
from util.errors import UserError
from util.image_files import ImagePaths, UnreadableImage, read_image

PHOTOGRAPHS = Path(__file__).parent / "photographs"
WIDTH, HEIGHT = 500, 375
INPUT_SIZE = 224
BATCH_SIZE = 64


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--photographs", default=PHOTOGRAPHS, metavar="DIR", help="searched for images"
    )
    parser.add_argument(
        "--images", type=cli.integer(BATCH_SIZE), default=1024, help="JPEGs that are made of them"
    )
    parser.add_argument("--workers", type=cli.integer(1), default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is some), cuda or cpu"
    )
    parser.add_argument("--pairs", type=cli.integer(1), default=7, help="rounds of turns")
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
        in_order = range(len(paths))
        one_core = report.take_turns(
            {
                "ours": lambda: rate(ours[0, index] for index in in_order),
                "pillow": lambda: rate(peer[index] for index in in_order),
                "decoding alone": lambda: rate(read_image(paths[index]) for index in in_order),
            },
            args.pairs,
        )
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
        several = report.take_turns(
            {
                "ours": lambda: BATCH_SIZE * rate(imgs for imgs, *_ in our_batches),
                "pillow": lambda: BATCH_SIZE * rate(x.to(process.device) for x, _ in peer_batches),
            },
            args.pairs,
        )
    results = {"one core": summary(one_core), f"{args.workers} workers": summary(several)}
    for where, sides in results.items():
        print(where, *(f"\n    {side:15}{figures}" for side, figures in sides.items()))
    report.write(
        "data_loading",
        results,
        bytes_to_the_device_per_image={"ours": 3 * INPUT_SIZE**2, "pillow": 4 * 3 * INPUT_SIZE**2},
        images=args.images,
        mean_kilobytes_of_a_jpeg=kilobytes,
    )


def rate(items):
    """How many of `items` are made a second."""
    started = time.perf_counter()
    count = sum(1 for _ in items)
    return count / (time.perf_counter() - started)


def summary(rates):
    """Images a second of every side and how many times the Pillow pipeline's they are."""
    return {
        side: {
            "images_per_s": report.median_and_range(values, digits=0),
            "times_as_fast_as_pillow": report.ratio(values, rates["pillow"]),
        }
        for side, values in rates.items()
    }


def make_jpegs(folder, photographs, count):
    """Write `count` JPEGs, of one class; returns their mean size in kB."""
    paths = ImagePaths(photographs)
    random = np.random.default_rng(0)
    (folder / "class").mkdir()
    sizes = []
    for number in range(count):
        try:
            pixels = read_image(paths[number % len(paths)])
        except UnreadableImage as error:
            raise UserError(f"--photographs: {error}") from error
        photograph = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        most = min(photograph.width / WIDTH, photograph.height / HEIGHT)
        scale = random.uniform(0.7, 1) * most
        width, height = WIDTH * scale, HEIGHT * scale
        left = random.uniform(0, photograph.width - width)
        top = random.uniform(0, photograph.height - height)
        box = (left, top, left + width, top + height)
        path = folder / "class" / f"{number:05d}.jpg"
        photograph.resize((WIDTH, HEIGHT), Image.BICUBIC, box).save(path, quality=95)
        sizes.append(path.stat().st_size)
    return round(np.mean(sizes) / 1000, 1)


def pillow_transform():
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                INPUT_SIZE, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )


if __name__ == "__main__":
    cli.run(main, get_args_parser())
