"""Checkpoint files: whole or absent, and loaded without running code from them."""

import argparse
import os
import zlib
from pathlib import Path

import safetensors.torch
import torch

from util.errors import UserError, warn
from util.pos_embed import interpolate_pos_embed

LAST = "checkpoint-last.pth"
BEST = "checkpoint-best.pth"


def save_checkpoint(path, contents):
    """Write `contents` so that `path` holds either all of them or what it held before.

    Raises:
        OSError: it could not be written; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by either
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def load_checkpoint(path):
    """The contents of a checkpoint file, on the CPU, unpickled without running any code.

    Accepts files of this project, the published {"model": ...} files (an argparse.Namespace under
    "args" becomes a dict) and bare state dicts, also as .safetensors, which are returned as
    {"model": ...}. An https:// address is downloaded once, to torch.hub's folder.

    Raises:
        UserError: the file is missing, torn, or holds something else.
    """
    path = str(path)
    remote = path.startswith("https://")
    if not remote and not Path(path).is_file():
        raise UserError(f"checkpoint {path} does not exist or is no file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if remote:
                contents = torch.hub.load_state_dict_from_url(
                    path, map_location="cpu", weights_only=True
                )
            elif path.endswith(".safetensors"):
                contents = safetensors.torch.load_file(path)
            else:
                contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loaders raise anything on broken files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if remote and isinstance(error, OSError):
            reason = getattr(error, "reason", reason)
            raise UserError(f"{path} can't be downloaded: {reason}") from error
        if remote:
            reason += f" (to download it again, remove it from {torch.hub.get_dir()}/checkpoints)"
        raise UserError(f"{path} is torn or not a checkpoint: {reason}") from error
    if not isinstance(contents, dict) or not contents:
        raise UserError(f"{path} holds no model weights: not a checkpoint of a model")
    if all(isinstance(value, torch.Tensor) for value in contents.values()):
        contents = {"model": contents}
    model = contents.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{path} has no entry 'model': not a checkpoint of a model")
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in model.items()):
        raise UserError(f"{path} has other things than tensors in its 'model'")
    if isinstance(contents.get("args"), argparse.Namespace):
        contents["args"] = vars(contents["args"])
    return contents


def find_checkpoint(resume, output_dir):
    """The contents to resume from and their path, or (None, None) for a new training.

    Args:
        resume: "auto" for the newest whole checkpoint in output_dir, "none", or a path.
        output_dir: where this training keeps its checkpoints.

    Raises:
        UserError: the file at a given path can't be used, or output_dir has torn ones alone.
    """
    if resume not in ("auto", "none"):
        return load_checkpoint(resume), resume
    numbered = Path(output_dir).glob("checkpoint-*[0-9].pth")
    candidates = sorted(numbered, key=lambda path: (len(path.name), path.name), reverse=True)
    last, best = Path(output_dir) / LAST, Path(output_dir) / BEST
    candidates = [path for path in (last, *candidates, best) if path.exists()]
    if resume == "none":
        if candidates:
            warn(f"--resume none starts anew and will overwrite what is in {output_dir}")
        return None, None
    for path in candidates:
        try:
            return load_checkpoint(path), path
        except UserError as error:
            warn(f"{error}; trying an older checkpoint")
    if candidates:
        raise UserError(f"{output_dir} has no whole checkpoint: use --resume none to start anew")
    return None, None


def start_from(model, path):
    """Load the encoder of a file into a classifier, see `load_encoder`; returns its fingerprint."""
    weights = load_checkpoint(path)["model"]
    load_encoder(model, weights, path)
    encoder = [k for k in model.state_dict() if k in weights and not k.startswith("head.")]
    return fingerprint({key: weights[key] for key in encoder})


def check_flags(contents, path, given):
    """Refuse, with a UserError, to evaluate a checkpoint otherwise than it was trained.

    Another input size, which resamples the positions of a classifier, is a warning.

    Args:
        contents: as `load_checkpoint` returns them; files that don't tell their flags pass.
        path: of the checkpoint.
        given: the flags of the evaluation, a dict.
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


def fingerprint(state_dict):
    """A checksum of the names and bits of weights on the CPU."""
    checksum = 0
    for name, weight in state_dict.items():
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(weight.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def load_encoder(model, state_dict, source="the checkpoint"):
    """Load the encoder of a masked autoencoder, or of a classifier, into a classifier.

    The head stays as it is. Positions are resampled where the grid of patches differs.

    Args:
        model: a classifier of `models_vit`.
        state_dict: weights under the published keys: "model" of what `load_checkpoint` returns.
        source: what errors call them.

    Raises:
        UserError: they are of another patch size, width or depth; others are missing than the
            head and, under global pooling, fc_norm; others are left over than a head, a decoder
            and, under global pooling, norm.
    """
    ignored = ["head.", "decoder_", "mask_token"]
    if not hasattr(model.norm, "weight"):  # the mean of the tokens is normalised, by fc_norm
        ignored.append("norm.")
    weights = {k: v for k, v in state_dict.items() if not k.startswith(tuple(ignored))}
    _load_weights(model, weights, source, may_miss=("head.", "fc_norm."))


def load_classifier(model, state_dict, source="the checkpoint"):
    """Load a whole classifier; all as of `load_encoder`, but nothing may be missing."""
    head = state_dict.get("head.weight")
    if head is None:
        kind = "the head of a linear probe, evaluate it by main_linprobe.py"
        if "head.1.weight" not in state_dict:
            kind = "a pre-trained encoder, fine-tune it before evaluation"
        raise UserError(f"{source} has no head of a classifier: it holds {kind}")
    if len(head) != len(model.head.weight):
        raise UserError(
            f"{source} is a classifier of {len(head)} classes, not {len(model.head.weight)}: "
            f"use --nb_classes {len(head)}"
        )
    _load_weights(model, state_dict, source, may_miss=())


def _load_weights(model, weights, source, may_miss):
    own = model.state_dict()
    for key in weights:
        if key in own and weights[key].ndim != own[key].ndim:
            raise UserError(f"{source} has {weights[key].ndim}, not {own[key].ndim} axes in {key}")
    _check_same_size(model, weights, source)
    weights = dict(weights)
    if "pos_embed" in weights:
        try:
            resampled = interpolate_pos_embed(weights["pos_embed"], model.patch_embed.grid_size)
        except ValueError as error:
            raise UserError(f"{source} has positions that can't be resampled: {error}") from error
        weights["pos_embed"] = resampled
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


def _check_same_size(model, weights, source):
    """Refuse, with a UserError, an encoder of other patches, width or depth, by that reason."""
    sizes = []
    for state in (weights, model.state_dict()):
        width, channels, *patch = getattr(state.get("patch_embed.proj.weight"), "shape", (0, 0))
        blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
        patches = f"patches of {' x '.join(map(str, patch))} pixels"
        sizes.append((patches, f"{channels} channels", f"width {width}", f"{len(blocks)} blocks"))
    theirs, ours = sizes
    different = [pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1]]
    if "patch_embed.proj.weight" in weights and different:
        theirs, ours = (" and ".join(names) for names in zip(*different, strict=True))
        raise UserError(f"{source} has {theirs}, the model {ours}: choose another --model")
