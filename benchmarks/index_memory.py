"""Memory that the index of a million images adds to every data-loading worker.

    python -m benchmarks.index_memory --json benchmarks/results/index_memory.json

Workers touch every path, as an epoch would, then report the memory that is theirs alone (Linux's
private pages, USS). Shown is what `ImagePaths` of util/image_files.py adds to a worker with an
index of one path, and, for contrast, what a plain list of the same paths adds: forked workers copy
its pages as reference counts are written, others receive it whole. Expected: at most 20 MB for the
index, else the exit code is 1. Takes about a minute.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from util import image_files

LIMIT_MB = 20
IMAGES_PER_CLASS = 1300


def get_args_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_paths", type=int, default=1_000_000)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument(
        "--start_methods",
        nargs="+",
        default=multiprocessing.get_all_start_methods(),
        choices=multiprocessing.get_all_start_methods(),
        help="how workers start, all ways if not given",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser


def image_names(count):
    """Names like ImageNet's, below a folder that need not hold them."""
    for number in range(count):
        label, image = divmod(number, IMAGES_PER_CLASS)
        synset = f"n{1_440_764 + 13 * label:08d}"
        yield f"train/{synset}/{synset}_{10_026 + 7 * image}.JPEG".encode()


def index_of(count, folder):
    """An `ImagePaths` of that many images."""
    with mock.patch.object(image_files, "_image_names", lambda root: image_names(count)):
        return image_files.ImagePaths(folder)


def list_of(count, folder):
    """The same paths in a list."""
    return [os.path.join(folder, os.fsdecode(name)) for name in image_names(count)]


class WholeIndex(torch.utils.data.Dataset):
    """One item a worker: what it measures after it has touched every path."""

    def __init__(self, paths, num_workers):
        self.paths = paths
        self.num_workers = num_workers

    def __len__(self):
        return self.num_workers

    def __getitem__(self, index):
        characters = sum(len(self.paths[number]) for number in range(len(self.paths)))
        return {"pid": os.getpid(), "characters": characters, "private_mb": private_mb()}


def private_mb():
    """Memory of this process that no other one shares, in millions of bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6


def measure(make_index, count, folder, num_workers, start_method):
    """Largest private memory of workers, in MB, that have each touched `count` paths."""
    loader = torch.utils.data.DataLoader(
        WholeIndex(make_index(count, folder), num_workers),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context=start_method,
    )
    reports = list(loader)
    characters = sum(len(folder) + 1 + len(name) for name in image_names(count))
    assert [report["characters"] for report in reports] == [characters] * num_workers
    assert len({report["pid"] for report in reports} - {os.getpid()}) == num_workers
    return max(report["private_mb"] for report in reports)


def main(args):
    figures = []
    print(f"{args.num_paths:,} paths, {args.num_workers} workers, private memory of a worker in MB")
    print(f"{'start method':>14}{'one path':>10}{'ImagePaths adds':>17}{'a list adds':>13}")
    with tempfile.TemporaryDirectory() as folder:
        for start_method in args.start_methods:
            one, index, plain_list = (
                measure(make_index, count, folder, args.num_workers, start_method)
                for make_index, count in (
                    (index_of, 1),
                    (index_of, args.num_paths),
                    (list_of, args.num_paths),
                )
            )
            print(f"{start_method:>14}{one:>10.1f}{index - one:>17.1f}{plain_list - one:>13.1f}")
            figures.append(
                {
                    "start_method": start_method,
                    "worker_with_one_path_mb": round(one, 1),
                    "image_paths_add_mb": round(index - one, 1),
                    "plain_list_adds_mb": round(plain_list - one, 1),
                }
            )
    if args.json:
        report = {
            "num_paths": args.num_paths,
            "num_workers": args.num_workers,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "limit_mb": LIMIT_MB,
            "workers": figures,
        }
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    within_limit = all(figure["image_paths_add_mb"] <= LIMIT_MB for figure in figures)
    print(f"ImagePaths adds {'at most' if within_limit else 'MORE than'} {LIMIT_MB} MB to a worker")
    sys.exit(0 if within_limit else 1)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
