"""The cheap recipe in miniature: a higher mask ratio and a decoder of one block.

    python recipes/efficient.py --data_path CIFAR10

Three budgets of each recipe. recipes/efficient.sh has its commands for ImageNet.
"""

import cifar10
import folders
import running
import worth

SEEDS = 2
BUDGETS = (1, 2, 4)
RECIPES = {  # what it changes, and the epochs for each budget
    "paper": ({"mask_ratio": 0.75, "decoder_depth": 2}, [2, 4, 8]),
    "cheap": ({"mask_ratio": 0.9, "decoder_depth": 1}, [3, 6, 12]),
}


def make_cells(args):
    source = cifar10.images(args)
    cells = []
    for seed in range(SEEDS):
        for recipe, (changes, lengths) in RECIPES.items():
            for budget, epochs in zip(BUDGETS, lengths, strict=True):
                name = f"{recipe}-{epochs}-seed{seed}"
                about = {"recipe": recipe, "budget": budget, "epochs": epochs}
                changed = changes | {"epochs": epochs}
                cells.append(worth.make_cell("efficient", name, source, about, seed, changed))
    return cells


if __name__ == "__main__":
    running.main(__doc__, make_cells, "efficient", cifar10.add_flags, folders.make_planned)
