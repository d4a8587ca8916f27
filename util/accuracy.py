"""The figures of a classifier as they are printed and kept."""

import json
from pathlib import Path

from util.errors import UserError


def accuracy_line(figures):
    """The figures of `engine_finetune.evaluate` in the usual form."""
    return "* Acc@1 {test_acc1:.3f} Acc@5 {test_acc5:.3f} loss {test_loss:.3f}".format(**figures)


def report_evaluation(output_dir, process, figures, **about):
    """Print the figures of an evaluation and write them, as printed, to output_dir/eval.json.

    A UserError if that file can't be written.
    """
    if process.is_main:
        print(accuracy_line(figures), flush=True)
        rounded = {name: round(value, 3) for name, value in figures.items()}
        try:
            (Path(output_dir) / "eval.json").write_text(json.dumps(about | rounded) + "\n")
        except OSError as error:
            raise UserError(f"{output_dir}/eval.json can't be written: {error.strerror}") from error
