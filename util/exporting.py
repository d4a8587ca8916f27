"""A model in the files of another library: timm, transformers, or .safetensors for this project."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from util.checkpoint import save_safetensors, write_whole
from util.errors import UserError, warn
from util.model_card import last_name
from util.pixels import PixelFormat

FORMATS = ("timm", "transformers", "safetensors")
ENCODER = "encoder.safetensors"
WEIGHTS = "model.safetensors"
DECODER = ("decoder_", "mask_token")  # how its keys begin


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


def quoted(output: Path) -> str:
    """A folder's name for a card that is shared: without the folders around it."""
    return output.resolve().name


def preprocessing_remarks(pixels: PixelFormat, library: str) -> list[str]:
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


def output_names(model: nn.Module, classes: list[str]) -> list[str]:
    """A name for each output of a classifier's head: those without a class have their numbers."""
    return [*classes, *map(str, range(len(classes), len(model.head.weight)))]


def size_of(blocks: nn.ModuleList) -> dict[str, int]:
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
        reason = error.strerror or error
        raise UserError(f"--output {output} can't be written: {reason}") from error
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
