"""tiny_pretrain.py without the right, which root has, to read and write what modes forbid."""

import ctypes
import os

import tiny_pretrain  # noqa: F401, for its model

import main_pretrain
from util import cli

VERSION = 0x20080522  # of Linux's capabilities


def give_up_privileges():
    if os.geteuid() == 0:
        none = (ctypes.c_uint32 * 6)()
        header = (ctypes.c_uint32 * 2)(VERSION, 0)
        assert ctypes.CDLL(None).capset(header, none) == 0


if __name__ == "__main__":
    give_up_privileges()
    cli.run(main_pretrain.main, main_pretrain.get_args_parser())
