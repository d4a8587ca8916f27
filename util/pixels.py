"""What a model sees of a file: which bands, on which scale, normalised how."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from util.errors import UserError, warn

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
        origin: the checkpoint that says all this, if one does. Not stored.
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
    origin: str = ""

    def stored(self) -> dict[str, Any]:
        """What a checkpoint keeps, under the flags' names; equal formats give equal values."""
        values = {name: getattr(self, name) for name in STORED}
        if self.nodata is not None and math.isnan(self.nodata):
            values["nodata"] = "nan"  # nan != nan, but the string compares equal
        return values

    @property
    def is_8_bit_rgb(self) -> bool:
        """Whether 8-bit files stay three bands of 8 bits."""
        return self.in_chans == 3 and self.value_range is None and self.nodata is None


STORED = ("in_chans", "bands", "value_range", "mean", "std", "nodata", "layout", "exif_orientation")
RGB = PixelFormat()


def resolve(
    flags: Mapping[str, Any],
    contents: Mapping[str, Any] | None = None,
    source: object = None,
    *,
    may_adapt: bool = False,
) -> PixelFormat:
    """The format that flags ask for, or that a checkpoint says.

    Args:
        flags: a command's flags; None for those that are not given.
        contents: those of a checkpoint, whose "args" may not say it.
        source: the checkpoint, for messages.
        may_adapt: whether weights of three bands may start a model of another number, whose files
            are read as theirs were where no flag says otherwise.

    Raises:
        UserError: the flags contradict each other, or the checkpoint.
    """
    saved = (contents or {}).get("args") or {}
    if contents and "command" in contents:  # this project's; older ones knew only this format
        saved = RGB.stored() | saved
    given = {name: _hashable(flags[name]) for name in STORED if flags.get(name) is not None}
    if saved.get("in_chans") is not None:  # another project's may be None
        kept = replace(RGB, **{name: _hashable(saved[name]) for name in STORED if name in saved})
        kept = replace(kept, nodata=None if kept.nodata is None else float(kept.nodata))
        in_chans = given.get("in_chans") or len(given.get("bands", ())) or kept.in_chans
        if not (may_adapt and kept.in_chans == 3 and in_chans != 3):
            stored, asked = kept.stored(), replace(kept, **given).stored()
            for name in given:
                if asked[name] != stored[name]:
                    raise UserError(
                        f"{source} was trained with {name} {_shown(stored[name])}, not "
                        f"{_shown(asked[name])}: leave out --{name}, it is read from there"
                    )
            return replace(kept, max_pixels=flags["max_pixels"], origin=str(source))
        of_files = {name: getattr(kept, name) for name in ("value_range", "nodata", "layout")}
        of_files["exif_orientation"] = kept.exif_orientation
        given = {name: value for name, value in of_files.items() if value is not None} | given
    in_chans = given.setdefault("in_chans", len(given["bands"]) if "bands" in given else 3)
    if "bands" in given and len(given["bands"]) != in_chans:
        raise UserError(
            f"--bands names {len(given['bands'])} bands, not the {in_chans} of --in_chans"
        )
    if len({"mean", "std"} & given.keys()) == 1:
        raise UserError("--mean and --std belong together: give both, see main_data.py stats")
    for name in {"mean", "std"} & given.keys():
        if len(given[name]) != in_chans:
            raise UserError(
                f"--{name} takes a number for each of the {in_chans} bands, not {len(given[name])}"
            )
    if "value_range" in given and not given["value_range"][0] < given["value_range"][1]:
        raise UserError(f"--value_range {_shown(given['value_range'])}: LO must be below HI")
    if "mean" not in given and in_chans != 3:
        given |= {"mean": (0.5,) * in_chans, "std": (0.5,) * in_chans}
        warn(
            f"no --mean and --std for {in_chans} bands: each is taken to have mean 0.5 and std 0.5 "
            "on the scale from 0 to 1; python main_data.py stats finds the right ones"
        )
    return replace(RGB, **given, max_pixels=flags["max_pixels"])


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
