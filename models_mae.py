"""Masked autoencoder with a ViT backbone (He et al., arXiv 2111.06377).

An encoder sees only the visible quarter of an image's patches; a small decoder predicts the
pixels of the removed ones from the encoder's output and learned mask tokens.

Shapes: N images, C channels, H x W pixels, L patches, V visible patches, D width (the encoder's
or the decoder's), P = patch height x patch width x C values of a patch.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models.vision_transformer import Block, PatchEmbed
from torch import nn

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
        UserError: the patch doesn't divide the image.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        mlp_ratio=4.0,
        norm_layer=nn.LayerNorm,
        norm_pix_loss=False,
    ):
        super().__init__()
        img_size, patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        check_patches(img_size, patch_size)
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
            DecoderBlock(
                decoder_embed_dim,
                decoder_num_heads,
                mlp_ratio,
                qkv_bias=True,
                norm_layer=norm_layer,
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size[0] * patch_size[1] * in_chans)

        self.initialize_weights()

    def initialize_weights(self):
        """Sine-cosine positions, xavier-uniform linear layers, N(0, 0.02) tokens (appendix A.1)."""
        grid_size = self.patch_embed.grid_size
        for table in (self.pos_embed, self.decoder_pos_embed):
            table.data.copy_(sincos_pos_embed_2d(table.shape[-1], grid_size, cls_token=True))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # A patch projection is a linear layer on the pixels of a patch: its fans are D and P.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def patchify(self, imgs):
        """Images [N, C, H, W] to patches [N, L, P]; values of a patch in (row, column, channel)."""
        (grid_h, grid_w), (patch_h, patch_w) = (
            self.patch_embed.grid_size,
            self.patch_embed.patch_size,
        )
        x = imgs.reshape(-1, self.in_chans, grid_h, patch_h, grid_w, patch_w)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(len(imgs), grid_h * grid_w, -1)

    def unpatchify(self, x):
        """Patches [N, L, P] to images [N, C, H, W]; the inverse of `patchify`."""
        (grid_h, grid_w), (patch_h, patch_w) = (
            self.patch_embed.grid_size,
            self.patch_embed.patch_size,
        )
        imgs = x.reshape(-1, grid_h, grid_w, patch_h, patch_w, self.in_chans)
        return imgs.permute(0, 5, 1, 3, 2, 4).reshape(
            len(x), self.in_chans, grid_h * patch_h, grid_w * patch_w
        )

    def check_mask_ratio(self, mask_ratio):
        """Refuse, with a UserError, a ratio that keeps no patch or removes none."""
        L = self.patch_embed.num_patches
        visible = int(L * (1 - mask_ratio))
        if not 1 <= visible < L:
            outcome = "keeps none" if visible < 1 else "removes none"
            raise UserError(f"mask_ratio {mask_ratio} {outcome} of the {L} patches")

    def random_masking(self, x, mask_ratio, noise=None):
        """Keep a random subset of every sample's patches: those of the smallest noise.

        Args:
            x: patches [N, L, D].
            mask_ratio: the share to remove.
            noise: [N, L], decides the mask alone; drawn uniformly when not given.

        Returns:
            the visible patches [N, V, D], in shuffled order; mask [N, L] float, 0 kept and
            1 removed; ids_restore [N, L], the place of every patch in the shuffled order.
        """
        N, L, _ = x.shape
        if noise is None:
            noise = torch.rand(N, L, device=x.device)
        ids_shuffle = torch.argsort(noise, dim=1, stable=True)  # stable: ties on every device alike
        ids_keep = ids_shuffle[:, : int(L * (1 - mask_ratio))]  # [N, V]
        mask = torch.ones(N, L, device=x.device).scatter(1, ids_keep, 0.0)
        return take(x, ids_keep), mask, inverse(ids_shuffle)

    def forward_encoder(self, imgs, mask_ratio, noise=None):
        """Images [N, C, H, W] to latent [N, 1 + V, D] (class token first), mask and ids_restore."""
        x, mask, ids_restore = self.random_masking(self.patchify(imgs), mask_ratio, noise)
        ids_keep = inverse(ids_restore)[:, : x.shape[1]]
        x = self.embed_patches(x)  # [N, V, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # [N, 1 + V, D]
        x = x + positions(self.pos_embed, ids_keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def embed_patches(self, x):
        """Patches [N, V, P] to their projections [N, V, D], as `patch_embed` projects an image."""
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1)  # [D, row, column, channel]
        return F.linear(x, weight.flatten(1), self.patch_embed.proj.bias)

    def forward_decoder(self, latent, ids_restore, removed_only=False):
        """Latent [N, 1 + V, D] to the predicted values of every patch [N, L, P].

        With `removed_only`, to those of the removed patches in shuffled order [N, L - V, P].
        """
        x = self.decoder_embed(latent)
        removed = 1 + ids_restore.shape[1] - x.shape[1]
        # Blocks know the order by the positions alone: tokens stay shuffled, removed ones last.
        x = torch.cat([x, self.mask_token.expand(len(x), removed, -1)], dim=1)  # [N, 1 + L, D]
        x = x + positions(self.decoder_pos_embed, inverse(ids_restore))
        *blocks, last_block = self.decoder_blocks
        for block in blocks:
            x = block(x)
        x = last_block(x, outputs=removed if removed_only else x.shape[1])
        x = self.decoder_pred(self.decoder_norm(x))
        return x if removed_only else take(x[:, 1:], ids_restore)  # without the class token's

    def forward_loss(self, imgs, pred, mask):
        """Mean squared error of a patch's values, averaged over the removed patches; float32."""
        loss = self.patch_loss(self.patchify(imgs), pred)
        return (loss * mask).sum() / mask.sum()

    def patch_loss(self, patches, pred):
        """Mean squared error [N, L] of the predicted values [N, L, P] of patches; float32."""
        with torch.autocast(patches.device.type, enabled=False):
            target = patches.float()
            if self.norm_pix_loss:
                var, mean = torch.var_mean(target, dim=-1, keepdim=True)
                target = (target - mean) / (var + 1e-6).sqrt()
            return (pred.float() - target).square().mean(dim=-1)

    def forward(self, imgs, mask_ratio=0.75, noise=None, return_pred=True):
        """Loss (scalar), pred [N, L, P] and mask [N, L] of images [N, C, H, W].

        Without `return_pred` pred is None, and what the loss doesn't look at is not computed.
        """
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        if return_pred:
            pred = self.forward_decoder(latent, ids_restore)
            return self.forward_loss(imgs, pred, mask), pred, mask
        pred = self.forward_decoder(latent, ids_restore, removed_only=True)
        ids_removed = inverse(ids_restore)[:, -pred.shape[1] :]
        return self.patch_loss(take(self.patchify(imgs), ids_removed), pred).mean(), None, mask


class DecoderBlock(Block):
    """A transformer block that can be asked for the outputs of its last tokens alone."""

    def forward(self, x, outputs=None):
        """Tokens [N, T, D] to tokens [N, outputs, D], of all T if `outputs` is not given."""
        x = x + self.attn(self.norm1(x))
        if outputs is not None:
            x = x[:, -outputs:]
        return x + self.mlp(self.norm2(x))


def take(x, ids):
    """Of x [N, L, D] the entries at ids [N, K], as [N, K, D]."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def inverse(permutations):
    """The inverse of every row of permutations [N, L]."""
    places = torch.arange(permutations.shape[1], device=permutations.device)
    return torch.empty_like(permutations).scatter_(1, permutations, places.expand_as(permutations))


def positions(table, ids):
    """Of a table [1, 1 + L, D] the class token's row, then those of ids [N, K]: [N, 1 + K, D]."""
    return table[0, F.pad(ids + 1, (1, 0))]


def check_patches(img_size, patch_size):
    """Refuse, with a UserError, patches that don't divide the image, each (height, width)."""
    if any(i < p or i % p for i, p in zip(img_size, patch_size, strict=True)):
        raise UserError(
            f"input_size {img_size[0]} x {img_size[1]} (height x width) is not divisible by "
            f"the patch of {patch_size[0]} x {patch_size[1]} pixels: choose a multiple of it"
        )


def factory(patch_size, encoder, decoder):
    """A model factory from (width, blocks, heads) of the encoder and of the decoder."""
    sizes = dict(zip(("embed_dim", "depth", "num_heads"), encoder, strict=True))
    sizes |= {f"decoder_{k}": v for k, v in zip(sizes, decoder, strict=True)}
    return partial(
        MaskedAutoencoderViT,
        patch_size=patch_size,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **sizes,
    )


_PAPER_DECODER = (512, 8, 16)
MODELS = {
    "mae_vit_nano_patch4": factory(4, (128, 6, 4), (96, 2, 4)),
    "mae_vit_tiny_patch2": factory(2, (192, 12, 3), (192, 4, 3)),
    "mae_vit_tiny_patch4": factory(4, (192, 12, 3), (192, 4, 3)),
    "mae_vit_tiny_patch16": factory(16, (192, 12, 3), (192, 4, 3)),
    "mae_vit_small_patch4": factory(4, (384, 12, 6), (256, 4, 8)),
    "mae_vit_small_patch16": factory(16, (384, 12, 6), (256, 4, 8)),
    "mae_vit_base_patch16": factory(16, (768, 12, 12), _PAPER_DECODER),
    "mae_vit_large_patch16": factory(16, (1024, 24, 16), _PAPER_DECODER),
    "mae_vit_huge_patch14": factory(14, (1280, 32, 16), _PAPER_DECODER),
}
MODELS |= {
    f"{name}_dec512d8b": MODELS[name]
    for name in ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
}


def build_model(name, **config):
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
