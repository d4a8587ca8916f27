"""Training is what it was: the first steps of the recipes lose what tests/golden says they lost.

The losses were found by the code of their time, so they prove no figure right. They show that a
change meant to leave training alone does so. What such a change is to do about them is in
CONTRIBUTING.md.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU
from packaging.version import parse

from benchmarks import golden, report

# A processor's flags, the best for bf16 first, and what golden.OTHERS calls one without the better.
INSTRUCTIONS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX512-BF16",
    "avx512f": "AVX512",
    "avx2": "AVX2",
}


def instructions(hardware):
    """The best instructions that a CPU has for bf16."""
    words = hardware["cpu"].split()
    return next((name for flag, name in INSTRUCTIONS.items() if flag in words), "none of x86's")


def why_another(recipe, dtype, contents):
    """Why a curve may be another one here than in a golden file; "" if it must be the same."""
    own, its = report.versions(), contents["versions"]
    # Under 1.0.12 the first loss is 9% off that under 1.0.31, which rounds cutmix's rectangles in
    # another way. Whether more differs was not looked for.
    if recipe == "finetune" and parse(own["timm"]) < parse(its["timm"]):
        return f"timm {own['timm']} augments or mixes images in another way than {its['timm']}"
    if dtype == "float32":
        return ""
    if parse(own["torch"]) < parse(its["torch"]):  # 2.6 is 8.5e-4 off
        return f"bf16 is rounded elsewhere in torch {own['torch']} than in {its['torch']}"
    has, known = instructions(report.hardware()), instructions(contents["hardware"])
    if has not in {known, *contents["curves"][recipe]["reruns"]}:
        return f"the spread of bf16 is of no run with the instructions here: {has}"
    return ""


@pytest.mark.parametrize("dtype", golden.AMP)
@pytest.mark.parametrize("recipe", golden.RECIPES)
def test_first_steps_lose_what_they_did(recipe, dtype):
    contents = json.loads(golden.file(CPU, dtype).read_text())
    if reason := why_another(recipe, dtype, contents):
        pytest.skip(reason)
    curve = contents["curves"][recipe]
    losses, _ = golden.train(recipe, dtype, "cpu", steps=golden.FIRST)
    assert len(losses) == golden.FIRST
    departure = golden.departure(losses, curve["losses"])
    assert departure <= golden.tolerance(curve, golden.FIRST), (
        "training is not what it was: see CONTRIBUTING.md"
    )


@pytest.mark.parametrize("path", sorted(golden.FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_files_are_of_today_s_recipes(path):
    dtype = path.stem.rpartition("_")[2]
    curves = json.loads(path.read_text())["curves"]
    commands = {recipe: curve["command"] for recipe, curve in curves.items()}
    assert commands == {recipe: golden.command(recipe, dtype) for recipe in golden.RECIPES}
    for curve in curves.values():
        assert [len(curve[name]) for name in ("losses", "epochs")] == [golden.STEPS, 3]
        if path.name == "cpu_float32.json":
            assert golden.tolerance(curve, golden.FIRST) == golden.TOLERANCE


def test_a_gpu_gets_files_once_and_is_checked_from_then_on(monkeypatch, tmp_path, capsys):
    runs = [
        {"float32": 1, "bf16": 1},
        {"float32": 1.000001, "bf16": 1.002},
        {"float32": 1, "bf16": 0.999},
        # The files are made of these three, and compared with the next three.
        {"float32": 1.000009, "bf16": 0.9970},
        {"float32": 1.000011, "bf16": 1.0032},
        {"float32": 2, "bf16": 2},
    ]
    rates = iter(runs)

    def train_all(device, types):
        rate = next(rates)
        return {t: {r: ([rate[t]] * 51, [rate[t]] * 3) for r in golden.RECIPES} for t in types}

    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    monkeypatch.setattr(golden, "train_all", train_all)
    monkeypatch.setattr(golden, "select_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU of 80 GB")
    args = SimpleNamespace(device="cuda", remake=False)

    golden.main(args)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["a_gpu_of_80_gb_bf16.json", "a_gpu_of_80_gb_float32.json"]
    curve = json.loads((tmp_path / names[0]).read_text())["curves"]["pretrain"]
    assert curve["spread"] == {"20": 0.0031, "50": 0.0031}  # 1.002 / 0.999 - 1, rounded up
    assert curve["reruns"]["repetition 2"] == {"20": 0.001, "50": 0.001}

    golden.main(args)  # within 1e-5, or within the spread
    with pytest.raises(SystemExit) as stopped:
        golden.main(args)
    _, *bent = stopped.value.code.splitlines()
    assert len(bent) == 2 * 3 * len(golden.RECIPES)
    assert bent[0] == "  pretrain in float32: the first losses are 1.1e-05 off, 1.0e-05 is allowed"

    installed = report.versions()
    here = installed | {"torch": "1.9", "numpy": "1.0"}  # numpy moves no loss
    monkeypatch.setattr(report, "versions", lambda: here)
    with pytest.raises(SystemExit) as stopped:
        golden.main(args)
    made_with = f"was made with torch {installed['torch']}, this is 1.9"
    assert stopped.value.code.splitlines()[-2:] == [
        f"  a_gpu_of_80_gb_float32.json {made_with}",
        f"  a_gpu_of_80_gb_bf16.json {made_with}",
    ]
    assert stopped.value.code.count("was made with") == 2


@pytest.mark.parametrize("losses", [[1, 2.00003], [1, float("nan")], [1, float("inf")]])
def test_a_loss_that_is_off_shows(losses):
    assert not golden.departure(losses, [1, 2, 3]) <= golden.TOLERANCE
