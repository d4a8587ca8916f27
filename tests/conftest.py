"""Fixtures of many tests: an image folder, small models, and commands to run on them."""

import pytest
import tiny_finetune  # noqa: F401, for its model
import tiny_pretrain  # noqa: F401, for its model
import torch

import main_finetune
import main_linprobe
import main_pretrain
import models_mae
from util.errors import UserError
from util.loading import ImageLoader

pytest.register_assert_rewrite("helpers")  # before its import: its asserts then show their values
from helpers import runner, write_images  # noqa: E402


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
        "amp": "off",
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
    original = ImageLoader.train_batches

    def spy(self, *position):
        for batch in original(self, *position):
            batches.append((batch.imgs.clone(), batch.labels.clone()))
            yield batch

    monkeypatch.setattr(ImageLoader, "train_batches", spy)
    return batches


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
