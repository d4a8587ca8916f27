"""A training's state: saved as a whole after any update, restored under the same settings."""

import itertools
import math
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import util
from util import distributed
from util.checkpoint import BEST, LAST, Writer, checkpoints_in, find_checkpoint, sort_key
from util.errors import UserError, say, warn
from util.stopping import StopSignals

if TYPE_CHECKING:
    from util.logs import Meter

FORMAT = 2


@dataclass
class TrainingState:
    """Where a training stands, and the objects that hold the rest of it.

    Attributes:
        model: what is trained, without a data-parallel wrapper.
        optimizer, scaler: as the engines take them.
        epoch: the epoch that is being trained, from 0.
        step: how many steps of this epoch are done.
        totals: the `Meter`'s sums over these steps.
        best: the best score so far; None before there is one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    best: float | None = None

    def begin_next_epoch(self) -> None:
        """Move on to the first step of the next epoch."""
        self.epoch, self.step, self.totals = self.epoch + 1, 0, {}


class Checkpoints:
    """A training's checkpoints in output_dir; rank 0 writes them, one at a time.

    A save copies the state to the host, and a thread writes the copy while the training goes on.
    The next save waits for it. So does leaving this object's context, however the run ends.

    Args:
        output_dir: the folder of the checkpoints.
        process: this `distributed.Process`.
        signals: the run's `StopSignals`, which ask for a save and a stop.
        settings: what defines the training; a checkpoint resumes only under equal settings.
        defaults: settings of a checkpoint that doesn't know them, being older than their flags.
        contents: further entries of every checkpoint, such as "command" and "args".
        epochs: the training's length.
        save_every: epochs between the numbered checkpoints.
        save_minutes: how often `LAST` is renewed within an epoch.
    """

    def __init__(
        self,
        output_dir: str | Path,
        process: distributed.Process,
        *,
        signals: StopSignals,
        settings: dict[str, Any],
        defaults: dict[str, Any],
        contents: dict[str, Any],
        epochs: int,
        save_every: int,
        save_minutes: float,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.process = process
        self.signals = signals
        self.settings = settings
        self.defaults = defaults
        self.contents = contents
        self.epochs = epochs
        self.save_every = save_every
        self.save_seconds = 60 * save_minutes
        self.writer = Writer(self.output_dir)
        self._next_save = time.monotonic() + self.save_seconds
        self._agree = distributed.Agreement(process)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.wait()

    def restore(self, state: TrainingState, resume: str) -> None:
        """Load a checkpoint into `state`, if there is one.

        Args:
            state: a new training's state.
            resume: `--resume`, see `find_checkpoint`.

        Raises:
            UserError: the checkpoint is unusable or belongs to another training.
        """
        if any(other != self.settings for other in distributed.gather(self.settings)):
            raise UserError("the processes were given different flags or see different files")
        # A machine's processes share the pages of a mapped file. On a CPU the optimizer's state
        # would stay in them.
        mmap = self.process.device.type == "cuda"
        found = find_checkpoint(resume, self.output_dir, mmap)
        place = found and (found[0].get("epoch"), found[0].get("step"))
        if any(other != place for other in distributed.gather(place)):
            raise UserError(
                f"the processes find different checkpoints in {self.output_dir}: it must be on a "
                "file system that all of them share"
            )
        if found is not None:
            self._check_same_training(*found)
        self._resume = resume
        if resume != "auto" and self.process.is_main:
            start = (found[0]["epoch"], found[0]["step"]) if found else (-math.inf, 0)
            self._set_newer_files_aside(resume, start)
        has_best = distributed.gather((self.output_dir / BEST).exists())[0]
        if found is None:
            return
        contents, path = found
        for name in ("model", "optimizer", "scaler"):
            if contents[name]:  # a disabled scaler's is empty
                getattr(state, name).load_state_dict(contents[name])
        state.epoch, state.step = contents["epoch"], contents["step"]
        state.best = contents["best"] if has_best else None
        if self.process.is_main:
            text = f"resuming {path} after step {state.step} of epoch {state.epoch}"
            say(text, sys.stdout)
        if contents["totals"] is None:
            state.begin_next_epoch()
        else:
            state.totals = contents["totals"]

    def _set_newer_files_aside(self, resume: str, start: tuple[float, float]) -> None:
        """Rename checkpoints newer than this run's start, so that a later auto doesn't take them.

        The log of epochs that will be replaced is kept in the same way.
        """
        newer = [p for p in checkpoints_in(self.output_dir) if sort_key(p)[:2] > start]
        log = self.output_dir / "log.txt"
        for path in [*newer, *([log] if log.is_file() and log.stat().st_size else [])]:
            numbered = (path.with_name(f"{path.name}.old{n or ''}") for n in itertools.count())
            old = next(name for name in numbered if not name.exists())
            if path == log:
                shutil.copyfile(log, old)
            else:
                path.rename(old)
            warn(f"--resume {resume}: what {path} was is kept as {old.name}")

    def _check_same_training(self, contents: dict[str, Any], path: str | Path) -> None:
        command = self.contents["command"]
        if contents.get("command") != command or "optimizer" not in contents:
            raise UserError(
                f"{path} is not a training state of {command} and can't be resumed: "
                "use another --output_dir"
            )
        if contents["format"] not in (1, FORMAT):
            writer = contents.get("versions", {}).get("mae", "unknown")
            raise UserError(
                f"{path} has format {contents['format']}, written by version {writer} of this "
                f"project, and can't be resumed by version {util.__version__}"
            )
        saved = {**self.defaults, **contents["training"]}
        if contents["format"] == 1:  # version 0.1, whose --amp auto was float32 on a CPU
            dtypes = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}
            if self.process.device.type == "cpu":
                dtypes["auto"] = "float32"
            saved = {**saved, "dtype": dtypes.get(saved["amp"], self.settings["dtype"])}
        changed = [
            f"{name} ({saved.get(name)} -> {value})"
            for name, value in self.settings.items()
            if saved.get(name) != value
        ]
        if changed:
            hint = ""
            if saved.get("dtype") != self.settings["dtype"]:
                hint = "; --amp chooses the dtype: off is float32"
            raise UserError(
                f"{path} belongs to a training with different settings: {', '.join(changed)}; "
                f"restore them, or start anew in another --output_dir{hint}"
            )

    def save_if_due(self, state: TrainingState, meter: "Meter") -> None:
        """After an update: renew `LAST` if it is time, or if a signal asks to stop.

        Raises:
            SystemExit: a process got a signal; the state is saved.
        """
        now = time.monotonic()
        is_time = self.process.is_main and now >= self._next_save
        if is_time:
            self._next_save = now + self.save_seconds
        # What all processes do now: 0 go on, 1 save, 1 + a signal's number save and stop.
        agreed = self._agree(1 + self.signals.received if self.signals.received else int(is_time))
        if agreed:
            meter.flush()
            self._save([LAST], state)
        if agreed > 1:
            self._agree.settle()
            self._stop(state, agreed - 1)

    def save_last(self, state: TrainingState) -> None:
        """Renew `LAST`, after an epoch's last step: the evaluation that follows may fail."""
        self._save([LAST], state)

    def keeps(self, epoch: int) -> bool:
        """Whether the epoch's checkpoint is kept under its number."""
        return (epoch + 1) % self.save_every == 0 or epoch + 1 == self.epochs

    def save_epoch(self, state: TrainingState, score: float | None = None) -> None:
        """Save an epoch that is trained, evaluated and logged.

        Args:
            state: after the epoch's last step.
            score: the epoch with the highest one is saved as `BEST`.
        """
        names = [LAST]
        if self.keeps(state.epoch):
            names.insert(0, f"checkpoint-{state.epoch}.pth")
        if score is not None and (state.best is None or score > state.best):
            state.best = score
            names.insert(0, BEST)
        self._save(names, state, epoch_is_done=True)

    def stop_if_asked(self, state: TrainingState) -> None:
        """After a saved epoch, unless it is the last: a SystemExit if a process got a signal."""
        received = max(distributed.gather(self.signals.received))
        if received and state.epoch + 1 < self.epochs:
            self._agree.settle()
            self._stop(state, received)

    def finish(self) -> None:
        """End a training; a UserError if its last checkpoint could not be written."""
        self._agree.settle()
        if not self._settle():
            raise UserError(
                f"the final checkpoint could not be written to {self.output_dir}, see the warnings"
            )

    def _save(self, names: list[str], state: TrainingState, epoch_is_done: bool = False) -> None:
        """Begin to write `state` to output_dir, as one file of these names.

        A file that can't be written is a warning, and leaves an older one of its name untouched.

        Raises:
            UserError: the state is not finite; nothing is written.
        """
        contents = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "epoch": state.epoch,
            "step": state.step,
            "totals": None if epoch_is_done else state.totals,
            "best": state.best,
            "versions": {"mae": util.__version__}
            | {
                library.__name__: str(library.__version__)
                for library in (np, timm, torch, torchvision)
            },
            "format": FORMAT,
            **self.contents,
            "training": self.settings,
        }
        for part in ("model", "optimizer"):
            tensors = [leaf for leaf in tree_leaves(contents[part]) if isinstance(leaf, Tensor)]
            # One wait for a GPU; an optimizer that fp16 has not let step yet has no tensors.
            if tensors and not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
                raise UserError(
                    f"the {part} holds values that are not finite after step {state.step} of epoch "
                    f"{state.epoch}, no checkpoint is written: start anew in another --output_dir "
                    "with a lower --lr"
                )
        self._next_save = time.monotonic() + self.save_seconds
        if self.process.is_main:
            self.writer.wait()  # before the copy: there is memory for one
            try:
                copies = tree_map_only(
                    Tensor, lambda tensor: tensor.to("cpu", non_blocking=True, copy=True), contents
                )
            except RuntimeError as error:
                warn(f"no checkpoint is written, the host has no memory for a copy: {error}")
                self.writer.last_succeeded = False
                return
            if self.process.device.type == "cuda":
                torch.cuda.synchronize()
            self.writer.start(names, copies)

    def _settle(self) -> bool:
        """Wait in all processes until the last save is on the disk, or has failed: a False.

        When one process exits, torchrun kills the rest.
        """
        self.writer.wait()
        return all(distributed.gather(self.writer.last_succeeded))

    def _stop(self, state: TrainingState, received: int) -> None:
        command = "the same command" + " with --resume auto" * (self._resume != "auto")
        outcome = f"{command} continues from {self.output_dir / LAST}"
        if not self._settle():
            outcome = "this state could not be saved"
        if self.process.is_main:
            name = signal.Signals(received).name
            place = f"step {state.step} of epoch {state.epoch}"
            say(f"{name}: stopped after {place}; {outcome}", sys.stdout)
        raise SystemExit(128 + received)
