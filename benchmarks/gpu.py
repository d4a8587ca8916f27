"""Tests and benchmarks on a GPU, one part after another: `make gpu`.

    python -m benchmarks.gpu

The parts are tests/test_gpu.py, small trainings whose losses are compared with this GPU's golden
ones (benchmarks/golden.py), the training steps of four models (benchmarks/train_step.py), and real
JPEGs through the loader (benchmarks/data_loading.py) and through whole runs
(benchmarks/whole_run.py). Each writes its file in benchmarks/results/ as soon as it has measured;
a GPU without golden losses gets files in tests/golden/.
A part that fails or takes too long doesn't stop the next ones; the exit code is then 1.

The first GPU is used: choose another with CUDA_VISIBLE_DEVICES.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from util import cli
from util.errors import UserError

ROOT = Path(__file__).parent.parent

# Seconds that the parts took on an H100 with 16 cores: tests 72, golden curves 54, the four tables
# 85, 84, 83 and 94. On an H200 the loader took 87 with 8192 images, whole runs 149 with 64 steps;
# both are smaller now.
TOTAL_SECONDS = 700
LONGEST_PART = 150  # so that one that hangs leaves time to the next
TURNS = "--pairs 3 --turn 0.7"

# Task, model, batch on a card of 80 GB, and the GiB from which all sides fit into memory together:
# between its turns each keeps 12 bytes a parameter and a CUDA context of about 0.5 GiB.
TABLES = [
    ("pretrain", "mae_vit_base_patch16", 256, 0),
    ("finetune", "vit_base_patch16", 128, 0),
    ("pretrain", "mae_vit_large_patch16", 128, 38),
    ("pretrain", "mae_vit_huge_patch14", 64, 76),
]
FEW_SIDES = "--sides ours:auto:compile transformers:auto"


def main(_args):
    if not torch.cuda.is_available():
        raise UserError("this machine has no GPU that torch can use; `make bench` measures its CPU")
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    end = time.monotonic() + TOTAL_SECONDS
    failed = [
        part for part in parts(gib) if not run(part, min(LONGEST_PART, end - time.monotonic()))
    ]
    if not run("benchmarks.table", LONGEST_PART):
        failed.append("benchmarks.table")
    if failed:
        sys.exit("\n  ".join(["failed:", *failed]))


def parts(gib):
    """The parts on a card of so many GiB, as arguments of `python -m`."""
    yield "pytest tests/test_gpu.py"
    yield "benchmarks.golden --device cuda"
    for task, model, batch, gib_for_all_sides in TABLES:
        flags = f"--task {task} --model {model} --batch_size {smaller(batch, gib)} {TURNS}"
        sides = [FEW_SIDES] * (gib < gib_for_all_sides)
        yield " ".join(["benchmarks.train_step --device cuda", flags, *sides])
    yield "benchmarks.data_loading --device cuda --images 4096 --pairs 1"
    flags = f"--model mae_vit_base_patch16 --batch_size {smaller(128, gib)} --steps 40 --pairs 1"
    yield f"benchmarks.whole_run --device cuda {flags}"


def smaller(batch, gib):
    """A batch for a card of `gib`, of one for 80 GB, which report at least 76: a power of two."""
    return 2 ** int(math.log2(batch * min(1, gib / 76)))


def run(part, seconds):
    """Run `python -m PART` for so many seconds at most; returns whether it succeeded."""
    print(f"\n==== {part}", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", *part.split()]
    # In a session of its own, so that it can be ended together with what it has started.
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            outcome = f"exit code {process.wait(max(0, seconds))}"
        except subprocess.TimeoutExpired:
            outcome = "took too long"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    print(f"==== {outcome} after {time.monotonic() - started:.0f} s: {part}", flush=True)
    return process.returncode == 0


if __name__ == "__main__":
    cli.run(main, cli.ArgumentParser(description=__doc__))
