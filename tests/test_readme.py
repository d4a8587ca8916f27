"""What the README shows in Python does what it says."""

import re

import torch
from helpers import ROOT, write_images

import models_mae


def test_the_features_in_the_readme_are_the_encoders(tmp_path, monkeypatch):
    """On all patches, without a mask."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output_dir").mkdir()
    torch.manual_seed(0)
    model = models_mae.build_model("mae_vit_tiny_patch16", img_size=224).eval()
    contents = {"model": model.state_dict(), "args": {"input_size": 224}}
    torch.save(contents, tmp_path / "output_dir" / "checkpoint-last.pth")
    write_images(tmp_path, 1, size=(300, 260))
    (tmp_path / "000.png").rename(tmp_path / "cat.jpg")
    names = {}
    exec(code, names)
    noise = torch.arange(196.0)[None]
    latent, _, _ = model.forward_encoder(names["imgs"], mask_ratio=0.0, noise=noise)
    torch.testing.assert_close(names["tokens"], latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(names["features"], latent[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)
