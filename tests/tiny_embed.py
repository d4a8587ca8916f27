"""main_embed.py with the models of tests, in small blocks, run as a script or imported."""

import time

import tiny_finetune  # noqa: F401, for its model
import tiny_pretrain  # noqa: F401, for its model

import main_embed
from util import cli, features

main_embed.BLOCK_TOKENS = 12

if __name__ == "__main__":
    parser = main_embed.get_args_parser()
    parser.add_argument("--wait", type=float, default=0, help="seconds before each block")
    original = features.tokens

    def waiting(args):
        def tokens(*inputs):
            time.sleep(args.wait)
            return original(*inputs)

        features.tokens = tokens
        main_embed.main(args)

    cli.run(waiting, parser)
