"""Bad input: one line on stderr that says what is wrong, exit code 2, before any training."""

import pytest
import torch
from conftest import command_line, run, write_images

import main_pretrain
from util import cli


@pytest.fixture
def pretrain_error(monkeypatch, capsys):
    """Runs the command with flags that it must refuse; returns its one line on stderr."""

    def error(flags):
        monkeypatch.setattr("sys.argv", ["main_pretrain.py", *command_line(flags)])
        with pytest.raises(SystemExit) as caught:
            cli.run(main_pretrain.main, main_pretrain.get_args_parser())
        assert caught.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "warning:" not in line]
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    return error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "mae_vit_giant"}, "unknown model 'mae_vit_giant': choose one of"),
        ({"input_size": 30}, "input_size 30 x 30 (height x width) is not divisible by"),
        ({"input_size": [8, 30]}, "input_size 8 x 30"),
        ({"input_size": [8, 8, 8]}, "takes one number, or height and width"),
        ({"input_size": 0}, "0 is not an integer of at least 1"),
        ({"mask_ratio": 0}, "removes none"),
        ({"mask_ratio": 0.9}, "keeps none"),
        ({"mask_ratio": 1}, "keeps none"),
        ({"mask_ratio": 2}, "keeps none"),
        ({"mask_ratio": -1}, "argument --mask_ratio: -1 is not"),
        ({"mask_ratio": "nan"}, "argument --mask_ratio: nan is not"),
        ({"batch_size": 0}, "argument --batch_size: 0 is not an integer of at least 1"),
        ({"batch_size": 1.5}, "argument --batch_size: 1.5 is not an integer"),
        ({"epochs": 0}, "argument --epochs"),
        ({"accum_iter": 0}, "argument --accum_iter"),
        ({"num_workers": -1}, "argument --num_workers"),
        ({"lr": "nan"}, "argument --lr: nan is not a finite number"),
        ({"lr": -1}, "argument --lr: -1 is not"),
        ({"lr": "inf"}, "argument --lr: inf is not"),
        ({"blr": -1e-3}, "argument --blr"),
        ({"clip_grad": 0}, "argument --clip_grad: 0 is not a finite number above 0"),
        ({"seed": "x"}, "argument --seed: x is not an integer"),
        ({"batch_size": 19}, "18 training images, fewer than one global batch of 19"),
        ({"batch_size": 5, "accum_iter": 4}, "fewer than one global batch of 20"),
        ({"device": "tpu"}, "--device tpu is not one of"),
        ({"amp": "fp16"}, "--amp fp16 needs a CUDA device"),
        ({"amp": "fp8"}, "argument --amp: invalid choice: 'fp8'"),
        ({"resume": "missing.pth"}, "checkpoint missing.pth does not exist"),
        ({"data_path": ""}, "argument --data_path: is empty"),
        ({"unknown": 1}, "unrecognized arguments: --unknown 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_flags(pretrain_flags, pretrain_error, flags, message):
    assert message in pretrain_error(pretrain_flags | flags)
    assert not list(pretrain_flags["output_dir"].glob("*.pth"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(pretrain_flags, pretrain_error):
    assert "no usable CUDA device" in pretrain_error(pretrain_flags | {"device": "cuda"})


def test_wrong_data_paths(pretrain_flags, pretrain_error, tmp_path):
    del pretrain_flags["data_path"]
    assert "required: --data_path" in pretrain_error(pretrain_flags)

    a_file, empty, broken = tmp_path / "file", tmp_path / "empty", tmp_path / "broken"
    a_file.write_text("")
    empty.mkdir()
    write_images(broken, 3)
    for path in broken.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    for path, message in (
        (tmp_path / "missing", "does not exist"),
        (a_file, "is a file, not a folder"),
        (empty, "has no images"),
        (broken, "has no readable images"),
    ):
        line = pretrain_error(pretrain_flags | {"data_path": path})
        assert message in line
        assert str(path) in line


def test_output_dir_that_cannot_be_written(pretrain_flags, pretrain_error, tmp_path):
    (tmp_path / "file").write_text("")
    for flag in ("output_dir", "log_dir"):
        line = pretrain_error(pretrain_flags | {flag: tmp_path / "file" / "out"})
        assert f"--{flag}" in line
        assert "can't be written" in line


def test_checkpoints_that_cannot_be_resumed(pretrain_flags, pretrain_error, pretrain, tmp_path):
    flags = pretrain_flags | {"epochs": 1, "warmup_epochs": 0.5}
    pretrain(flags)
    whole = flags["output_dir"] / "checkpoint-last.pth"
    files = {name: tmp_path / f"{name}.pth" for name in ("torn", "text", "number", "foreign")}
    files["torn"].write_bytes(whole.read_bytes()[:-1000])
    files["text"].write_text("no checkpoint")
    torch.save(3, files["number"])
    torch.save({"model": {"weight": torch.zeros(1)}, "epoch": 3}, files["foreign"])
    flags["output_dir"] = tmp_path / "new"
    for name, message in (
        ("torn", "is torn or not a checkpoint"),
        ("text", "is torn or not a checkpoint"),
        ("number", "holds no model weights"),
        ("foreign", "is not a training state of main_pretrain.py"),
    ):
        assert message in pretrain_error(flags | {"resume": files[name]})

    for changed, message in (
        ({"model": "mae_vit_tiny_patch4"}, "model (tiny_test_model -> mae_vit_tiny_patch4)"),
        ({"lr": 1e-3, "seed": 7}, "lr (0.01 -> 0.001), seed (0 -> 7)"),
        ({"batch_size": 3}, "batch_size (2 -> 3)"),
        ({"input_size": 16}, "input_size (8 -> 16)"),
        ({"epochs": 2}, "epochs (1 -> 2)"),
    ):
        assert message in pretrain_error(flags | changed | {"resume": whole})


def test_a_changed_image_folder_is_not_resumed(pretrain_flags, pretrain_error, pretrain, tmp_path):
    folder = tmp_path / "growing"
    write_images(folder, 4)
    flags = pretrain_flags | {"data_path": folder, "epochs": 1, "warmup_epochs": 0.5}
    pretrain(flags)
    write_images(folder, 5)
    assert "images (4 -> 5)" in pretrain_error(flags)
    (folder / "004.png").unlink()
    (folder / "003.png").rename(folder / "renamed.png")
    assert "image_names (" in pretrain_error(flags)


def test_long_warmup_is_a_warning(pretrain_flags, pretrain, capsys):
    pretrain(pretrain_flags | {"warmup_epochs": 2})
    assert "warning: warmup_epochs 2.0 is not below epochs 2" in capsys.readouterr().err


def test_help_prints_every_default(capsys):
    with pytest.raises(SystemExit):
        main_pretrain.get_args_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    for flag, default in (
        ("--batch_size", 64),
        ("--epochs", 400),
        ("--accum_iter", 1),
        ("--model", "mae_vit_large_patch16"),
        ("--input_size", 224),
        ("--mask_ratio", 0.75),
        ("--weight_decay", 0.05),
        ("--blr", 0.001),
        ("--min_lr", 0.0),
        ("--warmup_epochs", 40),
        ("--output_dir", "./output_dir"),
        ("--seed", 0),
        ("--resume", "auto"),
        ("--amp", "auto"),
        ("--save_every", 20),
        ("--log_every", 20),
    ):
        described = text.split(f" {flag} ", 1)[1].split(" --")[0]
        assert f"(default: {default})" in described, flag


def test_scripts_exit_with_the_error(tmp_path):
    for script, flags in (
        ("main_pretrain.py", {"data_path": tmp_path / "missing", "device": "cpu"}),
        ("main_visualize.py", {"checkpoint": tmp_path / "missing", "images": "a.png"}),
    ):
        code, out, err = run(script, flags)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
