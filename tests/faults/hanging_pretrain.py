"""tiny_pretrain.py whose rank 1 waits for ever for the images of its eighth step."""

import os
import time

import tiny_pretrain  # noqa: F401, for its model

import main_pretrain
from util import cli
from util.loading import ImageLoader

batches = ImageLoader._batches


def hanging_batches(self):
    for step, batch in enumerate(batches(self)):
        if os.environ["RANK"] == "1" and step == 7:
            time.sleep(1000)
        yield batch


if __name__ == "__main__":
    ImageLoader._batches = hanging_batches
    cli.run(main_pretrain.main, main_pretrain.get_args_parser())
