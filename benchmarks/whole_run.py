"""The share of main_pretrain.py's time that goes to anything but training steps.

    python -m benchmarks.whole_run
    python -m benchmarks.whole_run --model mae_vit_large_patch16 --batch_size 256 --steps 500

The second epoch of a run on JPEGs of 500 x 375 pixels (see benchmarks/data_loading.py), with its
loading, logging and rolling checkpoints, takes turns with as many bare steps on synthetic images
(see benchmarks/train_step.py). The share lost is what the epoch's images a second, as log.txt has
them, lack of the bare steps'. The first epoch warms up, as the bare steps do before their turns.
With --save_minutes 0.5, ten times as often as by default, a checkpoint is written within the epoch,
which must take more than half a minute.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.data_loading import PHOTOGRAPHS, make_jpegs
from benchmarks.sides import Setting
from benchmarks.train_step import Side
from util import cli
from util.distributed import select_device
from util.errors import UserError

ROOT = Path(__file__).parent.parent
SAVE_MINUTES = 0.5


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mae_vit_small_patch16", help="name of the model")
    parser.add_argument("--batch_size", type=cli.integer(1), default=64, help="images of a step")
    parser.add_argument("--amp", default="bf16", help="as of main_pretrain.py")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--steps", type=cli.integer(1), default=24, help="of an epoch")
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
            rate = records[-1]["images_per_s"]
            seconds = args.steps * args.batch_size / rate
            if seconds < 60 * SAVE_MINUTES:
                raise UserError(
                    f"no checkpoint falls into an epoch of {seconds:.0f} s: more --steps"
                )
            return rate

        turns = {
            "main_pretrain.py": whole_epoch,
            "bare steps": lambda: args.batch_size * steps.steps_per_second(count=args.steps),
        }
        rates = report.take_turns(turns, args.pairs)
    steps.close()
    pairs = zip(*rates.values(), strict=True)
    results = {
        "images_per_s": {name: report.median_and_range(values) for name, values in rates.items()},
        "share_lost": report.median_and_range([1 - whole / bare for whole, bare in pairs], 3),
        "data_wait": report.median_and_range([r["data_wait"] for r in records[1:]], 4),
    }
    print(json.dumps(results, indent=2))
    report.write(
        "whole_run", results, model=args.model, batch_size=args.batch_size, steps=args.steps
    )


def train_two_epochs(folder, args):
    """Train from scratch; returns the second epoch's entries in log.txt."""
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
        return json.loads((Path(output_dir) / "log.txt").read_text().splitlines()[-1])


if __name__ == "__main__":
    cli.run(main, get_args_parser())
