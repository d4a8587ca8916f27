"""Checkpoint files: written whole, loaded without running code, the newest one found."""

import argparse
import contextlib
import errno
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import safetensors.torch
import torch

from util import checksums, conversion, libraries, watching
from util.errors import UserError, printable, warn

LAST = "checkpoint-last.pth"
BEST = "checkpoint-best.pth"
# What data parallelism, torch.compile and training frameworks put in front of all keys.
WRAPPERS = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.", "timm_model.")


class TornCheckpoint(UserError):
    """A file that holds no whole checkpoint."""


def save_checkpoint(path: str | Path, contents: dict[str, Any]) -> None:
    """Write `contents` so that `path` holds either all of them or what it held before.

    Raises:
        OSError: they could not be written; the old file is untouched.
    """
    with _replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        archive = checksums.SummedArchive(file)
        try:
            torch.save(contents, archive)
            archive.finish()
        except RuntimeError as error:  # torch's own, of positions in the file
            raise archive.error or error from error
        file.flush()
        os.fsync(file.fileno())


def link_checkpoint(path: Path, name: str) -> None:
    """Give a checkpoint file a second name in its folder, whole or not at all.

    Raises:
        OSError: that fails; what had this name is untouched.
    """
    with _replacing(path.with_name(name)) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # some file systems have no links
            shutil.copyfile(path, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())


class Writer:
    """Writes checkpoints to a folder in a thread, one at a time.

    Args:
        folder: where to.
        seconds_to_save: how long the launcher lets a process live once it has asked it to end.

    Attributes:
        last_succeeded: whether the last one that is finished was written whole.
    """

    def __init__(self, folder: Path, seconds_to_save: float = math.inf) -> None:
        self.folder = folder
        self.seconds_to_save = seconds_to_save
        self.last_succeeded = True
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[bool] | None = None

    def start(self, names: list[str], contents: dict[str, Any]) -> None:
        """Begin to write `contents`, which must not change any more, as one file of these names.

        A name that can't be written is a warning, and keeps its older file.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, names, contents)

    def wait(self) -> None:
        """Wait for the file that is being written, if there is one."""
        if self._pending is not None:
            self.last_succeeded = self._pending.result()
            self._pending = None

    @watching.saving()
    def _write(self, names: list[str], contents: dict[str, Any]) -> bool:
        began = time.monotonic()
        written, succeeded = None, True
        for name in names:
            try:
                if written is None:
                    save_checkpoint(self.folder / name, contents)
                    written = self.folder / name
                else:
                    link_checkpoint(written, name)
            except (OSError, MemoryError) as error:
                reason = str(error) or "no memory is left"
                warn(f"{reason}; the previous checkpoint, if any, is intact")
                succeeded = False
        seconds = time.monotonic() - began
        if seconds > self.seconds_to_save:
            warn(
                f"a save took {seconds:.0f} s, and torchrun kills its processes "
                f"{self.seconds_to_save:g} s after SIGTERM: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT to "
                "more seconds for torchrun"
            )
            self.seconds_to_save = math.inf  # said once
        return succeeded


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` once it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # One that a killed run left may be a link: to write into it would change other names.
        temporary.unlink(missing_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        failed = OSError(f"{path} could not be written: {_reason_of_system(error)}")
        failed.strerror = _reason_of_system(error)
        raise failed from error
    _sync_folder(path.parent)


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that it holds these parts, or what it held before.

    Raises:
        OSError: it could not be written.
    """
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def save_safetensors(path: Path, weights: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write weights as .safetensors, whole or not at all.

    Args:
        about: what `load_checkpoint` returns beside "model", such as "args", "command" and
            "classes": values that JSON can hold. It is the entry "mae" of the file's metadata.

    Raises:
        OSError: the file could not be written.
    """
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    entries = {checksums.ABOUT: json.dumps(about), checksums.CHECKSUM: checksums.NO_SUM}
    metadata = {"format": "pt"} | entries | checksums.HAS_CHECKSUM
    content = safetensors.torch.save(tensors, metadata)
    write_whole(path, *checksums.with_checksum(content))


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlive a power cut, where the file system can promise that."""
    with contextlib.suppress(OSError):  # some network file systems refuse, or we may not read it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU, unpickled without running any code.

    With `mmap`, tensors are read from the file when they are used, into memory that processes on
    a machine share.

    Accepts files of this project, the published {"model": ...} files (an argparse.Namespace under
    "args" becomes a dict), .safetensors with what `save_safetensors` wrote beside the weights, and
    weights that are bare or in an entry "state_dict", which are returned as {"model": ...}. An
    https:// address of such a file is downloaded once, to torch.hub's folder. A folder of
    transformers or timm is read with what its config says, see `libraries.describe`.

    "model" has the published keys: those of transformers are converted, and the names of wrappers
    that all keys begin with, such as "module.", are left out.

    Raises:
        TornCheckpoint: the file is torn, or holds something else.
        UserError: it is missing, or can't be read just now; a folder's model can't be one of ours,
            or its config is malformed; the decoder's size is said to be another than it is.
    """
    path = str(path)
    if path.startswith("https://"):
        contents = _download(path)
    elif os.path.isdir(path):
        contents = _read_folder(Path(path))
    else:
        contents = _read(path, mmap)
    no_weights = TornCheckpoint(f"{path} holds no model weights: not a checkpoint of a model")
    if not isinstance(contents, dict) or not contents:
        raise no_weights
    if all(isinstance(value, torch.Tensor) for value in contents.values()):
        contents = {"model": contents}
    if "model" not in contents:
        for entry in ("state_dict", "model_state_dict"):
            if isinstance(contents.get(entry), dict):  # the other entries are another project's
                contents = {"model": contents[entry]}
    model = contents.get("model")
    if not isinstance(model, dict):
        raise TornCheckpoint(f"{path} has no entry 'model': not a checkpoint of a model")
    if not model:
        raise no_weights
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in model.items()):
        raise TornCheckpoint(f"{path} has values that are not tensors in its 'model'")
    contents["model"] = _with_published_keys(model, path)
    if isinstance(contents.get("args"), argparse.Namespace):
        contents["args"] = vars(contents["args"])
    if not isinstance(contents.get("args", {}), dict):
        del contents["args"]  # of another project
    if os.path.isdir(path) and "args" not in contents:
        contents |= libraries.describe(Path(path), contents["model"])
    _check_decoder(contents, path)
    return contents


def _check_decoder(contents: dict[str, Any], path: str) -> None:
    """Refuse, with a UserError, a decoder's size that isn't the weights', before it is built."""
    weights, said = contents["model"], contents.get("args", {})
    if "decoder_pred.weight" not in weights:
        return
    blocks = {key.split(".")[1] for key in weights if key.startswith("decoder_blocks.")}
    width = weights["decoder_pred.weight"].shape[-1:].numel()
    for name, size in (("decoder_depth", len(blocks)), ("decoder_embed_dim", width)):
        if said.get(name) not in (None, size):
            raise UserError(
                f"{path} says {name} {said[name]}, but its weights have {size}: mend it"
            )


def _with_published_keys(weights: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Weights without the names of wrappers, and without transformers' names of layers."""
    stripped = ""
    while weights:
        wrapper = next((w for w in WRAPPERS if all(key.startswith(w) for key in weights)), None)
        if wrapper is None:
            break
        weights = {key.removeprefix(wrapper): weight for key, weight in weights.items()}
        stripped += wrapper
    if stripped.replace("module.", "").replace("_orig_mod.", ""):
        warn(f'all keys of {path} begin with "{stripped}", which is left out')
    # Compiled blocks
    weights = {key.replace("._orig_mod.", "."): weight for key, weight in weights.items()}
    if not conversion.is_transformers(weights):
        return weights
    if not any(key.endswith(("query.bias", "q_proj.bias")) for key in weights):
        warn(f"{path} has no biases of queries, keys and values: they are 0")
    converted = conversion.from_transformers(weights)
    without_pooler = {k: v for k, v in converted.items() if not k.startswith("pooler.dense.")}
    if len(without_pooler) < len(converted):
        warn(f"the pooler of {path} is left out: no model here has one")
    return without_pooler


def _read_folder(folder: Path) -> dict[str, Any]:
    """The contents of a folder's weights, merged where they are in several files."""
    contents: dict[str, Any] = {}
    for file in libraries.weight_files(folder):
        part = _read(str(file))
        if not isinstance(part, dict):
            raise TornCheckpoint(f"{file} holds no model weights: not a checkpoint of a model")
        weights = part.pop("model") if file.suffix == ".safetensors" else part
        contents = {**part, "model": contents.get("model", {}) | weights}
    return contents


def _read(path: str, mmap: bool = False, whole: bool = True) -> Any:
    """What is in a local file; unless `whole`, damage in tensors' values is not noticed."""
    try:
        if not os.path.isfile(path):
            os.stat(path)  # says what is wrong, unless it is a folder
            raise UserError(f"checkpoint {path} is no file")
        return _load(path, mmap, whole)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} does not exist") from error
    except UserError:
        raise
    except checksums.Damaged as error:
        raise TornCheckpoint(f"{path} is damaged: {error}") from error
    except Exception as error:  # the loaders raise anything on damaged files
        if _cannot_read_now(error):
            reason = _reason_of_system(error)
            raise UserError(
                f"checkpoint {path} can't be read: {reason}; it may be whole, so mend that and "
                "repeat the command"
            ) from error
        raise TornCheckpoint(f"{path} is torn or not a checkpoint: {_reason(error)}") from error


def _load(path: str, mmap: bool = False, whole: bool = True) -> Any:
    # From a Python file, so that a failing disk is an OSError and not torch's RuntimeError. The
    # check also reads what will be mapped: it stays in the page cache, and a disk that fails is an
    # error here and not a SIGBUS when the values are used.
    with open(path, "rb") as file:
        if path.endswith(".safetensors"):
            checksums.check_safetensors(file)
            return _load_safetensors(path)
        sizes = checksums.check_archive(file, whole)
        contents = _load_mapped(path) if mmap and sizes is not None else None
        if contents is None:
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):
                contents = torch.load(file, map_location="cpu", weights_only=True)
        checksums.check_tensors(contents, sizes, os.path.getsize(path))
        return contents


def _load_safetensors(path: str) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as file:
        entry = (file.metadata() or {}).get(checksums.ABOUT, "{}")
    about = None
    with contextlib.suppress(ValueError):
        about = json.loads(entry)
    if not isinstance(about, dict):
        warn(f"{path}: its entry '{checksums.ABOUT}' is not this project's, and is left out")
        about = {}
    return {**about, "model": safetensors.torch.load_file(path)}


def _load_mapped(path: str) -> Any:
    """The contents of an archive, mapped; None where it can't be, as on some file systems."""
    with (
        contextlib.suppress(Exception),
        torch.serialization.safe_globals([argparse.Namespace]),
    ):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _cannot_read_now(error: Exception) -> bool:
    """Whether a loader failed for the system's reasons, and not because of the file's bytes."""
    if isinstance(error, OSError):
        return error.errno != errno.EINVAL  # a place before the file's start, from damaged bytes
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _download(address: str) -> Any:
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(address).path).name
    if not re.search(r"-[0-9a-f]{8,}\.pth$", file.name):  # other models' files may have this name
        file = file.with_name(f"{zlib.crc32(address.encode()):08x}-{file.name}")
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(file))
        return _load(str(file))
    except OSError as error:
        reason = getattr(error, "reason", None) or _reason(error)
        raise UserError(f"{address} can't be downloaded: {reason}") from error
    except Exception as error:  # as above
        raise TornCheckpoint(
            f"{address} is torn or not a checkpoint: {_reason(error)} "
            f"(to download it again, remove it from {file.parent})"
        ) from error


def _reason_of_system(error: Exception) -> str:
    return getattr(error, "strerror", None) or _reason(error)


def _reason(error: BaseException) -> str:
    """A line on an error of a loader. torch's own advises to run the code in the file."""
    # It may quote the file, which can hold codes for terminals.
    text = "\n".join(map(printable, str(error).split("\n")))
    unknown = re.search(r"Unsupported global: GLOBAL (\S+)", text)
    if unknown:
        return f"it holds {unknown[1]}, and no code in it is run: save only the model's weights"
    if text.startswith("Weights only load failed"):
        return "torch can't read it without running code"
    return text.splitlines()[0] if text else type(error).__name__


def find_checkpoint(
    resume: str, output_dir: str | Path, mmap: bool = False
) -> tuple[dict[str, Any], str | Path] | None:
    """The contents of the checkpoint to resume and its path, or None for a new training.

    Args:
        resume: "auto" for the newest whole checkpoint in output_dir, "none", or a path.
        output_dir: the folder of this training's checkpoints.
        mmap: see `load_checkpoint`.

    Raises:
        UserError: the file of the given path can't be used; a file in output_dir can't be read
            just now, so that it might be the newest; all files in output_dir are torn.
    """
    if resume == "none":
        return None
    if resume != "auto":
        return load_checkpoint(resume, mmap), resume
    damaged: list[TornCheckpoint] = []
    for path in sorted(checkpoints_in(output_dir), key=sort_key, reverse=True):
        try:
            contents = load_checkpoint(path, mmap)
        except TornCheckpoint as error:
            damaged.append(error)
            continue
        for reason in damaged:
            warn(f"{reason}; {path} is used instead")
        return contents, path
    if damaged:
        raise UserError(
            f"{output_dir} has no whole checkpoint ({'; '.join(map(str, damaged))}): restore one "
            "from a copy, or use --resume none to start anew"
        )
    return None


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a training in output_dir; files with similar names are left out.

    Raises:
        UserError: the folder can't be read.
    """
    names = re.compile(r"checkpoint-(last|best|\d+)\.pth")
    try:
        return sorted(path for path in Path(output_dir).iterdir() if names.fullmatch(path.name))
    except OSError as error:
        raise UserError(f"{output_dir} can't be read: {error.strerror}") from error


def sort_key(path: Path) -> tuple[float, float, bool]:
    """A file's (epoch, step, whether it is `LAST`), by which checkpoints sort from old to new.

    At the end of an epoch several files have the same step; resuming `LAST` repeats what was not
    finished. Torn files come last, so that they are tried and reported; other projects' come first.
    """
    try:
        epoch, step, _ = progress_in(path)
    except TornCheckpoint:
        return math.inf, 0, False
    return epoch, step, path.name == LAST


def progress_in(path: str | Path) -> tuple[int, int, float | None]:
    """How far the training of a checkpoint has come, without reading its tensors' values.

    Returns:
        its epoch, from -1 for another project's file; its step; the epoch's mean loss until then,
        None where it is not known.

    Raises:
        TornCheckpoint, UserError: as `load_checkpoint`, but damaged values are not noticed.
    """
    path = str(path)
    downloads = path.startswith("https://")
    contents = _download(path) if downloads else _read(path, mmap=True, whole=False)
    match contents:
        case {"epoch": int(epoch), "step": int(step)}:
            return epoch, step, contents.get("loss")
    return -1, 0, None
