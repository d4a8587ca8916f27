"""The paper's ablations in miniature: mask ratio, decoder depth, and what the decoder predicts.

    python recipes/ablations.py --data_path CIFAR10

One setting is changed at a time, in a pre-training of 3 epochs.
"""

import cifar10
import folders
import running
import worth

SEEDS = 2
EPOCHS = 3
VARIED = {
    "mask_ratio": [0.25, 0.5, 0.9],
    "decoder_depth": [2, 4, 8],
    "norm_pix_loss": [False],
}


def make_cells(args):
    source = cifar10.images(args)
    settings = [("base", None)] + [(flag, v) for flag, values in VARIED.items() for v in values]
    cells = []
    for seed in range(SEEDS):
        for flag, value in settings:
            changes = {"epochs": EPOCHS} | ({} if flag == "base" else {flag: value})
            name = "base" if flag == "base" else f"{flag}-{value}"
            about = {"vary": flag, "value": value}
            if flag == "norm_pix_loss":
                about = {"vary": "target", "value": "normalised" if value else "raw"}
            cells.append(
                worth.make_cell("ablations", f"{name}-seed{seed}", source, about, seed, changes)
            )
    return cells


if __name__ == "__main__":
    running.main(__doc__, make_cells, "ablations", cifar10.add_flags, folders.make_planned)
