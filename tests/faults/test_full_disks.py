"""Full disks, folders that go away, folders that become read-only: said, outlived, made up for."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import (
    ForkedScript,
    assert_same_bits,
    final_state,
    finetune_kill_flags,
    pretrain_kill_flags,
    run,
    runner,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_data
import main_embed
import main_export
import main_finetune
import main_pretrain
import main_visualize
from util.checkpoint import load_checkpoint

SCRIPT = "tests/tiny_pretrain.py"
UNPRIVILEGED = "tests/faults/unprivileged_pretrain.py"
EPOCHS = 30
FULL, TOO_LARGE = "No space left on device", "File too large"


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, mounted by root."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(disk):
    """Leave no byte on a disk; returns the file that has them."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass
    return disk / "filler"


def flags_for(image_folder, output_dir):
    """A run of 30 epochs that saves in each and shows a line of its steps in each."""
    flags = pretrain_kill_flags(image_folder, output_dir)
    return flags | {"epochs": EPOCHS, "log_every": 9, "save_minutes": 60}


@pytest.fixture
def start():
    """Starts a run that SIGSTOP stops after its second epoch, so that a test can change the world.

    No save is under way then, whose end would make room.
    """
    processes = []

    def begin(flags, script=SCRIPT):
        processes.append(ForkedScript(script, flags))
        go_on(processes[-1], 1)
        while list(flags["output_dir"].glob(".*.tmp")):
            processes[-1].send_signal(signal.SIGCONT)
            time.sleep(0.001)
            stop(processes[-1])
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()


def stop(process):
    process.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{process.pid}/stat").read_text().rsplit(") ")[-1][0] not in "TZ":
        time.sleep(0.001)


def go_on(process, epoch):
    """Let a stopped run go on to the end of an epoch; then it is stopped again."""
    process.send_signal(signal.SIGCONT)
    next(x for x in process.stdout if x.startswith(f"epoch {epoch}/") and "done" in x)
    stop(process)


def end(process):
    """Let a stopped run go on to its end; returns (exit code, stdout, stderr)."""
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate()
    assert "Traceback" not in err
    assert "unexpected pos" not in err
    return process.returncode, out, err


def check_nothing_is_lost(flags, first_event=0):
    """Every epoch is in log.txt and in TensorBoard, and the last state on the disk."""
    output_dir = flags["output_dir"]
    epochs = list(range(flags["epochs"]))
    lines = (output_dir / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == epochs
    # An x is there twice if the event could be written, but not the state.
    events = EventAccumulator(str(output_dir)).Reload().Scalars("val_loss")
    found = sorted({event.step for event in events})
    assert found == [1000 * (e + 1) for e in epochs[first_event:]]
    assert load_checkpoint(output_dir / "checkpoint-last.pth")["epoch"] == epochs[-1]
    assert not [path for path in output_dir.iterdir() if path.name.endswith(".tmp")]


# ---- faults that pass


def test_a_full_disk_that_gets_room_again_loses_nothing(image_folder, disk, start):
    flags = flags_for(image_folder, disk / "out")
    process = start(flags)
    filler = fill(disk)
    go_on(process, 15)
    assert load_checkpoint(disk / "out" / "checkpoint-last.pth")["epoch"] <= 2
    filler.unlink()
    code, _, err = end(process)
    assert code == 0, err
    assert f"checkpoint-last.pth could not be written: {FULL}" in err
    check_nothing_is_lost(flags)


def test_files_that_may_not_grow_for_a_while_lose_nothing(image_folder, tmp_path, start):
    """A limit on their size, where there is no disk to fill."""
    flags = flags_for(image_folder, tmp_path / "out")
    process = start(flags)
    limit = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, limit[1]))
    go_on(process, 15)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
    code, _, err = end(process)
    assert code == 0, err
    assert f"checkpoint-last.pth could not be written: {TOO_LARGE}" in err
    check_nothing_is_lost(flags)


@pytest.mark.parametrize("comes_back", ["as it was", "empty"])
def test_a_folder_that_comes_back_gets_everything(image_folder, tmp_path, start, comes_back):
    """As when a mount fails: the run doesn't make the folder itself, on another disk."""
    flags = flags_for(image_folder, tmp_path / "out")
    process = start(flags)
    os.rename(tmp_path / "out", tmp_path / "away")
    go_on(process, 15)
    assert not (tmp_path / "out").exists()
    if comes_back == "empty":
        (tmp_path / "out").mkdir()
    else:
        os.rename(tmp_path / "away", tmp_path / "out")
    code, _, err = end(process)
    assert code == 0, err
    assert "checkpoint-last.pth could not be written: No such file or directory" in err
    assert err.count("can't take TensorBoard's events: No such file or directory") == 1
    # What was in TensorBoard's file is where the folder is.
    check_nothing_is_lost(flags, first_event=1 if comes_back == "empty" else 0)


def test_a_folder_that_is_read_only_for_a_while(image_folder, tmp_path, start):
    flags = flags_for(image_folder, tmp_path / "out")
    process = start(flags, UNPRIVILEGED)
    (tmp_path / "out").chmod(0o555)
    go_on(process, 15)
    (tmp_path / "out").chmod(0o755)
    code, _, err = end(process)
    assert code == 0, err
    assert "checkpoint-last.pth could not be written: Permission denied" in err
    check_nothing_is_lost(flags)


# ---- faults that stay


@pytest.mark.parametrize(
    "fault",
    ["full", *(pytest.param(f, marks=pytest.mark.thorough) for f in ("read-only", "removed"))],
)
def test_a_last_state_that_is_not_on_the_disk_is_an_error(image_folder, disk, start, fault):
    """With room again the same command ends in the bits of an undisturbed run."""
    flags = flags_for(image_folder, disk / "out")
    process = start(flags)
    if fault == "full":
        filler, reason = fill(disk), FULL
    elif fault == "read-only":
        reason = "Read-only file system"
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    else:
        reason = "No such file or directory"
        os.rename(disk / "out", disk / "away")
    code, _, err = end(process)
    if fault == "full":
        filler.unlink()
    elif fault == "read-only":
        subprocess.run(["umount", disk], check=True)
    else:
        assert not (disk / "out").exists()
        os.rename(disk / "away", disk / "out")
    assert code == 2, err
    assert f"checkpoint-last.pth could not be written: {reason}" in err
    assert f"log.txt is not up to date: {reason}" in err
    assert err.count("can't take TensorBoard's events") == 1
    assert "error: the final checkpoint could not be written" in err
    code, out, err = run(SCRIPT, flags)
    assert code == 0, err
    assert "resuming" in out
    check_nothing_is_lost(flags)
    undisturbed = flags | {"output_dir": disk.parent / "undisturbed"}
    assert run(SCRIPT, undisturbed)[0] == 0
    assert_same_bits(final_state(disk / "out"), final_state(disk.parent / "undisturbed"))


def test_a_run_on_a_full_disk_goes_on_and_says_so(pretrain_flags, pretrain, disk, user_error):
    """From its start: the log of the epoch that runs again is not lost, nor the checkpoint."""
    flags = pretrain_flags | {"output_dir": disk / "out", "save_every": 1}
    pretrain(flags)
    (disk / "out" / "checkpoint-1.pth").unlink()
    (disk / "out" / "checkpoint-last.pth").unlink()
    before = (disk / "out" / "log.txt").read_text()
    filler = fill(disk)
    assert user_error(lambda: pretrain(flags)).startswith("the final checkpoint could not be")
    assert (disk / "out" / "log.txt").read_text().startswith(before.splitlines()[0])
    assert load_checkpoint(disk / "out" / "checkpoint-0.pth")["epoch"] == 0
    filler.unlink()
    pretrain(flags)
    lines = (disk / "out" / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1]


def test_a_signal_on_a_full_disk_says_that_the_state_is_lost(image_folder, disk, start):
    flags = flags_for(image_folder, disk / "out")
    process = start(flags)
    fill(disk)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 2
    assert re.search(
        r"^error: SIGTERM: stopped after step .*; this state could not be saved", err, re.MULTILINE
    )


def test_a_log_dir_on_a_full_disk_costs_only_its_curves(
    pretrain_flags, pretrain, disk, tmp_path, capsys
):
    (disk / "log").mkdir()
    fill(disk)
    pretrain(pretrain_flags | {"log_dir": disk / "log", "log_every": 1})
    err = capsys.readouterr().err
    assert err.count("can't take TensorBoard's events: No space left on device") == 1
    assert err.count("lacks TensorBoard's last events") == 1
    assert load_checkpoint(pretrain_flags["output_dir"] / "checkpoint-last.pth")["epoch"] == 1


# ---- what commands write at their end


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_folder):
    """The output_dirs of a finished pre-training and fine-tuning."""
    folder = tmp_path_factory.mktemp("trained")
    flags = flags_for(image_folder, folder / "pretrained") | {"epochs": 1, "warmup_epochs": 0}
    runner(main_pretrain)(flags)
    flags = finetune_kill_flags(
        image_folder, folder / "pretrained" / "encoder.safetensors", folder / "finetuned"
    )
    runner(main_finetune)(flags | {"epochs": 1, "warmup_epochs": 0})
    return folder


def outputs(trained, image_folder, disk):
    """Commands with an output on the disk, and where its flag stands in them."""
    pretrained = {"checkpoint": trained / "pretrained" / "checkpoint-last.pth", "device": "cpu"}
    data = {"data_path": image_folder}
    export = {"checkpoint": pretrained["checkpoint"], "output": disk / "exported"}
    evaluation = data | {
        "eval": True,
        "device": "cpu",
        "resume": trained / "finetuned" / "checkpoint-best.pth",
        "model": "tiny_test_vit",
        "nb_classes": 2,
        "input_size": 8,
        "num_workers": 0,
    }
    curves = {"curves": trained / "pretrained"}
    return {
        "eval.json": (main_finetune, evaluation | {"output_dir": disk}),
        "predictions": (
            main_finetune,
            evaluation | {"output_dir": trained / "eval", "predictions": disk / "p.csv"},
        ),
        "npz": (main_embed, pretrained | data | {"output": disk / "x.npz"}),
        "npy": (main_embed, pretrained | data | {"output": disk / "x.npy"}),
        "csv": (main_embed, pretrained | data | {"output": disk / "x.csv"}),
        "export": (main_export, export | {"format": "transformers"}),
        "reconstructions": (main_visualize, pretrained | data | {"output": disk / "x.png"}),
        "attention": (
            main_visualize,
            pretrained | data | {"output": trained / "x.png", "attention": disk / "x.png"},
        ),
        "curves": (main_visualize, curves | {"output": disk / "x.png"}),
    }


OUTPUTS = "eval.json predictions npz npy csv export reconstructions attention curves".split()


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_on_a_full_disk_is_whole_or_not_there(
    trained, image_folder, disk, name, user_error
):
    command, flags = outputs(trained, image_folder, disk)[name]
    filler = fill(disk)
    message = user_error(lambda: runner(command)(flags))
    assert message.endswith(FULL), message
    assert "\n" not in message
    assert list(disk.iterdir()) == [filler]


def test_a_pack_on_a_full_disk_leaves_no_half_shard(image_folder, disk, user_error):
    flags = ["pack", "--data_path", str(image_folder), "--output", str(disk / "packed")]
    (disk / "packed").mkdir()
    filler = fill(disk)

    def pack():
        main_data.main(main_data.get_args_parser().parse_args([*flags, "--num_workers", "0"]))

    message = user_error(pack)
    assert f"{disk / 'packed'} can't be written ({FULL})" in message
    assert [path.name for path in (disk / "packed").iterdir()] == [".lock"]
    filler.unlink()
    pack()
    assert (disk / "packed" / "train-000000.tar").exists()


def test_an_encoder_that_finds_no_room_is_an_error(trained, disk, user_error, image_folder):
    """The state fits, the encoder beside it does not."""
    flags = flags_for(image_folder, disk / "out") | {"epochs": 1, "warmup_epochs": 0}
    shutil.copytree(trained / "pretrained", disk / "out")
    (disk / "out" / "encoder.safetensors").unlink()
    fill(disk)
    message = user_error(lambda: runner(main_pretrain)(flags))
    assert message == "the training is done and saved, but no encoder, see the warning"
    assert not list((disk / "out").glob("*encoder*"))
