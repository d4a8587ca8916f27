"""Bad input: one line on stderr that says what is wrong, exit code 2, before any training."""

import io
import json
import os
import re
from functools import partial

import pytest
import torch
from helpers import command_line, run, start_fresh, write_images

import main_finetune
import main_linprobe
import main_pretrain
from util import cli, distributed, memory, precision, survey
from util.errors import UserError, say


@pytest.fixture
def command_error(monkeypatch, capsys):
    """Runs a command with flags that it must refuse; returns its one line on stderr."""

    def error(command, flags):
        monkeypatch.setattr("sys.argv", [f"{command.__name__}.py", *command_line(flags)])
        with pytest.raises(SystemExit) as caught:
            cli.run(command.main, command.get_args_parser())
        assert caught.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "warning:" not in line]
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    return error


@pytest.fixture
def pretrain_error(command_error):
    return partial(command_error, main_pretrain)


@pytest.fixture
def finetune_error(command_error):
    return partial(command_error, main_finetune)


@pytest.fixture
def linprobe_error(command_error):
    return partial(command_error, main_linprobe)


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
        (a_file, "names no file that exists"),
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


def test_help_prints_every_default_of_fine_tuning_and_probe(capsys):
    shared = {"--model": "vit_large_patch16", "--nb_classes": 1000, "--input_size": 224}
    finetune = {
        "--batch_size": 64,
        "--epochs": 50,
        "--blr": 0.001,
        "--min_lr": 1e-06,
        "--warmup_epochs": 5,
        "--weight_decay": 0.05,
        "--layer_decay": 0.75,
        "--drop_path": 0.1,
        "--aa": "rand-m9-mstd0.5-inc1",
        "--smoothing": 0.1,
        "--reprob": 0.25,
        "--remode": "pixel",
        "--recount": 1,
        "--mixup": 0.0,
        "--cutmix": 0.0,
        "--mixup_prob": 1.0,
        "--mixup_switch_prob": 0.5,
        "--mixup_mode": "batch",
        "--global_pool": True,
    }
    probe = {
        "--batch_size": 512,
        "--epochs": 90,
        "--blr": 0.1,
        "--min_lr": 0.0,
        "--warmup_epochs": 10,
        "--weight_decay": 0.0,
        "--global_pool": False,
    }
    for command, defaults in ((main_finetune, finetune), (main_linprobe, probe)):
        with pytest.raises(SystemExit):
            command.get_args_parser().parse_args(["--help"])
        text = " ".join(capsys.readouterr().out.split("options:")[1].split())
        for flag, default in (shared | defaults).items():
            described = text.split(f" {flag} ", 1)[1].split(" --")[0]
            assert f"(default: {default})" in described, flag


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "mae_vit_base_patch16"}, "unknown model 'mae_vit_base_patch16': choose one of"),
        ({"input_size": 30}, "input_size 30 x 30 (height x width) is not divisible by"),
        ({"nb_classes": 1}, "--nb_classes 1 is below the 2 classes in"),
        ({"mixup": 0.8, "batch_size": 3}, "batch_size 3 is not even"),
        ({"cutmix": 1, "batch_size": 3}, "batch_size 3 is not even"),
        ({"cutmix_minmax": [0.2, 0.8], "batch_size": 3}, "batch_size 3 is not even"),
        (
            {"smoothing": 1},
            "argument --smoothing: 1 is not a finite number of at least 0 and",
        ),
        ({"smoothing": -0.1}, "argument --smoothing: -0.1 is not"),
        (
            {"layer_decay": 0},
            "argument --layer_decay: 0 is not a finite number above 0 and",
        ),
        ({"layer_decay": 1.01}, "argument --layer_decay: 1.01 is not"),
        ({"drop_path": 1}, "argument --drop_path: 1 is not"),
        ({"aa": "rand-q3"}, "timm can't use --aa rand-q3 (Unknown RandAugment"),
        ({"aa": "rand-n100-tweights"}, "timm can't use --aa rand-n100-tweights"),
        ({"cutmix_minmax": [0.8, 0.2]}, "--cutmix_minmax 0.8 0.2 leaves no whole number of pixels"),
        (
            {"cutmix_minmax": [0.01, 0.1]},
            "--cutmix_minmax 0.01 0.1 leaves no whole number of pixels",
        ),
        ({"batch_size": 19}, "18 training images, fewer than one global batch of 19"),
        ({"finetune": "missing.pth"}, "checkpoint missing.pth does not exist"),
        ({"finetune": ""}, "argument --finetune: is empty: give a path"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_flags_of_fine_tuning(classify_flags, finetune_error, flags, message):
    assert message in finetune_error(classify_flags | flags)
    assert not list(classify_flags["output_dir"].glob("*.pth"))


def test_wrong_labelled_folders(classify_flags, finetune_error, linprobe_error, tmp_path):
    write_images(tmp_path / "differ" / "train" / "a", 4)
    write_images(tmp_path / "differ" / "val" / "b", 4)
    write_images(tmp_path / "no_val" / "train" / "a", 4)
    write_images(tmp_path / "flat" / "train", 4)
    for name, message in (
        ("differ", "they lack a and add b"),
        ("no_val", f"{tmp_path / 'no_val' / 'val'} does not exist"),
        ("flat", "000.png is in no class"),
        ("missing", "does not exist"),
    ):
        for error in (finetune_error, linprobe_error):
            assert message in error(classify_flags | {"data_path": tmp_path / name})


def test_a_probe_of_single_images_is_refused(classify_flags, linprobe_error):
    assert "batch_size 1 has no statistics" in linprobe_error(classify_flags | {"batch_size": 1})


def test_weights_that_are_no_numbers_are_not_evaluated(
    tmp_path, classify_flags, finetune, finetune_error, capsys
):
    """Another input size is evaluated, with a warning."""
    finetune(classify_flags | {"epochs": 1, "warmup_epochs": 0.5, "dist_eval": True})
    assert "--dist_eval is not needed" in capsys.readouterr().err
    del classify_flags["finetune"]
    whole = classify_flags["output_dir"] / "checkpoint-last.pth"
    finetune(classify_flags | {"eval": True, "resume": whole, "input_size": 12})
    assert "was trained with input_size 8, not 12" in capsys.readouterr().err
    contents = torch.load(whole, weights_only=True)
    contents["model"]["head.weight"].fill_(3e38)
    torch.save(contents, tmp_path / "large.pth")
    flags = classify_flags | {"eval": True, "resume": tmp_path / "large.pth"}
    assert "the loss on the held-out images is" in finetune_error(flags)
    contents["model"]["cls_token"] *= torch.nan
    torch.save(contents, tmp_path / "nan.pth")
    flags = classify_flags | {"eval": True, "resume": tmp_path / "nan.pth"}
    assert "nan.pth holds values that are not finite in cls_token" in finetune_error(flags)


def test_more_classes_than_found_are_a_warning(classify_flags, finetune, capsys):
    finetune(classify_flags | {"nb_classes": 3, "epochs": 1, "warmup_epochs": 0.5})
    assert "warning: --nb_classes 3 is above the 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("evaluating", [False, True])
def test_a_broken_image_is_not_dropped_from_evaluation(
    tmp_path, classify_flags, finetune, finetune_error, monkeypatch, capsys, evaluating, sampled
):
    """It is found before the first step if it is in the sample, else in the evaluation."""
    folder = tmp_path / "broken"
    for split in ("train", "val"):
        for label in "ab":
            write_images(folder / split / label, 4)
    flags = classify_flags | {"data_path": folder, "epochs": 1, "warmup_epochs": 0.5}
    if evaluating:
        finetune(flags)
        flags |= {"eval": True, "resume": flags["output_dir"] / "checkpoint-last.pth"}
        del flags["finetune"]
    (folder / "val" / "b" / "002.png").write_bytes(b"no image")
    monkeypatch.setattr(survey, "SAMPLED_FILES", 32 if sampled else 2)  # the first and the last
    message = finetune_error(flags)
    assert f"{folder / 'val' / 'b' / '002.png'} is unreadable" in message
    if sampled and not evaluating:
        assert not list(flags["output_dir"].glob("*.pth"))
    elif not evaluating:  # the epoch of training is not lost
        write_images(folder / "val" / "b", 4)
        finetune(flags)
        assert "checkpoint-last.pth after step 4 of epoch 0" in capsys.readouterr().out


def test_wrong_checkpoints(
    tmp_path, classify_flags, encoder, finetune, linprobe, finetune_error, linprobe_error
):
    """To start from, to evaluate, and to go on from after the encoder was replaced."""
    for model, message in (
        ("vit_tiny_patch4", "has width 32 and 2 blocks, the model width 192 and 12 blocks"),
        ("vit_tiny_patch2", "has patches of 4 x 4 pixels"),
    ):
        for error in (finetune_error, linprobe_error):
            assert message in error(classify_flags | {"model": model})

    finetune(classify_flags | {"epochs": 1, "warmup_epochs": 0.5})
    classifier = classify_flags["output_dir"] / "checkpoint-last.pth"
    renamed = tmp_path / "renamed"
    write_images(renamed / "val" / "a", 2)
    write_images(renamed / "val" / "c", 2)
    flags = classify_flags | {"eval": True, "resume": classifier}
    assert "by --resume or by --finetune" in finetune_error(flags)
    del flags["finetune"]
    for changed, message in (
        ({"resume": "auto"}, "--eval needs a classifier's checkpoint"),
        ({"resume": encoder}, "has no classifier's head: it holds a pre-trained encoder"),
        ({"nb_classes": 3}, "trained with nb_classes 2, not 3"),
        ({"cls_token": True}, "trained with global_pool True, not False"),
        ({"model": "vit_tiny_patch4"}, "trained with model tiny_test_vit, not vit_tiny_patch4"),
        ({"data_path": renamed}, "they add c"),
    ):
        assert message in finetune_error(flags | changed)

    probe_dir = tmp_path / "probe"
    linprobe(classify_flags | {"output_dir": probe_dir})
    assert "give it by --resume" in linprobe_error(classify_flags | {"eval": True})
    flags = classify_flags | {"eval": True, "resume": probe_dir / "checkpoint-last.pth"}
    contents = torch.load(encoder, weights_only=True)
    contents["model"]["cls_token"] += 1
    other = tmp_path / "other.pth"
    torch.save(contents, other)
    for changed, message in (
        ({"finetune": other}, "is a probe of a different encoder"),
        ({"nb_classes": 3}, "trained with nb_classes 2, not 3"),
        ({"global_pool": True}, "trained with global_pool False, not True"),
        ({"resume": classifier}, "is not a checkpoint of main_linprobe.py"),
        ({"data_path": renamed}, "they add c"),
    ):
        assert message in linprobe_error(flags | changed)
    assert "encoder (" in finetune_error(
        classify_flags | {"epochs": 1, "warmup_epochs": 0.5, "finetune": other}
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_line_that_cannot_be_written_does_not_end_a_run():
    """As where the output goes to a file on a full disk."""
    with open("/dev/full", "wb", buffering=0) as full:
        stream = io.TextIOWrapper(full, write_through=True)
        with pytest.raises(OSError, match="No space left"):
            print("a line", file=stream, flush=True)
        say("a line", stream)
        stream.detach()


def test_ctrl_c_before_the_training_is_no_traceback(monkeypatch):
    def interrupted(_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["a command"])
    with pytest.raises(SystemExit) as caught:
        cli.run(interrupted, cli.ArgumentParser())
    assert caught.value.code == 130


def test_scripts_exit_with_the_error(tmp_path):
    for script, flags in (
        ("main_pretrain.py", {"data_path": tmp_path / "missing", "device": "cpu"}),
        ("main_visualize.py", {"checkpoint": tmp_path / "missing", "images": "a.png"}),
    ):
        code, out, err = run(script, flags, start=start_fresh)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1


# ---- no memory left


@pytest.mark.parametrize("counted_size", [8, 224])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
    ids=["device", "library", "host"],
)
def test_running_out_of_memory(
    pretrain_flags, pretrain_error, monkeypatch, tmp_path, error, counted_size
):
    """What it takes is said where it was counted: on a GPU in bf16, for this model and size."""

    def run_out(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(main_pretrain, "train_one_epoch", run_out)
    lines = {
        "plain": {"fixed_gib": 1, "mib_per_image": 1024},
        "grad_checkpointing": {"fixed_gib": 1, "mib_per_image": 512},
    }
    results = {"pretrain": {"tiny_test_model": {"input_size": counted_size} | lines}}
    counted = tmp_path / "memory.json"
    counted.write_text(json.dumps({"results": results | {"finetune": {}}}))
    monkeypatch.setattr(memory, "COUNTED", counted)
    is_counted = counted_size == 8 and "Default" not in str(error)
    takes = ", which takes about 3.0 GiB, or 2.0 with --grad_checkpointing" if is_counted else ""
    add = "add to the same command, which then continues from the last checkpoint, "
    lower = (
        "--accept_changes with a lower --batch_size and a higher --accum_iter "
        "(docs/memory.md says what fits)"
    )
    problem = "error: out of memory with --batch_size 2"
    assert pretrain_error(pretrain_flags) == f"{problem}: {add}--grad_checkpointing, or {lower}"
    bf16 = {"amp": "bf16", "output_dir": tmp_path / "bf16", "grad_checkpointing": True}
    assert pretrain_error(pretrain_flags | bf16) == f"{problem}{takes}: {add}{lower}"


def test_running_out_of_memory_where_recomputing_is_no_help(
    classify_flags, linprobe_error, monkeypatch
):
    def run_out(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(main_finetune, "train_one_epoch", run_out)
    message = linprobe_error(classify_flags)
    assert message == (
        "error: out of memory with --batch_size 2: lower it and add --accept_changes to go on from "
        "the last checkpoint"
    )


def test_other_errors_of_torch_are_no_lack_of_memory(pretrain_flags, pretrain, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(main_pretrain, "train_one_epoch", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        pretrain(pretrain_flags)


# ---- several processes on GPUs


def test_one_gpu_for_several_processes_is_refused(monkeypatch, user_error):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    message = user_error(lambda: distributed.select_device("cuda:1", 0, 2))
    assert message == "--device cuda:1 is one device for 2 processes: use --device cuda"


def test_an_index_without_a_device(monkeypatch, user_error):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = user_error(lambda: distributed.select_device("cuda:3"))
    assert message.startswith("--device cuda:3: there is no cuda:3 among 1 CUDA devices")


def test_a_card_without_bf16(monkeypatch, user_error):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    device = torch.device("cuda", 0)
    message = user_error(lambda: precision.resolve_amp("bf16", device))
    assert message.startswith("--amp bf16 is not supported by Tesla T4: use fp16 or off, with ")
    assert precision.resolve_amp("auto", device) is torch.float16


@pytest.mark.parametrize(("processes", "workers"), [(None, 10), (4, 10), (8, 8), (128, 1)])
def test_workers_share_the_cores_of_a_machine(monkeypatch, processes, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: range(64), raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    parser = main_pretrain.get_args_parser()
    assert parser.get_default("num_workers") == workers


@pytest.mark.parametrize("command", [main_pretrain, main_finetune, main_linprobe])
def test_commands_pass_the_flag_on(command, classify_flags, monkeypatch):
    def stop(*args):
        raise UserError(f"given {args}")

    monkeypatch.setattr(distributed, "process_group", stop)
    flags = classify_flags | {"timeout_minutes": 4}
    if command is main_pretrain:
        flags = {"data_path": classify_flags["data_path"], "timeout_minutes": 4}
    args = command.get_args_parser().parse_args(command_line(flags))
    with pytest.raises(UserError, match=re.escape(f"given ('{args.device}', 4.0)")):
        command.main(args)


def test_the_number_of_local_processes_is_known(monkeypatch, user_error):
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    group = distributed.process_group("cuda:0")
    assert "is one device for 2 processes" in user_error(group.__enter__)
