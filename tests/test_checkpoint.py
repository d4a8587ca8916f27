"""Checkpoint files: whole or absent, and loaded without running code from them."""

import argparse
import errno
import functools
import io
import os
import pickle
import resource
import stat
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, run, start_fresh

from util.checkpoint import (
    TornCheckpoint,
    find_checkpoint,
    link_checkpoint,
    load_checkpoint,
    progress_in,
    save_checkpoint,
)


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
    """The same limit on a whole run: a warning each time, an error at the end."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    limited = ROOT / "tests" / "tiny_pretrain.py"
    start = functools.partial(start_fresh, preexec_fn=limit)
    code, out, err = run(limited, pretrain_flags, start=start)
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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_objects_of_other_projects_are_named(tmp_path, user_error):
    """As frameworks save them beside the weights; torch's advice, to run code, is not passed on."""
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "root": tmp_path}, path)
    message = user_error(lambda: load_checkpoint(path))
    assert message.endswith(
        "it holds pathlib.PosixPath, and no code in it is run: save only the model's weights"
    )
    with open(path, "wb") as file:
        pickle.dump({"root": tmp_path}, file, protocol=4)
    assert user_error(lambda: load_checkpoint(path)).endswith("it without running code")


def test_the_newest_whole_checkpoint_is_found(tmp_path, capsys, user_error):
    assert find_checkpoint("auto", tmp_path) is None
    names = ["checkpoint-9.pth", "checkpoint-19.pth", "checkpoint-last.pth"]
    for epoch, name in zip((9, 19, 20), names, strict=True):
        save_checkpoint(tmp_path / name, progress(epoch, 5, True))
    assert find_checkpoint("auto", tmp_path)[1].name == "checkpoint-last.pth"
    assert find_checkpoint("none", tmp_path) is None
    (tmp_path / names[2]).write_bytes(b"")
    assert find_checkpoint("auto", tmp_path)[1].name == "checkpoint-19.pth"
    capsys.readouterr()
    (tmp_path / names[1]).write_bytes(b"PK\x03\x04 torn")
    assert find_checkpoint("auto", tmp_path)[1].name == "checkpoint-9.pth"
    assert capsys.readouterr().err.count("is torn") == 2
    (tmp_path / names[0]).write_bytes(b"")
    assert "no whole checkpoint" in user_error(lambda: find_checkpoint("auto", tmp_path))


def progress(epoch, step, is_complete):
    """A training state as far as finding it goes."""
    weights = {"weight": torch.zeros(1)}
    totals = None if is_complete else {"loss": 0.0}
    return {"model": weights, "epoch": epoch, "step": step, "totals": totals}


@pytest.mark.parametrize(
    ("files", "newest"),
    [
        ({"last": (4, 9, True), "best": (3, 9, True), "3": (3, 9, True)}, "last"),
        ({"last": (4, 9, True), "best": (5, 9, True)}, "best"),
        ({"last": (4, 2, False), "3": (3, 9, True)}, "last"),
        ({"last": (4, 2, False), "9": (9, 9, True), "10": (10, 9, True)}, "10"),
        ({"last": (4, 9, False), "4": (4, 9, True), "best": (4, 9, True)}, "last"),
        ({"last": (4, 9, True), "4": (4, 9, True), "best": (4, 9, True)}, "last"),
        ({"best": (0, 9, True)}, "best"),
    ],
)
def test_the_newest_is_the_one_that_has_come_furthest(tmp_path, files, newest):
    """By epoch and step; of equal ones it is the last, whose epoch lacks no file when it ends."""
    for name, place in files.items():
        save_checkpoint(tmp_path / f"checkpoint-{name}.pth", progress(*place))
    save_checkpoint(tmp_path / "checkpoint-encoder.pth", progress(99, 0, True))  # a user's
    _, path = find_checkpoint("auto", tmp_path)
    assert path.name == f"checkpoint-{newest}.pth"


def test_progress_is_read_without_the_values(tmp_path, user_error):
    path = tmp_path / "checkpoint-last.pth"
    contents = progress(4, 2, False) | {"model": {"w": torch.full((300,), 0.5)}, "loss": 0.25}
    save_checkpoint(path, contents)
    values = contents["model"]["w"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(values, values[:-1] + b"!"))
    assert "is damaged" in user_error(lambda: load_checkpoint(path))
    assert progress_in(path) == (4, 2, 0.25)
    torch.save({"weight": torch.zeros(1)}, path)  # another project's
    assert progress_in(path) == (-1, 0, None)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TornCheckpoint):
        progress_in(path)
    path.unlink()
    assert "does not exist" in user_error(lambda: progress_in(path))


class FailingDisk(io.FileIO):
    """A file that can be read a few times before the disk fails."""

    reads_left = 5

    def readinto(self, buffer):
        self.fail()
        return super().readinto(buffer)

    def read(self, size=-1):
        self.fail()
        return super().read(size)

    def fail(self):
        FailingDisk.reads_left -= 1
        if FailingDisk.reads_left < 0:
            raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("failure", ["permission", "disk", "memory"])
def test_a_file_that_cannot_be_read_now_stops_the_run(
    pretrain_flags, pretrain, monkeypatch, user_error, failure
):
    """It may be the newest: nothing older is resumed, and nothing is changed."""
    out_dir = pretrain_flags["output_dir"]
    pretrain(pretrain_flags | {"save_every": 1, "epochs": 1})
    contents = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    unreadable, original = out_dir / "checkpoint-last.pth", open

    def failing_open(path, *args, **kwargs):
        if str(path) != str(unreadable) or args != ("rb",):
            return original(path, *args, **kwargs)
        if failure == "permission":
            raise PermissionError(errno.EACCES, "Permission denied")
        if failure == "memory":
            raise MemoryError
        return FailingDisk(path)

    FailingDisk.reads_left = 5
    monkeypatch.setattr("builtins.open", failing_open)
    message = user_error(lambda: pretrain(pretrain_flags | {"save_every": 1, "epochs": 1}))
    reason = {"permission": "Permission denied", "disk": "Input/output error"}
    assert message == (
        f"checkpoint {unreadable} can't be read: {reason.get(failure, 'MemoryError')}; it may be "
        "whole, so mend that and repeat the command"
    )
    assert contents.items() <= {p.name: p.read_bytes() for p in out_dir.iterdir()}.items()


def test_a_link_left_by_a_killed_run_is_not_written_into(tmp_path):
    best, last = tmp_path / "checkpoint-best.pth", tmp_path / "checkpoint-last.pth"
    save_checkpoint(best, progress(0, 5, True))
    os.link(best, tmp_path / ".checkpoint-last.pth.tmp")
    save_checkpoint(last, progress(1, 5, True))
    assert (load_checkpoint(best)["epoch"], load_checkpoint(last)["epoch"]) == (0, 1)


def test_a_link_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Where there are no links, on a full disk; the error names the file."""
    best, last = tmp_path / "checkpoint-best.pth", tmp_path / "checkpoint-last.pth"
    save_checkpoint(best, progress(0, 5, True))

    def full(_source, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.link", lambda *_: full(*_))
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match=f"{last} could not be written: .*No space left"):
        link_checkpoint(best, last.name)
    assert [path.name for path in tmp_path.iterdir()] == [best.name]


def test_a_file_that_cannot_be_mapped_is_read(tmp_path, monkeypatch):
    """As on some network file systems: it is not torn."""
    for epoch, name in enumerate(("checkpoint-0.pth", "checkpoint-last.pth")):
        save_checkpoint(tmp_path / name, progress(epoch, 5, True))
    load = torch.load

    def unmappable(*args, mmap=False, **kwargs):
        if mmap:
            raise RuntimeError("unable to mmap: No such device (19)")
        return load(*args, **kwargs)

    monkeypatch.setattr("torch.load", unmappable)
    contents, path = find_checkpoint("auto", tmp_path, mmap=True)
    assert (contents["epoch"], path.name) == (1, "checkpoint-last.pth")


def test_every_torn_file_is_called_torn(tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    save_checkpoint(path, progress(1, 2, False) | {"model": {"weight": torch.randn(500)}})
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(TornCheckpoint, match="is torn or not a checkpoint"):
            load_checkpoint(path)


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    """As on some network file systems; and no descriptor is left open."""
    fsync = os.fsync

    def picky(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", picky)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        save_checkpoint(tmp_path / "a.pth", progress(0, 0, True))
    assert load_checkpoint(tmp_path / "a.pth")["epoch"] == 0
    assert (len(os.listdir("/proc/self/fd")) if before else 0) == before
