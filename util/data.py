"""Transforms of images: crops and augmentations, and normalisation on the device."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.layers import to_2tuple
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2

from util.decoding import UnsuitableImage
from util.errors import UserError

BICUBIC = InterpolationMode.BICUBIC
# All transforms map [C, H, W] to [C, height, width], uint8 or floats in [0, 1], as they come.
# An image size is in pixels, an int or (height, width). Crops are shares of the image's area.
Size = int | tuple[int, int]
Scale = tuple[float, float]


class View(NamedTuple):
    """A region of an image, and the size that it is resized to, all in pixels.

    Attributes:
        box: the region's top, left, height and width.
        size: height and width of the resized region.
        image_size: height and width of the whole image.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    image_size: tuple[int, int]

    def reduction(self) -> int:
        """The largest divisor of the image's sides that leaves the region twice its size."""
        _, _, height, width = self.box
        ratio = min(height / self.size[0], width / self.size[1])
        return next((divisor for divisor in (8, 4, 2) if ratio >= 2 * divisor), 1)


class Transform(nn.Module):
    """Draws a view of an image, resizes it (bicubic), and gives it to `then`."""

    def __init__(self, then: nn.Module | None = None) -> None:
        super().__init__()
        self.then = then or nn.Identity()

    def draw(self, height: int, width: int) -> View:
        """A view of an image of this size."""
        raise NotImplementedError

    def resize(self, image: Tensor, view: View) -> Tensor:
        """The view of an image that is not reduced."""
        return resized_crop(image, *view.box, view.size)

    def forward(self, image: Tensor, view: View | None = None) -> Tensor:
        """Transform an image [C, H, W].

        Args:
            view: what `draw` gave before the image was read, which may then be an 8-bit RGB one
                reduced by `view.reduction()`, its sides rounded up.
        """
        view = view or self.draw(*image.shape[-2:])
        if image.shape[-2:] == view.image_size:
            return self.then(self.resize(image, view))
        reduced = [side / view.reduction() for side in view.box]
        return self.then(resized_crop_by_pillow(image, reduced, view.size))


def pretrain_transform(
    input_size: Size, crop_scale: Scale = (0.2, 1.0), flip: bool = True
) -> Transform:
    """Random resized crop (bicubic) and horizontal flip (paper, appendix A.1)."""
    return FastResizedCrop(to_2tuple(input_size), crop_scale, _random_flip(flip))


def probe_transform(
    input_size: Size, crop_scale: Scale = (0.08, 1.0), flip: bool = True
) -> Transform:
    """The linear probe's random crop, resized (bicubic), and horizontal flip."""
    return CropDrawnOnce(to_2tuple(input_size), crop_scale, _random_flip(flip))


def _random_flip(flip: bool) -> nn.Module | None:
    return v2.RandomHorizontalFlip() if flip else None


def eval_transform(input_size: Size, as_floats: bool = False) -> Transform:
    """Bicubic resize to 256 / 224 of the input size (up to 224 pixels), and a centre crop.

    `as_floats` gives floats for 8-bit images too: their bits then don't depend on what else is in
    a batch.
    """
    height, width = crop = to_2tuple(input_size)
    if max(crop) <= 224:
        height, width = height * 256 // 224, width * 256 // 224
    then: list[nn.Module] = [v2.CenterCrop(crop)]
    if as_floats:
        then.append(v2.Lambda(to_float))
    return ResizeToCover((height, width), v2.Compose(then))


def picture_transform(input_size: Size) -> Transform:
    """Bicubic resize and centre crop that show as much of the image as fits."""
    size = to_2tuple(input_size)
    return ResizeToCover(size, v2.CenterCrop(size))


def finetune_transform(
    input_size: Size,
    color_jitter: float | None = None,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    crop_scale: Scale = (0.08, 1.0),
    flip: bool = True,
    is_8_bit_rgb: bool = True,
) -> Transform:
    """timm's augmentation: random resized crop, flip, and a policy or colour jitter.

    Random erasing, which fills in normalised pixels, is done on batches. Images other than 8-bit
    RGB ones are cropped and flipped as in pre-training.

    Args:
        input_size: size of the crop.
        color_jitter: strength of the colour jitter, which a policy replaces.
        aa: timm's name of an augmentation policy; "none" or "" for none.
        is_8_bit_rgb: whether the images are.

    Raises:
        UserError: timm knows no such policy, or it is for other images.
    """
    aa = None if aa in ("", "none", "None") else aa
    if (aa or color_jitter) and not is_8_bit_rgb:
        flag = f"--aa {aa}" if aa else f"--color_jitter {color_jitter}"
        raise UserError(f"{flag} is for 8-bit RGB images, which these are not: add --aa none")
    if aa and int(PIL.__version__.split(".")[0]) >= 13:
        _let_posterize_reach_0_bits()
    try:
        augmentation = create_transform(
            (3, *to_2tuple(input_size)),
            is_training=True,
            scale=crop_scale,
            hflip=0.5 if flip else 0.0,
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
    crop, *further = augmentation.transforms
    return TimmAugmentation(
        crop,
        v2.Compose([v2.ToPILImage(), *further]),
        None if aa or color_jitter else pretrain_transform(input_size, crop_scale, flip),
    )


def check_cutmix_sides(input_size: Size, minmax: tuple[float, float]) -> None:
    """Refuse, with a UserError, bounds that leave a pasted rectangle no possible side."""
    if any(int(side * minmax[0]) >= int(side * minmax[1]) for side in to_2tuple(input_size)):
        raise UserError(
            f"--cutmix_minmax {minmax[0]} {minmax[1]} leaves no whole number of pixels for the "
            f"side of a rectangle in an image of {input_size}: take a larger MAX or a smaller MIN"
        )


def _let_posterize_reach_0_bits() -> None:
    """Have timm's policies posterize to 0 bits, a black image, where Pillow 13 raises an error.

    To be removed when timm no longer asks Pillow for 0 bits (timm.data.auto_augment, as of 1.0.31).
    """

    def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
        if bits_to_keep < 1:
            return Image.new(image.mode, image.size)
        return auto_augment.posterize(image, bits_to_keep)

    # timm builds its policies from this table.
    auto_augment.NAME_TO_OP |= dict.fromkeys(
        ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), posterize
    )


class TimmAugmentation(Transform):
    """timm's crop, resized by Pillow, and augmentation; `other`, if any, where not 8-bit RGB."""

    def __init__(
        self, crop: RandomResizedCropAndInterpolation, then: nn.Module, other: nn.Module | None
    ) -> None:
        super().__init__(then)
        self.crop = crop
        self.other = other

    def draw(self, height: int, width: int) -> View:
        box = self.crop.get_params(_of_size(height, width), self.crop.scale, self.crop.ratio)
        return View(box, self.crop.size, (height, width))

    def resize(self, image: Tensor, view: View) -> Tensor:
        return resized_crop_by_pillow(image, view.box, view.size)

    def forward(self, image: Tensor, view: View | None = None) -> Tensor:
        if image.dtype == torch.uint8 and len(image) == 3:
            return super().forward(image, view)
        if self.other is None:
            raise UnsuitableImage("is no 8-bit RGB image, which --aa and --color_jitter are for")
        return self.other(image)


class FastResizedCrop(Transform):
    """torchvision's crop, with a resize (bicubic) that takes a fifth off the time of an image."""

    def __init__(self, size: tuple[int, int], scale: Scale, then: nn.Module | None = None) -> None:
        super().__init__(then)
        self.size = size
        self.scale = scale

    def draw(self, height: int, width: int) -> View:
        ratio = [3 / 4, 4 / 3]
        box = RandomResizedCrop.get_params(_of_size(height, width), list(self.scale), ratio)
        return View(box, self.size, (height, width))


def _of_size(height: int, width: int) -> Tensor:
    """Stands for an image where only its size matters."""
    return torch.empty(()).expand(height, width)


class CropDrawnOnce(Transform):
    """A crop of a random area and aspect 3/4 to 4/3, clipped to the image, resized (bicubic).

    torchvision's RandomResizedCrop draws again, up to ten times, what doesn't fit into the image.
    """

    def __init__(self, size: tuple[int, int], scale: Scale, then: nn.Module | None = None) -> None:
        super().__init__(then)
        self.size = size
        self.scale = scale

    def draw(self, height: int, width: int) -> View:
        area = height * width * torch.empty(1).uniform_(*self.scale).item()
        aspect = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
        crop_h = min(height, max(1, round(math.sqrt(area / aspect))))
        crop_w = min(width, max(1, round(math.sqrt(area * aspect))))
        top = int(torch.randint(height - crop_h + 1, (1,)).item())
        left = int(torch.randint(width - crop_w + 1, (1,)).item())
        return View((top, left, crop_h, crop_w), self.size, (height, width))


class ResizeToCover(Transform):
    """Bicubic resize, aspect ratio kept, to the smallest image that covers (height, width)."""

    def __init__(self, size: tuple[int, int], then: nn.Module | None = None) -> None:
        super().__init__(then)
        self.size = size

    def draw(self, height: int, width: int) -> View:
        """All of the image."""
        h, w = self.size
        if h * width >= w * height:
            w = max(w, h * width // height)
        else:
            h = max(h, w * height // width)
        return View((0, 0, height, width), (h, w), (height, width))

    def resize(self, image: Tensor, view: View) -> Tensor:
        return _clip(v2.functional.resize(image, list(view.size), BICUBIC, antialias=True))


def resized_crop(
    image: Tensor, top: int, left: int, height: int, width: int, size: Sequence[int]
) -> Tensor:
    """A crop of an image [C, H, W], resized (bicubic) in the layout that the image has.

    The same bits as torchvision's function, without its checks and copies. Floats stay in [0, 1],
    as bicubic overshoots are clipped in uint8.
    """
    crop = image[None, :, top : top + height, left : left + width]
    layout = torch.channels_last if image.stride(0) == 1 else torch.contiguous_format
    crop = crop.contiguous(memory_format=layout)
    return _clip(F.interpolate(crop, list(size), mode="bicubic", antialias=True)[0])


def _clip(image: Tensor) -> Tensor:
    return image.clamp_(0, 1) if image.is_floating_point() else image


def resized_crop_by_pillow(image: Tensor, box: Sequence[float], size: Sequence[int]) -> Tensor:
    """A crop of an 8-bit RGB image, resized (bicubic); its edges may lie within pixels."""
    top, left, height, width = box
    y, x = int(top), int(left)
    pixels = image[:, y : math.ceil(top + height), x : math.ceil(left + width)]
    corners = (left - x, top - y, left - x + width, top - y + height)
    cut = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    resized = np.array(cut.resize((size[1], size[0]), Image.Resampling.BICUBIC, corners))
    return torch.from_numpy(resized).permute(2, 0, 1)


def to_float(images: Tensor) -> Tensor:
    """Images on the scale from 0 to 1: uint8 ones divided by 255, float32 ones as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def stack(images: Sequence[Tensor]) -> Tensor:
    """Images [C, H, W] as one batch; beside float ones, uint8 ones become floats."""
    if len({image.dtype for image in images}) > 1:
        images = [to_float(image) for image in images]
    return torch.stack(list(images))


def normalize(
    images: Tensor,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
) -> Tensor:
    """Images [N, C, H, W], uint8 or floats in [0, 1], minus `mean`, over `std`: floats.

    mean and std are per band, on the scale from 0 to 1; ImageNet's if not given.
    """
    means, stds = _channel_statistics(mean, std, images.device)
    if images.dtype == torch.uint8:
        return images.float().mul_(1 / (255 * stds)).sub_(means / stds)
    return (images - means).div_(stds)  # in this order, so that a band's mean is exactly 0


def denormalize(
    images: Tensor,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
) -> Tensor:
    """Normalised images [N, C, H, W] back to floats in [0, 1]."""
    means, stds = _channel_statistics(mean, std, images.device)
    return (images * stds + means).clamp(0, 1)


@functools.cache  # making them on a GPU waits for it, so only once
def _channel_statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per band, each [C, 1, 1]."""
    means, stds = torch.tensor([mean, std], dtype=torch.float32, device=device)[..., None, None]
    return means, stds
