"""The user's faults: errors, which end a command, and warnings, which don't."""

import contextlib
import os
import sys
from typing import TextIO


class UserError(ValueError):
    """What is wrong, where, and what to do about it, in one line; commands exit with code 2."""


class NotFinite(UserError):
    """A loss or a state that is not finite; `training.Checkpoints` adds what to do about it."""


class LostProcess(Exception):
    """Another process of the run is gone; the text says which, or is empty where another says it.

    Commands exit with code 1.
    """


def warn(message: str) -> None:
    """One line on stderr, from the main process only."""
    if os.environ.get("RANK", "0") == "0":
        say(f"warning: {message}", sys.stderr)


def say(text: str, stream: TextIO) -> None:
    """Print a line. Where that fails, as after `| head` or on a full disk, the run goes on."""
    with contextlib.suppress(OSError):
        try:
            print(text, file=stream, flush=True)
        except BrokenPipeError:  # nobody reads it any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
