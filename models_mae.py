"""Masked autoencoder with a ViT backbone (He et al., arXiv 2111.06377).

An encoder sees only the visible quarter of an image's patches; a small decoder predicts the
pixels of the removed ones from the encoder's output and learned mask tokens.

Shapes: N batch, C channels, H x W pixels, L patches, V visible patches, D width (the encoder's or
the decoder's), P = patch height x patch width x C values per patch.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import Block, PatchEmbed
from torch import Tensor, nn

from util.errors import UserError
from util.pos_embed import sincos_pos_embed_2d


class MaskedAutoencoderViT(nn.Module):
    """Masked autoencoder; `forward` returns the loss, the predicted patches and the mask.

    Args:
        img_size, patch_size: pixels, an int or (height, width); the patch must divide the image.
        in_chans: channels of an image.
        embed_dim, depth, num_heads: the encoder's width, blocks and attention heads.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder's.
        mlp_ratio: hidden width of the blocks' MLPs, as a multiple of their width.
        norm_layer: the normalisation of blocks and outputs.
        norm_pix_loss: predict each patch's pixels normalised by the patch's mean and variance.

    Raises:
        UserError: the patch doesn't divide the image; the decoder's width is no multiple of 4, as
            its positions need, or of its heads.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__()
        check_patches(to_2tuple(img_size), to_2tuple(patch_size))
        check_decoder(decoder_embed_dim, decoder_num_heads)
        self.in_chans = in_chans
        self.norm_pix_loss = norm_pix_loss

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        num_patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(
            torch.zeros(1, 1 + num_patches, embed_dim), requires_grad=False
        )
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            torch.zeros(1, 1 + num_patches, decoder_embed_dim), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(
            Block(
                decoder_embed_dim,
                decoder_num_heads,
                mlp_ratio,
                qkv_bias=True,
                norm_layer=norm_layer,
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        patch_values = math.prod(self.patch_embed.patch_size) * in_chans
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_values)

        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Sine-cosine positions, xavier-uniform linear layers, N(0, 0.02) tokens (appendix A.1)."""
        grid_size = self.patch_embed.grid_size
        for table in (self.pos_embed, self.decoder_pos_embed):
            table.data.copy_(sincos_pos_embed_2d(table.shape[-1], grid_size, cls_token=True))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Initialise the patch projection as a linear layer from P to D.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def patchify(self, imgs: Tensor) -> Tensor:
        """Images [N, C, H, W] to patches [N, L, P], a patch's values in (row, column, channel)."""
        (rows, columns), (height, width) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = imgs.reshape(-1, self.in_chans, rows, height, columns, width)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(len(imgs), rows * columns, -1)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches [N, L, P] to images [N, C, H, W]; the inverse of `patchify`."""
        (rows, columns), (height, width) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = x.reshape(-1, rows, columns, height, width, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(
            len(x), self.in_chans, rows * height, columns * width
        )

    def check_mask_ratio(self, mask_ratio: float) -> None:
        """Refuse, with a UserError, a ratio that keeps no patch or removes none."""
        L = self.patch_embed.num_patches
        visible = int(L * (1 - mask_ratio))
        if not 1 <= visible < L:
            outcome = "keeps none" if visible < 1 else "removes none"
            raise UserError(f"mask_ratio {mask_ratio} {outcome} of the {L} patches")

    def random_masking(
        self, x: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep a random subset of each sample's patches: those with the smallest noise.

        Args:
            x: patch tokens [N, L, D].
            mask_ratio: share of the patches to remove.
            noise: [N, L]; if given, it fully determines the mask. Otherwise drawn uniformly.

        Returns:
            the visible tokens [N, V, D] in shuffled order; mask [N, L], 0 kept and 1 removed;
            ids_restore [N, L], each patch's place in the shuffled order.
        """
        N, L, D = x.shape
        if noise is None:
            noise = torch.rand(N, L, device=x.device)
        # A stable sort, so that ties break alike on all devices.
        ids_shuffle = torch.argsort(noise, dim=1, stable=True)  # [N, L]
        ids_restore = torch.argsort(ids_shuffle, dim=1)  # [N, L]
        ids_keep = ids_shuffle[:, : int(L * (1 - mask_ratio))]  # [N, V]
        x = x.gather(1, ids_keep[:, :, None].expand(-1, -1, D))  # [N, V, D]
        mask = torch.ones(N, L, device=noise.device).scatter(1, ids_keep, 0.0)
        return x, mask, ids_restore

    def forward_encoder(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images [N, C, H, W] to latent [N, 1 + V, D] (class token first), mask, ids_restore."""
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]  # [N, L, D]
        x, mask, ids_restore = self.random_masking(x, mask_ratio, noise)  # [N, V, D]
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)  # [N, 1 + V, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Latent [N, 1 + V, D] to the predicted values of every patch [N, L, P]."""
        x = self.decoder_embed(latent)  # [N, 1 + V, D of the decoder]
        N, L = ids_restore.shape
        mask_tokens = self.mask_token.expand(N, 1 + L - x.shape[1], -1)
        shuffled = torch.cat([x[:, 1:], mask_tokens], dim=1)  # [N, L, D]
        patches = shuffled.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # [N, 1 + L, D]
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_pred(self.decoder_norm(x))  # [N, 1 + L, P]
        return x[:, 1:]  # drop the class token's prediction

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Squared error, averaged over a patch's values and over the removed patches; float32."""
        with torch.autocast(imgs.device.type, enabled=False):
            target = self.patchify(imgs.float())  # [N, L, P]
            if self.norm_pix_loss:
                var, mean = torch.var_mean(target, dim=-1, keepdim=True)
                target = (target - mean) / (var + 1e-6).sqrt()
            loss = (pred.float() - target).square().mean(dim=-1)  # [N, L]
            return (loss * mask).sum() / mask.sum()

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (scalar), pred [N, L, P] and mask [N, L] of images [N, C, H, W]."""
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask


def check_patches(img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Refuse, with a UserError, patches that don't divide the image; sizes are (height, width)."""
    if any(i < p or i % p for i, p in zip(img_size, patch_size, strict=True)):
        raise UserError(
            f"input_size {img_size[0]} x {img_size[1]} (height x width) is not divisible by "
            f"the patch of {patch_size[0]} x {patch_size[1]} pixels: choose a multiple of it"
        )


def check_decoder(width: int, heads: int) -> None:
    """Refuse, with a UserError, a decoder's width that its positions or its heads don't divide."""
    if width % 4 or width % heads:
        raise UserError(
            f"a decoder of width {width} with {heads} heads: the width must be divisible by 4 and "
            "by the heads, see --decoder_embed_dim and --decoder_num_heads"
        )


def factory(
    patch_size: int, encoder: tuple[int, int, int], decoder: tuple[int, int, int]
) -> "partial[MaskedAutoencoderViT]":
    """A model factory; encoder and decoder are (width, blocks, heads)."""
    embed_dim, depth, num_heads = encoder
    decoder_embed_dim, decoder_depth, decoder_num_heads = decoder
    return partial(
        MaskedAutoencoderViT,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        decoder_embed_dim=decoder_embed_dim,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_num_heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


PAPER_DECODER = (512, 8, 16)
MODELS = {
    "mae_vit_nano_patch4": factory(4, (128, 6, 4), (96, 2, 4)),
    "mae_vit_tiny_patch2": factory(2, (192, 12, 3), (192, 4, 3)),
    "mae_vit_tiny_patch4": factory(4, (192, 12, 3), (192, 4, 3)),
    "mae_vit_tiny_patch16": factory(16, (192, 12, 3), (192, 4, 3)),
    "mae_vit_small_patch4": factory(4, (384, 12, 6), (256, 4, 8)),
    "mae_vit_small_patch16": factory(16, (384, 12, 6), (256, 4, 8)),
    "mae_vit_base_patch16": factory(16, (768, 12, 12), PAPER_DECODER),
    "mae_vit_large_patch16": factory(16, (1024, 24, 16), PAPER_DECODER),
    "mae_vit_huge_patch14": factory(14, (1280, 32, 16), PAPER_DECODER),
}
MODELS |= {
    f"{name}_dec512d8b": MODELS[name]
    for name in ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
}


def build_model(name: str, **config: Any) -> MaskedAutoencoderViT:
    """The named model.

    Args:
        name: a key of `MODELS`.
        config: keywords of `MaskedAutoencoderViT`, such as img_size and norm_pix_loss.

    Raises:
        UserError: an unknown name, or a configuration the model refuses.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name](**config)


DECODER = (
    "decoder_embed",
    "mask_token",
    "decoder_pos_embed",
    "decoder_blocks",
    "decoder_norm",
    "decoder_pred",
)
DECODER_SIZES = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")


def decoder_sizes(saved: Mapping[str, Any]) -> dict[str, int]:
    """The `DECODER_SIZES` of the model that flags describe, those of a command or of a checkpoint.

    Empty, or not all of them, if the flags don't say it.
    """
    named = MODELS[saved["model"]].keywords if saved.get("model") in MODELS else {}
    sizes = {name: saved.get(name) or named.get(name) for name in DECODER_SIZES}
    return {name: size for name, size in sizes.items() if size is not None}


def build_saved(saved: Mapping[str, Any], in_chans: int) -> MaskedAutoencoderViT:
    """The model that flags describe, those of a command or those that a checkpoint stores.

    Args:
        saved: "model", "input_size" and "norm_pix_loss"; of `DECODER_SIZES`, those that differ
            from the named model's.
        in_chans: bands of an image.

    Raises:
        UserError: as `build_model`.
    """
    decoder = {name: saved[name] for name in DECODER_SIZES if saved.get(name) is not None}
    return build_model(
        saved["model"],
        img_size=saved["input_size"],
        in_chans=in_chans,
        norm_pix_loss=saved["norm_pix_loss"],
        **decoder,
    )


def build_encoder(saved: Mapping[str, Any], in_chans: int) -> MaskedAutoencoderViT:
    """As `build_saved`, but without a decoder: for the features of whole images, not for `forward`.

    `saved` need not hold "norm_pix_loss".
    """
    model = build_saved({"norm_pix_loss": False, **saved}, in_chans)
    for name in DECODER:
        delattr(model, name)
    return model
