"""main_linprobe.py with the model of tiny_finetune.py, run as a script or imported."""

import tiny_finetune  # noqa: F401, for its model

import main_linprobe
from util import cli

if __name__ == "__main__":
    cli.run(main_linprobe.main, main_linprobe.get_args_parser())
