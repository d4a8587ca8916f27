"""Checkpoint files: whole or absent, and loaded without running code from them."""

import argparse
import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, run

from util.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint


def test_a_save_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    for value in (1.0, 2.0):
        save_checkpoint(path, {"model": {"weight": torch.full((3,), value)}})
        assert load_checkpoint(path)["model"]["weight"].tolist() == [value] * 3
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """With a limit on the size of files, as a disk that fills up in the middle of a write."""
    path = tmp_path / "checkpoint-last.pth"
    save_checkpoint(path, {"model": {"weight": torch.ones(3)}})
    code = f"""
import resource, signal, torch
from util.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint({str(path)!r}, {{"model": {{"weight": torch.zeros(1_000_000)}}}})
except OSError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"refused: {path} could not be written" in done.stdout, done.stderr
    assert load_checkpoint(path)["model"]["weight"].tolist() == [1.0] * 3
    assert os.listdir(tmp_path) == [path.name]


def test_training_outlives_a_full_disk_but_not_its_final_checkpoint(pretrain_flags):
    """The same limit on a whole run: warned of every time, an error at the end."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    limited = ROOT / "tests" / "tiny_pretrain.py"
    code, out, err = run(limited, pretrain_flags, preexec_fn=limit)
    assert code == 2, err
    assert "step 9/9" in out
    assert "checkpoint-last.pth could not be written" in err
    assert err.splitlines()[-1].startswith("error: the final checkpoint could not be written")
    assert not list(pretrain_flags["output_dir"].glob("*.pth*"))


def test_released_files_and_bare_state_dicts(tmp_path):
    weights = {"cls_token": torch.zeros(1, 1, 4)}
    released = {"model": weights, "args": argparse.Namespace(model="mae_vit_base_patch16", lr=1.0)}
    torch.save(released, tmp_path / "released.pth")
    contents = load_checkpoint(tmp_path / "released.pth")
    assert contents["args"] == {"model": "mae_vit_base_patch16", "lr": 1.0}
    torch.save(weights, tmp_path / "bare.pth")
    assert list(load_checkpoint(tmp_path / "bare.pth")["model"]) == ["cls_token"]


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch, user_error):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"weight": torch.zeros(1)}, "extra": RunsCode()}, "zip.pth")
    with open("pickle.pth", "wb") as file:
        pickle.dump(RunsCode(), file)
    for name in ("zip.pth", "pickle.pth"):
        assert name in user_error(lambda name=name: load_checkpoint(name))
    assert not os.path.exists("executed")


def test_the_newest_whole_checkpoint_is_found(tmp_path, capsys, user_error):
    assert find_checkpoint("auto", tmp_path) == (None, None)
    names = ["checkpoint-9.pth", "checkpoint-19.pth", "checkpoint-last.pth"]
    for name in names:
        save_checkpoint(tmp_path / name, {"model": {"weight": torch.zeros(1)}})
    assert find_checkpoint("auto", tmp_path)[1].name == "checkpoint-last.pth"
    assert find_checkpoint("none", tmp_path) == (None, None)
    (tmp_path / names[2]).write_bytes(b"")
    assert find_checkpoint("auto", tmp_path)[1].name == "checkpoint-19.pth"
    capsys.readouterr()
    (tmp_path / names[1]).write_bytes(b"PK\x03\x04 torn")
    assert find_checkpoint("auto", tmp_path)[1].name == "checkpoint-9.pth"
    assert capsys.readouterr().err.count("is torn") == 2
    (tmp_path / names[0]).write_bytes(b"")
    assert "no whole checkpoint" in user_error(lambda: find_checkpoint("auto", tmp_path))


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_state_that_is_not_finite_is_not_written(tmp_path, part, user_error):
    from util import optim, precision
    from util.checkpointer import Checkpointer
    from util.distributed import Process

    device = torch.device("cpu")
    model = torch.nn.Linear(2, 2)
    optimizer = optim.adamw(model.parameters(), betas=(0.9, 0.95))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpointer = Checkpointer(
        tmp_path,
        Process(0, 1, device),
        state={
            "model": model,
            "optimizer": optimizer,
            "scaler": precision.grad_scaler(device, None),
        },
        settings={},
        contents={},
        save_minutes=5,
    )
    assert checkpointer.save("good.pth", epoch=0, step=1)
    broken = model.weight.data if part == "model" else optimizer.state[model.weight]["exp_avg_sq"]
    broken[0, 0] = float("inf")
    message = user_error(lambda: checkpointer.save("bad.pth", epoch=0, step=2))
    assert f"the {part} holds values that are not finite after step 2 of epoch 0" in message
    assert os.listdir(tmp_path) == ["good.pth"]
