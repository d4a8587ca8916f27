"""Measure a folder of images, or pack it into tar shards, before training on it.

python main_data.py stats --data_path DIR --output stats.json
python main_data.py pack --data_path DIR --output OUT
"""

import json
from dataclasses import asdict
from pathlib import Path

import util.threads  # noqa: F401  before torch, whose threads it sets

# isort: split
import torch

from util import advice, cli, distributed, flags, image_files, locking, packing
from util.checkpoint import write_whole
from util.errors import UserError, warn
from util.pixels import PixelFormat
from util.shards import ShardImages
from util.statistics import measure

STATS = """Measure every band of the training images: minimum, maximum, 1st and 99th percentile,
mean and standard deviation (of the population), in the files' own units.

    python main_data.py stats --data_path DIR --output stats.json

Prints the flags with which main_pretrain.py normalises these images.
"""

PACK = """Pack DIR/train, DIR/val and DIR/test, or DIR itself as train, into tar shards.

    python main_data.py pack --data_path DIR --output OUT --max_side 512

A training then takes --data_path OUT. The shards have WebDataset's names. Run the same command
again to continue after an interruption.
"""


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_stats_parser(commands)
    add_pack_parser(commands)
    return parser


def add_stats_parser(commands):
    parser = commands.add_parser("stats", description=STATS, help="statistics of every band")
    parser.set_defaults(run=stats)
    flags.add_source_flags(parser)
    flags.add_reading_flags(parser)
    parser.add_argument(
        "--max_images", type=cli.integer(1), help="measure only so many, spread evenly over all"
    )
    parser.add_argument(
        "--output", type=cli.path, metavar="FILE", help="write the statistics to it, as JSON"
    )


def stats(args):
    if args.output:
        cli.make_writable(Path(args.output).parent, "folder of --output")
        if Path(args.output).is_dir():
            raise UserError(f"--output {args.output} is a folder: give a file such as stats.json")
    pixels = PixelFormat(
        bands=tuple(args.bands) if args.bands else None,
        nodata=args.nodata,
        layout=args.layout or "hwc",
        exif_orientation=bool(args.exif_orientation),
        max_pixels=args.max_pixels,
    )
    paths = image_files.find_images(args.data_path, "train", pixels, as_stored=True)
    if args.max_images and args.max_images < len(paths):
        print(f"measuring {args.max_images} of {len(paths)} images, spread evenly", flush=True)
    found = measure(paths, pixels, max_images=args.max_images, num_workers=args.num_workers)

    for doubt in advice.doubts(found, pixels):
        warn(doubt)
    print(f"{found.images} images, {found.pixels} pixels, {found.dtype}; in their own units:")
    if found.kept is not None:
        print(f"percentiles are of {found.kept} values a band, spread over all")
    print(advice.table(found, pixels))
    pasted = advice.flags_to_paste(found, pixels)
    print(f"flags to paste, with mean and std on the scale from 0 to 1:\n{pasted}")
    if found.bands == 1:
        print(
            "--in_chans 1 is for a model of one band. For one of three equal bands leave it out, "
            "and give the numbers of --mean and --std three times"
        )
    if args.output:
        entries = asdict(found) | {"flags": pasted}
        del entries["full_scale"], entries["kept"]
        try:
            write_whole(Path(args.output), json.dumps(entries).encode() + b"\n")
        except OSError as error:
            raise UserError(f"--output {error}") from error


def add_pack_parser(commands):
    parser = commands.add_parser("pack", description=PACK, help="tar shards of the images")
    parser.set_defaults(run=pack)
    flags.add_source_flags(parser)
    parser.add_argument(
        "--output", type=cli.path, required=True, metavar="OUT", help="folder of the shards"
    )
    parser.add_argument(
        "--max_side",
        type=cli.integer(1),
        metavar="PIXELS",
        help="resize larger 8-bit images so that their longer side has so many; if not given, "
        "files are copied",
    )
    parser.add_argument(
        "--shard_mb",
        type=cli.integer(1),
        default=500,
        help="size of a shard in megabytes (10^6 bytes)",
    )
    parser.add_argument(
        "--pages",
        choices=["each", "bands", "first"],
        default="first",
        help="each: make an image of every page or frame of a file; bands: make one image of all, "
        "a .npy; first: copy the file, of which a training reads the first",
    )
    parser.add_argument(
        "--layout", choices=["hwc", "chw"], default="hwc", help="axes of a .npy file"
    )
    parser.add_argument(
        "--max_pixels",
        type=cli.integer(1),
        default=PixelFormat.max_pixels,
        help="files that claim more pixels, or more than 8 bytes for each, are left out",
    )


def pack(args):
    cli.make_writable(args.output, "--output")
    how = packing.Packing(args.max_side, args.shard_mb, args.pages, args.layout, args.max_pixels)
    splits = {}
    for split in ("train", "val", "test"):
        images = image_files.find_images(args.data_path, split, how.pixels, as_stored=True)
        if isinstance(images, ShardImages):
            raise UserError(f"{images.origin} are shards already: pack the folder they came from")
        if images:
            splits[split] = images
    with locking.lock(args.output, distributed.Process(0, 1, torch.device("cpu"))):
        packing.pack(splits, Path(args.output), how, args.num_workers)


def main(args):
    args.run(args)


if __name__ == "__main__":
    cli.run(main, get_args_parser())
