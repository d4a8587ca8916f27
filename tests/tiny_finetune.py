"""main_finetune.py with a model small enough for tests, run as a script or imported."""

import main_finetune
import models_vit
from util import cli

models_vit.MODELS["tiny_test_vit"] = models_vit.factory(4, 32, 2, 4)

if __name__ == "__main__":
    cli.run(main_finetune.main, main_finetune.get_args_parser())
