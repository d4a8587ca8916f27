"""Classify held-out images by their nearest neighbours among labelled ones.

    python recipes/knn.py --bank TRAIN.npz --queries VAL.npz --percents 100 10 1 --output knn.json

The files are main_embed.py's. With less than 100% of the labels there is a draw for each of three
seeds, the same as in recipes/folders.py. The output holds percentages: {"100": [one], "10":
[three], ...}.
"""

import json
from pathlib import Path

import folders
import numpy as np
import running  # noqa: F401  finds util
import torch

from util import cli, knn

SEEDS = 3
NEIGHBOURS = 20


def accuracies(bank, queries, percents):
    """{percent: [accuracy for each draw]} of two of main_embed.py's files, as it wrote them."""
    vectors, labels = torch.from_numpy(bank["embeddings"]), torch.from_numpy(bank["labels"])
    of_class = [np.flatnonzero(bank["labels"] == number) for number in range(len(bank["classes"]))]
    asked = torch.from_numpy(queries["embeddings"]), torch.from_numpy(queries["labels"])
    found = {}
    for percent in percents:
        found[str(percent)] = []
        for seed in range(SEEDS if percent < 100 else 1):
            drawn = [
                own[folders.draw(len(own), percent, seed, number)]
                for number, own in enumerate(of_class)
            ]
            chosen = torch.from_numpy(np.sort(np.concatenate(drawn)))
            accuracy = knn.accuracy(*asked, vectors[chosen], chosen, labels, NEIGHBOURS)
            found[str(percent)].append(accuracy)
    return found


def main(args):
    found = accuracies(np.load(args.bank), np.load(args.queries), args.percents)
    args.output.write_text(json.dumps(found) + "\n")
    print(found)


if __name__ == "__main__":
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--bank", required=True, metavar="FILE.npz", help="labelled images")
    parser.add_argument("--queries", required=True, metavar="FILE.npz", help="held-out images")
    parser.add_argument("--percents", type=int, nargs="+", default=[100], help="of the labels")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.json")
    cli.run(main, parser)
