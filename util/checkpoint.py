"""Checkpoints that are whole or absent, and a training that continues from any of them."""

import argparse
import contextlib
import os
import signal
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision

from util import distributed
from util.errors import UserError, warn

LAST = "checkpoint-last.pth"
FORMAT = 1


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
    "args" becomes a dict) and bare state dicts, which are returned as {"model": ...}.

    Raises:
        UserError: the file is missing, torn, or holds something else.
    """
    if not Path(path).is_file():
        raise UserError(f"checkpoint {path} does not exist or is no file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything on broken files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is torn or not a checkpoint: {reason}") from error
    if not isinstance(contents, dict) or not contents:
        raise UserError(f"{path} holds no model weights: not a checkpoint of a model")
    if all(isinstance(value, torch.Tensor) for value in contents.values()):
        contents = {"model": contents}
    if not isinstance(contents.get("model"), dict):
        raise UserError(f"{path} has no entry 'model': not a checkpoint of a model")
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
    numbered = (path for path in Path(output_dir).glob("checkpoint-*.pth") if path.name != LAST)
    candidates = sorted(numbered, key=lambda path: (len(path.name), path.name), reverse=True)
    if (Path(output_dir) / LAST).exists():
        candidates.insert(0, Path(output_dir) / LAST)
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


class Checkpointer:
    """Saves a training's state to output_dir: rank 0 writes, once all processes agree.

    Args:
        output_dir: folder of the checkpoints.
        process: this `distributed.Process`.
        command: the kind of training, such as "main_pretrain.py".
        model: the module without its `data_parallel` wrapper.
        optimizer, scaler: of the training.
        flags: all flags of the command, a dict of plain values.
        training: the settings that define the training; it resumes under the same ones alone.
        save_minutes: how often `LAST` is renewed within an epoch.
    """

    def __init__(
        self,
        output_dir,
        process,
        *,
        command,
        model,
        optimizer,
        scaler,
        flags,
        training,
        save_minutes,
    ):
        self.output_dir = Path(output_dir)
        self.process = process
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.fixed = {"format": FORMAT, "command": command, "args": flags, "training": training}
        self.save_seconds = 60 * save_minutes
        self._next_save = time.monotonic() + self.save_seconds
        self._signal = 0
        self._agree = distributed.Agreement()

    def resume(self, source):
        """Restore the training's state from a checkpoint, if there is one.

        Args:
            source: `--resume`, see `find_checkpoint`.

        Returns:
            the epoch and step to continue with, and the log's totals of the epoch so far.

        Raises:
            UserError: the checkpoint is unusable or of another training.
        """
        training = self.fixed["training"]
        if any(other != training for other in distributed.gather(training)):
            raise UserError("the processes were given different flags or see different images")
        contents, path = find_checkpoint(source, self.output_dir)
        found = contents and (contents.get("epoch"), contents.get("step"))
        if any(other != found for other in distributed.gather(found)):
            raise UserError(
                f"the processes find different checkpoints in {self.output_dir}: it must be on a "
                "file system that all of them share"
            )
        if contents is None:
            return 0, 0, None
        self._check_same_training(contents, path)
        self.model.load_state_dict(contents["model"])
        self.optimizer.load_state_dict(contents["optimizer"])
        if self.scaler.is_enabled() and contents["scaler"]:
            self.scaler.load_state_dict(contents["scaler"])
        epoch, step = found
        if self.process.is_main:
            print(f"resuming {path} after step {step} of epoch {epoch}", flush=True)
        totals = contents["totals"]
        return (epoch + 1, 0, None) if totals is None else (epoch, step, totals)

    def _check_same_training(self, contents, path):
        kind = {name: contents.get(name) for name in ("format", "command")}
        if kind != {name: self.fixed[name] for name in kind}:
            raise UserError(
                f"{path} is not a training state of {self.fixed['command']}, can't resume it"
            )
        saved = contents["training"]
        changed = [
            f"{name} ({saved.get(name)} -> {value})"
            for name, value in self.fixed["training"].items()
            if saved.get(name) != value
        ]
        if changed:
            raise UserError(
                f"{path} is of a training with other settings: {', '.join(changed)}; restore them, "
                "or start anew in another --output_dir"
            )

    def save(self, name, *, epoch, step, totals=None):
        """Write the state after `step` steps of `epoch` as output_dir/`name`.

        Args:
            totals: those of the `EpochLog`, unless the epoch is logged and done with.

        Returns:
            whether it succeeded: a file that can't be written is warned about, and leaves an
            older one of its name untouched.

        Raises:
            UserError: the state is not finite; nothing is written.
        """
        contents = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "step": step,
            "totals": totals,
            "versions": {
                library.__name__: str(library.__version__)
                for library in (np, timm, torch, torchvision)
            },
            **self.fixed,
        }
        for part in ("model", "optimizer"):
            if not all(tensor.isfinite().all() for tensor in _tensors(contents[part])):
                raise UserError(
                    f"the {part} holds values that are not finite after step {step} of epoch "
                    f"{epoch}, no checkpoint is written: resume the last one with a lower --lr"
                )
        self._next_save = time.monotonic() + self.save_seconds
        try:
            if self.process.is_main:
                save_checkpoint(self.output_dir / name, contents)
        except OSError as error:
            warn(f"{error}; an older checkpoint, if there is one, is whole")
            return False
        return True

    @contextlib.contextmanager
    def watch_signals(self):
        """Within this context SIGTERM, SIGINT and SIGUSR1 ask for a save and an orderly end."""

        def note(number, _frame):
            self._signal = number

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
            self._agree.settle()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def save_if_due(self, *, epoch, step, epoch_log):
        """After an optimizer step: renew `LAST` if time has come or a signal asks to stop.

        Raises:
            SystemExit: a process got a signal; the state is saved.
        """
        agreed = self._agree_on_wish()
        if not agreed:
            return
        epoch_log.flush()
        saved = self.save(LAST, epoch=epoch, step=step, totals=epoch_log.totals)
        if agreed > 1:
            self._agree.settle()
            number = signal.Signals(agreed - 1)
            outcome = f"the same command continues from {self.output_dir / LAST}"
            epoch_log.run_log.line(
                f"{number.name}: stopped after step {step} of epoch {epoch}; "
                f"{outcome if saved else 'this state could not be saved'}"
            )
            raise SystemExit(128 + number)

    def _agree_on_wish(self):
        """What all processes do now: 0 to go on, 1 to save, 1 + a signal's number to stop."""
        now = time.monotonic()
        save_due = self.process.is_main and now >= self._next_save
        if save_due:
            self._next_save = now + self.save_seconds
        return self._agree(1 + self._signal if self._signal else int(save_due))


def _tensors(value):
    """All tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
