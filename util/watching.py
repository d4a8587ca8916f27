"""Whether the processes of a run go on; if they don't, which one is stuck or lost, and where.

Every process notes where it is. A thread posts that in the store through which the processes found
each other, and answers when another process asks. Asked is only where nothing has moved for as long
as `--timeout_minutes`, or where a connection broke. A step waits for none of this.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from util.errors import LostProcess, say_error

# A save, an evaluation, the start and the end may take so many times as long as a step.
PATIENCE = 10
_POLL_SECONDS = 0.25
_ANSWER_SECONDS = 3.0


class _Progress:
    """Where this process is, and since when."""

    def __init__(self) -> None:
        self.place = "the start"
        self.places = 0  # how many it has been at, in the order that all processes share
        self.patience = PATIENCE
        self.saving = 0
        self.since = time.monotonic()

    def idle_seconds(self) -> float:
        """The time without a sign of progress, divided by the patience that the place deserves."""
        patience = PATIENCE if self.saving else self.patience
        return (time.monotonic() - self.since) / patience


_progress = _Progress()


def at_step(epoch: int, step: int) -> None:
    """Note that this process begins a step."""
    _go_to(f"step {step} of epoch {epoch}", 1)


def at_long(place: str) -> None:
    """Note that this process begins something that may take `PATIENCE` times as long."""
    _go_to(place, PATIENCE)


def _go_to(place: str, patience: int) -> None:
    _progress.place, _progress.patience = place, patience
    _progress.places += 1
    beat()


def beat() -> None:
    """Note that this process goes on, wherever it is."""
    _progress.since = time.monotonic()


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Within this context, also in another thread, a checkpoint is being written."""
    beat()
    _progress.saving += 1
    try:
        yield
    finally:
        _progress.saving -= 1
        beat()


class Watch:
    """Within this context, processes tell each other where they are.

    Where none has gone on for `timeout_seconds`, or `PATIENCE` times as long in what may take long,
    each ends with exit code 1, and one says which it waits for.

    Args:
        store: a client of the processes' store that nothing else uses.
        rank, world_size: of this process.
        timeout_seconds: how long nothing may move.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float
    ) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self._calls = 0
        self._asked = time.monotonic()
        self._host: dict[str, Any] | None = None  # rank 0's last report: it may hold the store
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        at_long("the start")
        self._post()
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._left.set()
        self._thread.join()
        if error is not None and not isinstance(error, (SystemExit, LostProcess)):
            with contextlib.suppress(RuntimeError):
                self.store.set(f"seen/{self.rank}", json.dumps(self._report() | {"failed": True}))

    def say_lost(self, error: Exception) -> None:
        """After an error of a connection: one process says which process is lost."""
        # Without the place in gloo's source before it, and the guesses behind it.
        reason = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
        try:
            answers = self._call()
            text = f"{self._blame(answers)} ({reason}); {_ADVICE}"
            if self._is_first_to_say():
                say_error(text, names_rank=False)
        except RuntimeError:
            say_error(f"{self._unreachable()} ({reason}); {_ADVICE}", names_rank=False)

    def _watch(self) -> None:
        """The thread: post, answer, and look whether it is time to ask."""
        posted, looked, is_cut_off = "", time.monotonic(), False
        while not self._left.wait(_POLL_SECONDS):
            now = time.monotonic()
            if now - looked > 10 * _POLL_SECONDS:  # the whole process was stopped, and goes on
                _progress.since += now - looked
            looked = now
            if is_cut_off:
                if _progress.idle_seconds() > self.timeout_seconds:
                    self._end(f"{self._unreachable()}; this process was at {_progress.place}")
                continue
            try:
                if posted != _progress.place:
                    posted = _progress.place
                    self._post()
                    if self.rank and self.store.check(["seen/0"]):
                        self._host = json.loads(self.store.get("seen/0"))
                self._answer()
                if self.store.check(["said"]):
                    self._end()
                if self._is_time_to_ask(now):
                    self._end_if_stuck()
            except RuntimeError:  # the store is gone, and with it torchrun or rank 0
                is_cut_off = True

    def _is_time_to_ask(self, now: float) -> bool:
        """Whether nothing has moved here for too long, and nobody has asked for some time.

        The ranks wait in turn, so that one asks for all.
        """
        interval = min(60.0, self.timeout_seconds / 10)
        turn = (1 + min(self.rank, 10) / 4) * interval
        return _progress.idle_seconds() > self.timeout_seconds and now - self._asked > turn

    def _post(self) -> None:
        self.store.set(f"seen/{self.rank}", json.dumps(self._report()))

    def _report(self) -> dict[str, Any]:
        return {
            "place": _progress.place,
            "places": _progress.places,
            "saving": _progress.saving > 0,
            "idle": _progress.idle_seconds(),
            "seconds": time.monotonic() - _progress.since,
            "host": socket.gethostname(),
        }

    def _answer(self) -> None:
        while self.store.check([f"call/{self._calls}"]):
            self.store.set(f"answer/{self._calls}/{self.rank}", json.dumps(self._report()))
            self._calls += 1
            self._asked = time.monotonic()

    def _call(self) -> dict[int, dict[str, Any]]:
        """Every process's report, by rank, but for those whose thread does not answer."""
        call = self._calls
        self.store.set(f"call/{call}", "")
        keys = {rank: f"answer/{call}/{rank}" for rank in range(self.world_size)}
        if threading.current_thread() is self._thread:
            self._answer()
        end = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < end and not self.store.check(list(keys.values())):
            time.sleep(_POLL_SECONDS / 5)
        there = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: json.loads(self.store.get(key)) for rank, key in there.items()}

    def _end_if_stuck(self) -> None:
        answers = self._call()
        if len(answers) < self.world_size:
            answers = self._call() | answers  # one that was only slow answers now
        if any(answer["idle"] < 0.9 * self.timeout_seconds for answer in answers.values()):
            return
        minutes = min(answer["seconds"] for answer in answers.values()) / 60
        text = f"{self._blame(answers)}; nothing has moved for {minutes:.2g} minutes, see "
        text += "--timeout_minutes"
        self._end(text if self._is_first_to_say() else "")

    def _blame(self, answers: dict[int, dict[str, Any]]) -> str:
        """Where the processes that the rest waits for were last seen."""
        silent = [rank for rank in range(self.world_size) if rank not in answers]
        reports = answers | {
            rank: json.loads(self.store.get(f"seen/{rank}"))
            for rank in silent
            if self.store.check([f"seen/{rank}"])
        }
        blamed = silent
        if not silent:
            # The rest waits for the one that is behind, or that has not moved for longest.
            behind = min((answer["places"], -answer["idle"]) for answer in answers.values())
            blamed = [r for r, a in answers.items() if (a["places"], -a["idle"]) == behind]
        texts = [_fate(rank, reports.get(rank), rank in answers) for rank in blamed[:8]]
        if len(blamed) > 8:
            texts.append(f"{len(blamed) - 8} more")
        rest = {report["place"] for rank, report in reports.items() if rank not in blamed}
        rest -= {report["place"] for rank, report in reports.items() if rank in blamed}
        waiting = f", the rest at {' and '.join(sorted(rest)[:3])}" if rest else ""
        return ", ".join(texts) + waiting

    def _unreachable(self) -> str:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if self.rank == 0:
            return f"torchrun answers no more at {address}"
        return f"{_fate(0, self._host, False)}; it, or its torchrun, can't be reached at {address}"

    def _is_first_to_say(self) -> bool:
        """Whether no thread of any process has said yet that one is stuck or lost."""
        own = f"{self.rank} {threading.get_ident()}"
        return self.store.compare_set("said", "", own).decode() == own

    def _end(self, text: str = "") -> None:
        if text:
            say_error(f"{text}; {_ADVICE}", names_rank=False)
        else:
            time.sleep(2)  # torchrun ends all processes as soon as one has ended
        end = time.monotonic() + PATIENCE * self.timeout_seconds
        while _progress.saving and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        # The main thread waits for another process and hears nothing.
        os._exit(1)


_ADVICE = "the same command continues from the last checkpoint"


def _fate(rank: int, report: dict[str, Any] | None, answers: bool) -> str:
    """What has become of a process, and where it was last seen."""
    if report is None:
        return f"rank {rank} did not get as far as to say where it is"
    fate = "does not go on" if answers else "answers no more"
    if report.get("failed"):
        fate = "has ended with an error"
    saving = ", saving" if report["saving"] else ""
    return f"rank {rank} on {report['host']} {fate}, last seen at {report['place']}{saving}"
