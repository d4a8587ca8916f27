"""A small model, an image folder and a way to run the command, which many tests use."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pretrain  # noqa: F401, for its model
from PIL import Image

import main_pretrain
from util.errors import UserError

ROOT = Path(__file__).parent.parent


def write_images(folder, count, size=(12, 10), seed=0):
    """Write `count` PNG images of smooth random colours, named 000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        coarse = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.BICUBIC).save(folder / f"{index:03d}.png")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Eighteen training and five held-out images of 12 x 10 pixels in two classes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train" / "a", 10, seed=1)
    write_images(root / "train" / "b", 8, seed=2)
    write_images(root / "val" / "a", 3, seed=3)
    write_images(root / "val" / "b", 2, seed=4)
    return root


@pytest.fixture
def pretrain_flags(image_folder, tmp_path):
    """Flags of a run of a few seconds: nine steps an epoch of the model in tiny_pretrain.py."""
    return {
        "data_path": image_folder,
        "output_dir": tmp_path / "out",
        "model": "tiny_test_model",
        "input_size": 8,
        "batch_size": 2,
        "epochs": 2,
        "warmup_epochs": 1,
        "lr": 1e-2,
        "num_workers": 0,
        "device": "cpu",
    }


@pytest.fixture
def pretrain():
    """Runs main_pretrain with flags, in this process."""
    return lambda flags: main_pretrain.main(
        main_pretrain.get_args_parser().parse_args(command_line(flags))
    )


@pytest.fixture
def user_error():
    """Calls a function and returns the message of the UserError that it must raise."""

    def message(function):
        with pytest.raises(UserError) as caught:
            function()
        return str(caught.value)

    return message


def command_line(flags):
    """Flags as words: {"lr": 1, "compile": True} becomes ["--lr", "1", "--compile"]."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *(str(v) for v in values if v is not True)]
    return words


def start(script, flags, processes=1, **popen):
    """Start a script of the tests or of the project, under torchrun for several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launcher, str(ROOT / script), *command_line(flags)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def run(script, flags, processes=1, timeout=120, **popen):
    """Run a script to its end; returns (exit code, stdout, stderr)."""
    process = start(script, flags, processes, **popen)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err
