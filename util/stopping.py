"""Stopping a run: a first signal is acknowledged, then saves and stops; a second one kills."""

import contextlib
import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A scheduler signals every process of a run, and torchrun passes on what it gets: what arrives
# within this time of the first signal is the same request.
SAME_REQUEST_SECONDS = 2.0


class StopSignals:
    """Within this context SIGTERM, SIGINT and SIGUSR1 ask for a save and an orderly stop.

    `training.Checkpoints` saves and stops after the update or the evaluation under way, once all
    processes agree. A second signal, after `SAME_REQUEST_SECONDS`, ends the process at once.

    Attributes:
        received: the number of the signal that arrived; 0 before one has.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "StopSignals":
        self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if not self.received:
            self.received, self._since = number, now
            self._say(f"{name}: saving, then stopping; a second signal (after 2 s) ends the run")
        elif now - self._since > SAME_REQUEST_SECONDS:
            self._say(f"{name}: ended by a second signal, without a save")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _say(self, text: str) -> None:
        # Not by print: the code that the signal interrupts may hold the stream's buffer.
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # Ctrl-C may have ended the reader, too
                os.write(2, f"{text}\n".encode())
