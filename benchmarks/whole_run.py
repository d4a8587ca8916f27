"""What a run of main_pretrain.py loses to everything but its training steps.

    python -m benchmarks.whole_run
    python -m benchmarks.whole_run --model mae_vit_large_patch16 --batch_size 256 --steps 500

Three sides take turns: a run on JPEGs (see benchmarks/data_loading.py), measured by its second
epoch; the same run while another process keeps one core busy; and as many bare steps on synthetic
images (see benchmarks/train_step.py). The share lost is what the quiet run's images/s lack of the
bare steps', plus the time to write its checkpoint as a share of the minutes between two.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report, table
from benchmarks.data_loading import PHOTOGRAPHS, make_jpegs
from benchmarks.sides import Setting
from benchmarks.train_step import Side
from util import cli
from util.checkpoint import load_checkpoint, save_checkpoint
from util.distributed import select_device

ROOT = Path(__file__).parent.parent
SAVE_MINUTES = 5  # between two checkpoints, main_pretrain.py's default
QUIET, BUSY, BARE = "main_pretrain.py", "main_pretrain.py beside a busy process", "bare steps"
BUSY_LOOP = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


def get_args_parser():
    parser = report.parser(__doc__, pairs=5)
    parser.add_argument("--model", default="mae_vit_small_patch16", help="name of the model")
    parser.add_argument("--batch_size", type=cli.integer(1), default=64, help="images per step")
    parser.add_argument("--amp", default="auto", help="as for main_pretrain.py")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--steps", type=cli.integer(1), default=16, help="per epoch")
    return parser


def main(args):
    device = select_device(args.device)
    setting = Setting("pretrain", args.model, 224, args.batch_size, device, args.amp, args.compile)
    bare = Side("ours", setting)
    bare.warm_up()
    images = args.steps * args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        make_jpegs(Path(folder), PHOTOGRAPHS, images)

        def beside_a_busy_process():
            with busy_process():
                return train_two_epochs(folder, args)

        records = report.take_turns(
            {
                QUIET: lambda: train_two_epochs(folder, args),
                BUSY: beside_a_busy_process,
                BARE: lambda: {"images_per_s": images / bare.train(args.steps)},
            },
            args.pairs,
        )
    rates = {run: [record["images_per_s"] for record in records[run]] for run in records}
    saving = [record["checkpoint_seconds"] for record in records[QUIET]]
    rounds = zip(rates[QUIET], rates[BARE], saving, strict=True)
    lost = [1 - run / steps + seconds / (60 * SAVE_MINUTES) for run, steps, seconds in rounds]
    results = {
        "images_per_s": {run: report.median_and_range(rates[run]) for run in rates},
        "busy_to_quiet": report.ratio(rates[BUSY], rates[QUIET]),
        "share_lost": report.median_and_range(lost, 3),
        "checkpoint_seconds": report.median_and_range(saving),
        "data_wait": report.median_and_range([r["data_wait"] for r in records[QUIET]], 4),
    }
    settings = {name: getattr(args, name) for name in ("model", "batch_size", "amp", "steps")}
    written = report.write(f"whole_run{report.on(device)}", results, **settings)
    print(table.whole_run_table(written))


@contextlib.contextmanager
def busy_process():
    """While it lasts, another process keeps one core busy."""
    with subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) as process:
        try:
            yield process
        finally:
            process.kill()


def train_two_epochs(folder, args):
    """Train from scratch; returns the second epoch's entries in log.txt, and checkpoint_seconds."""
    with tempfile.TemporaryDirectory() as output_dir:
        words = f"--model {args.model} --batch_size {args.batch_size} --amp {args.amp}".split()
        words += f"--device {args.device} --save_minutes {SAVE_MINUTES} --norm_pix_loss".split()
        words += ["--epochs=2", "--warmup_epochs=1", *["--compile"] * args.compile]
        words += ["--data_path", folder, "--output_dir", output_dir]
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
