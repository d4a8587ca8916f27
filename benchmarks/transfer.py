"""What pre-training is worth on the demo's images: three ways to classify, over three seeds.

    make demo; .venv/bin/python -m benchmarks.transfer

From the encoder that the demo has pre-trained: fine-tuned, probed, and for comparison the same
classifier trained from scratch with the flags and the epochs of fine-tuning, but without layer
decay, as there is nothing to preserve. The accuracies are those of the last epoch, on 2,000
held-out images. Writes benchmarks/results/transfer.json.
"""

import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ENCODER = "demo/output/pretrain/checkpoint-last.pth"
METHODS = {
    "fine-tuned": ("finetune", ["--finetune", ENCODER]),
    "linear probe": ("probe", ["--finetune", ENCODER]),
    "from scratch": ("finetune", ["--layer_decay", "1"]),
}
SEEDS = (0, 1, 2)


def main():
    results = {}
    for method, (recipe, flags) in METHODS.items():
        accuracies = [accuracy(recipe, flags, seed) for seed in SEEDS]
        results[method] = {
            "accuracies": accuracies,
            "mean": round(statistics.mean(accuracies), 2),
            "standard_deviation": round(statistics.stdev(accuracies), 2),
        }
        print(f"{method:12} {results[method]}", flush=True)
    report = {
        "command": "python -m benchmarks.transfer",
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "commit": output_of("git rev-parse --short HEAD"),
        "recipes": {name: flags_of(name) for name in ("pretrain", "finetune", "probe")},
        "results": results,
    }
    path = Path(__file__).parent / "results" / "transfer.json"
    path.write_text(json.dumps(report, indent=2) + "\n")


def accuracy(recipe, flags, seed):
    """Test accuracy after the last epoch of the demo's recipe with more flags."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *shlex.split(flags_of(recipe)), *flags, "--seed", str(seed)]
        command += ["--output_dir", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        *_, last = (Path(folder) / "log.txt").read_text().splitlines()
    return round(json.loads(last)["test_acc1"], 2)


def flags_of(recipe):
    """The demo's command line of a recipe, without its interpreter."""
    return output_of(f'source demo/recipes.sh; echo "${{{recipe}[@]}}"')


def output_of(command):
    return subprocess.check_output(["bash", "-c", command], text=True).strip()


if __name__ == "__main__":
    main()
