"""A small model, an image folder and a way to run the command, which many tests use."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_finetune  # noqa: F401, for its model
import tiny_pretrain  # noqa: F401, for its model
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_linprobe
import main_pretrain
import models_mae
from util.checkpoint import load_checkpoint
from util.errors import UserError
from util.loading import ImageLoader

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


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A checkpoint of the model in tiny_pretrain.py, with weights that no training has touched."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.save({"model": models_mae.build_model("tiny_test_model", img_size=8).state_dict()}, path)
    return path


@pytest.fixture
def classify_flags(pretrain_flags, encoder):
    """Flags of main_finetune or main_linprobe, like those of a pre-training."""
    return pretrain_flags | {"model": "tiny_test_vit", "nb_classes": 2, "finetune": encoder}


@pytest.fixture
def spied_batches(monkeypatch):
    """The (images, labels) of every training step, before erasing and mixup."""
    batches = []
    original = ImageLoader.epoch

    def spy(self, *position):
        for step, imgs, labels in original(self, *position):
            batches.append((imgs.clone(), labels.clone()))
            yield step, imgs, labels

    monkeypatch.setattr(ImageLoader, "epoch", spy)
    return batches


def runner(command):
    return lambda flags: command.main(command.get_args_parser().parse_args(command_line(flags)))


@pytest.fixture
def pretrain():
    """Runs main_pretrain with flags, in this process."""
    return runner(main_pretrain)


@pytest.fixture
def finetune():
    """Runs main_finetune with flags, in this process."""
    return runner(main_finetune)


@pytest.fixture
def linprobe():
    """Runs main_linprobe with flags, in this process."""
    return runner(main_linprobe)


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


def final_state(output_dir, figure="val_loss"):
    """Weights, optimizer state and logged losses of a finished run."""
    contents = load_checkpoint(output_dir / "checkpoint-last.pth")
    records = [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]
    losses = [(r["epoch"], r["train_loss"], r[figure]) for r in records]
    return contents["model"], contents["optimizer"], losses


def assert_same_bits(state, other):
    """Two `final_state`s are equal to the last bit."""
    assert state[2] == other[2]
    for weights, others in ((state[0], other[0]), (state[1]["state"], other[1]["state"])):
        flat, others = (
            {
                (k, n): t
                for k, v in d.items()
                for n, t in (v if isinstance(v, dict) else {0: v}).items()
            }
            for d in (weights, others)
        )
        assert flat.keys() == others.keys()
        assert all(torch.equal(flat[key], others[key]) for key in flat)


def kill_and_resume(script, flags, number, lines):
    """Send a run a signal after so many lines on its steps, then run it to its end.

    With two steps an update and `save_minutes` 0, the third line tells of a checkpoint.
    """
    process = start(script, flags)
    shown = (line for line in process.stdout if line.startswith("epoch "))
    for _ in range(lines):
        next(shown)
    process.send_signal(number)
    rest, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    elif process.returncode != 0:  # it may have been done when the signal came
        assert process.returncode == 128 + number, err
        assert f"{number.name}: stopped after step" in rest
    code, out, err = run(script, flags)
    assert code == 0, err
    assert "resuming" in out


def events(log_dir):
    """TensorBoard scalars as {tag: {x: value}}, and the image tags with their x."""
    accumulator = EventAccumulator(str(log_dir)).Reload()
    scalars = {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()["scalars"]
    }
    images = {
        tag: [event.step for event in accumulator.Images(tag)]
        for tag in accumulator.Tags()["images"]
    }
    return scalars, images


def run(script, flags, processes=1, timeout=120, **popen):
    """Run a script to its end; returns (exit code, stdout, stderr)."""
    process = start(script, flags, processes, **popen)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err
