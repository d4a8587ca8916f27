"""Golden curves: the losses of small trainings, kept, so that no change bends training unseen.

    python -m benchmarks.golden              # compare with the curves in tests/golden
    python -m benchmarks.golden --remake     # make them anew
    python -m benchmarks.golden --device cuda

Three recipes run main_pretrain.py or main_finetune.py for three epochs, in float32 and in bf16, on
140 images made of the bundled ones. A device has a file for each type. It holds the first 50 losses
and the epochs' mean losses. A GPU whose file is missing gets one: `make gpu` does that.
tests/test_golden.py repeats the first steps on a CPU.

Losses may depart by a relative 1e-5, or by the `spread` that the file holds where that is more: the
largest relative difference between any two of several runs, at any of the first 20 losses or of all
50. It grows with the steps, most in bf16. `reruns` holds each run's differences from the golden
one. On a CPU these are one and two threads, and one thread with the instructions of other
processors. They are imitated: oneDNN, MKL and torch are told to use fewer of those that this
processor has. On a GPU the same run is repeated.
"""

import concurrent.futures
import contextlib
import decimal
import io
import json
import multiprocessing
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import main_finetune
import main_pretrain
from benchmarks import report
from util import cli, logs
from util.distributed import select_device

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "golden"
AMP = {"float32": "off", "bf16": "bf16"}
TOLERANCE = 1e-5  # ten times what float32 differs by with other threads or instructions
LIBRARIES = ("torch", "timm")  # whose versions may move a loss
FIRST, STEPS = 20, 50  # how many losses the test compares, and the files hold

# Between them: RGB, one band, images that are not square; raw and normalised pixels; updates of
# one step and of two, with one left over at the end of an epoch; clipped gradients. No image is
# resized by Pillow, nor changed by timm's policies, whose pixels depend on their version.
TRAIN_IMAGES, VAL_IMAGES = 140, range(8000, 8030)
SHARED = "--batch_size 8 --epochs 3 --num_workers 0"
RECIPES = {
    "pretrain": f"main_pretrain.py --model mae_vit_nano_patch4 --input_size 28 {SHARED} "
    "--warmup_epochs 0.25 --lr 3e-3",
    "pretrain_accum": f"main_pretrain.py --model mae_vit_nano_patch4 --input_size 32 24 {SHARED} "
    "--warmup_epochs 0.5 --blr 5e-2 --accum_iter 2 --clip_grad 0.5 --norm_pix_loss "
    "--mask_ratio 0.6 --crop_scale 0.5 1 --no_flip --weight_decay 0.5 --decoder_depth 1",
    "finetune": f"main_finetune.py --model vit_nano_patch4 --input_size 28 {SHARED} "
    "--warmup_epochs 0.25 --lr 3e-3 --nb_classes 10 --bands 0 --mean 0.5 --std 0.5 --aa none "
    "--reprob 0.25 --mixup 0.8 --cutmix 1",
}
COMMANDS = {"main_pretrain.py": main_pretrain, "main_finetune.py": main_finetune}

# The golden run's environment, and what the others add to it or change.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
AVX2 = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
OTHERS = {
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "AVX512-BF16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "AVX512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": AVX2 | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
}
REPETITIONS = 2  # on a GPU


def get_args_parser():
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--remake", action="store_true", help="replace curves that exist")
    return parser


def main(args):
    device = select_device(args.device)
    types = [dtype for dtype in AMP if computes(device, dtype)]
    missing = [dtype for dtype in types if args.remake or not file(device, dtype).exists()]
    kept = [dtype for dtype in types if dtype not in missing]
    if missing:
        make(device, missing)
    bent = check(device, kept) if kept else []
    if bent:
        bent += other_versions(device, kept)
        sys.exit("\n  ".join(["training is not what it was, see CONTRIBUTING.md:", *bent]))


def computes(device, dtype):
    """Whether the device computes in a type; a CPU without bf16 emulates it."""
    if device.type == "cpu" or dtype == "float32":
        return True
    return torch.cuda.is_bf16_supported(including_emulation=False)


def file(device, dtype):
    """The file of a device's curves in a type."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return FOLDER / f"{re.sub('[^a-z0-9]+', '_', name.lower())}_{dtype}.json"


def read(device, dtype):
    """A device's curves in a type: {recipe: what `curve` returns}"""
    return json.loads(file(device, dtype).read_text())["curves"]


def command(recipe, dtype):
    """A recipe's command line in a type, without the flags for places."""
    return f"{RECIPES[recipe]} --amp {AMP[dtype]}"


# ---- training


class Enough(Exception):
    """The steps that were asked for are done."""


def train(recipe, dtype, device, steps=None, flags=()):
    """Run a recipe's command; returns (losses of its steps, the epochs' mean losses).

    Args:
        recipe: one of `RECIPES`.
        dtype: a key of `AMP`.
        device: "cpu" or "cuda".
        steps: stop after so many, without the means.
        flags: further words of the command line.
    """
    script, *words = shlex.split(command(recipe, dtype))
    losses, add = [], logs.Meter.add

    def noting(meter, step, loss, *figures):
        add(meter, step, loss, *figures)
        losses.append(loss.item())
        if len(losses) == steps:
            raise Enough

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(logs.Meter, "add", noting),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(Enough),
    ):
        write_images(Path(folder))
        words += [
            "--device",
            device,
            "--data_path",
            folder,
            "--output_dir",
            f"{folder}/out",
            *flags,
        ]
        COMMANDS[script].main(COMMANDS[script].get_args_parser().parse_args(words))
        lines = Path(folder, "out", "log.txt").read_text().splitlines()
        return losses, [json.loads(line)["train_loss"] for line in lines]
    return losses, []


def write_images(folder):
    """Write `folder`/{train,val}/CLASS/*.png, each with three bundled images as its bands."""
    archive = np.load(ROOT / "demo" / "fashion_mnist.npz")
    images, labels = archive["x"], archive["y"]
    for part, indices in (("train", range(TRAIN_IMAGES)), ("val", VAL_IMAGES)):
        for index in indices:
            path = folder / part / str(labels[index]) / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.stack(images[index : index + 3], axis=-1)).save(path)


def train_all(device, types):
    """{type: {recipe: what `train` returns}}"""
    trained = {}
    for dtype in types:
        # In bf16, torch asks the processor itself what it has. Without AVX512 it leaves out oneDNN.
        imitates_avx2 = os.environ.get("ATEN_CPU_CAPABILITY") == "avx2"
        torch.backends.mkldnn.set_flags(not (dtype == "bf16" and imitates_avx2))
        trained[dtype] = {recipe: train(recipe, dtype, device) for recipe in RECIPES}
    return trained


def in_process(environment, function, *args):
    """What a function returns in a new process, whose libraries read this environment."""
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, ONE_THREAD | environment),
        concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool,
    ):
        return pool.submit(function, *args).result()


# ---- comparing


def departure(losses, golden):
    """The largest relative difference of losses from golden ones, of which there may be more."""
    found, expected = np.array(losses), np.array(golden[: len(losses)])
    return float(np.abs(found / expected - 1).max())


def tolerance(curve, steps):
    """How far so many losses, `FIRST` or `STEPS`, may depart from a curve."""
    return max(TOLERANCE, curve["spread"][str(steps)])


def check(device, types):
    """Train all recipes and compare all losses with these types' files; returns what is bent."""
    bent = []
    for dtype, trained in train_all(device.type, types).items():
        for recipe, golden in read(device, dtype).items():
            losses, epochs = trained[recipe]
            for name, found, expected, steps in (
                ("the first losses", losses[:FIRST], golden["losses"], FIRST),
                ("the losses", losses[:STEPS], golden["losses"], STEPS),
                ("the epochs' means", epochs, golden["epochs"], STEPS),
            ):
                far, most = departure(found, expected), tolerance(golden, steps)
                line = f"{recipe} in {dtype}: {name} are {far:.1e} off, {most:.1e} is allowed"
                print(line, flush=True)
                if not far <= most:  # nor if it is nan
                    bent.append(line)
    return bent


def other_versions(device, types):
    """A line for each library whose version is another than when these types' files were made."""
    own = report.versions()
    return [
        f"{file(device, dtype).name} was made with {name} {version}, this is {own[name]}"
        for dtype in types
        for name, version in json.loads(file(device, dtype).read_text())["versions"].items()
        if name in LIBRARIES and own[name] != version
    ]


def make(device, types):
    """Train all recipes, several times each, and write the files of these types."""
    if device.type == "cpu":
        trained = in_process({}, train_all, "cpu", types)
        reruns = {name: in_process(v, train_all, "cpu", types) for name, v in OTHERS.items()}
    else:
        trained, *others = (train_all("cuda", types) for _ in range(1 + REPETITIONS))
        reruns = {f"repetition {number}": run for number, run in enumerate(others, 1)}
    for dtype in types:
        curves = {recipe: curve(recipe, dtype, trained, reruns) for recipe in RECIPES}
        text = json.dumps(report.about() | {"curves": curves}, indent=1)
        text = re.sub(r"\[[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)
        path = file(device, dtype)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
        print(f"written to {path}")


def curve(recipe, dtype, trained, reruns):
    """A recipe's entry of a file."""
    losses, epochs = trained[dtype][recipe]
    others = {name: run[dtype][recipe][0] for name, run in reruns.items()}
    runs = np.array([losses, *others.values()])
    spreads = runs.max(axis=0) / runs.min(axis=0) - 1
    return {
        "command": command(recipe, dtype),
        "losses": [shortest(loss) for loss in losses[:STEPS]],
        "epochs": [shortest(loss) for loss in epochs],
        "spread": {str(steps): rounded(spreads[:steps].max()) for steps in (FIRST, STEPS)},
        "reruns": {
            name: {str(steps): rounded(departure(run[:steps], losses)) for steps in (FIRST, STEPS)}
            for name, run in others.items()
        },
    }


def rounded(share):
    """A relative difference, rounded up to two digits, so that it is allowed itself."""
    unit = decimal.Decimal(f"{share:.0e}").scaleb(-1)
    return float(decimal.Decimal(f"{share:.9g}").quantize(unit, rounding=decimal.ROUND_UP))


def shortest(loss):
    """A loss with as many digits as a float32 has."""
    return float(str(np.float32(loss)))


if __name__ == "__main__":
    cli.run(main, get_args_parser())
