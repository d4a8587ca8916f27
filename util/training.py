"""A training's state: saved as a whole after any update, restored under the same settings."""

import contextlib
import itertools
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
from util import distributed, launching, memory, optim, restarts, watching
from util.checkpoint import (
    BEST,
    LAST,
    Writer,
    checkpoints_in,
    find_checkpoint,
    progress_in,
    sort_key,
    write_whole,
)
from util.errors import NotFinite, UserError, say, warn
from util.flags import CHANGES_STEPS
from util.lr_sched import lr_jump
from util.stopping import StopSignals
from util.survey import first_names

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
        contents: further entries of every checkpoint: "command", "args", "schedule" (the
            keywords of `warmup_cosine_lr`), "steps" (of an epoch) and a classifier's "classes".
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
        self.writer = Writer(self.output_dir, launching.seconds_to_save())
        self.accepted: list[dict[str, Any]] = []  # changes of settings, see `accepted_in`
        self.first_loss: float | None = None  # of untrained weights
        self._resume = "auto"
        self._next_save = time.monotonic() + self.save_seconds
        self._agree = distributed.Agreement(process)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self.signals.leaves = isinstance(error, Exception)
        self.writer.wait()
        if isinstance(error, NotFinite):
            raise UserError(f"{error}: {self._way_on()}") from error

    def restore(
        self, state: TrainingState, resume: str, *, acceptable: set[str], accept_changes: bool
    ) -> None:
        """Load a checkpoint into `state`, if there is one.

        Args:
            state: a new training's state.
            resume: `--resume`, see `find_checkpoint`.
            acceptable: names of the settings that a resumed training may change,
            accept_changes: if this is true. Each change is said, and kept in `accepted`.

        Raises:
            UserError: the checkpoint is unusable or belongs to another training.
        """
        given = self.settings | {"accept_changes": accept_changes}
        for other in distributed.gather(given):
            if other != given:
                names = ", ".join(name for name in given if other.get(name) != given[name])
                raise UserError(
                    f"the processes were given different flags or see different files ({names}): "
                    "start all of them with the same flags, on the same files"
                )
        # A machine's processes share the pages of a mapped file. On a CPU the optimizer's state
        # would stay in them.
        mmap = self.process.device.type == "cuda"
        launch, again = restarts.begun(self.output_dir, resume)
        found = self._find(launch, again, mmap)
        place = found and (found[0].get("epoch"), found[0].get("step"))
        if any(other != place for other in distributed.gather(place)):
            raise UserError(
                f"the processes find different checkpoints in {self.output_dir}: it must be on a "
                "file system that all of them share"
            )
        changed = {}
        if found is not None:
            changed = self._check_same_training(*found, acceptable, accept_changes)
        self._resume = resume
        if resume != "auto" and self.process.is_main:
            if not again:
                if found is not None:
                    launch.epoch, launch.step = found[0]["epoch"], found[0]["step"]
                self._set_newer_files_aside(resume, (launch.epoch, launch.step))
            launch.note(self.output_dir)
        has_best = distributed.gather((self.output_dir / BEST).exists())[0]
        if found is None:
            return
        contents, path = found
        state.model.load_state_dict(contents["model"])
        optim.load_state(
            state.optimizer,
            state.model,
            contents["optimizer"],
            contents.get("optimizer_names"),  # which older checkpoints lack
        )
        if contents["scaler"]:  # a disabled one's is empty
            state.scaler.load_state_dict(contents["scaler"])
        state.epoch, state.step = contents["epoch"], contents["step"]
        state.best = contents["best"] if has_best else None
        if self.process.is_main:
            text = f"resuming {path} after step {state.step} of epoch {state.epoch}"
            say(text, sys.stdout)
        if contents["totals"] is None:
            state.begin_next_epoch()
        else:
            state.totals = contents["totals"]
        self.accepted = contents.get("accepted_changes", [])
        self.first_loss = contents.get("first_loss")
        if changed:
            self._accept(changed, state, contents)

    def _find(
        self, launch: restarts.Launch, again: bool, mmap: bool
    ) -> tuple[dict[str, Any], str | Path] | None:
        """`find_checkpoint`; where a launch begins again, it prefers what this launch has saved."""
        if again and launch.resume != "auto":
            found = find_checkpoint("auto", self.output_dir, mmap)
            place = found and (found[0].get("epoch", -1), found[0].get("step", 0))
            own = place is not None and place > (launch.epoch, launch.step)
            if self.process.is_main:
                outcome = (
                    "continuing from its own checkpoint" if own else "it has saved nothing yet"
                )
                say(
                    f"this launch with --resume {launch.resume} was restarted: {outcome}",
                    sys.stdout,
                )
            if own:
                return found
        return find_checkpoint(launch.resume, self.output_dir, mmap)

    def _accept(
        self, changed: dict[str, tuple[Any, Any]], state: TrainingState, contents: dict[str, Any]
    ) -> None:
        """Say and note the changed settings, and what they do to the epoch that goes on."""
        shown = {name: f"{name} {_shown(*values)}" for name, values in changed.items()}
        if "image_names" in shown:  # checksums, which mean nothing to a reader
            shown["image_names"] = "image_names: other files than before"
        lines = [f"accepted: {change}" for change in shown.values()]
        steps = self.contents["steps"]
        cause = ", ".join(name for name in changed if name in CHANGES_STEPS)
        if cause and 0 < state.step == contents.get("steps"):
            state.step = steps  # the epoch is trained, and remains to be evaluated
        elif cause and state.step:
            lines.append(
                f"epoch {state.epoch} begins again, with the weights after its step {state.step}, "
                f"as its steps have changed ({cause})"
            )
            state.step, state.totals = 0, {}
        if state.epoch >= self.epochs:
            lines.append(
                f"{state.epoch} epochs are trained, --epochs is {self.epochs}: nothing is left"
            )
        elif "schedule" in contents:  # that of an older checkpoint is not known
            now = state.epoch + state.step / steps
            lines.append(lr_jump(contents["schedule"], self.contents["schedule"], now))
        if self.process.is_main:
            for line in filter(None, lines):
                say(line, sys.stdout)
        self.accepted = self.accepted + [
            {"epoch": state.epoch, "step": state.step, "name": name, "before": old, "after": new}
            for name, (old, new) in changed.items()
        ]

    def accepted_in(self, epoch: int) -> dict[str, Any]:
        """The epoch's entry of log.txt on changes of settings; empty if there were none."""
        changes = [change for change in self.accepted if change["epoch"] == epoch]
        return {"accepted_changes": changes} if changes else {}

    def _way_on(self) -> str:
        """What to do about a loss or state that is not finite."""
        change = (
            "repeat the command with --accept_changes and a lower learning rate (--lr or --blr), a "
            "longer --warmup_epochs, --clip_grad 1 or, in fp16 or bf16, --amp off"
        )
        places = []
        for path in checkpoints_in(self.output_dir):
            with contextlib.suppress(UserError):  # a torn one
                places.append(_place(path))
        places.sort(key=lambda place: place.key)
        start = places[-1] if places else None
        if self._resume != "auto":
            start = None if self._resume == "none" else _place(self._resume)
        if start is None:
            return f"{change}; it begins anew"
        back = ["--resume none, which begins anew"]
        back[:0] = [
            f"--resume {place.path} ({place})"
            for place in places[::-1]
            if place.key[:2] < start.key[:2] and not self._is_ruined(place)
        ][:1]
        if self._is_ruined(start):
            return (
                f"{change}, and add {back[0]}: {start.path} ({start}) is of no use, as the loss "
                f"was {self.first_loss:.4g} at the run's first steps"
            )
        return (
            f"{change}; it continues from {start.path} ({start}). If that is too late, "
            f"or fails again at once, add {', or '.join(back)}"
        )

    def _is_ruined(self, place: "_Place") -> bool:
        """Whether its loss is far above that of untrained weights, from where none comes back."""
        if place.loss is None or self.first_loss is None:
            return False
        return place.loss > 2 * self.first_loss

    def _set_newer_files_aside(self, resume: str, start: tuple[float, float]) -> None:
        """Rename checkpoints newer than this run's start, so that a later auto doesn't take them.

        The log of epochs that will be replaced is kept in the same way.
        """
        newer = [p for p in checkpoints_in(self.output_dir) if sort_key(p)[:2] > start]
        log = self.output_dir / "log.txt"
        for path in [*newer, *([log] if log.is_file() and log.stat().st_size else [])]:
            numbered = (path.with_name(f"{path.name}.old{n or ''}") for n in itertools.count())
            old = next(name for name in numbered if not name.exists())
            try:
                if path == log:
                    write_whole(old, log.read_bytes())
                else:
                    path.rename(old)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"{path} can't be kept as {old.name}: {reason}") from error
            warn(f"--resume {resume}: what {path} was is kept as {old.name}")

    def _check_same_training(
        self,
        contents: dict[str, Any],
        path: str | Path,
        acceptable: set[str],
        accept_changes: bool,
    ) -> dict[str, tuple[Any, Any]]:
        """The settings that changed and may do so, each as before and as now.

        Raises:
            UserError: one may not; the checkpoint is none of this command.
        """
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
        settings = self.settings
        if "classes" in contents:  # they are kept beside the settings
            saved, settings = (
                values | {"classes": kept["classes"]}
                for values, kept in ((saved, contents), (settings, self.contents))
            )
        changed = {
            name: (saved.get(name), value)
            for name, value in settings.items()
            if saved.get(name) != value
        }
        fatal = [name for name in changed if name not in acceptable]
        if not changed or (accept_changes and not fatal):
            return changed
        named = fatal if accept_changes else list(changed)
        shown = ", ".join(f"{name} ({_shown(*changed[name])})" for name in named)
        if accept_changes or fatal == named:
            advice = "these can't change, restore them"
        elif fatal:
            advice = f"restore {', '.join(fatal)}, which can't change, and restore the rest or add "
            advice += "--accept_changes"
        else:
            advice = "restore them, add --accept_changes to go on under the new ones"
        if "dtype" in named:
            advice += " (--amp chooses the dtype: off is float32)"
        raise UserError(
            f"{path} belongs to a training with different settings: {shown}; {advice}, or start "
            "anew in another --output_dir"
        )

    def save_if_due(self, state: TrainingState, meter: "Meter") -> None:
        """After an update: renew `LAST` if it is time, or if a signal asks to stop.

        Raises:
            SystemExit: a process got a signal; the state is saved.
            UserError: likewise, and it could not be saved.
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
        watching.at_long(f"the evaluation after epoch {state.epoch}")

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
        watching.at_long("the end of the training")
        self._agree.settle()
        if not self._settle():
            raise UserError(
                f"the final checkpoint could not be written to {self.output_dir}, see the warnings"
            )

    def _save(self, names: list[str], state: TrainingState, epoch_is_done: bool = False) -> None:
        """Begin to write `state` to output_dir, as one file of these names.

        A file that can't be written is a warning, and leaves an older one of its name untouched.

        Raises:
            NotFinite: the state is not finite; nothing is written.
        """
        if state.epoch == 0 and self.first_loss is None:
            self.first_loss = state.totals.get("first_loss")
        contents = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "optimizer_names": optim.parameter_names(state.optimizer, state.model),
            "scaler": state.scaler.state_dict(),
            "epoch": state.epoch,
            "step": state.step,
            "totals": None if epoch_is_done else state.totals,
            "best": state.best,
            "first_loss": self.first_loss,
            "loss": state.totals["loss"] / state.totals["steps"] if state.totals else None,
            "versions": {"mae": util.__version__}
            | {
                library.__name__: str(library.__version__)
                for library in (np, timm, torch, torchvision)
            },
            "format": FORMAT,
            **self.contents,
            "training": self.settings,
            "accepted_changes": self.accepted,
        }
        for part in ("model", "optimizer"):
            tensors = [leaf for leaf in tree_leaves(contents[part]) if isinstance(leaf, Tensor)]
            # One wait for a GPU; an optimizer that fp16 has not let step yet has no tensors.
            if tensors and not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
                raise NotFinite(
                    f"the {part} holds values that are not finite after step {state.step} of epoch "
                    f"{state.epoch}, no checkpoint is written"
                )
        self._next_save = time.monotonic() + self.save_seconds
        self.writer.wait()  # before the copy: there is memory for one
        distributed.gather(None)  # the other processes wait here, where they may wait for long
        if self.process.is_main:
            try:
                copies = tree_map_only(
                    Tensor, lambda tensor: tensor.to("cpu", non_blocking=True, copy=True), contents
                )
            except RuntimeError as error:
                if not memory.has_run_out(error):  # torch raises a killed worker's anywhere
                    raise
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
        stopped = (
            f"{signal.Signals(received).name}: stopped after step {state.step} of epoch "
            f"{state.epoch}"
        )
        if not self._settle():
            raise UserError(f"{stopped}; this state could not be saved, see the warnings")
        if self.process.is_main:
            command = "the same command" + " with --resume auto" * (self._resume != "auto")
            say(f"{stopped}; {command} continues from {self.output_dir / LAST}", sys.stdout)
        raise SystemExit(128 + received)


def _shown(before: Any, after: Any) -> str:
    """A change of a setting, "0.1 -> 0.2"; of a list of names, those that it lost and got."""
    if isinstance(before, list) and isinstance(after, list):
        lost = [name for name in before if name not in set(after)]
        got = [name for name in after if name not in set(before)]
        parts = [f"{k} {first_names(v)}" for k, v in (("lost", lost), ("new", got)) if v]
        return "; ".join(parts) if lost or got else "in another order"
    texts = []
    for value in (before, after):
        values = value if isinstance(value, (list, tuple)) else [value]
        words = [f"{v:.12g}" if isinstance(v, float) else str(v) for v in values]
        texts.append("not given" if value is None else " ".join(words))
    return " -> ".join(texts)


@dataclass
class _Place:
    """Where a checkpoint lies, sorted as by `sort_key`, and the epoch's mean loss until then."""

    path: str | Path
    key: tuple[int, int, bool]
    loss: float | None

    def __str__(self) -> str:
        loss = "" if self.loss is None else f", whose loss was {self.loss:.4g}"
        return f"after step {self.key[1]} of epoch {self.key[0]}{loss}"


def _place(path: str | Path) -> _Place:
    epoch, step, loss = progress_in(path)
    return _Place(path, (epoch, step, Path(path).name == LAST), loss)
