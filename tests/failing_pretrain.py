"""tiny_pretrain.py whose rank 1 fails at its fifth step.

With seed 1 its loss is nan, and with seed 2 it has an error of the user's.
"""

import os

import tiny_pretrain  # noqa: F401, for its model
import torch

import main_pretrain
from models_mae import MaskedAutoencoderViT
from util import cli
from util.errors import UserError

forward_loss = MaskedAutoencoderViT.forward_loss
parser = main_pretrain.get_args_parser()
calls = []


def failing_loss(self, imgs, pred, mask):
    calls.append(len(calls))
    loss = forward_loss(self, imgs, pred, mask)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        if parser.parse_args().seed == 0:
            raise RuntimeError("rank 1 fails here")
        if parser.parse_args().seed == 2:
            raise UserError("rank 1 sees no images here: mount them")
        return loss * torch.nan
    return loss


if __name__ == "__main__":
    MaskedAutoencoderViT.forward_loss = failing_loss
    cli.run(main_pretrain.main, parser)
