"""The README.md of an exported folder: what the model is, what to feed it, how it came about."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.pixels import STORED, PixelFormat

PAPER = "[Masked Autoencoders Are Scalable Vision Learners](https://arxiv.org/abs/2111.06377)"
SHOWN_FIGURES = ("loss", "acc", "knn", "rankme", "feature_std")

# Where and how a training ran, and what the card's other sections tell.
NOT_THE_RECIPE = {
    *STORED,
    *("data_path", "output_dir", "log_dir", "resume", "device", "num_workers", "decode"),
    *("pin_mem", "no_pin_mem", "compile", "log_every", "save_every", "save_minutes"),
    *("timeout_minutes", "max_pixels", "eval", "dist_eval", "grad_checkpointing"),
    *("accept_changes", "predictions", "knn_every", "knn_k", "knn_images", "knn_layer"),
    *("image_names", "images", "processes", "dtype", "encoder"),
    *("world_size", "local_rank", "dist_on_itp", "dist_url", "distributed", "gpu", "rank"),
}


def model_card(
    title: str,
    what: str,
    *,
    loading: str,
    library: str | None,
    task: str | None,
    remarks: list[str],
    inputs: list[str],
    recipe: list[str],
    figures: Mapping[str, float],
) -> str:
    """A model card in Markdown, headed by what the Hub reads of one.

    Args:
        title: the model's name.
        what: a sentence on what it is.
        loading: Python lines that load it.
        library: the Hub's name of the library that loads it, or None.
        task: the Hub's name of what it does, or None: its pipelines load a model by this name.
        remarks: sentences on what this format does differently.
        inputs: see `input_lines`.
        recipe: see `recipe_lines`.
        figures: see `logged_figures`.
    """
    head = ["---"]
    if library is not None:
        head.append(f"library_name: {library}")
    if task is not None:
        head.append(f"pipeline_tag: {task}")
    head += ["tags:", "- masked-autoencoder", "- vit", "---"]
    parts = [
        "\n".join(head),
        f"# {title}\n\n{what}",
        f"## Load\n\n```python\n{loading}\n```",
        "## Input\n\n" + _listed(inputs),
        "## Training\n\n" + _listed(recipe),
    ]
    if remarks:
        parts.insert(3, "## Mind\n\n" + _listed(remarks))
    if figures:
        table = "\n".join(f"| {name} | {value:.6g} |" for name, value in figures.items())
        parts.append(f"## Figures\n\n| of its epoch | |\n|---|---|\n{table}")
    parts.append(
        "## Licence\n\nNone is chosen yet. Choose one before you share this model, and write it "
        "here and as `license:` at the top. It may depend on those of the data and of the weights "
        "that the training began with."
    )
    return "\n\n".join(parts) + "\n"


def _listed(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def input_lines(img_size: tuple[int, int], pixels: PixelFormat) -> list[str]:
    """What a user must feed a model of images of (height, width), in sentences."""
    height, width = img_size
    cover = f"{height} x {width}"
    if max(img_size) <= 224:
        cover = f"{height * 256 // 224} x {width * 256 // 224}"
    bands = "bands" if pixels.in_chans != 1 else "band"
    lines = [
        f"A tensor [N, {pixels.in_chans}, {height}, {width}]: {pixels.in_chans} {bands}, "
        f"{height} x {width} pixels (height x width), in float32."
    ]
    if pixels.bands is not None:
        chosen = ", ".join(map(str, pixels.bands))
        lines.append(f"Its bands are the bands {chosen} of the files, in this order, from 0.")
    elif pixels.in_chans == 3:
        lines.append("Bands: red, green, blue, if the files were photographs.")
    if pixels.value_range is not None:
        low, high = pixels.value_range
        lines.append(
            f"Scale: samples from {low:g} to {high:g} become 0 to 1, those beyond are clipped: "
            f"`x = ((samples - {low:g}) / {high - low:g}).clip(0, 1)`."
        )
    else:
        lines.append(
            "Scale: 0 to 1 is the range of the files' unsigned type: divide 8-bit samples by 255, "
            "16-bit samples by 65535."
        )
    lines.append(
        f"Size: resized (bicubic, antialiased, aspect ratio kept) to cover {cover} pixels, then "
        "the centre is cropped."
    )
    mean, std = (", ".join(f"{v:.6g}" for v in values) for values in (pixels.mean, pixels.std))
    lines.append(f"Normalisation, by band: `x = (x - mean) / std`, mean {mean}, std {std}.")
    if pixels.nodata is not None:
        lines.append(
            f"Samples of {pixels.nodata:g} stand for no data: they are 0 after normalisation."
        )
    turned = "are turned as their EXIF tag says" if pixels.exif_orientation else "are not turned"
    lines.append(f"Images {turned}{'' if pixels.exif_orientation else ' by their EXIF tag'}.")
    return lines


def recipe_lines(contents: Mapping[str, Any]) -> list[str]:
    """How a checkpoint's model was trained, as far as the checkpoint says it.

    Args:
        contents: as `load_checkpoint` returns them.
    """
    saved, training = contents.get("args") or {}, contents.get("training") or {}
    lines = []
    if "command" in contents:
        lines.append(f"Command: `{contents['command']}` of the project that made this file.")
    if saved.get("data_path"):
        folder = last_name(str(saved["data_path"]))
        images = f", {training['images']} images" if "images" in training else ""
        lines.append(f"Data: a folder named `{folder}`{images}.")
    if isinstance(contents.get("epoch"), int):
        epochs = f" of {saved['epochs']}" if "epochs" in saved else ""
        done = contents["epoch"] + 1
        if contents.get("totals") is not None:
            done = f"{contents['epoch']} epochs and {contents['step']} steps"
        lines.append(f"Length: {done}{epochs} epochs.")
    if "processes" in training:
        batch = saved["batch_size"] * saved["accum_iter"] * training["processes"]
        dtype, processes = training.get("dtype", "an unknown type"), training["processes"]
        lines.append(f"Effective batch {batch}; number of processes {processes}; in {dtype}.")
    flags = {
        name: value
        for name, value in saved.items()
        if name not in NOT_THE_RECIPE and value is not None and value is not False and value != ""
    }
    if flags:
        words = (_flag(name, value) for name, value in sorted(flags.items()))
        lines.append(f"Flags: `{' '.join(words)}`")
    for change in contents.get("accepted_changes") or []:
        name, before, after = (change[key] for key in ("name", "before", "after"))
        if name != "image_names":  # a checksum
            place = f"epoch {change['epoch']}, step {change['step']}"
            lines.append(f"The flags are the last ones. At {place}: {name} {before} -> {after}.")
    if contents.get("versions"):
        versions = ", ".join(f"{name} {number}" for name, number in contents["versions"].items())
        lines.append(f"Versions: {versions}.")
    return lines or ["The checkpoint does not say how it was trained."]


def _flag(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    values = value if isinstance(value, (list, tuple)) else [value]
    words = (last_name(v) if isinstance(v, str) else str(v) for v in values)
    return " ".join([f"--{name}", *words])


def last_name(path: str) -> str:
    """The last name of a path, or of an address, whose user, host and query may be secret."""
    if "://" in path:
        place = re.split("[?#;]", path.split("://", 1)[1])[0]
        path = place.partition("/")[2]
    return os.path.basename(path.rstrip("/"))


def logged_figures(checkpoint: str, contents: Mapping[str, Any]) -> dict[str, float]:
    """Losses and accuracies of a checkpoint's epoch, from the log.txt beside it; {} without one."""
    if contents.get("totals") is not None or "epoch" not in contents:
        return {}
    try:
        lines = (Path(checkpoint).parent / "log.txt").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("epoch") == contents["epoch"]:
            return {
                name: value
                for name, value in record.items()
                if any(part in name for part in SHOWN_FIGURES)
                and isinstance(value, (int, float))
                and math.isfinite(value)
            }
    return {}
