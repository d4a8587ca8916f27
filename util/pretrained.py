"""Weights from files into models: keys, sizes and positions checked."""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from util.checkpoint import load_checkpoint
from util.errors import UserError, warn
from util.pos_embed import guess_grid, interpolate_pos_embed, sincos_pos_embed_2d

LISTED_KEYS = 8  # of a kind, in an error
# What other vision transformers have, by a part of its keys.
LACKING = {
    "reg_token": "register tokens",
    "dist_token": "a distillation token",
    "distillation_token": "a distillation token",
    ".ls1.": "layer scale",
    ".lambda_1": "layer scale",
    "norm_pre.": "a norm before the blocks",
    ".q_norm.": "norms of queries and keys",
    "attn_pool.": "attention pooling",
    "relative_position": "relative positions",
}


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
    check_heads(model, contents, path)
    encoder = [k for k in model.state_dict() if k in weights and not k.startswith("head.")]
    return fingerprint({key: weights[key] for key in encoder})


@dataclass(frozen=True)
class AutoencoderStart:
    """What `start_autoencoder_from` did.

    Attributes:
        fingerprint: of the weights that were loaded, in words.
        summary: a line on what was loaded, what was not, and what the decoder predicts.
        warnings: lines on what the user may not want.
    """

    fingerprint: str
    summary: str
    warnings: tuple[str, ...]


def start_autoencoder_from(
    model: nn.Module,
    path: str | Path,
    contents: dict[str, Any],
    decoder_heads: int | None = None,
) -> AutoencoderStart:
    """Load a masked autoencoder, an encoder, or a classifier's encoder into an autoencoder.

    Positions are those of the model's grid of patches, and channels are adapted. A decoder of
    another size stays as it is, and so does everything that the weights lack.

    Args:
        model: a MaskedAutoencoderViT.
        path: the checkpoint.
        contents: what `load_checkpoint` returns for it.
        decoder_heads: attention heads of its decoder; None if they are not known.

    Raises:
        UserError: the patch size, width or depth differs; a key of the encoder, or of a decoder
            of the model's size, is missing; a key is unexpected.
    """
    source, warnings, notes = str(path), [], []
    saved = contents.get("args") or {}
    _check_kind(contents["model"], source)
    own = model.state_dict()
    _check_axes(own, contents["model"], source)
    weights = _with_channels(contents["model"], model.in_chans, source)
    _check_same_size(own, weights, source)
    check_heads(model, contents, source)
    may_miss: tuple[str, ...] = ()
    if any(key.startswith("head.") for key in weights):
        notes.append("its head is left out")
    if "fc_norm.weight" in weights and "norm.weight" not in weights:
        notes.append("the encoder's norm starts anew, it has one of pooled features")
        may_miss += ("norm.",)
    has_decoder = any(key.startswith("decoder_") for key in weights)
    flags = _decoder_flags(model, weights, decoder_heads) if has_decoder else None
    if flags is not None:
        warnings.append(
            f"the decoder of {source} has another size, so this one starts at random"
            f"{f': with {flags} it would be loaded' if flags else ''}"
        )
    elif not has_decoder:
        warnings.append(
            f"{source} has no decoder, so this one starts at random and pictures are noise for a "
            "while: give the full file of the pre-training if you have it"
        )
    if flags is not None or not has_decoder:
        notes.append("the decoder starts at random")
        may_miss += ("decoder_", "mask_token")
    left_out = ("head.", "fc_norm.", *may_miss)
    weights = {key: weight for key, weight in weights.items() if not key.startswith(left_out)}
    old_grid = _load_weights(
        model, weights, source, saved_input_size(contents), may_miss, fixed_positions=True
    )
    new_grid = model.patch_embed.grid_size
    if old_grid != new_grid:
        grids = (" x ".join(map(str, grid)) for grid in (old_grid, new_grid))
        notes.append("positions of {} patches become those of {}".format(*grids))
    loaded = "encoder"
    if "decoder_embed.weight" in weights:
        width, blocks = own["decoder_embed.weight"].shape[0], model.decoder_blocks
        size = f"width {width}, depth {len(blocks)}, {blocks[0].attn.num_heads} heads"
        loaded = f"encoder and decoder ({size})"
    targets = {True: "normalised", False: "raw", None: None}
    theirs, ours = targets.get(saved.get("norm_pix_loss")), targets[model.norm_pix_loss]
    if theirs is not None:
        notes.append(f"the file says that it was trained to predict {theirs} pixels")
    elif "head.weight" not in contents["model"]:
        notes.append("the file doesn't say whether it was trained on raw or normalised pixels")
    if theirs not in (None, ours) and loaded != "encoder":
        warnings.append(
            f"{source} predicts {theirs} pixels, but this run {ours} ones, which its decoder has "
            f"to learn anew: {'add' if theirs == 'normalised' else 'leave out'} --norm_pix_loss "
            "to go on as it was trained"
        )
    return AutoencoderStart(
        fingerprint=f"weights {fingerprint({k: weights[k] for k in own if k in weights}):08x}",
        summary=f"starting from {source}: {'; '.join([f'{loaded} loaded', *notes])}",
        warnings=tuple(warnings),
    )


def _decoder_flags(model: nn.Module, weights: dict[str, Tensor], heads: int | None) -> str | None:
    """The flags that give the decoder in `weights` its size; None if it has the model's."""
    own = model.state_dict()
    blocks = {key.split(".")[1] for key in weights if key.startswith("decoder_blocks.")}
    width = weights["decoder_embed.weight"].shape[0] if "decoder_embed.weight" in weights else None
    sizes = {
        "embed_dim": (width, len(own["decoder_embed.weight"])),
        "depth": (len(blocks), len(model.decoder_blocks)),
        "num_heads": (heads, model.decoder_blocks[0].attn.num_heads),
    }
    flags = [
        f"--decoder_{name} {theirs}"
        for name, (theirs, ours) in sizes.items()
        if theirs not in (None, ours)
    ]
    other_shapes = any(
        own[key].shape != weights[key].shape
        for key in own.keys() & weights.keys()
        if key.startswith("decoder_") and key != "decoder_pos_embed"
    )
    return " ".join(flags) if flags or other_shapes else None


def check_heads(model: nn.Module, contents: dict[str, Any], source: str | Path) -> None:
    """Refuse, with a UserError, an encoder of another number of attention heads.

    No shape shows it. Files of other libraries say it in a folder's config.
    """
    theirs, ours = (contents.get("args") or {}).get("num_heads"), model.blocks[0].attn.num_heads
    if theirs not in (None, ours):
        raise UserError(
            f"{source} has {theirs} attention heads, the model {ours}: choose another --model"
        )


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


def settle(path: str | Path, saved: dict[str, Any], **given: Any) -> dict[str, Any]:
    """By name, what a checkpoint says of its model, or else the flags that are given.

    Args:
        path: the checkpoint, for messages.
        saved: its "args".
        given: flags by name; None for those that are not given.

    Raises:
        UserError: neither says it, or they differ.
    """
    config = {}
    for name, value in given.items():
        config[name] = saved.get(name, value)
        if isinstance(config[name], list):  # as .safetensors have it, in JSON
            config[name] = tuple(config[name])
        if config[name] is None:
            raise UserError(f"{path} does not say its {name}: add --{name}")
        if value not in (None, config[name]):
            raise UserError(f"{path} says {name} {config[name]}: leave out --{name}")
    return config


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
    _check_kind(state_dict, source)
    ignored = ["head.", "decoder_", "mask_token"]
    if not hasattr(model.norm, "weight"):  # fc_norm normalises the mean of the tokens instead
        ignored.append("norm.")
    weights = {k: v for k, v in state_dict.items() if not k.startswith(tuple(ignored))}
    weights = _with_channels(weights, model.patch_embed.proj.in_channels, source)
    _load_weights(model, weights, source, input_size, may_miss=("head.", "fc_norm."))


def _check_kind(weights: dict[str, Tensor], source: str) -> None:
    """Refuse, with a UserError, what is no vision transformer, or one that has other parts."""
    if not any(key.startswith("blocks.") for key in weights):
        raise UserError(
            f"{source} holds none of the models that can be loaded here, which are ViTs of this "
            f"project, timm or transformers: its keys are {_few(list(weights), 3)}"
        )
    lacking = {kind for part, kind in LACKING.items() for key in weights if part in key}
    if lacking:
        raise UserError(f"{source} has {' and '.join(sorted(lacking))}, which no model here has")


def _few(keys: list[str], most: int = LISTED_KEYS) -> str:
    """The first of the keys, and how many there are."""
    rest = len(keys) - most
    return ", ".join(keys[:most]) + (f" and {rest} more" if rest > 0 else "")


def _with_channels(weights: dict[str, Tensor], in_chans: int, source: str) -> dict[str, Tensor]:
    """Weights for a model of `in_chans`; those of three channels are adapted, and that is said."""
    projection = weights.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4 or projection.shape[1] != 3 or in_chans == 3:
        return weights
    adapted = "patch projection is"
    if "decoder_pred.weight" in weights:
        adapted = "patch projection and the decoder's last layer are"
    warn(f"{source} has 3 channels: its {adapted} adapted to {in_chans}")
    return adapt_channels(weights, in_chans)


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
    if head is not None or "head.1.weight" not in state_dict:
        _check_kind(state_dict, source)
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
    fixed_positions: bool = False,
) -> tuple[int, int]:
    """Load weights whose keys, sizes and positions fit; returns the grid of their patches.

    With `fixed_positions`, sine-cosine tables are those of the model's grid, and not resampled.
    """
    own = model.state_dict()
    for key, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{source} holds values that are not finite in {key}: it is of no use")
    _check_axes(own, weights, source)
    _check_same_size(own, weights, source)
    weights = dict(weights)
    old_grid = new_grid = model.patch_embed.grid_size
    if "pos_embed" in weights:
        old_grid = _grid_of(model, weights["pos_embed"], source, input_size)
    tables = {"pos_embed", "decoder_pos_embed"} & weights.keys() if old_grid != new_grid else ()
    for key in tables:
        table = weights[key]
        if table.shape[1] != 1 + math.prod(old_grid):
            continue  # an error below
        expected = sincos_pos_embed_2d(table.shape[2], old_grid, cls_token=True)
        if fixed_positions and torch.allclose(table[0].float(), expected, atol=1e-3):
            weights[key] = own[key]
            continue
        if input_size is None:
            warn(
                f"{source} doesn't say its input_size: the shape of its grid of "
                f"{math.prod(old_grid)} patches is guessed, and resampled to "
                f"{new_grid[0]} x {new_grid[1]}"
            )
        weights[key] = interpolate_pos_embed(table, new_grid, old_grid=old_grid)
    problems = {
        "missing": [k for k in own if k not in weights and not k.startswith(may_miss)],
        "unexpected": [k for k in weights if k not in own],
        "of another shape": [k for k in own if k in weights and own[k].shape != weights[k].shape],
    }
    if any(problems.values()):
        listed = [f"{problem} {_few(keys)}" for problem, keys in problems.items() if keys]
        hint = ""
        if {"norm.weight", "fc_norm.weight"} & {k for keys in problems.values() for k in keys}:
            hint = " (a classifier has fc_norm with --global_pool and norm with --cls_token)"
        raise UserError(f"{source} does not fit the model: {'; '.join(listed)}{hint}")
    model.load_state_dict(weights, strict=False)
    return old_grid


def _grid_of(
    model: nn.Module,
    table: Tensor,
    source: str,
    input_size: int | tuple[int, int] | None,
) -> tuple[int, int]:
    """The (height, width) of the grid of a position table [1, 1 + L, D], guessed if need be."""
    positions, new_grid = table.shape[1] - 1, model.patch_embed.grid_size
    if input_size is not None:
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        patch_h, patch_w = model.patch_embed.patch_size
        old_grid = height // patch_h, width // patch_w
        if math.prod(old_grid) != positions:
            raise UserError(
                f"{source} has {positions} positions, but says that it was trained on images of "
                f"{height} x {width} pixels, which have {math.prod(old_grid)} patches"
            )
        return old_grid
    try:
        return guess_grid(table[0, 1:], likely=new_grid)
    except ValueError as error:
        raise UserError(f"{source} has positions that can't be resampled: {error}") from error


def _check_axes(own: dict[str, Tensor], weights: dict[str, Tensor], source: str) -> None:
    """Refuse, with a UserError, tensors of another number of axes."""
    for key in weights:
        if key in own and weights[key].ndim != own[key].ndim:
            raise UserError(f"{source} has {weights[key].ndim}, not {own[key].ndim} axes in {key}")


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
