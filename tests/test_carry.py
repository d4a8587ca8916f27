"""Every snippet of docs/carry.md runs, one after another, on a pre-training of two steps."""

import importlib
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, write_images

from util.data import eval_transform, normalize
from util.decoding import read_image

QUICK = "--batch_size 2 --num_workers 0 --device cpu --amp off --warmup_epochs 0"


def parse(line):
    """The module that a line `main_X.py ...` names, and its flags."""
    command, *flags = shlex.split(line)
    module = importlib.import_module(command.removesuffix(".py"))
    return module, module.get_args_parser().parse_args(flags)


def run(line, more=""):
    """Run a line `python main_X.py ...` in this process."""
    module, args = parse(f"{line} {more}".removeprefix("python "))
    module.main(args)


def test_every_snippet(tmp_path, monkeypatch):
    pytest.importorskip("timm", minversion="1.0.16")  # which loads folders
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate(("train/a", "train/b", "val/a", "val/b")):
        write_images(tmp_path / "DIR" / folder, 2, seed=number, size=(240, 260))
    shutil.copy(ROOT / "benchmarks" / "photographs" / "flower.jpg", "cat.jpg")
    pretrain = "python main_pretrain.py --data_path DIR --model mae_vit_tiny_patch16 --epochs 1"
    run(pretrain, QUICK)

    text = (ROOT / "docs" / "carry.md").read_text()
    blocks = re.findall(r"```(bash|python|)\n(.*?)```", text, re.DOTALL)
    names = {}
    of_timm = of_transformers = None
    for kind, code in blocks:
        if kind == "python":
            assert len(code.split("\n\n")[-1].splitlines()) <= 5
            exec(code, names)
            if "features.npz" in code:
                assert names["embeddings"].shape == (4, 192)
                assert names["similar"][0] == names["features"]["filenames"][0]
            elif "create_transform" in code:
                of_timm = names["model"], names["features"]
            elif "AutoImageProcessor" in code:
                of_transformers = names["model"], names["features"]
            continue
        for line in code.replace("\\\n", "").splitlines():
            if kind == "bash":
                run(line, QUICK * ("main_pretrain" in line or "main_finetune" in line))
            else:  # of the reference below the snippets: its flags exist
                parse(line[line.index("main_") :])

    assert names["masks"].shape == (1, 21, 224, 224)
    embed = "python main_embed.py --checkpoint output_dir/encoder.safetensors --device cpu"
    run(f"{embed} --images cat.jpg --output cat.npz --num_workers 0")
    expected = torch.from_numpy(np.load("cat.npz")["embeddings"])
    imgs = normalize(eval_transform(224)(read_image("cat.jpg"))[None])
    with torch.inference_mode():
        found = [of_timm[0](imgs), of_transformers[0](imgs).last_hidden_state[:, 1:].mean(dim=1)]
    for features in found:
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    for _, features in (of_timm, of_transformers):  # with their own, slightly different, resize
        assert torch.cosine_similarity(features, expected).item() > 0.998
