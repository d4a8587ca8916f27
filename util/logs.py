"""What a run shows and leaves: console lines or a progress bar, log.txt and TensorBoard."""

import json
import math
import os
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util import distributed
from util.accuracy import accuracy_line
from util.errors import UserError
from util.loading import MAX_UNREADABLE_SHARE


class RunLog:
    """The outputs of a whole run, written by rank 0.

    Args:
        output_dir: folder of log.txt, one JSON line an epoch.
        log_dir: folder of the TensorBoard events.
        process: this `distributed.Process`.
        epochs: of the whole run.
        log_every: steps between console lines.
        loss_tag: TensorBoard's name for the loss of a log line.
        start: epoch, with its fraction, at which this run takes up; later entries of an
            interrupted run are taken back.
    """

    def __init__(self, output_dir, log_dir, process, *, epochs, log_every, loss_tag, start):
        self.process = process
        self.epochs = epochs
        self.log_every = log_every
        self.loss_tag = loss_tag
        self.show_bar = process.is_main and sys.stdout.isatty() and sys.stderr.isatty()
        if process.is_main:
            self._log_file = Path(output_dir) / "log.txt"
            self._take_back(int(start))
            # TensorBoard drops what an earlier writer put at this x and beyond it.
            purge_step = int(1000 * start) + 1 if start else 0
            self._tensorboard = SummaryWriter(log_dir, purge_step=purge_step)

    def _take_back(self, first_epoch):
        """Drop the lines of epochs that will run again, and one torn by a crash."""
        if not self._log_file.exists():
            return
        kept = []
        for line in self._log_file.read_text().splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["epoch"] < first_epoch:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
        temporary = self._log_file.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self._log_file)

    def line(self, text):
        """A line on the console, beside the progress bar if there is one."""
        if self.process.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def scalars(self, epoch, **values):
        """TensorBoard scalars at 1000 x epoch, so that runs of any batch size compare."""
        if self.process.is_main:
            for tag, value in values.items():
                self._tensorboard.add_scalar(tag, value, int(1000 * epoch))

    def accuracy(self, epoch, figures):
        """A classifier's figures after `epoch` epochs: a console line, TensorBoard by epoch."""
        self.line(accuracy_line(figures))
        if self.process.is_main:
            for name, value in figures.items():
                self._tensorboard.add_scalar(f"perf/{name}", value, epoch)

    def picture(self, epoch, tag, picture):
        """A PIL image in TensorBoard."""
        if self.process.is_main:
            pixels = np.asarray(picture)
            self._tensorboard.add_image(tag, pixels, int(1000 * epoch), dataformats="HWC")

    def epoch_line(self, record):
        """An epoch's entries as one JSON line in log.txt, its losses also on the console."""
        losses = [f"{name} {value:.4f}" for name, value in record.items() if "loss" in name]
        self.line(f"epoch {record['epoch']}/{self.epochs}  done  {'  '.join(losses)}")
        if self.process.is_main:
            self._tensorboard.flush()
            with open(self._log_file, "a") as file:
                file.write(json.dumps(record) + "\n")

    def close(self):
        if self.process.is_main:
            self._tensorboard.close()


class EpochLog:
    """The losses of one epoch: kept on the device, fetched and averaged once a log line.

    Args:
        run_log: the `RunLog` that shows them.
        loader: the `ImageLoader` of the epoch.
        epoch, first_step: where the epoch is taken up.
        totals: the `totals` of its first part, when it was interrupted.
    """

    def __init__(self, run_log, loader, *, epoch, first_step, totals=None):
        self.run_log = run_log
        self.loader = loader
        self.epoch = epoch
        self._first_step = first_step
        self.totals = totals or dict(
            steps=0, images=0, loss=0.0, lr=0.0, seconds=0.0, waited=0.0, bad=0
        )
        self._bad_before = self.totals["bad"]
        self._bar = tqdm(
            total=len(loader),
            initial=first_step,
            desc=f"epoch {epoch}/{run_log.epochs}",
            leave=False,
            disable=not run_log.show_bar,
        )
        self._losses = []
        self._waited = 0.0
        self._since = time.perf_counter()

    def steps(self):
        """The (step, images, labels) that are left of the epoch, timing the wait for them."""
        batches = self.loader.epoch(self.epoch, self._first_step)
        with self._bar:
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                self._waited += time.perf_counter() - asked
                if batch is None:
                    break
                yield batch
                self._bar.update()
            self.flush()

    def add(self, step, loss, lr):
        """Note the loss of a step, a scalar on the device, without waiting for its value."""
        self._losses.append(loss.detach())
        self._step = step
        self.totals["lr"] = lr
        if (step + 1) % self.run_log.log_every == 0:
            self.flush()

    def flush(self):
        """Fetch the losses since the last line, check them, sum them up and show a line.

        All processes take part, at the same step.

        Raises:
            UserError: a loss of any process is not finite; too many images are unreadable.
        """
        if not self._losses:
            return
        own = torch.stack(self._losses).cpu().tolist(), self.loader.unreadable
        losses, unreadable = zip(*distributed.gather(own), strict=True)
        now = time.perf_counter()
        self._check_finite(losses)
        means = [sum(step_losses) / len(step_losses) for step_losses in zip(*losses, strict=True)]
        for mean in means:  # one by one: a sum that doesn't depend on where the lines fell
            self.totals["loss"] += mean
        images = len(means) * self.loader.images_per_step
        seconds, waited = now - self._since, self._waited
        self.totals["steps"] += len(means)
        self.totals["images"] += images
        self.totals["seconds"] += seconds
        self.totals["waited"] += waited
        self.totals["bad"] = self._bad_before + sum(unreadable)
        self._check_readable()
        self._show(sum(means) / len(means), images / seconds, waited / seconds)
        self._losses = []
        self._waited = 0.0
        self._since = now

    def _check_finite(self, losses):
        first_step = self._step + 1 - len(self._losses)
        for offset, step_losses in enumerate(zip(*losses, strict=True)):
            for rank, loss in enumerate(step_losses):
                if not math.isfinite(loss):
                    raise UserError(
                        f"the loss is {loss} at epoch {self.epoch}, step {first_step + offset}, "
                        f"rank {rank}: continue from the last checkpoint with a lower learning "
                        "rate, a longer warm-up, --clip_grad 1 or --amp off"
                    )

    def _check_readable(self):
        images = len(self.loader) * self.loader.images_per_step
        if self.totals["bad"] > MAX_UNREADABLE_SHARE * images:
            raise UserError(
                f"{self.totals['bad']} of the {images} images of epoch {self.epoch} are "
                f"unreadable, more than {MAX_UNREADABLE_SHARE:.0%}: repair or remove the files "
                "warned about"
            )

    def _show(self, loss, images_per_s, waited_share):
        progress = self.epoch + (self._step + 1) / len(self.loader)
        self.run_log.scalars(progress, **{self.run_log.loss_tag: loss, "lr": self.totals["lr"]})
        status = (
            f"loss {loss:.4f}  lr {self.totals['lr']:.2e}  {images_per_s:.1f} images/s  "
            f"data wait {waited_share:.0%}  peak memory {peak_memory_gib():.2f} GiB"
        )
        if self.run_log.show_bar:
            self._bar.set_postfix_str(status)
            return
        rate = self.totals["images"] / self.totals["seconds"]
        images_left = (
            (self.run_log.epochs - progress) * len(self.loader) * self.loader.images_per_step
        )
        eta = timedelta(seconds=round(images_left / rate))
        self.run_log.line(
            f"epoch {self.epoch}/{self.run_log.epochs}  step {self._step + 1}/{len(self.loader)}  "
            f"eta {eta}  {status}"
        )

    def summary(self):
        """The epoch's entries for log.txt."""
        totals = self.totals
        return {
            "epoch": self.epoch,
            "train_loss": totals["loss"] / totals["steps"],
            "train_lr": totals["lr"],
            "images_per_s": round(totals["images"] / totals["seconds"], 2),
            "data_wait": round(totals["waited"] / totals["seconds"], 4),
            "unreadable_images": totals["bad"],
            "peak_memory_gib": round(peak_memory_gib(), 3),
        }


def describe_training(process, effective_batch, lr, amp_dtype):
    """What a run says of its size, learning rate, devices and precision."""
    return (
        f"effective batch {effective_batch}, lr {lr:.2e}; {process.world_size} x {process.device}, "
        f"{amp_dtype or torch.float32}"
    )


def peak_memory_gib():
    """Peak memory of this process: CUDA's allocator where one is used, else the resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)
