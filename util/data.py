"""Transforms of images: crops and augmentations as uint8, and normalisation on the device."""

import functools
import math

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    auto_augment,
    create_transform,
)
from timm.layers import to_2tuple
from torchvision.transforms import InterpolationMode, v2

from util.errors import UserError

# All transforms are from uint8 [3, H, W] to uint8 [3, height, width]


def pretrain_transform(input_size):
    """Random resized crop (area 0.2 to 1, bicubic) and horizontal flip (paper, appendix A.1)."""
    return CropAndFlip(draw_crop, to_2tuple(input_size))


def eval_transform(input_size):
    """Bicubic resize to 256 / 224 of the input size, up to 224, and a centre crop."""
    crop = to_2tuple(input_size)
    covered = tuple(side * 256 // 224 if max(crop) <= 224 else side for side in crop)
    return v2.Compose([ResizeToCover(covered), v2.CenterCrop(crop)])


def picture_transform(input_size):
    """Bicubic resize and centre crop that show as much of the image as fits."""
    size = to_2tuple(input_size)
    return v2.Compose([ResizeToCover(size), v2.CenterCrop(size)])


def probe_transform(input_size):
    """Random crop of the linear probe, resized (bicubic), and horizontal flip."""
    return CropAndFlip(draw_crop_once, to_2tuple(input_size))


def finetune_transform(input_size, color_jitter=None, aa="rand-m9-mstd0.5-inc1"):
    """timm's augmentation: random resized crop, flip, and a policy or colour jitter.

    Random erasing, which paints normalised pixels, is done on batches.

    Args:
        input_size: pixels, an int or (height, width).
        color_jitter: strength of the colour jitter, used where there is no policy.
        aa: timm's name of an augmentation policy, or "none" or "" for none.

    Raises:
        UserError: timm knows no such policy.
    """
    aa = None if aa in ("", "none", "None") else aa
    try:
        augmentation = create_transform(
            (3, *to_2tuple(input_size)),
            is_training=True,
            color_jitter=color_jitter,
            auto_augment=aa,
            interpolation="bicubic",
            normalize=False,
        )
        augmentation(Image.new("RGB", (32, 32)))  # some policies fail at their first image
    except (AssertionError, ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"timm can't use --aa {aa} ({error}): take a policy such as rand-m9-mstd0.5-inc1"
        ) from error
    return v2.Compose([v2.ToPILImage(), augmentation])


def check_cutmix_sides(input_size, minmax):
    """Refuse, with a UserError, bounds between which no side of a pasted rectangle lies."""
    if any(int(side * minmax[0]) >= int(side * minmax[1]) for side in to_2tuple(input_size)):
        raise UserError(
            f"--cutmix_minmax {minmax[0]} {minmax[1]}: no side of an image of {input_size} pixels "
            "lies between, take a larger MAX or a smaller MIN"
        )


def _posterize(image, bits_to_keep, **_):
    """timm's posterize, which asks Pillow for 0 bits: a black image, to Pillow 13 an error."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep)


# timm builds its policies from this table.
auto_augment.NAME_TO_OP |= dict.fromkeys(
    ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize
)


class CropAndFlip(torch.nn.Module):
    """A random crop, resized (bicubic) to (height, width), in half of the cases flipped.

    Drawn as torchvision's transforms draw, without what they do for other kinds of inputs.
    """

    def __init__(self, draw, size):
        super().__init__()
        self.draw = draw
        self.size = size

    def forward(self, image):
        crop = resized_crop(image, *self.draw(*image.shape[-2:]), self.size)
        return crop.flip(-1) if torch.rand(1).item() < 0.5 else crop


def draw_crop(height, width):
    """Top, left, height and width of a crop of area 0.2 to 1 and aspect 3/4 to 4/3.

    As torchvision's RandomResizedCrop draws it: until it fits, ten times at most, after which the
    largest of these aspects is taken from the centre.
    """
    for _ in range(10):
        crop_h, crop_w = draw_shape(height * width, 0.2)
        if 1 <= crop_h <= height and 1 <= crop_w <= width:
            return *draw_place(height, width, crop_h, crop_w), crop_h, crop_w
    crop_h, crop_w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def draw_crop_once(height, width):
    """Top, left, height and width of a crop of area 0.08 to 1, drawn once, clipped to the image."""
    crop_h, crop_w = draw_shape(height * width, 0.08)
    crop_h, crop_w = min(height, max(1, crop_h)), min(width, max(1, crop_w))
    return *draw_place(height, width, crop_h, crop_w), crop_h, crop_w


def draw_shape(area, min_share):
    """Height and width of a share of `area`, of an aspect between 3/4 and 4/3."""
    area_draw, aspect_draw = torch.rand(2).tolist()
    area *= min_share + (1 - min_share) * area_draw
    aspect = (4 / 3) ** (2 * aspect_draw - 1)
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def draw_place(height, width, crop_h, crop_w):
    """Top and left of a crop in an image."""
    return tuple(torch.randint(1 + n, (1,)).item() for n in (height - crop_h, width - crop_w))


def resized_crop(image, top, left, height, width, size):
    """A crop of a uint8 image, resized (bicubic), with its channels innermost in memory.

    So decoders leave them, and the resize is faster that way.
    """
    crop = image[None, :, top : top + height, left : left + width]
    crop = crop.contiguous(memory_format=torch.channels_last)
    return F.interpolate(crop, size, mode="bicubic", antialias=True)[0]


class ResizeToCover(torch.nn.Module):
    """Bicubic resize, aspect ratio kept, to the smallest image that covers (height, width)."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, image):
        (height, width), (h, w) = self.size, image.shape[-2:]
        if height * w >= width * h:
            size = (height, max(width, height * w // h))
        else:
            size = (max(height, width * h // w), width)
        return v2.functional.resize(image, size, InterpolationMode.BICUBIC, antialias=True)


def normalize(images):
    """uint8 images [N, 3, H, W] to floats of ImageNet's mean 0 and standard deviation 1."""
    mean, std = _channel_statistics(images.device)
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


def denormalize(images):
    """Normalised images [N, 3, H, W] back to floats in [0, 1]."""
    mean, std = _channel_statistics(images.device)
    return (images * std + mean).clamp(0, 1)


@functools.cache  # making them on a GPU would wait for it, every time
def _channel_statistics(device):
    """ImageNet's mean and standard deviation of the channels, each [3, 1, 1]."""
    statistics = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device=device)
    return statistics[:, :, None, None]
