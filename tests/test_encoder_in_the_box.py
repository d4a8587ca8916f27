"""The encoder in recipes/encoders gives the features that timm gives, and starts a classifier."""

import json
import shlex

import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
from helpers import ROOT, runner, write_images
from PIL import Image
from torchvision import transforms

import main_embed
import main_finetune
import main_pretrain

FOLDER = ROOT / "recipes" / "encoders" / "nano_cifar10"
PHOTOGRAPHS = ROOT / "benchmarks" / "photographs"


def timm_features(image):
    """As its card says: by timm's own transformer and torchvision's transforms on Pillow; [128]."""
    with torch.device("meta"):
        model = timm.models.VisionTransformer(
            img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, num_classes=0
        )
    weights = safetensors.torch.load_file(FOLDER / "model.safetensors")
    model.load_state_dict(weights, assign=True)
    prepare = transforms.Compose(
        [
            transforms.Resize(36, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.inference_mode():
        return model.eval().forward_features(prepare(image)[None])[0, 1:].mean(dim=0)


def test_features_of_photographs_are_timm_s(tmp_path):
    output = tmp_path / "features.npz"
    flags = {"checkpoint": FOLDER, "data_path": PHOTOGRAPHS, "output": output, "num_workers": 0}
    runner(main_embed)(flags)
    found = np.load(output)
    for name, features in zip(found["filenames"], found["embeddings"], strict=True):
        expected = timm_features(Image.open(PHOTOGRAPHS / str(name)))
        # Resizing by Pillow rounds to whole samples.
        np.testing.assert_allclose(features, expected, rtol=0, atol=0.02 * expected.abs().max())


def test_a_classifier_starts_from_it(tmp_path):
    for part in ("train", "val"):
        for label in "ab":
            write_images(tmp_path / part / label, 2)
    flags = {"finetune": FOLDER, "data_path": tmp_path, "nb_classes": 2, "epochs": 1, "lr": 0}
    flags |= {"model": "vit_nano_patch4", "input_size": 32, "batch_size": 2, "num_workers": 0}
    runner(main_finetune)(flags | {"output_dir": tmp_path / "out"})
    saved = torch.load(tmp_path / "out" / "checkpoint-last.pth", weights_only=True)["model"]
    for name, weight in safetensors.torch.load_file(FOLDER / "model.safetensors").items():
        if name not in ("norm.weight", "norm.bias"):  # a mean-pooled classifier has its own
            torch.testing.assert_close(saved[name], weight, rtol=0, atol=0)


def test_it_is_small_and_what_its_card_and_the_results_say():
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size < 6e6
    card = (FOLDER / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card
    run = json.loads((ROOT / "recipes" / "results" / "cifar10" / "nano-pretrain.json").read_text())
    last = run["outputs"]["log.txt"][-1]
    assert f"{last['train_loss']:.3f} on the training images, {last['val_loss']:.3f}" in card
    with safetensors.safe_open(path, "pt") as file:
        saved = json.loads(file.metadata()["mae"])
    assert saved["epoch"] == last["epoch"] == 99
    (command,) = run["commands"]
    parser = main_pretrain.get_args_parser()
    given = json.loads(json.dumps(vars(parser.parse_args(shlex.split(command)[2:]))))
    for name in (
        "model",
        "blr",
        "crop_scale",
        "decoder_depth",
        "mask_ratio",
        "norm_pix_loss",
        "seed",
    ):
        assert saved["args"][name] == given[name]
