"""The recipes that are shell scripts: their commands parse, add up, and do what they promise.

A script runs with a python, torchrun and sbatch that only write down what they are asked to do. The
commands' own parsers read that.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import cifar10
import fashion_mnist
import numpy as np
import pytest
import running
from helpers import ROOT
from PIL import Image

from util import flags

RECIPES = ROOT / "recipes"
SCRIPTS = sorted(path for path in RECIPES.rglob("*.sh") if path.name != "launch.sh")
ON_GPUS = [path for path in SCRIPTS if path.parent.name not in ("small", "domain")]
MEASURED = ROOT / "benchmarks" / "results"
SIZES = json.loads((MEASURED / "memory.json").read_text())["results"]
IMAGES = 1_281_167  # of ImageNet's training

# Writes its name and its arguments to CALLS. Python runs what is not of this project.
STUB = """#!/bin/sh
name=${0##*/}
case "$name $1" in "python -c") exec PYTHON "$@" ;; esac
for word in "$name" "$@"; do printf '%s\\0' "$word"; done >> CALLS
echo >> CALLS
[ $name != sbatch ] || wc -l < CALLS
"""


@pytest.fixture
def record(tmp_path):
    """Runs a recipe; returns the finished process, and the words of each call that it made."""
    programs, calls = tmp_path / "programs", tmp_path / "calls"
    programs.mkdir()
    for name in ("python", "torchrun", "sbatch"):
        stub = STUB.replace("CALLS", shlex.quote(str(calls))).replace("PYTHON", sys.executable)
        (programs / name).write_text(stub)
        (programs / name).chmod(0o755)
    (tmp_path / "images").mkdir()
    usual = {"DATA": tmp_path / "images", "OUT": tmp_path / "out"}

    def started(script, shell="bash", **variables):
        calls.write_text("")
        environment = {"PATH": f"{programs}:{os.environ['PATH']}"}
        environment |= {k: str(v) for k, v in (usual | variables).items() if v is not None}
        done = subprocess.run(
            [shell, script], env=environment, cwd=tmp_path, text=True, capture_output=True
        )
        return done, [line.split("\0")[:-1] for line in calls.read_text().splitlines()]

    return started


def parsed(call):
    """(module, flags, processes) of a call of a main_*.py, as the command's own parser reads it."""
    start = next(index for index, word in enumerate(call) if word.endswith(".py"))
    launcher = " ".join(call[:start])
    numbers = re.findall(r"--(?:nproc_per_node|nodes|gpus-per-node)[ =](\d+)", launcher)
    module = importlib.import_module(call[start].removesuffix(".py"))
    args = module.get_args_parser().parse_args(call[start + 1 :])
    return module, args, int(np.prod([int(number) for number in numbers] or [1]))


def commands(recorded):
    """The `parsed` calls of a recipe that ended well, but for those of other programs."""
    done, calls = recorded
    assert done.returncode == 0, done.stderr
    return [parsed(call) for call in calls if any(word.startswith("main_") for word in call)]


def name_of(module, args):
    """pretrain, finetune, linprobe, and eval where the command only evaluates."""
    return "eval" if getattr(args, "eval", False) else module.__name__.removeprefix("main_")


# ---- all of them


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_commands_take_these_flags_and_files_of_earlier_ones(record, script, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stats.json").write_text('{"flags": "--in_chans 2 --value_range 0 9"}')
    made, trained = set(), {}
    for module, args, _ in commands(record(script, CLASSES=3)):
        name = name_of(module, args)
        for flag in ("finetune", "checkpoint", "resume"):
            assert getattr(args, flag, None) in {None, "auto"} | made
        if name == "eval":
            same = ("model", "nb_classes", "global_pool", "input_size", "output_dir")
            assert [getattr(args, flag) for flag in same] == [
                getattr(trained[module], flag) for flag in same
            ]
            assert args.resume == f"{args.output_dir}/checkpoint-last.pth", "not the best epoch's"
        elif "output_dir" in args:
            assert args.output_dir not in {other.output_dir for other in trained.values()}
            made.add(f"{args.output_dir}/checkpoint-last.pth")
            trained[module] = args
        if name == "pretrain":
            made.add(f"{args.output_dir}/encoder.safetensors")
            assert args.in_chans == (2 if script.parent.name == "domain" else None)
        elif name == "finetune":
            assert args.nb_classes == {"domain": 3, "small": 10}.get(script.parent.name, 1000)
    assert {module.__name__ for module in trained} >= {"main_pretrain", "main_finetune"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_headers_say_how_to_run_it_and_what_to_expect(script):
    header = script.read_text().split("\nsource ")[0]
    assert f"bash {script.relative_to(ROOT)}" in header
    said = ["measured: "]
    if script.parent.name != "small":
        said = ["not run here", "hours: not measured here", "expected: "]
    for words in said:
        assert f"\n# {words}" in header


def test_what_is_missing_or_wrong_is_one_line(record):
    for variables, message in (
        ({"DATA": None}, "DATA is not set: DATA=IMAGES OUT=FOLDER bash"),
        ({"OUT": ""}, "OUT is not set"),
        ({"DATA": "gone"}, "DATA=gone does not exist: give the folder"),
        ({"GPUS": "all"}, "GPUS=all is not an integer of at least 1"),
        ({"GPUS": 6}, "GPUS=6 on NODES=1 can't share the effective batch"),
        ({"GPU_GB": 48}, "GPU_GB=48: take 24, 40 or 80"),
        ({"NODES": 2}, "NODES=2 without SLURM: see docs/clusters.md"),
    ):
        done, calls = record(RECIPES / "imagenet" / "base.sh", **variables)
        assert (done.returncode, done.stdout, calls) == (2, "", [])
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and message in line


def test_a_missing_python_is_one_line(record, tmp_path):
    (tmp_path / "few").mkdir()
    for program in ("bash", "dirname"):
        (tmp_path / "few" / program).symlink_to(shutil.which(program))
    done, _ = record(RECIPES / "imagenet" / "base.sh", PATH=tmp_path / "few")
    expected = "error: there is no python here: . .venv/bin/activate\n"
    assert (done.returncode, done.stderr) == (2, expected)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_command_that_fails_is_a_recipes_last(record, script, tmp_path):
    (tmp_path / "programs" / "python").write_text("#!/bin/sh\nexit 3\n")
    done, _ = record(script)
    assert done.returncode == 3
    assert done.stdout.count("$ python") == 1


@pytest.mark.skipif(shutil.which("dash") is None, reason="needs a shell that isn't bash")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_another_shell_than_bash_is_an_error(record, script):
    done, calls = record(script, shell="dash")
    assert done.returncode != 0
    assert not calls


def test_pages_name_recipes_that_exist_and_commands_that_parse():
    for page in (ROOT / "README.md", RECIPES / "README.md", *(ROOT / "docs").glob("*.md")):
        for path in re.findall(r"recipes/[a-z0-9_/]+\.(?:sh|py)", page.read_text()):
            assert (ROOT / path).exists(), f"{page} names {path}"
    listed = (RECIPES / "README.md").read_text()
    for path in RECIPES.glob("*.py"):
        assert f"`{path.name}`" in listed
    for block in re.findall(
        r"```\n(.*?)```", (ROOT / "docs" / "choosing.md").read_text(), re.DOTALL
    ):
        for line in block.replace("\\\n", "").splitlines():
            parsed(shlex.split(line, comments=True))


# ---- on GPUs


@pytest.mark.parametrize("script", ON_GPUS, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus, nodes", [(1, 1), (8, 1), (4, 2), (8, 8)])
def test_effective_batches_are_the_papers_and_fit(record, script, gpus, nodes):
    effective = {"pretrain": 4096, "finetune": 1024, "linprobe": 16384}
    slurm = "--time=1:00:00" if nodes > 1 else ""
    for card in ("24", "40", "80"):
        for module, args, processes in commands(
            record(script, GPUS=gpus, NODES=nodes, GPU_GB=card, SLURM=slurm)
        ):
            assert processes == gpus * nodes
            name = name_of(module, args)
            if name in effective:
                assert args.batch_size * args.accum_iter * processes == effective[name]
            if name in SIZES:
                largest = SIZES[name][args.model]["plain"]["largest_batch"][card]
                assert args.batch_size <= largest
                assert args.accum_iter == 1 or 2 * args.batch_size > largest


@pytest.mark.parametrize("script", ON_GPUS, ids=lambda path: path.stem)
def test_one_gpu_takes_python_several_torchrun_and_slurm_a_chain_of_jobs(record, script):
    _, calls = record(script)
    assert {call[0] for call in calls} == {"python"}
    recorded = record(script, GPUS=8, FLAGS="--compile --save_minutes 9")
    torchrun = ("torchrun", "--nproc_per_node", "8", "--max-restarts", "3")
    assert {tuple(call[:5]) for call in recorded[1]} == {torchrun}
    for module, args, _ in commands(recorded):
        trains = name_of(module, args) != "eval"
        assert (args.compile, args.save_minutes) == ((True, 9) if trains else (False, 5))
    slurm = ["--time=24:00:00", "--cpus-per-task=96"]
    done, calls = record(script, GPUS=8, NODES=2, SLURM=" ".join(slurm))
    for number, call in enumerate(calls):
        after = [f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"] if number else []
        job = ["--parsable", "--nodes=2", "--gpus-per-node=8", *slurm, *after]
        words = ["sbatch", *job, "slurm/train.sbatch"]
        assert call[: len(words)] == words
        assert f"\njob {number + 1}: {call[len(words)]} " in done.stdout


# ---- ImageNet

# The paper's (appendix A), and where sizes differ those of the original's PyTorch release.
PAPERS = {
    "base": ("base_patch16", 100, 5e-4, 0.65, 0.1, 90),
    "large": ("large_patch16", 50, 1e-3, 0.75, 0.2, 50),
    "huge": ("huge_patch14", 50, 1e-3, 0.75, 0.3, 50),
}


@pytest.mark.parametrize("size", PAPERS)
def test_settings_are_the_papers(record, size):
    model, epochs, blr, layer_decay, drop_path, probe_epochs = PAPERS[size]
    recorded = record(RECIPES / "imagenet" / f"{size}.sh")
    pretrain, finetune, _, probe, _ = (vars(args) for _, args, _ in commands(recorded))
    expected = {"model": f"mae_vit_{model}", "epochs": 1600, "warmup_epochs": 40, "blr": 1.5e-4}
    expected |= {"weight_decay": 0.05, "mask_ratio": 0.75, "norm_pix_loss": True}
    expected |= {"crop_scale": (0.2, 1.0), "input_size": 224, "min_lr": 0}
    assert pretrain == pretrain | expected
    expected = {"model": f"vit_{model}", "epochs": epochs, "warmup_epochs": 5, "blr": blr}
    expected |= {"layer_decay": layer_decay, "drop_path": drop_path, "weight_decay": 0.05}
    expected |= {"mixup": 0.8, "cutmix": 1.0, "reprob": 0.25, "smoothing": 0.1}
    expected |= {"aa": "rand-m9-mstd0.5-inc1", "global_pool": True, "input_size": 224}
    assert finetune == finetune | expected
    expected = {"model": f"vit_{model}", "epochs": probe_epochs, "warmup_epochs": 10, "blr": 0.1}
    assert probe == probe | expected | {"weight_decay": 0, "global_pool": False}


@pytest.mark.parametrize("size", PAPERS)
def test_hours_follow_from_images_a_second(record, size):
    """Measured ones of an H100, or docs/memory.md's estimate; huge's fine-tuning has neither."""
    script = RECIPES / "imagenet" / f"{size}.sh"
    text = " ".join(line.strip("# ") for line in script.read_text().splitlines())
    pretrain, finetune, *_ = commands(record(script))
    for task, name, (_, args, _) in (
        ("pretrain", "pre-training", pretrain),
        ("finetune", "fine-tuning", finetune),
    ):
        measured = MEASURED / f"{task}_{args.model}_224px_cuda.json"
        if measured.exists():
            results = json.loads(measured.read_text())["results"]
            speed = results["ours:bf16"]["images_per_s"]["median"]
        elif estimate := SIZES[task][args.model].get("estimate"):
            speed = round(estimate["H100"]["images_per_s"], -2)
        else:
            assert f"for {name}" not in text
            continue
        hours = round(args.epochs * IMAGES / speed / 3600)
        assert f" {hours} for {name}" in text
        assert (f"for {name}, an estimate" in text) == (not measured.exists())


def test_part_of_the_images_is_spread_over_the_classes(record, tmp_path):
    for name in ("a", "b"):
        for number in range(20):
            path = tmp_path / "images" / "train" / name / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (_, pretrain, _), (_, finetune, _), _ = commands(record(RECIPES / "efficient.sh", PERCENT=20))
    with open(pretrain.data_path) as file:
        listed = file.read().splitlines()
    assert len(set(listed)) == 8
    assert [os.path.isfile(path) for path in listed] == [True] * 8
    assert sum("/a/" in path for path in listed) == 4
    assert finetune.data_path == str(tmp_path / "images")


@pytest.mark.parametrize("files, message", [([], "train does not exist"), (["a/.b"], "are none")])
def test_a_part_of_no_images_is_refused(record, tmp_path, files, message):
    for name in files:
        path = tmp_path / "images" / "train" / name
        path.parent.mkdir(parents=True)
        path.touch()
    done, calls = record(RECIPES / "efficient.sh", PERCENT=20)
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith("error: ") and message in done.stderr


# ---- small images


@pytest.mark.parametrize("table", [cifar10, fashion_mnist], ids=lambda table: table.__name__)
def test_small_recipes_have_the_settings_of_the_tables(record, table):
    """Those of the nano model with all labels: all flags but paths, and what changes no result."""
    settings = table.SETTINGS
    script = RECIPES / "small" / f"{table.__name__}.sh"
    pretrain, finetune, _, probe, _, _ = commands(record(script))
    classify = settings.classify | {"model": "vit_nano_patch4", "data_path": "any"}
    encoder = {"finetune": "any"}
    for (module, args, _), expected in (
        (pretrain, settings.pretrain | {"model": "mae_vit_nano_patch4", "data_path": "any"}),
        (finetune, classify | settings.finetune | {"epochs": settings.epochs[100]} | encoder),
        (probe, classify | settings.probe | {"epochs": settings.probe_epochs[100]} | encoder),
    ):
        parser = module.get_args_parser()
        words = running.flags(expected)
        assert flags.fixed(parser, vars(args)) == flags.fixed(
            parser, vars(parser.parse_args(words))
        )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_does_not_take_is_refused(record, script):
    """Or a run would begin on one GPU instead of eight, or without its pre-training."""
    wrong = [{"EPOCHS": "1.5"}, {"EPOCHS": "08"}]
    if script not in ON_GPUS:
        wrong += [{"GPUS": 8}, {"SLURM": "--time=1"}]
    for variables in wrong:
        done, calls = record(script, **variables)
        assert (done.returncode, calls) == (2, [])
        assert done.stderr.startswith("error: ") and "".join(variables) in done.stderr


def test_the_bundled_images_are_written_to_the_output(record, tmp_path):
    """And never to the user's own images."""
    script = RECIPES / "small" / "fashion_mnist.sh"
    _, calls = record(script)
    images = str(tmp_path / "out" / "images")
    assert calls[0] == ["python", "demo/unpack.py", images]
    assert {args.data_path for _, args, _ in commands(record(script))} == {images}
    done, calls = record(script, OUT=None)
    assert done.returncode == 2 and done.stderr.startswith("error: OUT is not set")
    assert not calls


# ---- other domains


@pytest.mark.parametrize("name, bands", [("grey16", 1), ("bands8", 8)])
def test_other_images_from_statistics_to_a_classifier(record, tmp_path, name, bands):
    """The recorded commands, run one after another in this process."""
    random = np.random.default_rng(0)
    for number, label in enumerate(("a", "b") * 10):
        folder = tmp_path / "images" / ("val" if number > 15 else "train") / label
        folder.mkdir(parents=True, exist_ok=True)
        image = random.integers(0, 60000, (20, 20, bands)).astype(np.uint16)
        if bands == 1:
            Image.fromarray(image[:, :, 0]).save(folder / f"{number}.png")
        else:
            np.save(folder / f"{number}.npy", image)
    script = RECIPES / "domain" / f"{name}.sh"
    small = {"MODEL": "nano_patch4", "SIZE": 16, "EPOCHS": 2, "FINETUNE_EPOCHS": 1}
    more = "--batch_size 4 --num_workers 0 --device cpu --amp off --warmup_epochs 0"
    done, calls = record(script, **small, CLASSES=2, FLAGS=more)
    assert "stats.json" in done.stderr, "the recorder writes none"
    (stats,) = calls
    run(stats)
    _, calls = record(script, **small, CLASSES=2, FLAGS=more)
    for call in calls:
        run(call)
    out = tmp_path / "out"
    assert np.load(out / "features.npz")["embeddings"].shape == (16, 128)
    for picture in ("recon.png", "parts.png"):
        assert Image.open(out / picture).size > (16, 16)
    for folder in ("pretrain", "finetune"):
        epochs = (out / folder / "log.txt").read_text().splitlines()
        assert len(epochs) == (2 if folder == "pretrain" else 1)


def run(call):
    """A recorded command, in this process."""
    module, args, _ = parsed(call)
    module.main(args)
