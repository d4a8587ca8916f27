"""The user's faults: errors, which end a command, and warnings, which don't."""

import contextlib
import os
import re
import sys
import time
import zlib
from pathlib import Path
from typing import TextIO

SAID_WITHIN_SECONDS = 5.0  # by another process that has begun to say an error
RANK_0_WITHIN_SECONDS = 2.0  # for an error that it has, too


class UserError(ValueError):
    """What is wrong, where, and what to do about it, in one line; commands exit with code 2."""


class NotFinite(UserError):
    """A loss or a state that is not finite; `training.Checkpoints` adds what to do about it."""


class LostProcess(Exception):
    """Another process of the run is gone; the text says which, or is empty if that is said.

    Commands exit with code 1.
    """


def warn(message: str) -> None:
    """One line on stderr, from the main process only."""
    if os.environ.get("RANK", "0") == "0":
        say(printable(f"warning: {message}"), sys.stderr)


# Control characters except the tab, what ends a line or changes its direction, and surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """A text in one line, which a file's name may be part of: newlines, terminal codes and bytes
    that are no text are escaped."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    if "\udc80" <= found[0] <= "\udcff":  # as Python keeps a byte that is no text
        return f"\\x{ord(found[0]) - 0xDC00:02x}"
    return found[0].encode("unicode_escape").decode()


def say_error(text: str, names_rank: bool = True) -> None:
    """One line on stderr; what all processes of a torchrun have to say is said by one of them.

    With `names_rank`, the line names one that is not the main process.
    """
    rank = os.environ.get("RANK", "0")
    line = printable(f"error: {f'[rank {rank}] ' if names_rank and rank != '0' else ''}{text}")
    folder = os.environ.get("TORCHELASTIC_ERROR_FILE")  # LOGS/attempt_0/LOCAL_RANK/error.json
    if not folder:
        say(line, sys.stderr)
        return
    note = Path(folder).parents[1] / f"said-{zlib.crc32(printable(text).encode()):08x}"
    with contextlib.suppress(OSError):
        deadline = time.monotonic() + RANK_0_WITHIN_SECONDS
        while rank != "0" and not note.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            note.touch(exist_ok=False)
        except FileExistsError:
            # Another process says it, and torchrun would end that one as soon as this one left.
            deadline = time.monotonic() + SAID_WITHIN_SECONDS
            while time.monotonic() < deadline:
                if note.stat().st_size:
                    return
                time.sleep(0.05)
    say(line, sys.stderr)
    with contextlib.suppress(OSError):
        note.write_text("said")


def say(text: str, stream: TextIO) -> None:
    """Print lines. Where that fails, as after `| head` or on a full disk, the run goes on."""
    with contextlib.suppress(OSError):
        try:
            print("\n".join(map(printable, text.split("\n"))), file=stream, flush=True)
        except BrokenPipeError:  # nobody reads it any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
