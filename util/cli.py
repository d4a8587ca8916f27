"""Command lines: parsing, types of arguments, and errors of the user in one line."""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

from util.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """A parser that shows every default in --help and tells errors in one line."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every flag, the description as it is written."""


def run(main, parser):
    """Run a command; an error of the user becomes one line on stderr and exit code 2."""
    try:
        main(parser.parse_args())
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: {'' if rank == '0' else f'[rank {rank}] '}{error}", file=sys.stderr)
        sys.exit(2)


def pick(args, names):
    """The flags of these names (one string, with blanks between them) as keywords for a call."""
    return {name: getattr(args, name) for name in names.split()}


def make_output_dirs(output_dir, log_dir, process):
    """Make a run's folders, which must be writable, in the main process."""
    if process.is_main:
        make_writable(output_dir, "--output_dir")
        if log_dir:
            make_writable(log_dir, "--log_dir")


def make_writable(folder, flag):
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


def integer(minimum):
    """An argument type: an integer of at least `minimum`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is not an integer of at least {minimum}")
        return value

    return parse


def number(minimum=0.0, maximum=math.inf, *, above=False, below=False):
    """An argument type: a finite number from `minimum` to `maximum`, or `above` and `below`."""

    def parse(text):
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


def path(text):
    """An argument type: a path that is not empty, as an unset shell variable would be."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a path")
    return text
