"""tiny_pretrain.py whose saves take SAVE_SECONDS (3); notes when one is whole, rank 1 gone."""

import atexit
import os
import time
from pathlib import Path

import tiny_pretrain  # noqa: F401, for its model

import main_pretrain
from util import checkpoint, cli

save = checkpoint.save_checkpoint
parser = main_pretrain.get_args_parser()


def note(name):
    (Path(parser.parse_args().output_dir) / name).write_text(str(time.time()))


def slow_save(path, contents):
    time.sleep(float(os.environ.get("SAVE_SECONDS", 3)))
    save(path, contents)
    note("saved")


if __name__ == "__main__":
    checkpoint.save_checkpoint = slow_save
    if os.environ["RANK"] == "1":
        print("rank 1 is process", os.getpid(), flush=True)
        atexit.register(note, "left")
    cli.run(main_pretrain.main, parser)
