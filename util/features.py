"""Features of whole images: the encoder's tokens without a mask, and their pooling."""

import torch
from torch import Tensor, nn

from util.errors import UserError

POOLS = ("mean", "cls", "none")


def check_layer(model: nn.Module, layer: int) -> None:
    """Refuse, with a UserError, a block that the model doesn't have."""
    depth = len(model.blocks)
    if not -depth <= layer < depth:
        raise UserError(
            f"layer {layer} does not exist: the model has the blocks 0 to {depth - 1}, or -1 for "
            "the last"
        )


def tokens(model: nn.Module, imgs: Tensor, layer: int = -1) -> Tensor:
    """The tokens of images [N, C, H, W] after a block: [N, 1 + L, D], class token first.

    All patches are seen, in the order of the image, and nothing is drawn. The final norm follows,
    whatever the block; it is the identity where a classifier normalises the pooled features
    instead. So the last block's tokens are timm's `forward_features`.

    Args:
        model: a MaskedAutoencoderViT or one of timm's VisionTransformers.
        layer: the block's index, from 0, or from the end if negative.

    Raises:
        UserError: there is no such block.
    """
    check_layer(model, layer)
    x = model.patch_embed(imgs) + model.pos_embed[:, 1:]  # [N, L, D]
    cls_token = model.cls_token + model.pos_embed[:, :1]
    x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)  # [N, 1 + L, D]
    for block in model.blocks[: layer % len(model.blocks) + 1]:
        x = block(x)
    return model.norm(x)


def pool(model: nn.Module, x: Tensor, how: str) -> Tensor:
    """Features of tokens [N, 1 + L, D] of `tokens`.

    Args:
        model: what made the tokens; a classifier's `fc_norm` normalises pooled features, as it
            does for its head.
        how: "mean" of the patch tokens [N, D], the "cls" token [N, D], or "none" for all the
            patch tokens [N, L, D].
    """
    if how == "none":
        return x[:, 1:]
    pooled = x[:, 0] if how == "cls" else x[:, 1:].mean(dim=1)
    return getattr(model, "fc_norm", nn.Identity())(pooled)
