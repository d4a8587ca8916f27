"""What a model sees of a file: which bands, on which scale, normalised how."""

from dataclasses import dataclass

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

MAX_PIXELS = 178_956_970  # where Pillow refuses a file as a decompression bomb


@dataclass(frozen=True)
class PixelFormat:
    """How files are read. A checkpoint stores it, and every later command reads it from there.

    Attributes:
        in_chans: bands of the model's images.
        bands: the file's bands to take, in this order, from 0; None for all of them.
        value_range: samples that become 0 and 1, in the file's units; those beyond are clipped.
            None for the range of an unsigned type.
        mean, std: per band, on the scale from 0 to 1.
        nodata: the sample that stands for no data, in the file's units, or nan; None if there is
            none. It becomes 0 after normalisation.
        layout: axes of a .npy file with three of them: "hwc" or "chw".
        exif_orientation: whether to turn images as their EXIF tag says.
        max_pixels: files that claim more are not decoded. Not stored.
    """

    in_chans: int = 3
    bands: tuple[int, ...] | None = None
    value_range: tuple[float, float] | None = None
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    nodata: float | None = None
    layout: str = "hwc"
    exif_orientation: bool = False
    max_pixels: int = MAX_PIXELS


RGB = PixelFormat()
