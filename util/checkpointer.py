"""A training's state: saved as a whole, at any step, and restored under the same settings."""

import contextlib
import signal
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision

from util import distributed
from util.checkpoint import LAST, find_checkpoint, save_checkpoint
from util.errors import UserError, warn

FORMAT = 1


class Checkpointer:
    """Saves a training's state to output_dir: rank 0 writes, once all processes agree.

    Args:
        output_dir: folder of the checkpoints.
        process: this `distributed.Process`.
        state: model (without its `data_parallel` wrapper), optimizer and scaler, by these names.
        settings: those that define the training; it resumes under the same ones alone.
        contents: entries of every checkpoint besides, such as "command".
        save_minutes: how often `LAST` is renewed within an epoch.

    Attributes:
        best: the best figure so far, which is saved and restored; None before there is one.
    """

    def __init__(self, output_dir, process, *, state, settings, contents, save_minutes):
        self.output_dir = Path(output_dir)
        self.process = process
        self.state = state
        self.fixed = {"format": FORMAT, **contents, "training": settings}
        self.best = None
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
        settings = self.fixed["training"]
        if any(other != settings for other in distributed.gather(settings)):
            raise UserError("the processes were given different flags or see different files")
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
        for name, stateful in self.state.items():
            if contents[name]:  # a disabled scaler's is empty
                stateful.load_state_dict(contents[name])
        self.best = contents.get("best")
        epoch, step = found
        if self.process.is_main:
            print(f"resuming {path} after step {step} of epoch {epoch}", flush=True)
        totals = contents["totals"]
        return (epoch + 1, 0, None) if totals is None else (epoch, step, totals)

    def _check_same_training(self, contents, path):
        kind = {name: contents.get(name) for name in ("format", "command")}
        if kind != {name: self.fixed[name] for name in kind}:
            raise UserError(
                f"{path} is not a training state of {self.fixed['command']} and can't be resumed: "
                "use another --output_dir"
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
            **{name: stateful.state_dict() for name, stateful in self.state.items()},
            "epoch": epoch,
            "step": step,
            "totals": totals,
            "best": self.best,
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
