"""The user's faults: errors, which end a command, and warnings, which don't."""

import contextlib
import os
import sys
from typing import TextIO


class UserError(ValueError):
    """What is wrong, where, and what to do about it, in one line; commands exit with code 2."""


class NotFinite(UserError):
    """A loss or a state that is not finite; `training.Checkpoints` adds what to do about it."""


def warn(message: str) -> None:
    """One line on stderr, from the main process only."""
    if os.environ.get("RANK", "0") == "0":
        say(printable(f"warning: {message}"), sys.stderr)


def printable(text: str) -> str:
    """A text in one line, which a file's name may be part of: newlines, terminal codes and bytes
    that are no text are escaped."""
    return "".join(
        c
        if c.isprintable()
        else f"\\x{ord(c) - 0xDC00:02x}"  # as Python keeps such a byte
        if "\udc80" <= c <= "\udcff"
        else c.encode("unicode_escape").decode()
        for c in text
    )


def say(text: str, stream: TextIO) -> None:
    """Print lines. Where that fails, as after `| head` or on a full disk, the run goes on."""
    with contextlib.suppress(OSError):
        try:
            print("\n".join(map(printable, text.split("\n"))), file=stream, flush=True)
        except BrokenPipeError:  # nobody reads it any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
