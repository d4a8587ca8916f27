"""Command lines: the parser, types of arguments, and the user's errors in one line."""

import argparse
import contextlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from util.distributed import Process
from util.errors import LostProcess, UserError, say_error

KILLED_WORKER = (
    "a worker, a process that loads images, was killed, most likely as memory ran out: repeat the "
    "command with a lower --num_workers; a training continues from its last checkpoint"
)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that shows every default in --help and reports errors in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        # Before Python 3.14, argparse takes -1e-05 for a flag.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        say_error(f"{message} (see {self.prog} --help)")
        sys.exit(2)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every flag that is not required, the description as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.required else super()._get_help_string(action)


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Run a command; errors that are not ours become one line on stderr.

    Exit codes: 2 after a user's error, 1 if another process or a worker is gone, 130 after Ctrl-C.
    """
    try:
        main(parser.parse_args())
    except UserError as error:
        say_error(str(error))
        sys.exit(2)
    except LostProcess as error:
        if str(error):
            say_error(str(error))
        sys.exit(1)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        say_error(KILLED_WORKER)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def make_output_dirs(output_dir: str, log_dir: str | None, process: Process) -> None:
    """Make a run's folders, which must be writable, in the main process."""
    if process.is_main:
        make_writable(output_dir, "--output_dir")
        if log_dir:
            make_writable(log_dir, "--log_dir")


def make_writable(folder: str | Path, flag: str) -> None:
    """Make the folder that `flag` names, if it is missing, and try to write to it.

    Raises:
        UserError: that fails.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} can't be written: {error.strerror}") from error


def check_output_file(file: str | Path, flag: str) -> None:
    """Make the folder of a file to write, and refuse, with a UserError, one that can't be."""
    if os.path.isdir(file):
        raise UserError(f"{flag} {file} is a folder: give a file")
    make_writable(Path(file).parent, f"folder of {flag}")


def cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def integer(minimum: int) -> Callable[[str], int]:
    """An argument type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        value = None
        with contextlib.suppress(ValueError):
            value = int(text)
        if value is None or value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is not an integer of at least {minimum}")
        return value

    return parse


def number(
    minimum: float = 0.0, maximum: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """An argument type: a finite number from `minimum` to `maximum`, or `above` and `below`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = value > minimum if above else value >= minimum
        inside &= value < maximum if below else value <= maximum
        if not math.isfinite(value) or not inside:
            bounds = f"{'above' if above else 'of at least'} {minimum:g}"
            if maximum < math.inf:
                bounds += f" and {'below' if below else 'at most'} {maximum:g}"
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {bounds}")
        return value

    return parse


def path(text: str) -> str:
    """An argument type: a non-empty path; an unset shell variable would give an empty one.

    A shell expands `--data_path ~/images`, but not `--data_path=~/images`.
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a path")
    return os.path.expanduser(text)
