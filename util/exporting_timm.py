"""A model as a folder that timm loads."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from util.exporting import Folder, output_names, preprocessing_remarks, quoted, size_of, unprocessed
from util.pixels import PixelFormat

# timm's registered sizes, whose names say the most; every size is written out beside the name.
TIMM_NAMES = {
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
    (1280, 32): "vit_huge_patch14_224",
}


def for_timm(
    output: Path,
    model: nn.Module,
    weights: dict[str, Tensor],
    global_pool: str,
    classes: list[str] | None,
    pixels: PixelFormat,
) -> Folder:
    """A folder for timm.

    Args:
        output: where it will be.
        model, global_pool, classes, pixels: as for `timm_config`.
        weights: the model's.
    """
    load = 'timm.create_model("local-dir:{}", pretrained=True)'
    example = f"import timm\n\nmodel = {load.format(quoted(output))}.eval()"
    folder = Folder(weights, load.format(output), example, "timm")
    folder.remarks.append("timm loads this folder from version 1.0.16 on.")
    folder.settings["config.json"] = timm_config(model, global_pool, classes, pixels)
    if classes is None:
        pooled = {"avg": "the mean of the patch tokens", "token": "the class token"}[global_pool]
        folder.remarks.append(
            f"`model(imgs)` is {pooled}, after the encoder's norm. `model.forward_features(imgs)` "
            "are all tokens, the class token first."
        )
    folder.remarks += preprocessing_remarks(pixels, "timm")
    height, width = model.patch_embed.img_size
    if height != width:
        folder.remarks.append(
            "timm's transform rounds the resized size otherwise than Input says for models that "
            "are not square: crops can lie up to a pixel beside this project's."
        )
    if not unprocessed(pixels):
        folder.example += (
            "\ntransform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        )
    return folder


def timm_config(
    model: nn.Module, global_pool: str, classes: list[str] | None, pixels: PixelFormat
) -> dict[str, Any]:
    """config.json of a folder that `timm.create_model("local-dir:...", pretrained=True)` loads.

    Args:
        model: the encoder or the classifier; its sizes are read.
        global_pool: "avg" or "token".
        classes: names of a classifier's first classes, the rest are named by their numbers; [] if
            they are unknown; None for an encoder.
        pixels: what the model sees of a file.
    """
    (height, width), (patch, _) = model.patch_embed.img_size, model.patch_embed.patch_size
    size = size_of(model.blocks)
    model_args = {
        "img_size": [height, width],
        "patch_size": patch,
        "in_chans": pixels.in_chans,
        "embed_dim": size["width"],
        "depth": size["depth"],
        "num_heads": size["heads"],
        "mlp_ratio": size["mlp_width"] / size["width"],
        "global_pool": global_pool,
        # An encoder's own norm normalises the tokens, a mean-pooling classifier's the mean.
        "fc_norm": classes is not None and global_pool == "avg",
    }
    num_classes = 0 if classes is None else len(model.head.weight)
    return {
        "architecture": TIMM_NAMES.get((size["width"], size["depth"]), "vit_tiny_patch16_224"),
        "num_classes": num_classes,
        "num_features": size["width"],
        "global_pool": global_pool,
        "model_args": model_args,
        **({"label_names": output_names(model, classes)} if classes else {}),
        "pretrained_cfg": {
            "tag": "mae",
            "custom_load": False,
            "input_size": [pixels.in_chans, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875 if max(height, width) <= 224 else 1.0,
            "crop_mode": "center",
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
