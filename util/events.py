"""TensorBoard's event files, in which a full disk or a folder that goes away loses nothing."""

import io
import itertools
import os
import socket
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar

from util.errors import warn

_numbers = itertools.count()  # of this process's files, which can be begun in the same second


class EventFile:
    """A run's file of events. Events that can't be written now are kept, and written later.

    tensorboard's own writer has a thread that dies of a full disk. Its error then comes up in the
    training, or its close hangs. This one appends to the file in `flush`.

    Args:
        folder: the file's, which must exist.
        purge_step: TensorBoard drops what older files have at this x and beyond.
    """

    def __init__(self, folder: str | Path, purge_step: int) -> None:
        place = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._path = Path(folder) / f"events.out.tfevents.{place}"
        self._size = 0  # how much of the file is whole
        self._kept = io.BytesIO()
        self._has_failed = False
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._start, self._kept = self._kept.getvalue(), io.BytesIO()
        self.flush()

    def scalars(self, x: int, values: dict[str, float]) -> None:
        """Add values of curves, by their tags."""
        for tag, value in values.items():
            self._add(Event(summary=scalar(tag, value), step=x))

    def picture(self, x: int, tag: str, picture: Image.Image) -> None:
        """Add a picture."""
        summary = image(tag, np.asarray(picture), dataformats="HWC")
        self._add(Event(summary=summary, step=x))

    def close(self) -> None:
        """Write what is left, or say that it is lost."""
        self.flush()
        if self._has_failed:
            warn(f"{self._path.parent} lacks TensorBoard's last events, which are lost")

    def flush(self) -> None:
        """Write what is not written yet. The first failure is a warning."""
        try:
            is_there = self._path.exists()  # not if its folder was removed, and made again
            with open(self._path, "ab") as file:  # which makes no folder
                file.truncate(self._size if is_there else 0)  # an event may have been cut off
                file.seek(0, os.SEEK_END)
                file.write((b"" if is_there else self._start) + self._kept.getvalue())
                size = file.tell()
        except OSError as error:
            if not self._has_failed:
                warn(
                    f"{self._path.parent} can't take TensorBoard's events: {error.strerror}; "
                    "they are kept until it can"
                )
            self._has_failed = True
        else:
            self._size = size
            self._kept = io.BytesIO()
            self._has_failed = False

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        RecordWriter(self._kept).write(event.SerializeToString())
