"""What pre-training is worth on the demo's images: three ways to classify, over three seeds.

    make demo; .venv/bin/python -m benchmarks.transfer

The encoder that the demo pre-trained is fine-tuned and probed. For comparison the same classifier
is trained from scratch with fine-tuning's flags and epochs, but without layer decay, as there is
nothing to preserve. Accuracies are those of the last epoch, on 2,000 held-out images.
"""

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import report
from util import cli

ENCODER = "demo/output/pretrain/checkpoint-last.pth"
METHODS = {
    "fine-tuned": ("finetune", ["--finetune", ENCODER]),
    "linear probe": ("probe", ["--finetune", ENCODER]),
    "from scratch": ("finetune", ["--layer_decay", "1"]),
}
SEEDS = (0, 1, 2)


def main(_args):
    recipes = {name: flags_of(name) for name in ("pretrain", "finetune", "probe")}
    results = {}
    for method, (recipe, flags) in METHODS.items():
        accuracies = [accuracy([*shlex.split(recipes[recipe]), *flags], seed) for seed in SEEDS]
        results[method] = {
            "accuracies": accuracies,
            "mean": round(statistics.mean(accuracies), 2),
            "standard_deviation": round(statistics.stdev(accuracies), 2),
        }
        print(f"{method:12} {results[method]}", flush=True)
    report.write("transfer", results, recipes=recipes)


def accuracy(words, seed):
    """Test accuracy after the last epoch of a command line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *words, "--seed", str(seed), "--output_dir", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        *_, last = (Path(folder) / "log.txt").read_text().splitlines()
    return round(json.loads(last)["test_acc1"], 2)


def flags_of(recipe):
    """The command line of a demo recipe, without its interpreter."""
    command = ["bash", "-c", f'source demo/recipes.sh; echo "${{{recipe}[@]}}"']
    return subprocess.check_output(command, text=True).strip()


if __name__ == "__main__":
    cli.run(main, cli.ArgumentParser(description=__doc__))
