"""The share of main_pretrain.py's time that goes to anything but training steps.

    python -m benchmarks.whole_run
    python -m benchmarks.whole_run --model mae_vit_large_patch16 --batch_size 256 --steps 500

The second epoch of a run on JPEGs of 500 x 375 pixels (see benchmarks/data_loading.py), with its
loading and logging, takes turns with as many bare steps on synthetic images (see
benchmarks/train_step.py). The share lost is what the epoch's images a second, as log.txt has them,
lack of the bare steps', and the time to write the run's checkpoint once more, of the minutes
between two. The first epoch warms up, as the bare steps do before their turns.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report
from benchmarks.data_loading import PHOTOGRAPHS, make_jpegs
from benchmarks.sides import Setting
from benchmarks.train_step import Side
from util import cli
from util.checkpoint import load_checkpoint, save_checkpoint
from util.distributed import select_device
from util.errors import UserError

ROOT = Path(__file__).parent.parent
SAVE_MINUTES = 5  # between two checkpoints, main_pretrain.py's default


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mae_vit_small_patch16", help="name of the model")
    parser.add_argument("--batch_size", type=cli.integer(1), default=64, help="images of a step")
    parser.add_argument("--amp", default="bf16", help="as of main_pretrain.py")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--steps", type=cli.integer(1), default=16, help="of an epoch")
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is some), cuda or cpu"
    )
    parser.add_argument("--pairs", type=cli.integer(1), default=5, help="rounds of turns")
    return parser


def main(args):
    device = select_device(args.device)
    setting = Setting("pretrain", args.model, 224, args.batch_size, device, args.amp, args.compile)
    steps = Side("ours", setting)
    if steps.failure:
        raise UserError(steps.failure)
    with tempfile.TemporaryDirectory() as folder:
        make_jpegs(Path(folder), PHOTOGRAPHS, args.steps * args.batch_size)
        records = []

        def whole_epoch():
            records.append(train_two_epochs(folder, args))
            return records[-1]["images_per_s"]

        turns = {
            "main_pretrain.py": whole_epoch,
            "bare steps": lambda: args.batch_size * steps.steps_per_second(count=args.steps),
        }
        rates = report.take_turns(turns, args.pairs)
    steps.close()
    saving = [record["checkpoint_seconds"] for record in records[1:]]
    rounds = zip(*rates.values(), saving, strict=True)
    lost = [1 - whole / bare + seconds / (60 * SAVE_MINUTES) for whole, bare, seconds in rounds]
    results = {
        "images_per_s": {name: report.median_and_range(values) for name, values in rates.items()},
        "share_lost": report.median_and_range(lost, 3),
        "checkpoint_seconds": report.median_and_range(saving),
        "data_wait": report.median_and_range([r["data_wait"] for r in records[1:]], 4),
    }
    print(json.dumps(results, indent=2))
    report.write(
        "whole_run", results, model=args.model, batch_size=args.batch_size, steps=args.steps
    )


def train_two_epochs(folder, args):
    """Train from scratch; returns the second epoch's entries in log.txt, and checkpoint_seconds."""
    with tempfile.TemporaryDirectory() as output_dir:
        flags = {
            "data_path": folder,
            "output_dir": output_dir,
            "model": args.model,
            "batch_size": args.batch_size,
            "amp": args.amp,
            "device": args.device,
            "epochs": 2,
            "warmup_epochs": 1,
            "save_minutes": SAVE_MINUTES,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        words += ["--norm_pix_loss"] + ["--compile"] * args.compile
        command = [sys.executable, str(ROOT / "main_pretrain.py"), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        record = json.loads((Path(output_dir) / "log.txt").read_text().splitlines()[-1])
        path = Path(output_dir) / "checkpoint-last.pth"
        contents = load_checkpoint(path)
        started = time.perf_counter()
        save_checkpoint(path, contents)
        return record | {"checkpoint_seconds": time.perf_counter() - started}


if __name__ == "__main__":
    cli.run(main, get_args_parser())
