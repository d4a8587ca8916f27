"""Whether memory and open files grow over a long run, and how long a run takes to start.

    python -m benchmarks.load
    python -m benchmarks.load --files 2000 --steps 200 --epochs 4

Every file has an inode and bytes of its own: one of a few small JPEGs or PNGs, in 100 class folders
below the system's temporary folder (TMPDIR). All runs are main_pretrain.py on the CPU, in a process
of its own, with a model of a few pixels and --num_workers 2:

- starts: from the command to the first step's line, on the folder, on a list of its paths and on
  tar shards. The files have just been written, so the page cache holds them.
- one epoch over all files, which saves every 20 seconds;
- many epochs over a hundredth of them, each with a save, held-out images and a k-NN.

Memory and open files are read from /proc, from outside, at log lines. Memory is what is resident in
the main process, and in its workers, without the pages of files, which the kernel can drop. Forked
workers share pages with the main process, so their sum is more than they take; "shared once" counts
such a page in parts, and grows while they write to pages that were shared. A straight line is
fitted to each, but for the first tenth of the steps, which warms up. Memory is called flat if that
line rises by less than the values scatter about it, or by less than 1 MiB: the allocator takes
memory in pieces, and one piece more is no trend.
"""

import contextlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import report, table
from benchmarks.whole_run import ROOT
from util import cli
from util.errors import UserError
from util.image_files import ImagePaths
from util.shards import find_shards
from util.survey import survey

CLASSES, KINDS = 100, 16
SAVE_SECONDS = 20
HELD_OUT = 500
PIECE_MIB = 1
MODEL = "--model mae_vit_nano_patch4 --input_size 16 --device cpu --num_workers 2"
STEP = re.compile(r"epoch (\d+)/\d+ +step (\d+)/(\d+) ")


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=cli.integer(CLASSES), default=200_000)
    parser.add_argument("--steps", type=cli.integer(20), default=10_000, help="that take all files")
    parser.add_argument("--epochs", type=cli.integer(4), default=50, help="over a hundredth")
    return parser


def main(args):
    if not os.path.exists("/proc/self/smaps_rollup"):
        raise UserError("this system has no /proc/PID/smaps_rollup: measure on Linux")
    batch_size = args.files // args.steps
    if not batch_size:
        raise UserError(f"--files {args.files} are fewer than --steps {args.steps}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds = {"writing the files": make_images(folder / "images", args.files)}
        part = max(args.files // 100, 4 * batch_size)
        list_images(folder / "images", folder / "all", args.files)
        list_images(folder / "images", folder / "part", part)
        seconds["packing them"] = pack(folder / "images", folder / "shards")
        results = {
            "starts": measure_starts(folder, batch_size),
            "one epoch": watch(folder / "images", batch_size, 1, max(1, args.steps // 100)),
            "many epochs": watch(
                folder / "part", batch_size, args.epochs, part // batch_size, "--knn_every", "1"
            ),
        }
        written = report.write(
            "load",
            results,
            files=args.files,
            batch_size=batch_size,
            file_system=file_system(folder),
            seconds=seconds,
        )
    print(table.load_tables(written))


# ---- images


def make_images(folder, count):
    """Write `count` files below folder/train, and some below folder/val; returns the seconds."""
    contents = [encode(seed) for seed in range(KINDS)]
    started = time.perf_counter()
    for split, number in (("train", count), ("val", min(HELD_OUT, count))):
        for name in range(CLASSES):
            (folder / split / f"{name:03d}").mkdir(parents=True)
        for index in range(number):
            content, suffix = contents[index % KINDS]
            path = f"{folder}/{split}/{index % CLASSES:03d}/{index:06d}.{suffix}"
            with open(path, "wb") as file:
                file.write(content)
    return round(time.perf_counter() - started, 1)


def encode(seed):
    """An image of smooth random colours as a file's bytes, and their suffix."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)
    suffix = "png" if seed % 2 else "jpg"
    buffer = io.BytesIO()
    image.save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return buffer.getvalue(), suffix


def list_images(images, folder, count):
    """Write lists of the first `count` images to train on, and of all held-out ones."""
    folder.mkdir()
    for split, most in (("train", count), ("val", None)):
        paths = sorted((images / split).glob("*/*"), key=lambda path: path.name)[:most]
        (folder / f"{split}.txt").write_text("".join(f"{path}\n" for path in paths))


def pack(images, shards):
    """Pack the images into tar shards; returns the seconds."""
    started = time.perf_counter()
    words = ["pack", "--data_path", str(images), "--output", str(shards), "--shard_mb", "100"]
    command = [sys.executable, str(ROOT / "main_data.py"), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - started, 1)


def file_system(folder):
    """The name of a folder's file system, as `stat` knows it."""
    return subprocess.check_output(["stat", "-f", "-c", "%T", folder], text=True).strip()


# ---- starting


def measure_starts(folder, batch_size):
    """Of each kind of --data_path, the seconds to the first step; and here, of their parts."""
    images, paths, shards = folder / "images", folder / "all", folder / "shards"
    first = {"seconds_to_first_step": seconds_to_first_step(shards, batch_size)}  # builds an index
    return {
        "folder": start(images, lambda: ImagePaths(images / "train"), batch_size),
        "list": start(paths, lambda: ImagePaths(paths / "train.txt"), batch_size),
        "tar shards, the first time": first,
        "tar shards": start(shards, lambda: find_shards(shards, "train"), batch_size),
    }


def start(data_path, find, batch_size):
    started = time.perf_counter()
    images = find()
    found = time.perf_counter()
    survey(images)
    surveyed = time.perf_counter()
    return {
        "seconds_to_first_step": seconds_to_first_step(data_path, batch_size),
        "seconds_to_find": round(found - started, 2),
        "seconds_to_survey": round(surveyed - found, 2),
    }


def seconds_to_first_step(data_path, batch_size):
    """From the start of a command to the line of its first step."""
    started = time.perf_counter()
    with training(data_path, batch_size, epochs=1, log_every=1) as process:
        has_begun = any(map(STEP.match, process.stdout))
        seconds = time.perf_counter() - started
        process.terminate()  # not killed, which would leave its workers behind for some seconds
        process.communicate()
    if not has_begun:
        raise UserError(f"the run on {data_path} ended with exit code {process.returncode}")
    return round(seconds, 2)


@contextlib.contextmanager
def training(data_path, batch_size, epochs, log_every, *flags):
    """A run of main_pretrain.py, as a process whose lines can be read; it is over afterwards."""
    with tempfile.TemporaryDirectory() as output_dir:
        words = (
            f"{MODEL} --batch_size {batch_size} --epochs {epochs} --log_every {log_every}".split()
        )
        words += f"--warmup_epochs 0 --save_minutes {SAVE_SECONDS / 60}".split()
        words += ["--data_path", data_path, "--output_dir", output_dir, *flags]
        command = [sys.executable, ROOT / "main_pretrain.py", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()


# ---- running


def watch(data_path, batch_size, epochs, log_every, *flags):
    """A run's memory and open files at its log lines.

    Returns:
        a dict of seconds, steps and epochs; samples, some of what was read; open_files, all their
        numbers; and lines, what `fit` returns for the memory of "main" and of "workers".
    """
    samples = []
    started = time.perf_counter()
    with training(data_path, batch_size, epochs, log_every, *flags) as process:
        for line in process.stdout:
            if found := STEP.match(line):
                epoch, step, steps = map(int, found.groups())
                total = epoch * steps + step
                if step % log_every == 0:  # a save shows a line, too
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # has ended
                        samples.append({"step": total} | look_at(process.pid))
        if process.wait():
            raise UserError(f"the run on {data_path} ended with exit code {process.returncode}")
    seconds = time.perf_counter() - started
    fitted = samples[len(samples) // 10 :]
    shown = {round(len(samples) * tenth / 10) - 1 for tenth in range(1, 11)}
    shown.add(round(len(samples) / 20) - 1)
    return {
        "seconds": round(seconds, 1),
        "steps": total,
        "epochs": epochs,
        "samples": [sample for index, sample in enumerate(samples) if index in shown],
        "open_files": sorted({sample["open_files"] for sample in fitted}),
        "lines": {
            whose: fit(
                [sample["step"] for sample in fitted],
                [sample[f"mib_of_{whose}"] for sample in fitted],
            )
            for whose in ("main", "workers")
        },
    }


def look_at(pid):
    """Memory and open files of a process and of those that it has started, of which some may go."""
    processes = [memory_and_files(pid)]
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in file.read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                processes.append(memory_and_files(child))
    resident, proportional, files = zip(*processes, strict=True)
    return {
        "mib_of_main": round(resident[0], 2),
        "mib_of_workers": round(sum(resident[1:]), 2),
        "mib_shared_once": round(sum(proportional), 2),
        "workers": len(processes) - 1,
        "open_files": sum(files),
    }


def memory_and_files(pid):
    """A process's memory in MiB, the same with shared pages in parts, and its open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    resident = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE)
    proportional = re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", rollup, re.MULTILINE)
    mib, mib_in_parts = (sum(map(int, kib)) / 1024 for kib in (resident, proportional))
    return mib, mib_in_parts, len(os.listdir(f"/proc/{pid}/fd"))


def fit(steps, mib):
    """The straight line through memory by step.

    Returns:
        a dict of kib_per_1000_steps, with its standard error; rise_mib, the line's over all steps;
        scatter_mib, twice the standard deviation about it; and is_flat, see above.
    """
    (slope, start), covariance = np.polyfit(steps, mib, 1, cov=True)
    rise = float(slope) * (steps[-1] - steps[0])
    scatter = 2 * float(np.std(mib - (start + slope * np.asarray(steps))))
    return {
        "kib_per_1000_steps": round(1024 * 1000 * float(slope), 1),
        "standard_error": round(1024 * 1000 * math.sqrt(covariance[0, 0]), 1),
        "rise_mib": round(rise, 2),
        "scatter_mib": round(scatter, 2),
        "is_flat": abs(rise) <= max(scatter, PIECE_MIB),
    }


if __name__ == "__main__":
    cli.run(main, get_args_parser())
