"""Weights from files into models: keys, sizes and positions checked."""

import math
import zlib
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from util.checkpoint import load_checkpoint
from util.errors import UserError, warn
from util.pos_embed import interpolate_pos_embed


def start_from(model: nn.Module, path: str | Path, contents: dict[str, Any] | None = None) -> int:
    """Load the encoder in a checkpoint into a classifier, see `load_encoder`.

    Args:
        model: a classifier of `models_vit`.
        path: the checkpoint.
        contents: what `load_checkpoint` returns for it, if that was called before.

    Returns:
        the encoder's fingerprint.
    """
    contents = load_checkpoint(path) if contents is None else contents
    weights = contents["model"]
    load_encoder(model, weights, str(path), input_size=saved_input_size(contents))
    encoder = [k for k in model.state_dict() if k in weights and not k.startswith("head.")]
    return fingerprint({key: weights[key] for key in encoder})


def saved_input_size(contents: dict[str, Any]) -> int | tuple[int, int] | None:
    """The image size that a checkpoint's model was trained on; None if the file doesn't say."""
    size = (contents.get("args") or {}).get("input_size")
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return size[0], size[1]
    return size if isinstance(size, int) else None


def check_flags(contents: dict[str, Any], path: str | Path, given: dict[str, Any]) -> None:
    """Refuse, with a UserError, to evaluate a checkpoint with different flags than in training.

    Another input size, for which a classifier's positions are resampled, is a warning.

    Args:
        contents: as `load_checkpoint` returns them; a file that doesn't say its flags passes.
        path: the checkpoint's path.
        given: the evaluation's flags.
    """
    saved = contents.get("args") or {}
    for name, value in given.items():
        if saved.get(name, value) == value:
            continue
        message = f"{path} was trained with {name} {saved[name]}, not {value}"
        if name == "input_size":
            warn(message)
        else:
            raise UserError(f"{message}: evaluate it as it was trained")


def fingerprint(state_dict: dict[str, Tensor]) -> int:
    """A checksum of weights' names and bits; the tensors are on the CPU."""
    checksum = 0
    for name, weight in state_dict.items():
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(weight.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def load_encoder(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    source: str = "the checkpoint",
    input_size: int | tuple[int, int] | None = None,
) -> None:
    """Load the encoder of a masked autoencoder, or of a classifier, into a classifier.

    The head stays as it is. Positions are resampled where the grid of patches differs.

    Args:
        model: a classifier of `models_vit`.
        state_dict: weights under the published keys: "model" of what `load_checkpoint` returns.
        source: what errors call them.
        input_size: image size that they were trained on, in pixels, an int or (height, width);
            if not given, the grid of their positions is guessed.

    Raises:
        UserError: the patch size, width or depth differs; a key other than the head's (and
            fc_norm's, under global pooling) is missing; a key other than the head's, the decoder's
            (and norm's, under global pooling) is unexpected.
    """
    ignored = ["head.", "decoder_", "mask_token"]
    if not hasattr(model.norm, "weight"):  # fc_norm normalises the mean of the tokens instead
        ignored.append("norm.")
    weights = {k: v for k, v in state_dict.items() if not k.startswith(tuple(ignored))}
    in_chans = model.patch_embed.proj.in_channels
    if _in_chans(weights) == 3 and in_chans != 3:
        weights = adapt_channels(weights, in_chans)
        warn(f"{source} has 3 channels: its patch projection is adapted to {in_chans}")
    _load_weights(model, weights, source, input_size, may_miss=("head.", "fc_norm."))


def _in_chans(weights: dict[str, Tensor]) -> int | None:
    projection = weights.get("patch_embed.proj.weight")
    return projection.shape[1] if projection is not None and projection.ndim == 4 else None


def adapt_channels(state_dict: dict[str, Tensor], in_chans: int) -> dict[str, Tensor]:
    """Weights of a model of three channels for one of `in_chans`.

    The patch projection is adapted by timm's `adapt_input_conv`: one channel gets the sum of the
    three, N channels repeat them, times 3 / N. So grey images in equal channels give equal tokens
    if N is 1 or a multiple of 3.
    The decoder's last layer, whose outputs are pixels, gets their mean or repeats them as they are.
    """
    adapted = dict(state_dict)
    key = "patch_embed.proj.weight"
    adapted[key] = adapt_input_conv(in_chans, state_dict[key])
    for key in {"decoder_pred.weight", "decoder_pred.bias"} & state_dict.keys():
        channels = state_dict[key].unflatten(0, (-1, 3))  # the fastest index of a patch's values
        if in_chans == 1:
            channels = channels.mean(dim=1, keepdim=True)
        else:
            channels = channels[:, [channel % 3 for channel in range(in_chans)]]
        adapted[key] = channels.flatten(0, 1)
    return adapted


def load_classifier(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    source: str = "the checkpoint",
    input_size: int | tuple[int, int] | None = None,
) -> None:
    """Load a whole classifier: like `load_encoder`, but no key may be missing."""
    head = state_dict.get("head.weight")
    if head is None:
        kind = "the head of a linear probe, evaluate it by main_linprobe.py"
        if "head.1.weight" not in state_dict:
            kind = "a pre-trained encoder, fine-tune it before evaluation"
        raise UserError(f"{source} has no classifier's head: it holds {kind}")
    num_classes = len(model.get_parameter("head.weight"))
    if len(head) != num_classes:
        raise UserError(
            f"{source} is a classifier of {len(head)} classes, not {num_classes}: "
            f"use --nb_classes {len(head)}"
        )
    _load_weights(model, state_dict, source, input_size, may_miss=())


def _load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    input_size: int | tuple[int, int] | None,
    may_miss: tuple[str, ...],
) -> None:
    own = model.state_dict()
    for key in weights:
        if key in own and weights[key].ndim != own[key].ndim:
            raise UserError(f"{source} has {weights[key].ndim}, not {own[key].ndim} axes in {key}")
    _check_same_size(own, weights, source)
    weights = dict(weights)
    if "pos_embed" in weights:
        weights["pos_embed"] = _resample_positions(model, weights, source, input_size)
    problems = {
        "missing": [k for k in own if k not in weights and not k.startswith(may_miss)],
        "unexpected": [k for k in weights if k not in own],
        "of another shape": [k for k in own if k in weights and own[k].shape != weights[k].shape],
    }
    if any(problems.values()):
        listed = [f"{problem} {', '.join(keys)}" for problem, keys in problems.items() if keys]
        hint = ""
        if {"norm.weight", "fc_norm.weight"} & {key for keys in problems.values() for key in keys}:
            hint = " (a classifier has fc_norm with --global_pool and norm with --cls_token)"
        raise UserError(f"{source} does not fit the model: {'; '.join(listed)}{hint}")
    model.load_state_dict(weights, strict=False)


def _resample_positions(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    input_size: int | tuple[int, int] | None,
) -> Tensor:
    """The position table in `weights` on the model's grid, which may differ from its own."""
    table, new_grid = weights["pos_embed"], model.patch_embed.grid_size
    positions = table.shape[1] - 1
    if input_size is not None:
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        patch_h, patch_w = model.patch_embed.patch_size
        old_grid = height // patch_h, width // patch_w
        if math.prod(old_grid) != positions:
            raise UserError(
                f"{source} has {positions} positions, but says that it was trained on images of "
                f"{height} x {width} pixels, which have {math.prod(old_grid)} patches"
            )
        return interpolate_pos_embed(table, new_grid, old_grid=old_grid)
    try:
        resampled = interpolate_pos_embed(table, new_grid)
    except ValueError as error:
        raise UserError(f"{source} has positions that can't be resampled: {error}") from error
    if resampled is not table:
        warn(
            f"{source} doesn't say its input_size: the shape of its grid of {positions} patches "
            "is guessed, and resampled to "
            f"{new_grid[0]} x {new_grid[1]}"
        )
    return resampled


def _check_same_size(own: dict[str, Tensor], weights: dict[str, Tensor], source: str) -> None:
    """Refuse, with a UserError that says the reason, another patch size, width or depth."""
    sizes = []
    for state in (weights, own):
        width, channels, *patch = getattr(state.get("patch_embed.proj.weight"), "shape", (0, 0))
        blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
        patches = f"patches of {' x '.join(map(str, patch))} pixels"
        sizes.append((patches, f"{channels} channels", f"width {width}", f"{len(blocks)} blocks"))
    different = [pair for pair in zip(*sizes, strict=True) if pair[0] != pair[1]]
    if "patch_embed.proj.weight" in weights and different:
        theirs, ours = (" and ".join(names) for names in zip(*different, strict=True))
        raise UserError(f"{source} has {theirs}, the model {ours}: choose another --model")
