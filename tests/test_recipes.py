"""The recipes that are shell scripts: their commands parse, add up, and do what they promise.

A script runs with a python, torchrun and sbatch that only write down what they are asked to do. The
commands' own parsers read it.
"""

import importlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from util import flags

RECIPES = ROOT / "recipes"
SCRIPTS = sorted(path for path in RECIPES.rglob("*.sh") if path.name != "launch.sh")
ON_GPUS = [path for path in SCRIPTS if path.parent.name not in ("small", "domain")]
SIZES = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())["results"]
IMAGES = 1_281_167  # of ImageNet's training

# Writes its name and arguments down, a line each. What is no command of this project runs.
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

    def started(script, **variables):
        calls.write_text("")
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "LC_ALL": "C"}
        environment |= {k: str(v) for k, v in (usual | variables).items() if v is not None}
        done = subprocess.run(
            ["bash", script], env=environment, cwd=tmp_path, text=True, capture_output=True
        )
        return done, [line.split("\0")[:-1] for line in calls.read_text().splitlines()]

    return started


def parsed(call):
    """(module, flags, processes) of a call, as its command's own parser reads it."""
    launcher, *words = call
    processes = 1
    start = next(index for index, word in enumerate(words) if word.endswith(".py"))
    options = dict(zip(words[:start], words[1:start], strict=False))
    if launcher == "torchrun":
        processes = int(options["--nproc_per_node"])
    elif launcher == "sbatch":
        assert words[start - 1] == "slurm/train.sbatch"
        counts = dict(word.split("=") for word in words[: start - 1] if "=" in word)
        processes = int(counts["--nodes"]) * int(counts["--gpus-per-node"])
    module = importlib.import_module(words[start].removesuffix(".py"))
    return module, module.get_args_parser().parse_args(words[start + 1 :]), processes


def commands(calls):
    """`parsed` calls of this project's commands, without the others."""
    return [parsed(call) for call in calls if any(word.startswith("main_") for word in call)]


# ---- all of them


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_commands_take_these_flags_and_each_others_files(record, script, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stats.json").write_text('{"flags": "--in_chans 2 --value_range 0 9"}')
    done, calls = record(script, CLASSES=3)
    assert done.returncode == 0, done.stderr
    made = set()
    found = commands(calls)
    for module, args, _ in found:
        name = module.__name__
        inputs = [vars(args).get(flag) for flag in ("finetune", "checkpoint", "resume")]
        assert made.issuperset(path for path in inputs if path not in (None, "auto"))
        if name != "main_data" and "input_size" in args and args.input_size is not None:
            assert args.input_size == found[0][1].input_size
        if getattr(args, "eval", False):
            trained = next(a for m, a, _ in found if m is module and not a.eval)
            for flag in ("model", "nb_classes", "global_pool", "input_size"):
                assert getattr(args, flag) == getattr(trained, flag)
            assert args.resume.endswith("checkpoint-last.pth"), "the last epoch, not the best"
        elif "output_dir" in args:
            made |= {f"{args.output_dir}/{file}" for file in ("checkpoint-last.pth",)}
        if name == "main_pretrain":
            made.add(f"{args.output_dir}/encoder.safetensors")
            assert args.in_chans == (2 if script.parent.name == "domain" else None)
    assert len(found) >= 3
    outputs = [a.output_dir for m, a, _ in found if "output_dir" in a and not vars(a).get("eval")]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_headers_say_what_to_expect_and_that_it_was_not_run(script):
    header = script.read_text().split("\nsource ")[0]
    assert f"bash {script.relative_to(ROOT)}" in header
    for what in ("# measured: ",) if script.parent.name == "small" else HEADER:
        assert f"\n{what}" in header


HEADER = ("# not run here", "# hours: not measured here", "# expected: ")


def test_what_is_missing_or_wrong_is_one_line(record, tmp_path):
    base = RECIPES / "imagenet" / "base.sh"
    for variables, message in (
        ({"DATA": None}, "DATA is not set: DATA=IMAGES OUT=FOLDER bash"),
        ({"OUT": ""}, "OUT is not set"),
        ({"DATA": "gone"}, "DATA=gone does not exist: give the folder"),
        ({"GPUS": "all"}, "GPUS=all is not an integer of at least 1"),
        ({"GPUS": 6}, "GPUS=6 on NODES=1 can't share the effective batch"),
        ({"GPU_GB": 48}, "GPU_GB=48: take 24, 40 or 80"),
        ({"NODES": 2}, "NODES=2 without SLURM: see docs/clusters.md"),
    ):
        done, calls = record(base, **variables)
        assert (done.returncode, done.stdout, calls) == (2, "", [])
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and message in line


def test_a_failed_command_ends_a_recipe(record, tmp_path):
    (tmp_path / "programs" / "python").write_text("#!/bin/sh\necho $1 >> calls\nexit 3\n")
    done, calls = record(RECIPES / "imagenet" / "base.sh")
    assert done.returncode == 3
    assert len(done.stdout.strip().splitlines()) == 1


# ---- on GPUs


@pytest.mark.parametrize("script", ON_GPUS, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus, nodes", [(1, 1), (8, 1), (4, 2), (8, 8)])
def test_effective_batches_are_the_papers_and_fit(record, script, gpus, nodes):
    effective = {"main_pretrain": 4096, "main_finetune": 1024, "main_linprobe": 16384}
    rates = {"main_pretrain": {2.4e-3}, "main_finetune": {2e-3, 4e-3}, "main_linprobe": {6.4}}
    for card in ("24", "40", "80"):
        slurm = {"SLURM": "--time=1:00:00"} if nodes > 1 else {}
        done, calls = record(script, GPUS=gpus, NODES=nodes, GPU_GB=card, **slurm)
        assert done.returncode == 0, done.stderr
        for module, args, processes in commands(calls):
            assert processes == gpus * nodes
            if getattr(args, "eval", False):
                continue
            name = module.__name__
            assert args.batch_size * args.accum_iter * processes == effective[name]
            assert any(args.blr * effective[name] / 256 == pytest.approx(r) for r in rates[name])
            if name != "main_linprobe":
                task = name.removeprefix("main_")
                largest = SIZES[task][args.model]["plain"]["largest_batch"][card]
                assert largest / 2 < args.batch_size * (args.accum_iter > 1) <= largest or (
                    args.accum_iter == 1 and args.batch_size <= largest
                )


def test_the_papers_settings():
    """As docs/finetuning.md had them: paper, appendix A."""


@pytest.mark.parametrize("script", ON_GPUS, ids=lambda path: path.stem)
def test_one_gpu_takes_python_several_torchrun_and_slurm_a_chain_of_jobs(record, script):
    _, calls = record(script)
    assert {call[0] for call in calls} == {"python"}
    _, calls = record(script, GPUS=8, FLAGS="--compile --save_minutes 9")
    assert {tuple(call[:5]) for call in calls} == {
        ("torchrun", "--nproc_per_node", "8", "--max-restarts", "3")
    }
    for _, args, _ in commands(calls):
        assert args.compile == (args.save_minutes == 9) == (not vars(args).get("eval"))
    slurm = "--time=24:00:00 --cpus-per-task=96"
    done, calls = record(script, GPUS=8, NODES=2, SLURM=slurm)
    for number, call in enumerate(calls):
        assert call[:6] == ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=8", *slurm.split()]
        waits = [word for word in call if word.startswith("--dependency")]
        assert waits == [f"--dependency=afterok:{number}"] * (number > 0)
        assert f"job {number + 1}: {call[call.index('slurm/train.sbatch') + 1]}" in done.stdout
