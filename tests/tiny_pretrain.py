"""main_pretrain.py with a model small enough for tests, run as a script or imported."""

import main_pretrain
import models_mae
from util import cli

models_mae.MODELS["tiny_test_model"] = models_mae.factory(4, (32, 2, 4), (16, 1, 2))

if __name__ == "__main__":
    cli.run(main_pretrain.main, main_pretrain.get_args_parser())
