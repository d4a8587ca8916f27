"""Pictures of what a model sees and reconstructs, of its attention and its features."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from util.attention import QUERIES, principal_components
from util.data import denormalize
from util.pixels import RGB, PixelFormat
from util.precision import autocast
from util.seeding import uniform_noise

COLUMNS = ("original", "masked", "reconstruction", "reconstruction + visible")
_GAP = 4
_HEADER = 18
_HEAT = np.array(  # from no attention to the most: black, violet, red, orange, yellow
    [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], float
)
_OVER = 0.7  # share of these colours over the image


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
    height, width = columns[0].shape[-2:]
    factor = max(1, -(-min_side // min(height, width)))
    shown = [_tiles(images, (height * factor, width * factor), bands) for images in columns]
    return _table(COLUMNS, [list(row) for row in zip(*shown, strict=True)])


def draw_attention(
    imgs: Tensor,
    attention: Tensor,
    grid_size: tuple[int, int],
    pixels: PixelFormat = RGB,
    *,
    bands: Sequence[int] | None = None,
    side: int = 112,
) -> Image.Image:
    """A picture of what each head attends to: two rows an image, one for each query.

    The columns are the image, the mean of all heads, and each head. A map lies over the image in
    grey and reaches from black for no weight to yellow for its own largest one.

    Args:
        imgs: normalised images [N, C, H, W].
        attention: weights [N, 2, heads, 1 + L], as `attention.attention` returns them; those of
            the class token, the first key, are left out.
        grid_size: rows and columns of the L patches.
        pixels, bands: as in `reconstruct` and `draw_grid`.
        side: shorter side of each tile, in pixels; small images are enlarged by a whole factor.
    """
    size = _tile_size(imgs, side)
    originals = _tiles(_shown(imgs, pixels).cpu(), size, bands)
    maps = attention[..., 1:].cpu()
    maps = torch.cat([maps.mean(dim=2, keepdim=True), maps], dim=2)  # [N, 2, 1 + heads, L]
    maps = (maps / maps.amax(dim=-1, keepdim=True).clamp_min(1e-30)).unflatten(-1, grid_size)
    rows: list[list[Image.Image | None]] = []
    for original, of_image in zip(originals, maps, strict=True):
        grey = np.asarray(original.convert("L"), np.float32)[..., None] / 255
        for number, of_query in enumerate(of_image):
            heads = [_heat(weights.numpy(), grey) for weights in of_query]
            rows.append([original if number == 0 else None, *heads])
    titles = ("image", "all heads", *(f"head {number}" for number in range(maps.shape[2] - 1)))
    return _with_scale(_table(titles, rows, labels=QUERIES))


def draw_components(
    imgs: Tensor,
    patches: Tensor,
    grid_size: tuple[int, int],
    pixels: PixelFormat = RGB,
    *,
    bands: Sequence[int] | None = None,
    side: int = 112,
) -> Image.Image:
    """A picture of the patches' features: the image, their first three principal components as
    red, green and blue, and each component as grey, with its share of the variance.

    Components are those of all images together, so that equal colours are alike in all of them.
    Each reaches from its 1st percentile to its 99th.

    Args:
        imgs: normalised images [N, C, H, W].
        patches: features [N, L, D] of their patches.
        grid_size, pixels, bands, side: as in `draw_attention`.
    """
    size = _tile_size(imgs, side)
    scores, shares = principal_components(patches.flatten(0, 1))
    low, high = scores.quantile(torch.tensor([0.01, 0.99], dtype=scores.dtype), dim=0)
    levels = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    levels = levels.unflatten(0, (len(imgs), *grid_size)).permute(0, 3, 1, 2)
    columns = [_tiles(_shown(imgs, pixels).cpu(), size, bands), _tiles(levels, size)]
    columns += [_tiles(levels, size, (number,)) for number in range(3)]
    numbered = (f"component {n} ({share:.0%})" for n, share in enumerate(shares.tolist(), 1))
    rows = [list(row) for row in zip(*columns, strict=True)]
    return _table(["image", "three as RGB", *numbered], rows)


def _tile_size(imgs: Tensor, side: int) -> tuple[int, int]:
    """Height and width of images whose shorter side becomes `side`, or a little more."""
    height, width = imgs.shape[-2:]
    factor = side / min(height, width)
    if factor > 1:
        factor = math.ceil(factor)
    return round(height * factor), round(width * factor)


def _tiles(
    images: Tensor, size: tuple[int, int], bands: Sequence[int] | None = None
) -> list[Image.Image]:
    """Images [N, C, H, W] in [0, 1] in the height and width of a picture's tiles."""
    if bands is None:
        bands = (0, 1, 2) if images.shape[1] >= 3 else (0,)
    levels = (images[:, list(bands)].expand(-1, 3, -1, -1) * 255).round().byte()
    height, width = size
    how = Image.Resampling.NEAREST if height >= images.shape[2] else Image.Resampling.LANCZOS
    arrays = levels.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array).resize((width, height), how) for array in arrays]


def _heat(weights: np.ndarray, grey: np.ndarray) -> Image.Image:
    """Weights [rows, columns] in [0, 1] as colours over a grey image [height, width, 1]."""
    height, width, _ = grey.shape
    large = Image.fromarray(weights).resize((width, height), Image.Resampling.BICUBIC)
    level = np.asarray(large).clip(0, 1)[..., None]
    places = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(level[..., 0], places, band) for band in _HEAT.T], axis=-1) / 255
    mixed = (1 - _OVER) * grey + _OVER * colours
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def _with_scale(picture: Image.Image) -> Image.Image:
    """A picture of `_heat` maps, and below it what their colours stand for."""
    canvas = Image.new("RGB", (picture.width, picture.height + _HEADER), "white")
    canvas.paste(picture)
    bar = _heat(np.linspace(0, 1, 96, dtype=np.float32)[None], np.zeros((8, 96, 1), np.float32))
    canvas.paste(bar, (_GAP + _HEADER, picture.height + 4))
    ImageDraw.Draw(canvas).text(
        (2 * _GAP + _HEADER + bar.width, picture.height + 2),
        "from no attention to the most in each map; the class token is left out",
        fill="black",
        font=ImageFont.load_default(),
    )
    return canvas


def _table(
    titles: Sequence[str],
    rows: Sequence[Sequence[Image.Image | None]],
    labels: Sequence[str] = (),
) -> Image.Image:
    """Tiles of one size under the titles of their columns; None leaves a place empty.

    If there are labels, each group of so many rows has them on its left, turned by a quarter.
    """
    font = ImageFont.load_default()
    width, height = next(tile.size for row in rows for tile in row if tile)
    margin = _GAP + (_HEADER if labels else 0)
    tops = [_HEADER + number * (height + _GAP) for number in range(len(rows) + 1)]
    if labels:  # a wider gap between groups
        tops = [top + 2 * _GAP * (number // len(labels)) for number, top in enumerate(tops)]
    canvas = Image.new("RGB", (margin + len(titles) * (width + _GAP), tops[-1]), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((margin + column * (width + _GAP), 3), title, fill="black", font=font)
    for number, (top, row) in enumerate(zip(tops, rows, strict=False)):
        for column, tile in enumerate(row):
            if tile:
                canvas.paste(tile, (margin + column * (width + _GAP), top))
        if labels:
            label = Image.new("RGB", (height, _HEADER), "white")
            ImageDraw.Draw(label).text(
                (height // 2, 3), labels[number % len(labels)], fill="black", font=font, anchor="ma"
            )
            canvas.paste(label.transpose(Image.Transpose.ROTATE_90), (_GAP, top))
    return canvas
