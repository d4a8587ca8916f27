"""tiny_pretrain.py that waits STEP_SECONDS after each step in a Slurm job's first start."""

import os
import time

import tiny_pretrain  # noqa: F401, for its model
from torch.optim.optimizer import register_optimizer_step_post_hook

import main_pretrain
from util import cli

if __name__ == "__main__":
    if "SLURM_RESTART_COUNT" not in os.environ:
        seconds = float(os.environ.get("STEP_SECONDS", 0))
        register_optimizer_step_post_hook(lambda *_: time.sleep(seconds))
    cli.run(main_pretrain.main, main_pretrain.get_args_parser())
