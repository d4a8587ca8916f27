"""Folders in which transformers and timm keep a model: the files of its weights, its config."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from util.errors import UserError, warn

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or, for several files, NAME.index.json
NORM_EPS = 1e-6  # of all models here


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # NaN is not


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and _is_positive(value)


def _is_list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _is_or_list(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: is_right(value) or _is_list_of(is_right)(value)


def _or_null(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


# What is read of each file, and whether a value can be that.
Entries = dict[str, Callable[[Any], bool]]
INDEX: Entries = {
    "weight_map": lambda value: isinstance(value, dict) and all(map(_is(str), value.values()))
}
OF_TRANSFORMERS: Entries = {
    "layer_norm_eps": _is_positive,
    "num_attention_heads": _is_count,
    "image_size": _is_or_list(_is_count),
    "norm_pix_loss": _is(bool),
    "mask_ratio": _is_number,
    "decoder_hidden_size": _is_count,
    "decoder_num_hidden_layers": _is_count,
    "decoder_num_attention_heads": _is_count,
}
PROCESSOR: Entries = {
    "image_mean": _or_null(_is_or_list(_is_number)),
    "image_std": _or_null(_is_or_list(_is_positive)),
    "do_normalize": _or_null(_is(bool)),
    "do_rescale": _or_null(_is(bool)),
    "rescale_factor": _or_null(_is_positive),
}
OF_TIMM: Entries = {
    "model_args": _or_null(_is(dict)),
    "pretrained_cfg": _or_null(_is(dict)),
    "global_pool": _or_null(_is(str)),
    "label_names": _or_null(_is(list, dict)),
    # Of "model_args" and "pretrained_cfg"
    "num_heads": _or_null(_is_or_list(_is_count)),  # a list where stages differ
    "img_size": _or_null(_is_or_list(_is_count)),
    "input_size": _or_null(_is_list_of(_is_count)),
    "mean": _or_null(_is_or_list(_is_number)),
    "std": _or_null(_is_or_list(_is_positive)),
}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of the model in a folder.

    Raises:
        UserError: there are none.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(_read_json(index, INDEX).get("weight_map", {}).values()))
            if names and all(Path(name).name == name not in ("", "..") for name in names):
                return [folder / name for name in names]
            raise UserError(f"{index} names no files of weights in its folder")
    checkpoints = sorted(folder.glob("*.pth"))
    hint = f": name one of its checkpoints, such as {checkpoints[-1]}" if checkpoints else ""
    raise UserError(
        f"{folder} is a folder without a model: it has no {' and no '.join(WEIGHTS)}{hint}"
    )


def describe(folder: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """What a folder says about its model, as entries of a checkpoint: "args", and "classes".

    "args" has, where the folder says them, the flags "input_size", "in_chans", "mean", "std",
    "mask_ratio", "norm_pix_loss", those of the decoder's size, "global_pool", "nb_classes", and
    "num_heads", the encoder's attention heads.

    Args:
        folder: with config.json, and preprocessor_config.json from transformers.
        weights: the model's, under the published keys.

    Raises:
        UserError: it is a model that the ones here can't represent; a file is malformed.
    """
    config = _read_json(folder / "config.json")
    if "architecture" in config:
        args, labels = _of_timm(folder, config, weights)
    elif "model_type" in config:
        args, labels = _of_transformers(folder, config, weights)
    else:
        return {}
    about: dict[str, Any] = {"args": {k: v for k, v in args.items() if v is not None}}
    if "head.weight" in weights:
        about["args"]["nb_classes"] = len(weights["head.weight"])
        is_named = not any(name.startswith("LABEL_") for name in labels)  # as transformers fills in
        if is_named and len(labels) == len(weights["head.weight"]):
            about["classes"] = labels
    return about


def _read_json(path: Path, entries: Entries | None = None) -> dict[str, Any]:
    """The object in a JSON file, with such entries; an empty one if there is no file."""
    try:
        content = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    _check(path, content, entries or {})
    return content


def _check(path: Path, content: Any, entries: Entries) -> None:
    """Refuse, with a UserError, what is no object or has one of these entries of another kind."""
    wrong = None if isinstance(content, dict) else "it holds no object"
    for name, is_right in entries.items() if wrong is None else ():
        if name in content and not is_right(content[name]):
            wrong = f'its "{name}" is {json.dumps(content[name])[:80]}'
    if wrong:
        raise UserError(f"{path} is malformed: {wrong}")


def _of_transformers(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    kind = config["model_type"]
    if kind not in ("vit_mae", "vit", "beit"):
        raise UserError(
            f"{folder} holds a {kind} of transformers: only vit_mae, vit and beit can be loaded"
        )
    _check(folder / "config.json", config, OF_TRANSFORMERS)
    _check_activation(folder, config.get("hidden_act"))
    eps = config.get("layer_norm_eps", NORM_EPS)
    if not math.isclose(eps, NORM_EPS):
        warn(
            f"{folder} was trained with layer_norm_eps {eps:g}, the models here have "
            f"{NORM_EPS:g}: outputs differ a little"
        )
    args = {
        "num_heads": config.get("num_attention_heads"),
        "input_size": _matching_size([config.get("image_size")], weights),
    }
    if "decoder_pred.weight" in weights:
        args |= {
            "norm_pix_loss": config.get("norm_pix_loss"),
            "mask_ratio": config.get("mask_ratio"),
            "decoder_embed_dim": config.get("decoder_hidden_size"),
            "decoder_depth": config.get("decoder_num_hidden_layers"),
            "decoder_num_heads": config.get("decoder_num_attention_heads"),
        }
    if "head.weight" in weights:
        args["global_pool"] = "fc_norm.weight" in weights
    processor = _read_json(folder / "preprocessor_config.json", PROCESSOR)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor and not processor.get("do_normalize", True):
        mean, std = 0.0, 1.0
    if mean is not None and std is not None:
        rescale = 255 * (processor.get("rescale_factor") or 1 / 255)
        scale = rescale if processor.get("do_rescale", True) else 255.0
        args |= _pixels(folder, mean, std, weights, scale)
    return args, [name for _, name in sorted(_by_number(config.get("id2label")).items())]


def _of_timm(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    _check(folder / "config.json", config, OF_TIMM)
    model, pretrained = config.get("model_args") or {}, config.get("pretrained_cfg") or config
    for part in (model, pretrained):
        _check(folder / "config.json", part, OF_TIMM)
    _check_activation(folder, model.get("act_layer"))
    size = pretrained.get("input_size")
    args = {
        "num_heads": model.get("num_heads"),
        "input_size": _matching_size([size and size[1:], model.get("img_size")], weights),
    }
    if "head.weight" in weights:
        pool = config.get("global_pool", model.get("global_pool"))
        by_weights = "fc_norm.weight" in weights
        args["global_pool"] = {"avg": True, "token": False, None: by_weights}.get(pool, pool)
    if pretrained.get("mean") is not None and pretrained.get("std") is not None:
        args |= _pixels(folder, pretrained["mean"], pretrained["std"], weights)
    labels = config.get("label_names") or pretrained.get("label_names") or []
    if isinstance(labels, dict):
        labels = [name for _, name in sorted(_by_number(labels).items())]
    return args, [str(name) for name in labels]


def _check_activation(folder: Path, name: Any) -> None:
    if name not in (None, "gelu"):
        raise UserError(f"{folder} has the activation {name}, which no model here has: only gelu")


def _by_number(names: Any) -> dict[int, str]:
    """A config's table of names, whose keys JSON has made strings."""
    if not isinstance(names, dict) or not all(
        number.isdecimal() and len(number) < 10 for number in names
    ):
        return {}
    return {int(number): str(name) for number, name in names.items()}


def _matching_size(sizes: list[Any], weights: dict[str, Tensor]) -> int | tuple[int, int] | None:
    """The first of these image sizes that has as many patches as the weights have positions.

    A config may tell the size that an architecture usually has, instead of the model's.
    """
    table, projection = weights.get("pos_embed"), weights.get("patch_embed.proj.weight")
    if table is None or projection is None or table.ndim != 3 or projection.ndim != 4:
        return None
    patch_h, patch_w = projection.shape[2:]
    for size in sizes:
        match size:
            case int():
                height, width = size, size
            case [int(height), int(width)]:
                pass
            case _:
                continue
        if (height // patch_h) * (width // patch_w) == table.shape[1] - 1:
            return height if height == width else (height, width)
    return None


def _pixels(
    folder: Path, mean: Any, std: Any, weights: dict[str, Tensor], scale: float = 1.0
) -> dict[str, Any]:
    """The bands, and their mean and std on the scale from 0 to 1; `scale` is what 1 was then."""
    projection = weights.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4:
        return {}
    in_chans = projection.shape[1]
    figures: dict[str, Any] = {"in_chans": in_chans}
    for name, values in (("mean", mean), ("std", std)):
        values = values if isinstance(values, list) else [values]
        values = values * in_chans if len(values) == 1 else values
        if len(values) != in_chans:
            warn(
                f"{folder} has {name} of {len(values)} bands for {in_chans} of its model: "
                "it is ignored, give --mean and --std"
            )
            return {}
        figures[name] = tuple(round(value / scale, 12) for value in values)
    if figures["mean"] != IMAGENET_DEFAULT_MEAN or figures["std"] != IMAGENET_DEFAULT_STD:
        mean, std = (" ".join(f"{x:g}" for x in figures[name]) for name in ("mean", "std"))
        warn(f"{folder} normalises by mean {mean} and std {std}, not by ImageNet's: so do we")
    return figures
