"""A model in the files of another library: timm, transformers, or .safetensors for this project."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from util.checkpoint import save_safetensors, write_whole
from util.conversion import to_transformers
from util.errors import UserError, warn
from util.model_card import last_name
from util.pixels import PixelFormat

FORMATS = ("timm", "transformers", "safetensors")
ENCODER = "encoder.safetensors"
WEIGHTS = "model.safetensors"
DECODER = ("decoder_", "mask_token")  # how its keys begin

# timm's registered sizes, whose names say the most; every size is written out beside the name.
TIMM_NAMES = {
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
    (1280, 32): "vit_huge_patch14_224",
}


@dataclass
class Folder:
    """What an exported folder will hold, and what is said about it.

    Attributes:
        weights: of model.safetensors, under the library's keys.
        settings: the library's files, by name.
        library: the Hub's name of the library, or None.
        load: what loads the folder, in one line, to be shown.
        example: Python lines that load it.
        remarks: sentences on what the library does differently.
    """

    weights: dict[str, Tensor]
    load: str
    example: str
    library: str | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


# ---- what a checkpoint holds


def part_in(weights: Mapping[str, Tensor]) -> str:
    """What weights are: an "autoencoder", an "encoder", a "classifier" or a "probe"'s head."""
    if "head.1.weight" in weights:
        return "probe"
    if "head.weight" in weights:
        return "classifier"
    return "autoencoder" if "decoder_pred.weight" in weights else "encoder"


def choose_part(holds: str, part: str | None, library: str, path: str) -> str:
    """The part to export: all that the checkpoint holds, and of a pre-training the asked one.

    Args:
        holds: as `part_in`.
        part: --part, or None.
        library: one of `FORMATS`.
        path: the checkpoint.

    Raises:
        UserError: the checkpoint doesn't hold this part, or the library can't.
    """
    if holds == "classifier":
        if part is not None:
            raise UserError(
                f"{path} is a classifier, which is exported whole: leave out --part {part}"
            )
        return holds
    if part == "autoencoder" and holds == "encoder":
        raise UserError(f"{path} has no decoder weights: leave out --part autoencoder")
    if library == "timm":
        if part == "autoencoder":
            raise UserError("timm has no masked autoencoder: leave out --part autoencoder")
        return "encoder"
    return part or holds


def take_part(
    model: nn.Module, weights: Mapping[str, Tensor], part: str, path: str
) -> dict[str, Tensor]:
    """The weights of a part, in the model's order, all there and in the model's shapes.

    Args:
        model: what the checkpoint's flags describe; its own weights are not used.
        weights: the checkpoint's, under the published keys.
        part: as `choose_part`.
        path: the checkpoint.

    Raises:
        UserError: a key is missing or unexpected, or has another shape.
    """
    own = model.state_dict()
    if part == "encoder":
        own = {key: value for key, value in own.items() if not key.startswith(DECODER)}
        weights = {key: value for key, value in weights.items() if not key.startswith(DECODER)}
    for problem, keys in (
        ("missing", own.keys() - weights.keys()),
        ("unexpected", weights.keys() - own.keys()),
        ("of another shape", {k for k in own if k in weights and own[k].shape != weights[k].shape}),
    ):
        if keys:
            listed = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise UserError(
                f"{path} is not what its flags describe: {problem} {listed} (see --model, "
                "--input_size and --in_chans)"
            )
    return {key: weights[key] for key in own}


def fold_probe(head: Mapping[str, Tensor], eps: float = 1e-6) -> dict[str, Tensor]:
    """A linear probe's head, a BatchNorm without affine before a linear layer, as one linear layer.

    Args:
        head: "head.0.running_mean" and "head.0.running_var" [D], "head.1.weight" [K, D] and
            "head.1.bias" [K].
        eps: the BatchNorm's.

    Returns:
        "head.weight" and "head.bias", folded in float64.
    """
    mean, var = head["head.0.running_mean"].double(), head["head.0.running_var"].double()
    weight = head["head.1.weight"].double() / (var + eps).sqrt()
    bias = head["head.1.bias"].double() - weight @ mean
    return {"head.weight": weight.float(), "head.bias": bias.float()}


# ---- timm


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
    example = f"import timm\n\nmodel = {load.format(_shown(output))}.eval()"
    folder = Folder(weights, load.format(output), example, "timm")
    folder.remarks.append("timm loads this folder from version 1.0.16 on.")
    folder.settings["config.json"] = timm_config(model, global_pool, classes, pixels)
    if classes is None:
        pooled = {"avg": "the mean of the patch tokens", "token": "the class token"}[global_pool]
        folder.remarks.append(
            f"`model(imgs)` is {pooled}, after the encoder's norm. `model.forward_features(imgs)` "
            "are all tokens, the class token first."
        )
    folder.remarks += _preprocessing_remarks(pixels, "timm")
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
    size = _size(model.blocks)
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
        **({"label_names": _all_names(model, classes)} if classes else {}),
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


# ---- transformers


def for_transformers(
    output: Path,
    model: nn.Module,
    weights: dict[str, Tensor],
    part: str,
    global_pool: str,
    classes: list[str] | None,
    pixels: PixelFormat,
    mask_ratio: float,
) -> Folder:
    """A folder for transformers.

    Args:
        output: where it will be.
        model, classes, pixels, mask_ratio: as for `transformers_config`.
        weights: the model's.
        part: as `choose_part`.
        global_pool: of a classifier, "avg" or "token".

    Raises:
        UserError: transformers has no class that holds the model.
    """
    name = transformers_class(part, global_pool)
    check_transformers(model, name)
    options = ", add_pooling_layer=False" if name == "ViTModel" else ""
    load, shown = f'{name}.from_pretrained("{{}}"{options})', _shown(output)
    folder = Folder(transformers_weights(weights, name), load.format(output), "", "transformers")
    config = transformers_config(model, name, classes, pixels, mask_ratio)
    config["torch_dtype"] = str(weights["cls_token"].dtype).removeprefix("torch.")
    folder.settings["config.json"] = config
    processor = image_processor(model, pixels)
    folder.remarks = [*REMARKS.get(name, []), *_preprocessing_remarks(pixels, "transformers")]
    if processor is None:
        folder.example = f"from transformers import {name}\n\nmodel = {load.format(shown)}.eval()"
        return folder
    folder.settings["preprocessor_config.json"] = processor
    folder.example = (
        f"from transformers import AutoImageProcessor, {name}\n\n"
        f'processor = AutoImageProcessor.from_pretrained("{shown}")\n'
        f"model = {load.format(shown)}.eval()"
    )
    if processor["image_processor_type"] == "ViTImageProcessor":
        folder.remarks.append(
            "The image processor stretches an image to the model's size, as transformers has none "
            "that covers a size that is not square. The model was evaluated as Input says."
        )
    return folder


REMARKS = {
    "ViTMAEForPreTraining": [
        "For features, load the encoder by `ViTModel.from_pretrained(..., "
        "add_pooling_layer=False)`, which sees all patches. `ViTMAEModel` loads it too, but hides "
        "`mask_ratio` of the patches, drawn anew in every call, and shuffles those that it keeps.",
        "transformers resamples the decoder's positions in one dimension: keep to the trained "
        "image size.",
    ],
    "ViTModel": [
        "`last_hidden_state` are all tokens, the class token first. Without "
        "`add_pooling_layer=False`, `pooler_output` comes from a layer that nothing has trained.",
    ],
    "BeitForImageClassification": [
        "The classifier pools the mean of the patch tokens, which ViTForImageClassification can't. "
        "BEiT's class without relative positions and layer scales computes the same. It has no "
        "bias in its keys, which softmax would ignore.",
    ],
}


def transformers_class(part: str, global_pool: str) -> str:
    """The class of transformers that holds a part of a pre-training, or a classifier."""
    if part == "classifier":
        # ViTForImageClassification has no mean of the patch tokens, and BEiT without its relative
        # positions and layer scales is a ViT that has it.
        names = {"avg": "BeitForImageClassification", "token": "ViTForImageClassification"}
        return names[global_pool]
    return {"autoencoder": "ViTMAEForPreTraining", "encoder": "ViTModel"}[part]


def check_transformers(model: nn.Module, architecture: str) -> None:
    """Refuse, with a UserError, images that are not square where transformers assumes it."""
    height, width = model.patch_embed.img_size
    if height == width or architecture.startswith("ViTFor") or architecture == "ViTModel":
        return
    instead = "--format timm holds it"
    if architecture == "ViTMAEForPreTraining":
        instead = "export the encoder by --part encoder, or take --format safetensors"
    raise UserError(
        f"transformers' {architecture} takes only square images, not {height} x {width} "
        f"(height x width): {instead}"
    )


def transformers_config(
    model: nn.Module,
    architecture: str,
    classes: list[str] | None,
    pixels: PixelFormat,
    mask_ratio: float,
) -> dict[str, Any]:
    """config.json for transformers.

    Args:
        model: the autoencoder, encoder or classifier; its sizes are read.
        architecture: as `transformers_class` names it.
        classes: as for `timm_config`.
        pixels: what the model sees of a file.
        mask_ratio: of the pre-training.
    """
    (height, width), (patch, _) = model.patch_embed.img_size, model.patch_embed.patch_size
    size = _size(model.blocks)
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "vit",
        "hidden_size": size["width"],
        "num_hidden_layers": size["depth"],
        "num_attention_heads": size["heads"],
        "intermediate_size": size["mlp_width"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "image_size": height if height == width else [height, width],
        "patch_size": patch,
        "num_channels": pixels.in_chans,
    }
    if architecture == "ViTMAEForPreTraining":
        decoder = _size(model.decoder_blocks)
        config |= {
            "model_type": "vit_mae",
            "qkv_bias": True,
            "decoder_hidden_size": decoder["width"],
            "decoder_num_hidden_layers": decoder["depth"],
            "decoder_num_attention_heads": decoder["heads"],
            "decoder_intermediate_size": decoder["mlp_width"],
            "mask_ratio": float(mask_ratio),  # its type is checked
            "norm_pix_loss": model.norm_pix_loss,
        }
    elif architecture == "BeitForImageClassification":
        config |= {
            "model_type": "beit",
            "use_mask_token": False,
            "use_absolute_position_embeddings": True,
            "use_relative_position_bias": False,
            "use_shared_relative_position_bias": False,
            "layer_scale_init_value": 0.0,
            "drop_path_rate": 0.0,
            "use_mean_pooling": True,
        }
    else:
        config |= {"qkv_bias": True, "encoder_stride": patch}
    if classes is not None:
        unknown = [f"LABEL_{index}" for index in range(len(model.head.weight))]
        names = _all_names(model, classes) if classes else unknown
        config["id2label"] = {str(index): name for index, name in enumerate(names)}
        config["label2id"] = {name: index for index, name in enumerate(names)}
    return config


def transformers_weights(weights: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Weights under the keys that the Hub's files of this class of transformers have."""
    prefixes = {"ViTModel": "", "BeitForImageClassification": "beit."}
    converted = to_transformers(weights, prefixes.get(architecture, "vit."))
    if architecture != "BeitForImageClassification":
        return converted
    # BEiT's keys have no bias. One adds the same to all of a query's scores, and softmax ignores
    # that.
    return {key: value for key, value in converted.items() if not key.endswith(".key.bias")}


def image_processor(model: nn.Module, pixels: PixelFormat) -> dict[str, Any] | None:
    """preprocessor_config.json for transformers; None where no processor reads such files.

    For square images it is this project's evaluation transform: the short side is resized, the
    centre cropped. For other shapes transformers has none that keeps the aspect ratio, and this one
    stretches the image.
    """
    if unprocessed(pixels):
        return None
    height, width = model.patch_embed.img_size
    shared = {
        "do_resize": True,
        "resample": 3,  # Pillow's number of bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
    if height != width:
        size = {"height": height, "width": width}
        return {"image_processor_type": "ViTImageProcessor", "size": size, **shared}
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": height * 256 // 224 if height <= 224 else height},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_convert_rgb": pixels.in_chans == 3,
        **shared,
    }


# ---- what a library's preprocessing can't do


def unprocessed(pixels: PixelFormat) -> list[str]:
    """What of a pixel format no other library's preprocessing does, each in a few words."""
    found = []
    if pixels.in_chans not in (1, 3):
        found.append(f"{pixels.in_chans} bands")
    if pixels.bands is not None:
        found.append(f"the choice of bands {' '.join(map(str, pixels.bands))}")
    if pixels.value_range is not None:
        low, high = pixels.value_range
        found.append(f"the value range {low:g} to {high:g}")
    if pixels.nodata is not None:
        found.append(f"the nodata value {pixels.nodata:g}")
    if pixels.exif_orientation:
        found.append("the EXIF orientation")
    return found


def _shown(output: Path) -> str:
    """A folder's name for a card that is shared: without the folders around it."""
    return output.resolve().name


def _preprocessing_remarks(pixels: PixelFormat, library: str) -> list[str]:
    lacking = unprocessed(pixels)
    if not lacking:
        return []
    return [
        f"The preprocessing in {library} does not know {', '.join(lacking)}: make the input as "
        "the section Input of README.md says."
    ]


# ---- .safetensors


def for_safetensors(output: Path, weights: dict[str, Tensor], part: str) -> Folder:
    """A folder whose weights this project's commands take without flags.

    Args:
        output: where it will be.
        weights: under the published keys.
        part: as `choose_part`.
    """
    path = output / WEIGHTS
    load = {
        "autoencoder": f"python main_visualize.py --checkpoint {path} --data_path DIR",
        "encoder": f"python main_embed.py --checkpoint {path} --data_path DIR --output FILE.npz",
        "classifier": f"python main_embed.py --checkpoint {path} --data_path DIR --output FILE.npz",
    }[part]
    example = (
        "import safetensors.torch\n\n"
        f'weights = safetensors.torch.load_file("{WEIGHTS}")  # under the published keys'
    )
    return Folder(weights, load, example)


# ---- files


def _all_names(model: nn.Module, classes: list[str]) -> list[str]:
    """A name for each output of a classifier's head: those without a class have their numbers."""
    return [*classes, *map(str, range(len(classes), len(model.head.weight)))]


def _size(blocks: nn.ModuleList) -> dict[str, int]:
    block = blocks[0]
    return {
        "width": block.norm1.weight.shape[0],
        "depth": len(blocks),
        "heads": block.attn.num_heads,
        "mlp_width": block.mlp.fc1.out_features,
    }


def shareable(about: dict[str, Any]) -> dict[str, Any]:
    """What is said beside weights, for shared files: of paths and addresses the last name only."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [cut(inner) for inner in value]
        return last_name(value) if isinstance(value, str) and "/" in value else value

    return {name: value if name == "classes" else cut(value) for name, value in about.items()}


def save_encoder(output_dir: str | Path, model: nn.Module, about: dict[str, Any]) -> Path | None:
    """Write a pre-trained encoder, without the decoder, as output_dir/encoder.safetensors.

    Args:
        output_dir: the folder.
        model: the whole autoencoder.
        about: what `load_checkpoint` is to return beside "model"; its "args" lose their folders.

    Returns:
        the file, or None if it could not be written, after a warning.
    """
    path = Path(output_dir) / ENCODER
    encoder = {k: v for k, v in model.state_dict().items() if not k.startswith(DECODER)}
    try:
        save_safetensors(path, encoder, shareable(about))
    except (OSError, MemoryError, RuntimeError) as error:
        warn(f"{error}; main_export.py makes such a file from a checkpoint")
        return None
    return path


def check_output(output: Path) -> None:
    """Refuse, with a UserError, an output folder that is not new or empty."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: give a new folder")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty: give a new folder, or remove it")


def write_folder(output: Path, folder: Folder, about: dict[str, Any], card: str) -> None:
    """Write an exported folder, whole or not at all.

    Args:
        output: a folder that is missing or empty.
        folder: its content.
        about: beside the weights, so that this project takes them back without flags, see
            `save_safetensors`; paths are cut.
        card: its README.md.

    Raises:
        UserError: it could not be written.
    """
    output = output.resolve()
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        if temporary.exists():  # of an export that was killed
            shutil.rmtree(temporary)
        temporary.mkdir()
        save_safetensors(temporary / WEIGHTS, folder.weights, shareable(about))
        for name, values in folder.settings.items():
            write_whole(temporary / name, (json.dumps(values, indent=2) + "\n").encode())
        # The output's name, which can hold any bytes, is in it.
        write_whole(temporary / "README.md", card.encode(errors="backslashreplace"))
        try:
            temporary.rename(output)
        except OSError:
            if not output.is_dir() or any(output.iterdir()):
                raise
            _fill(output, temporary)  # a mounted volume, which can't be replaced
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(output: Path, temporary: Path) -> None:
    """Copy an exported folder's files into an empty one, all or none, what loads it at the end."""
    names = sorted(path.name for path in temporary.iterdir())
    try:
        for name in sorted(names, key=["config.json", WEIGHTS].count):
            write_whole(output / name, (temporary / name).read_bytes())
    except BaseException:
        for name in names:
            (output / name).unlink(missing_ok=True)
            (output / f".{name}.tmp").unlink(missing_ok=True)  # an interrupt leaves it
        raise
