"""What an encoder's tokens attend to, and the main directions of its patches' features."""

import torch
from torch import Tensor, nn

from util import features

QUERIES = ("class token", "mean of patches")


@torch.no_grad()
def attention(model: nn.Module, imgs: Tensor, layer: int = -1) -> Tensor:
    """How a block's heads share out their attention over the tokens of unmasked images.

    Args:
        model: a MaskedAutoencoderViT or one of timm's VisionTransformers.
        imgs: normalised images [N, C, H, W].
        layer: the block's index, from 0, or from the end if negative.

    Returns:
        float32 [N, 2, heads, 1 + L], the class token first: the softmax weights of the `QUERIES`,
        which sum to 1. Those of the second one are the mean over all patches.

    Raises:
        UserError: there is no such block.
    """
    features.check_layer(model, layer)
    attn = model.blocks[layer].attn
    found: list[Tensor] = []
    hook = attn.register_forward_pre_hook(lambda _, inputs: found.append(_weights(attn, *inputs)))
    try:
        for image in imgs:  # one by one, as the weights of all pairs of tokens are many
            features.tokens(model, image[None], layer)
    finally:
        hook.remove()
    return torch.cat(found)


def _weights(attn: nn.Module, x: Tensor) -> Tensor:
    """Softmax of the queries' products with the keys; fused attention doesn't give it."""
    N, T, _ = x.shape
    qkv = attn.qkv(x).float().reshape(N, T, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])  # [N, heads, T, width of a head]
    weights = (q @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)  # [N, heads, T, T]
    return torch.stack([weights[:, :, 0], weights[:, :, 1:].mean(dim=2)], dim=1)


def principal_components(x: Tensor, number: int = 3) -> tuple[Tensor, Tensor]:
    """The coordinates of vectors along the directions in which they vary most.

    The largest entry of each direction is positive, so that signs don't depend on the machine.

    Args:
        x: vectors [M, D].
        number: how many directions; those that M or D don't allow have coordinates 0.

    Returns:
        float64 coordinates [M, number], and each direction's share of the variance [number].
    """
    x = x.double().cpu()
    x = x - x.mean(dim=0)
    _, singular, directions = torch.linalg.svd(x, full_matrices=False)
    directions = directions[:number]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    scores = torch.zeros(len(x), number, dtype=x.dtype)
    scores[:, : len(directions)] = x @ (directions * largest.sign()).T
    variances = torch.zeros(number, dtype=x.dtype)
    variances[: len(directions)] = singular[:number].square()
    return scores, variances / singular.square().sum().clamp_min(1e-300)
