"""Stopping a run: a first signal is acknowledged, then saves and stops; a second one kills."""

import contextlib
import ctypes
import os
import signal
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A scheduler signals every process of a run, and torchrun passes on what it gets: what arrives
# within this time of the first signal is the same request.
SAME_REQUEST_SECONDS = 2.0


class StopSignals:
    """Within this context SIGTERM, SIGINT and SIGUSR1 ask for a save and an orderly stop.

    `training.Checkpoints` saves and stops after the update or the evaluation under way, once all
    processes agree. A second signal, after `SAME_REQUEST_SECONDS`, ends the process at once.

    A thread hears them. Python runs a handler in the main thread only, which may wait for a process
    that never comes.

    Attributes:
        received: the number of the signal that arrived; 0 before one has.
        leaves: whether the run ends with an error, and answers no signal.
    """

    def __init__(self) -> None:
        self.received = 0
        self.leaves = False

    def __enter__(self) -> "StopSignals":
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._writer = writer
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # A handler keeps a signal from its default.
        self._handlers = {number: signal.signal(number, self._wait) for number in SIGNALS}
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Exception) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # As soon as one process has ended, torchrun sends SIGTERM to those that say why.
            self.leaves = True
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._writer)
        os.close(self._reader)

    def _listen(self) -> None:
        # Until a 0, and not until the other end is closed: forked workers hold that, too.
        while number := os.read(self._reader, 1)[0]:
            if number in SIGNALS:
                self._receive(signal.Signals(number))

    def _wait(self, *_: object) -> None:
        """Keep the main thread until the first signal is heard.

        Without a lock: another signal may interrupt this function and call it again.
        """
        deadline = time.monotonic() + 1
        while not self.received and time.monotonic() < deadline:
            time.sleep(0.001)

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
            if not self.leaves:
                self._say(
                    f"{number.name}: saving, then stopping; a second signal (after 2 s) ends the "
                    "run"
                )
        elif now - self._since > SAME_REQUEST_SECONDS:
            self._say(f"{number.name}: ended by a second signal, without a save")
            # As signal.signal(number, SIG_DFL), which only the main thread may call.
            ctypes.CDLL(None).signal(int(number), 0)
            os.kill(os.getpid(), number)

    def _say(self, text: str) -> None:
        # Not by print: the main thread may hold the stream's buffer and wait.
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # Ctrl-C may have ended the reader, too
                os.write(2, f"{text}\n".encode())
