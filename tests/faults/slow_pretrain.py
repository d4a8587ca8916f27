"""tiny_pretrain.py that says when it is at something slow, which the seed chooses from SLOW.

Its rank 0 takes half a second longer for it, or six with a --timeout_minutes below one.
"""

import os
import time

import tiny_pretrain  # noqa: F401, for its model
import torch._inductor.compile_fx as compiler

import engine_pretrain
import main_pretrain
from util import checkpoint, cli

SLOW = [
    (main_pretrain, "evaluate"),
    (checkpoint, "save_checkpoint"),
    (engine_pretrain, "clip_and_step"),
    (compiler, "compile_fx"),
]


def slowly(function, name, seconds):
    def slow(*args, **kwargs):
        if os.environ.get("RANK", "0") == "0":
            print("at", name, flush=True)
            time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


if __name__ == "__main__":
    parser = main_pretrain.get_args_parser()
    args = parser.parse_args()
    module, name = SLOW[args.seed]
    seconds = 6 if args.timeout_minutes < 1 else 0.5
    setattr(module, name, slowly(getattr(module, name), name, seconds))
    cli.run(main_pretrain.main, parser)
