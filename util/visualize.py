"""Pictures of what a masked autoencoder sees and reconstructs."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from util.data import denormalize
from util.pixels import RGB, PixelFormat
from util.precision import autocast
from util.seeding import uniform_noise

COLUMNS = ("original", "masked", "reconstruction", "reconstruction + visible")
_GAP = 4
_HEADER = 18


@torch.compiler.set_stance("force_eager")  # compiling for these shapes would not pay
@torch.no_grad()
def reconstruct(
    model: nn.Module,
    imgs: Tensor,
    mask_ratio: float,
    seed: int,
    pixels: PixelFormat = RGB,
    amp_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The images of a grid's four columns, in [0, 1].

    Each band is shown from three standard deviations below its mean to three above it, within the
    scale of its values; for ImageNet's statistics that is the whole scale.

    With norm_pix_loss the model predicts patches without their mean and variance. These are taken
    from the original: the reconstruction then shows structure, not the model's own colours.

    Args:
        model: a MaskedAutoencoderViT.
        imgs: normalised images [N, C, H, W].
        mask_ratio: share of the patches to remove.
        seed: seed of the masks; row i of a grid has the same mask, whatever the images are.
        pixels: their format.
        amp_dtype: type to compute in under autocast, or None for float32.

    Returns:
        a list of four float tensors [N, C, H, W] on the CPU, in the order of `COLUMNS`.
    """
    was_training = model.training
    model.eval()
    num_patches = model.patch_embed.num_patches
    noise = torch.stack([uniform_noise(num_patches, seed, "picture", i) for i in range(len(imgs))])
    with autocast(imgs.device, amp_dtype):
        _, pred, mask = model(imgs, mask_ratio, noise.to(imgs.device))
    model.train(was_training)

    pred = pred.float()
    if model.norm_pix_loss:
        var, mean = torch.var_mean(model.patchify(imgs), dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    pixel_mask = model.unpatchify(mask[:, :, None].expand_as(pred))
    original, reconstruction = _shown(imgs, pixels), _shown(model.unpatchify(pred), pixels)
    masked = torch.where(pixel_mask.bool(), 0.5, original)
    pasted = torch.where(pixel_mask.bool(), reconstruction, original)
    return [images.cpu() for images in (original, masked, reconstruction, pasted)]


def shown_ranges(pixels: PixelFormat) -> list[tuple[float, float]]:
    """Per band, what is shown as black and as white, on the scale from 0 to 1."""
    ranges = [
        (max(0.0, mean - 3 * std), min(1.0, mean + 3 * std))
        for mean, std in zip(pixels.mean, pixels.std, strict=True)
    ]
    return [(low, high) if low < high else (0.0, 1.0) for low, high in ranges]


def _shown(imgs: Tensor, pixels: PixelFormat) -> Tensor:
    """Normalised images as levels from 0 to 1 of a picture."""
    low, high = torch.tensor(shown_ranges(pixels), device=imgs.device).T[:, :, None, None]
    return ((denormalize(imgs, pixels.mean, pixels.std) - low) / (high - low)).clamp(0, 1)


def draw_grid(
    columns: list[Tensor], *, bands: Sequence[int] | None = None, min_side: int = 112
) -> Image.Image:
    """A picture with a row for each image and a titled column for each element of `columns`.

    Args:
        columns: the four that `reconstruct` returns.
        bands: one to show as grey, or three as red, green and blue; if not given, the first three,
            or the first where there are fewer.
        min_side: small images are enlarged by a whole factor until their shorter side has at
            least this many pixels.
    """
    if bands is None:
        bands = (0, 1, 2) if columns[0].shape[1] >= 3 else (0,)
    height, width = columns[0].shape[-2:]
    factor = max(1, -(-min_side // min(height, width)))
    height, width = height * factor, width * factor
    rows = len(columns[0])
    canvas = Image.new(
        "RGB", (len(columns) * (width + _GAP) + _GAP, _HEADER + rows * (height + _GAP)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default()
    for column, (title, images) in enumerate(zip(COLUMNS, columns, strict=True)):
        left = _GAP + column * (width + _GAP)
        draw.text((left, 3), title, fill="black", font=font)
        shown = images[:, list(bands)].expand(-1, 3, -1, -1)
        pixels = (shown * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for row in range(rows):
            tile = Image.fromarray(pixels[row]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left, _HEADER + row * (height + _GAP)))
    return canvas
