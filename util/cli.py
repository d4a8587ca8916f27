"""Command lines: the flags that commands share, and errors of the user in one line."""

import argparse
import math
import os
import sys
import tempfile

from util.errors import UserError

# Flags that say where and how a training runs, not what it computes: a resumed one may change them.
FREE_FLAGS = frozenset(
    "data_path num_workers pin_mem output_dir log_dir device resume compile save_every "
    "save_minutes log_every".split()
)


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


def make_writable(folder, flag):
    """Make the folder that `flag` names, if it is missing, and try to write to it.

    Raises:
        UserError: that fails.
    """
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


def number(minimum=0.0, *, above=False):
    """An argument type: a finite number of at least (or `above`) `minimum`."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < minimum or (above and value == minimum):
            bound = "above" if above else "of at least"
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {bound} {minimum:g}")
        return value

    return parse


def path(text):
    """An argument type: a path that is not empty, as an unset shell variable would be."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a path")
    return text


class HeightWidth(argparse.Action):
    """Stores one number as it is, and two different ones as (height, width)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, "takes one number, or height and width")
        setattr(namespace, self.dest, values[0] if len(set(values)) == 1 else tuple(values))


def add_model_flags(parser):
    """--model and --input_size, in a group to which the command adds its own."""
    group = parser.add_argument_group("Model")
    group.add_argument("--model", metavar="NAME", help="name of the model")
    add_input_size_flag(group, default=224)
    return group


def add_input_size_flag(parser, default):
    parser.add_argument(
        "--input_size",
        type=integer(1),
        nargs="+",
        action=HeightWidth,
        metavar="PIXELS",
        default=default,
        help="size of the images the model sees: one number, or height and width",
    )


def add_device_flag(parser):
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is some), cuda or cpu"
    )


def add_data_flags(parser):
    """Where images come from and how they are loaded."""
    group = parser.add_argument_group("Data")
    group.add_argument(
        "--data_path", type=path, metavar="DIR", required=True, help="folder of the images"
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    group.add_argument(
        "--num_workers",
        type=integer(0),
        default=min(10, cores),
        help="processes that load images; results don't depend on it",
    )
    group.add_argument(
        "--pin_mem", action="store_true", default=True, help="page-locked batches, for CUDA"
    )
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem")


def add_optimization_flags(parser):
    """Batch size, length and learning rate of a training."""
    group = parser.add_argument_group("Optimization")
    group.add_argument("--batch_size", type=integer(1), help="images of a process and step")
    group.add_argument("--epochs", type=integer(1), help="length of the training")
    group.add_argument(
        "--accum_iter",
        type=integer(1),
        default=1,
        help="steps whose gradients are averaged; the effective batch is "
        "batch_size x accum_iter x processes",
    )
    group.add_argument(
        "--lr", type=number(), help="learning rate; if not given, blr x effective batch / 256"
    )
    group.add_argument("--blr", type=number(), help="base learning rate, of 256 images")
    group.add_argument("--min_lr", type=number(), help="learning rate at the end of the cosine")
    group.add_argument(
        "--warmup_epochs", type=number(), help="epochs in which the learning rate rises from 0"
    )
    group.add_argument(
        "--weight_decay", type=number(), help="of matrices; biases and 1-D have none"
    )
    group.add_argument(
        "--clip_grad", type=number(above=True), help="clip the gradients to this norm"
    )


def add_runtime_flags(parser):
    """Outputs, device, precision, resuming."""
    group = parser.add_argument_group("Runtime")
    group.add_argument(
        "--output_dir",
        type=path,
        default="./output_dir",
        metavar="DIR",
        help="checkpoints and log.txt",
    )
    group.add_argument(
        "--log_dir", metavar="DIR", help="TensorBoard events; if not given, output_dir"
    )
    add_device_flag(group)
    group.add_argument("--seed", type=integer(0), default=0, help="of everything random")
    group.add_argument(
        "--resume",
        default="auto",
        metavar="{auto,none,PATH}",
        help="continue the newest whole checkpoint of output_dir, none, or this one",
    )
    group.add_argument(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="mixed precision; auto is bf16 or else fp16 on CUDA, and off (float32) on a CPU",
    )
    group.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    group.add_argument("--no_compile", action="store_false", dest="compile")
    group.add_argument(
        "--save_every",
        type=integer(1),
        default=20,
        help="epochs between the numbered checkpoints; the last one is renewed every epoch",
    )
    group.add_argument(
        "--save_minutes",
        type=number(),
        default=5,
        help="minutes after which the last checkpoint is renewed within an epoch",
    )
    group.add_argument(
        "--log_every", type=integer(1), default=20, help="steps between two console lines"
    )
