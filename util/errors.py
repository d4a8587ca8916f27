"""The user's faults: errors, which end a command, and warnings, which don't."""

import os
import sys


class UserError(ValueError):
    """What is wrong, where, and what to do about it, in one line; commands exit with code 2."""


def warn(message: str) -> None:
    """One line on stderr, from the main process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)
