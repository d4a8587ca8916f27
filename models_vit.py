"""Vision transformer classifiers for fine-tuning and probing (paper, sections 4.1 and 4.3).

timm's VisionTransformer computes the published classifier, under the published state-dict keys;
this file names its sizes. Its encoder takes the weights of a masked autoencoder of equal size.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models_mae import check_patches
from util.errors import UserError


def vision_transformer(global_pool: bool = True, **config: Any) -> VisionTransformer:
    """A classifier [N, 3, H, W] -> logits [N, num_classes].

    Args:
        global_pool: classify the mean of the patch tokens, normalised by `fc_norm`; otherwise the
            class token of the normalised output.
        config: keywords of timm's VisionTransformer: img_size and patch_size (pixels, an int or
            (height, width)), embed_dim, depth, num_heads, num_classes, drop_path_rate, ...

    Raises:
        UserError: the patch doesn't divide the image.
    """
    check_patches(to_2tuple(config["img_size"]), to_2tuple(config["patch_size"]))
    return VisionTransformer(
        global_pool="avg" if global_pool else "token",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **config,
    )


def factory(
    patch_size: int, width: int, depth: int, num_heads: int
) -> Callable[..., VisionTransformer]:
    """A model factory; without img_size, its models take images of 224 pixels."""
    return partial(
        vision_transformer,
        img_size=224,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
    )


MODELS = {
    "vit_nano_patch4": factory(4, 128, 6, 4),
    "vit_tiny_patch2": factory(2, 192, 12, 3),
    "vit_tiny_patch4": factory(4, 192, 12, 3),
    "vit_tiny_patch16": factory(16, 192, 12, 3),
    "vit_small_patch4": factory(4, 384, 12, 6),
    "vit_small_patch16": factory(16, 384, 12, 6),
    "vit_base_patch16": factory(16, 768, 12, 12),
    "vit_large_patch16": factory(16, 1024, 24, 16),
    "vit_huge_patch14": factory(14, 1280, 32, 16),
}


def build_model(name: str, **config: Any) -> VisionTransformer:
    """The named classifier; takes `vision_transformer`'s keywords.

    Raises:
        UserError: an unknown name, or a configuration that the model refuses.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name](**config)


def build_saved(saved: Mapping[str, Any], in_chans: int) -> VisionTransformer:
    """The classifier that the flags stored in a checkpoint describe, without drop path.

    Args:
        saved: "model", "input_size", "nb_classes" and "global_pool".
        in_chans: bands of an image.

    Raises:
        UserError: as `build_model`.
    """
    return build_model(
        saved["model"],
        img_size=saved["input_size"],
        in_chans=in_chans,
        num_classes=saved["nb_classes"],
        global_pool=saved["global_pool"],
    )


def add_probe_head(model: VisionTransformer) -> None:
    """Freeze a classifier and give it the linear probe's head (paper, appendix A.1).

    The head is a linear layer with small weights on features that a BatchNorm without affine
    transformation brings to one scale. Only the head requires gradients. It computes in float32.
    """
    model.requires_grad_(False)
    linear = nn.Linear(model.head.in_features, model.head.out_features)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    model.head = Float32(nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6), linear)


class Float32(nn.Sequential):
    """Layers that compute in float32 under autocast too, so that fp16 needs no gradient scaler."""

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, D] of any type to float32 logits [N, K]."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())
