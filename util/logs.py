"""What a run shows and leaves: console lines or a progress bar, log.txt, TensorBoard, eval.json."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from util import distributed
from util.checkpoint import write_whole
from util.errors import NotFinite, UserError, say, warn
from util.events import EventFile
from util.image_files import Images
from util.loading import MAX_UNREADABLE_SHARE, MIN_UNREADABLE, Batch, ImageLoader
from util.training import TrainingState


class RunLog:
    """The outputs of a whole run, written by rank 0; a context that closes them.

    Args:
        output_dir: folder of log.txt, one JSON line an epoch.
        log_dir: folder of the TensorBoard events, if it is another one.
        process: this `distributed.Process`.
        state: where the run starts; entries logged beyond this point are removed.
        loader: gives an epoch's batches.
        epochs: length of the whole run.
        tag: TensorBoard's name for the training loss.
    """

    def __init__(
        self,
        output_dir: str | Path,
        log_dir: str | Path | None,
        process: distributed.Process,
        state: TrainingState,
        loader: ImageLoader,
        epochs: int,
        tag: str,
    ) -> None:
        self.process = process
        self.epochs = epochs
        self.tag = tag
        self.show_bar = process.is_main and sys.stdout.isatty() and sys.stderr.isatty()
        problem = None
        if process.is_main:
            try:
                self._log_file = LogFile(Path(output_dir) / "log.txt", state.epoch)
            except UserError as error:
                problem = str(error)
        if problem := distributed.gather(problem)[0]:
            raise UserError(problem)
        if process.is_main:
            # TensorBoard drops what an earlier run logged at this x and beyond it.
            start = int(1000 * (state.epoch + state.step / len(loader)))
            self._events = EventFile(log_dir or output_dir, start + 1 if start else 0)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.is_main:
            self._log_file.close()
            self._events.close()

    def line(self, text: str) -> None:
        """A line on the console, beside the progress bar if there is one."""
        if self.show_bar:
            tqdm.write(text)
        elif self.process.is_main:
            say(text, sys.stdout)

    def scalars(self, x: float, values: dict[str, float]) -> None:
        """TensorBoard scalars by tag; x is 1000 x epoch, so that runs of any batch size compare."""
        if self.process.is_main:
            self._events.scalars(int(x), values)

    def flush(self) -> None:
        """Write what TensorBoard got so far."""
        if self.process.is_main:
            self._events.flush()

    def picture(self, epoch: float, tag: str, picture: Image.Image) -> None:
        """A picture in TensorBoard."""
        if self.process.is_main:
            self._events.picture(int(1000 * epoch), tag, picture)

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch's entries as one JSON line in log.txt; its losses on the console too."""
        losses = [f"{name} {value:.4f}" for name, value in record.items() if "loss" in name]
        self.line(f"epoch {record['epoch']}/{self.epochs}  done  {'  '.join(losses)}")
        if self.process.is_main:
            self._events.flush()
            self._log_file.add(record)


class LogFile:
    """log.txt, one JSON line an epoch. Lines that can't be written are written with the next.

    Args:
        path: the file, which may be there.
        first_epoch: lines of this epoch and later ones are removed, as it will run again, and so
            is one torn by a crash.

    Raises:
        UserError: the file can't be read.
    """

    def __init__(self, path: Path, first_epoch: int) -> None:
        self.path = path
        self._text = ""  # all that the file is to hold
        try:
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is no file: move it away")
            content = path.read_text(errors="replace") if path.exists() else ""
        except OSError as error:
            raise UserError(
                f"{path} can't be read: {error.strerror}; make it readable, or move it away"
            ) from error
        for line in content.splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if line.endswith("\n") and json.loads(line)["epoch"] < first_epoch:
                    self._text += line
        self._is_current = self._text == content
        if not self._is_current:
            self._write("")

    def add(self, record: dict[str, Any]) -> None:
        """Add an epoch's line."""
        self._write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Write the lines that are missing, if there are any."""
        if not self._is_current:
            self._write("")

    def _write(self, line: str) -> None:
        self._text += line
        try:
            if self._is_current and self.path.exists():
                with open(self.path, "a") as file:
                    file.write(line)
            else:  # it lacks lines, or ends in half a line
                write_whole(self.path, self._text.encode())
            self._is_current = True
        except OSError as error:
            self._is_current = False
            warn(f"{self.path} is not up to date: {error.strerror or error}")


class Meter:
    """One epoch's losses, gradient norms and speed.

    Losses and norms stay on the device and are fetched once a log line.

    Args:
        log: the `RunLog` that shows them; None to show nothing.
        state: where the training stands; its `totals`, the sums over the epoch's steps so far, are
            kept up to date.
        loader: gives the epoch's batches to all processes.
        log_every: steps between console lines.
    """

    def __init__(
        self, log: RunLog | None, state: TrainingState, loader: ImageLoader, log_every: int
    ) -> None:
        self.log = log
        self.totals = state.totals
        self.epoch = state.epoch
        self.steps = len(loader)
        self.loader = loader
        self.images_per_step = loader.images_per_step
        self.log_every = log_every
        for name in ("steps", "images", "loss", "lr", "seconds", "waited", "bad", "norm", "norms"):
            self.totals.setdefault(name, 0)
        self._bar = tqdm(
            total=self.steps,
            initial=state.step,
            desc=f"epoch {state.epoch}/{log.epochs}" if log else None,
            leave=False,
            disable=not (log and log.show_bar),
        )
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._unreadable = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The batches as (step, images, labels); notes the wait for them and unreadable images."""
        with self._bar:
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                self._waited += time.perf_counter() - asked
                if batch is None:
                    break
                self._unreadable += batch.unreadable
                yield batch.step, batch.imgs, batch.labels
                self._bar.update()
            self.flush()

    def shows_update(self, step: int, accum_iter: int) -> bool:
        """Whether the update that ends with `step` is the last one before a log line.

        The gradients' norm is measured in these, if no clip computes it in all updates. That
        depends only on the step, so a resumed epoch measures the same ones.
        """
        next_update = min(step + accum_iter, self.steps - 1)
        return step + 1 == self.steps or next_update // self.log_every > step // self.log_every

    def add(self, step: int, loss: Tensor, lr: float, grad_norm: Tensor | None = None) -> None:
        """Note a step's loss, and its update's gradient norm if it was measured.

        Both are scalars on the device, whose values are not waited for.
        """
        self._losses.append(loss.detach())
        if grad_norm is not None:
            self._norms.append(grad_norm)
        self._step = step
        self.totals["lr"] = lr
        if (step + 1) % self.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Fetch the losses since the last line, check them, add them up and show a line.

        All processes take part, at the same step.

        Raises:
            NotFinite: a process's loss is not finite.
            UserError: too many images are unreadable.
        """
        if not self._losses:
            return
        values = torch.stack([*self._losses, *self._norms]).cpu().tolist()
        own, norms = values[: len(self._losses)], values[len(self._losses) :]
        losses, unreadable = zip(*distributed.gather((own, self._unreadable)), strict=True)
        now = time.perf_counter()
        self._check_finite(losses)
        means = [sum(step_losses) / len(step_losses) for step_losses in zip(*losses, strict=True)]
        if not self.totals["steps"]:
            self.totals["first_loss"] = means[0]
        # One at a time, so that the float sum does not depend on where the log lines fell.
        for mean in means:
            self.totals["loss"] += mean
        # Equal in all processes. fp16 skips the updates in which they overflow.
        norms = [norm for norm in norms if math.isfinite(norm)]
        for norm in norms:
            self.totals["norm"] += norm
        self.totals["norms"] += len(norms)
        images = len(means) * self.images_per_step
        seconds, waited = now - self._since, self._waited
        self.totals["steps"] += len(means)
        self.totals["images"] += images
        self.totals["seconds"] += seconds
        self.totals["waited"] += waited
        self.totals["bad"] += sum(unreadable)
        self._check_readable()
        if self.log:
            figures = {self.log.tag: sum(means) / len(means), "lr": self.totals["lr"]}
            if norms:
                figures["grad_norm"] = sum(norms) / len(norms)
            self._show(self.log, figures, images / seconds, waited / seconds)
        self._losses = []
        self._norms = []
        self._unreadable = 0
        self._waited = 0.0
        self._since = now

    def _check_finite(self, losses: tuple[list[float], ...]) -> None:
        first_step = self._step + 1 - len(self._losses)
        for offset, step_losses in enumerate(zip(*losses, strict=True)):
            for rank, loss in enumerate(step_losses):
                if not math.isfinite(loss):
                    raise NotFinite(
                        f"the loss is {loss} at epoch {self.epoch}, step {first_step + offset}, "
                        f"rank {rank}"
                    )

    def _check_readable(self) -> None:
        bad = self.totals["bad"]
        if bad < MIN_UNREADABLE:
            return
        images = len(self.loader.dataset)
        if bad > MAX_UNREADABLE_SHARE * images:
            raise UserError(
                f"{bad} of the folder's {images:,} images are unreadable, at least "
                f"{MIN_UNREADABLE} and more than {MAX_UNREADABLE_SHARE:.0%}: repair the files "
                "warned about, or remove them and add --accept_changes to the same command"
            )

    def _show(
        self, log: RunLog, figures: dict[str, float], images_per_s: float, waited_share: float
    ) -> None:
        progress = self.epoch + (self._step + 1) / self.steps
        log.scalars(1000 * progress, figures)
        log.flush()
        norm = f"grad norm {figures['grad_norm']:.3g}  " if "grad_norm" in figures else ""
        status = (
            f"loss {figures[log.tag]:.4f}  lr {figures['lr']:.2e}  {norm}"
            f"{images_per_s:.1f} images/s  data wait {waited_share:.0%}  "
            f"peak memory {peak_memory_gib():.2f} GiB"
        )
        if log.show_bar:
            self._bar.set_postfix_str(status)
            return
        rate = self.totals["images"] / self.totals["seconds"]
        images_left = (log.epochs - progress) * self.steps * self.images_per_step
        log.line(
            f"epoch {self.epoch}/{log.epochs}  step {self._step + 1}/{self.steps}  "
            f"eta {timedelta(seconds=round(images_left / rate))}  {status}"
        )

    def summary(self) -> dict[str, Any]:
        """The epoch's entries for log.txt; grad_norm is the mean of the updates it is known of."""
        totals = self.totals
        known = {"grad_norm": totals["norm"] / totals["norms"]} if totals["norms"] else {}
        return {
            "epoch": self.epoch,
            "train_loss": totals["loss"] / totals["steps"],
            "train_lr": totals["lr"],
            **known,
            "images_per_s": round(totals["images"] / totals["seconds"], 2),
            "data_wait": round(totals["waited"] / totals["seconds"], 4),
            "unreadable_images": totals["bad"],
            "peak_memory_gib": round(peak_memory_gib(), 3),
        }


def accuracy_line(figures: dict[str, float]) -> str:
    """The figures of `engine_finetune.evaluate` in the usual form."""
    return "* Acc@1 {test_acc1:.3f} Acc@5 {test_acc5:.3f} loss {test_loss:.3f}".format(**figures)


def features_line(figures: dict[str, float]) -> str:
    """The figures of `engine_pretrain.evaluate_features` in a line."""
    accuracy = f"k-NN Acc@1 {figures['knn_acc1']:.3f} " if "knn_acc1" in figures else ""
    std, rank = figures.get("feature_std", math.nan), figures.get("rankme", math.nan)
    return f"* {accuracy}feature_std {std:.4f} rankme {rank:.2f}"


def report_evaluation(
    output_dir: str | Path, process: distributed.Process, figures: dict[str, float], **about: Any
) -> None:
    """Print an evaluation's figures and write them, as printed, to output_dir/eval.json.

    Raises:
        UserError: the file can't be written.
    """
    if process.is_main:
        say(accuracy_line(figures), sys.stdout)
        rounded = {name: round(value, 3) for name, value in figures.items()}
        try:
            content = json.dumps(about | rounded) + "\n"
            write_whole(Path(output_dir) / "eval.json", content.encode())
        except OSError as error:
            raise UserError(str(error)) from error


def report_predictions(
    path: Path, process: distributed.Process, images: Images, unreadable: int
) -> None:
    """Say where predictions are, and what is unknown of them."""
    if process.is_main:
        say(f"the predictions for {len(images) - unreadable} images are in {path}", sys.stdout)
        if unreadable:
            say(f"unreadable, and there without a prediction: {unreadable}", sys.stdout)
        if not images.classes:
            say(f"{images.origin} has no labels: there is no accuracy", sys.stdout)


def peak_memory_gib() -> float:
    """This process's peak memory: CUDA's allocator where one is used, else the resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)
