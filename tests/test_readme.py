"""What the README shows in Python does what it says."""

import re

import safetensors.torch
import torch
from helpers import ROOT

import models_mae


def test_the_features_in_the_readme_are_the_encoders(monkeypatch):
    """On all patches, without a mask."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code, names)
    model = models_mae.build_model("mae_vit_nano_patch4", img_size=32).eval()
    weights = safetensors.torch.load_file("recipes/encoders/nano_cifar10/model.safetensors")
    model.load_state_dict(weights, strict=False)  # it has no decoder
    noise = torch.arange(64.0)[None]
    latent, _, _ = model.forward_encoder(names["imgs"], mask_ratio=0.0, noise=noise)
    torch.testing.assert_close(names["tokens"], latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(names["features"], latent[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)
