"""The figures of the original implementation and the inputs they were computed from.

See reference/README.md for how the inputs are defined.
"""

import json
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models_mae import MaskedAutoencoderViT

FIGURES = json.loads((Path(__file__).parent / "reference" / "figures.json").read_text())


def fill_weights(model, seed):
    """The reference weights of every trainable parameter, a function of its name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
            values = (random.standard_normal(tuple(parameter.shape)) * 0.05).astype(np.float32)
            values += float("norm" in name and name.endswith("weight"))
            parameter.data.copy_(torch.from_numpy(values))
    return model


def reference_mae(case):
    """The model of a `mae` case, with its weights."""
    model = MaskedAutoencoderViT(
        **case["config"],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss=case["norm_pix_loss"],
    )
    return fill_weights(model, case["seed"])


def reference_inputs(case, model, image_seed=None, noise_seed=None):
    """Images and noise of a `mae` case; the seeds are those of its loss when not given."""
    seed, size = case["seed"], case["config"]["img_size"]
    images = np.random.RandomState(seed + 1 if image_seed is None else image_seed)
    noise = np.random.RandomState(seed + 2 if noise_seed is None else noise_seed)
    return (
        torch.from_numpy(images.standard_normal((case["batch"], 3, size, size)).astype(np.float32)),
        torch.from_numpy(
            noise.random_sample((case["batch"], model.patch_embed.num_patches)).astype(np.float32)
        ),
    )


def assert_statistics(tensor, expected, rtol=1e-4):
    """Shape, mean, std, l2 and the ends of a tensor are those of the reference."""
    flat = tensor.detach().double().flatten()
    assert list(tensor.shape) == expected["shape"]
    scale = expected["std"] * rtol  # values near 0 carry the error of the others
    assert abs(flat.mean() - expected["mean"]) < scale
    assert abs(flat.std() - expected["std"]) < scale
    assert abs(flat.norm() / expected["l2"] - 1) < rtol
    for part, values in ((flat[:8], expected["first"]), (flat[-4:], expected["last"])):
        torch.testing.assert_close(part, torch.tensor(values).double(), rtol=rtol, atol=scale)
