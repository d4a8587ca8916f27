"""Full disks, folders that go away, folders that become read-only: said, outlived, made up for."""

import contextlib
import json
import os
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
    pretrain_kill_flags,
    run,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    events = EventAccumulator(str(flags.get("log_dir", output_dir))).Reload().Scalars("val_loss")
    assert sorted({event.step for event in events}) == [
        1000 * (e + 1) for e in epochs[first_event:]
    ]
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
    assert f"log.txt is not up to date: {FULL}" in err
    assert err.count("can't take TensorBoard's events") == 1
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


@pytest.mark.parametrize("fault", ["full", "read-only", "removed"])
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
