"""A training run: what it shows, what it keeps and where it takes up after an interruption."""

import contextlib

from util.checkpoint import BEST, LAST
from util.checkpointer import Checkpointer
from util.errors import UserError
from util.logs import EpochLog, RunLog

# Flags that say where and how a training runs, not what it computes: a resumed one may change them.
FREE_FLAGS = frozenset(
    "data_path num_workers pin_mem output_dir log_dir device resume compile "
    "grad_checkpointing save_every save_minutes log_every finetune eval dist_eval".split()
)
# The flags that `Run` takes by their names.
RUN_FLAGS = "output_dir log_dir resume epochs log_every save_every save_minutes"
# The flags that make a classifier what it is.
ARCHITECTURE_FLAGS = "model nb_classes global_pool input_size"


class Run:
    """A training of `epochs` epochs that takes up where an earlier run of it ended.

    Args:
        command: the kind of training, such as "main_pretrain.py".
        process: this `distributed.Process`.
        state: model (without its `data_parallel` wrapper), optimizer and scaler, by these names.
        flags: all flags of the command, a dict of plain values.
        images: the `ImagePaths` of the training.
        steps: of an epoch.
        settings: what defines the training besides flags, images and number of processes.
        contents: entries of every checkpoint besides.
        loss_tag: TensorBoard's name for the training loss.
        output_dir, log_dir: folders of checkpoints and log.txt, and of the TensorBoard events.
        resume: "auto", "none" or a path, see `checkpoint.find_checkpoint`.
        epochs: length of the training.
        log_every: steps between console lines.
        save_every: epochs between the numbered checkpoints.
        save_minutes: how often the rolling checkpoint is renewed within an epoch.

    Raises:
        UserError: the checkpoint to resume is unusable or of another training.
    """

    def __init__(
        self,
        command,
        process,
        state,
        *,
        flags,
        images,
        steps,
        settings=None,
        contents=None,
        loss_tag="loss",
        output_dir,
        log_dir,
        resume,
        epochs,
        log_every,
        save_every,
        save_minutes,
    ):
        self.process = process
        self.output_dir = output_dir
        self.epochs = epochs
        self.steps = steps
        self._save_every = save_every
        self._saved = True
        self._checkpointer = Checkpointer(
            output_dir,
            process,
            state=state,
            settings={
                **{flag: value for flag, value in flags.items() if flag not in FREE_FLAGS},
                "processes": process.world_size,
                "images": len(images),
                "image_names": images.fingerprint,
                **(settings or {}),
            },
            contents={"command": command, "args": flags, **(contents or {})},
            save_minutes=save_minutes,
        )
        self._first_epoch, self._first_step, self._totals = self._checkpointer.resume(resume)
        self.log = RunLog(
            output_dir,
            log_dir or output_dir,
            process,
            epochs=epochs,
            log_every=log_every,
            loss_tag=loss_tag,
            start=self._first_epoch + self._first_step / steps,
        )

    def __enter__(self):
        """From here on signals are answered by a checkpoint and an orderly end."""
        self._context = contextlib.ExitStack()
        self._context.enter_context(contextlib.closing(self.log))
        self._context.enter_context(self._checkpointer.watch_signals())
        return self

    def __exit__(self, *exception):
        """Close the outputs; a UserError if the final checkpoint could not be written."""
        self._context.__exit__(*exception)
        if exception[0] is not None:
            return
        if not self._saved:
            raise UserError(
                f"the final checkpoint could not be written to {self.output_dir}: free some space"
            )
        self.log.line(f"done: {self.epochs} epochs, see {self.output_dir}")

    def epochs_left(self):
        """The epochs that are still to train, the first perhaps in part."""
        return range(self._first_epoch, self.epochs)

    def epoch_log(self, loader, epoch):
        """The `EpochLog` of an epoch, from the step on at which it takes up."""
        resumed = epoch == self._first_epoch
        first_step, totals = (self._first_step, self._totals) if resumed else (0, None)
        self._epoch_log = EpochLog(
            self.log, loader, epoch=epoch, first_step=first_step, totals=totals
        )
        return self._epoch_log

    def save_if_due(self, epoch_log, step):
        """After an update, `step` steps into the epoch: see `Checkpointer.save_if_due`."""
        self._checkpointer.save_if_due(epoch=epoch_log.epoch, step=step, epoch_log=epoch_log)

    def save_before_evaluation(self):
        """Renew the rolling checkpoint after an epoch's last step: an evaluation may fail."""
        log = self._epoch_log
        self._checkpointer.save(LAST, epoch=log.epoch, step=self.steps, totals=log.totals)

    def saves_numbered(self, epoch):
        """Whether the epoch's checkpoint is kept under its number."""
        return (epoch + 1) % self._save_every == 0 or epoch + 1 == self.epochs

    def end_epoch(self, record, figure=None):
        """Log an epoch and save its checkpoints.

        Args:
            record: the epoch's entries for log.txt.
            figure: the higher the better: the best epoch is kept as `checkpoint.BEST`.
        """
        self.log.epoch_line(record)
        epoch = record["epoch"]
        names = [LAST]
        if self.saves_numbered(epoch):
            names.insert(0, f"checkpoint-{epoch}.pth")
        best = self._checkpointer.best
        if figure is not None and (best is None or figure > best):
            self._checkpointer.best = figure
            names.insert(0, BEST)
        for name in names:
            self._saved = self._checkpointer.save(name, epoch=epoch, step=self.steps)
