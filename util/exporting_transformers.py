"""A model as a folder that transformers loads."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from util.conversion import to_transformers
from util.errors import UserError
from util.exporting import Folder, output_names, preprocessing_remarks, quoted, size_of, unprocessed
from util.pixels import PixelFormat


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
    load, shown = f'{name}.from_pretrained("{{}}"{options})', quoted(output)
    folder = Folder(transformers_weights(weights, name), load.format(output), "", "transformers")
    config = transformers_config(model, name, classes, pixels, mask_ratio)
    config["torch_dtype"] = str(weights["cls_token"].dtype).removeprefix("torch.")
    folder.settings["config.json"] = config
    processor = image_processor(model, pixels)
    folder.remarks = [*REMARKS.get(name, []), *preprocessing_remarks(pixels, "transformers")]
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
    size = size_of(model.blocks)
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
        decoder = size_of(model.decoder_blocks)
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
        names = output_names(model, classes) if classes else unknown
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
