"""Damaged, unreadable and hostile checkpoint files: noticed and named, none runs code."""

import json
import random
import re
import shutil
import sys
import zipfile

import pytest
import safetensors.torch
import torch
from fuzz_checkpoints import CONTENTS, HOSTILE
from helpers import run, runner

import main_embed
import main_export
import main_visualize
from util.checkpoint import (
    TornCheckpoint,
    find_checkpoint,
    link_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_safetensors,
)

FUZZ = "tests/faults/fuzz_checkpoints.py"
UNPRIVILEGED = "tests/faults/unprivileged_pretrain.py"


def flip(path, place, bit=0):
    """Flip a bit of a file's byte, counted from its end if `place` is negative."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def flip_in(path, what):
    """Flip a bit in the middle of some bytes that the file holds once."""
    content = path.read_bytes()
    assert content.count(what) == 1
    flip(path, content.index(what) + len(what) // 2)


def save(folder, kind):
    """A file of this project of one kind."""
    if kind == ".safetensors":
        save_safetensors(folder / "encoder.safetensors", CONTENTS["model"], {"args": {"lr": 1}})
        return folder / "encoder.safetensors"
    save_checkpoint(folder / "checkpoint-last.pth", CONTENTS)
    return folder / "checkpoint-last.pth"


def unnoticed(path, flips, mmap):
    """Those of some flips, (place, bit) each, after which the file loads."""
    whole, silent = path.read_bytes(), []
    for place, bit in flips:
        flip(path, place, bit)
        try:
            load_checkpoint(path, mmap)
            silent.append((place, bit))
        except TornCheckpoint as error:
            assert str(path) in str(error)
        path.write_bytes(whole)
    assert load_checkpoint(path, mmap)
    return silent


# ---- flipped bits


@pytest.mark.parametrize(
    ("kind", "mmap"),
    [(".pth", False), (".pth", True), (".safetensors", False)],
    ids=["read-.pth", "mapped-.pth", ".safetensors"],
)
def test_sixty_flipped_bits_are_sixty_errors(tmp_path, kind, mmap):
    path = save(tmp_path, kind)
    bits = random.Random(f"{kind} {mmap}").sample(range(8 * path.stat().st_size), 60)
    assert unnoticed(path, [divmod(bit, 8) for bit in bits], mmap) == []


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
def test_a_flipped_bit_in_any_byte_is_an_error(tmp_path, kind):
    """In tensors, padding, headers, the directory, the end record and the checksum itself."""
    path, draw = save(tmp_path, kind), random.Random(1)
    flips = [(place, draw.randrange(8)) for place in range(path.stat().st_size)]
    assert unnoticed(path, flips, mmap=False) == []


def test_the_damaged_entry_is_named(tmp_path, user_error):
    values = torch.randn(1000)
    ours, others = tmp_path / "ours.pth", tmp_path / "others.pth"
    save_checkpoint(ours, {"model": {"a": torch.zeros(2), "b": values}})
    torch.save({"model": {"a": torch.zeros(2), "b": values}}, others)
    for path in (ours, others):
        assert load_checkpoint(path)["model"]["b"].equal(values)
        flip_in(path, values.numpy().tobytes())
        message = user_error(lambda path=path: load_checkpoint(path))
        entry = f"{'archive' if path == ours else 'others'}/data/1"
        assert message == f"{path} is damaged: its entry '{entry}' doesn't match its checksum"


def test_a_comment_that_is_not_ours_is_damage(tmp_path, user_error):
    path = save(tmp_path, ".pth")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = archive.comment.replace(b"mae", b"moe")
    assert "its end is missing or damaged" in user_error(lambda: load_checkpoint(path))


def test_no_flipped_bit_hides_that_a_file_has_a_checksum(tmp_path):
    """Else it would look like one that was written before there were checksums, and load."""
    path = save(tmp_path, ".safetensors")
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flips = [(place, bit) for place in range(header) for bit in range(8)]
    assert unnoticed(path, flips, mmap=False) == []


# An entry "mae" as this project wrote it before there were checksums, and as others may.
OLD = {"args": {"lr": 0.1}, "command": "main_pretrain.py"}
FOREIGN = ["0.23", "mean absolute error: 0.23", "", "[1]", "null", '{"args"']


@pytest.mark.parametrize("entry", [json.dumps(OLD), *FOREIGN])
def test_files_without_a_checksum_load(tmp_path, entry, capsys):
    path = tmp_path / "encoder.safetensors"
    safetensors.torch.save_file(CONTENTS["model"], path, {"format": "pt", "mae": entry})
    contents = load_checkpoint(path)
    assert contents.pop("model")["a"].equal(CONTENTS["model"]["a"])
    assert contents == (OLD if entry not in FOREIGN else {})
    err = capsys.readouterr().err
    assert err == (
        f"warning: {path}: its entry 'mae' is not this project's, and is left out\n"
        if entry in FOREIGN
        else ""
    )


def test_other_programs_read_our_files(tmp_path):
    path = save(tmp_path, ".pth")
    link_checkpoint(path, "checkpoint-3.pth")
    for name in (path.name, "checkpoint-3.pth"):
        for mmap in (False, True):
            contents = torch.load(tmp_path / name, weights_only=True, mmap=mmap)
            assert contents["model"]["a"].equal(CONTENTS["model"]["a"])
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert archive.testzip() is None


# ---- the newest whole one


def state(epoch):
    return {"model": {"w": torch.full((300,), float(epoch))}, "epoch": epoch, "step": 7}


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
@pytest.mark.parametrize("damaged", ["value", "epoch", "end"])
def test_auto_goes_to_the_newest_whole_one(tmp_path, capsys, user_error, damaged, mmap):
    """Also if the damage makes a file seem older than it is."""
    paths = [tmp_path / f"checkpoint-{name}.pth" for name in (98, 99, "last")]
    for epoch, path in zip((98, 99, 100), paths, strict=True):
        save_checkpoint(path, state(epoch))
    content = paths[2].read_bytes()
    places = {
        "value": content.index(torch.tensor(100.0).numpy().tobytes() * 300),
        "epoch": content.index(b"K\x64", content.index(b"epoch")) + 1,  # 100 becomes 36
        "end": -1,
    }
    flip(paths[2], places[damaged], bit=6)
    contents, path = find_checkpoint("auto", tmp_path, mmap)
    assert (path, contents["epoch"]) == (paths[1], 99)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {paths[2]} is ")
    assert line.endswith(f"; {paths[1]} is used instead")
    for path in paths[:2]:
        flip(path, 300)
    message = user_error(lambda: find_checkpoint("auto", tmp_path, mmap))
    assert all(str(path) in message for path in paths)
    assert message.endswith("restore one from a copy, or use --resume none to start anew")


def test_a_run_resumes_the_newest_whole_one(pretrain_flags, pretrain, capsys):
    pretrain(pretrain_flags | {"save_every": 1})
    last = pretrain_flags["output_dir"] / "checkpoint-last.pth"
    last.unlink()  # the numbered one of the same epoch has the same bytes
    shutil.copyfile(last.with_name("checkpoint-1.pth"), last)
    last.with_name("checkpoint-1.pth").unlink()
    flip(last, last.stat().st_size // 2)
    capsys.readouterr()
    pretrain(pretrain_flags | {"save_every": 1})
    out, err = capsys.readouterr()
    older = last.with_name("checkpoint-0.pth")
    assert re.search(f"{last} is damaged: .*; {older} is used instead", err)
    assert f"resuming {older} after step 9 of epoch 0" in out
    assert load_checkpoint(last)["epoch"] == 1


@pytest.mark.parametrize("flag", ["resume", "init", "finetune", "checkpoint"])
def test_a_damaged_file_that_a_flag_names(
    flag, pretrain_flags, pretrain, finetune, linprobe, classify_flags, tmp_path, user_error
):
    path = save(tmp_path, ".pth")
    flip(path, 200)
    output = {"output": tmp_path / "x.npz"}
    images = {"data_path": pretrain_flags["data_path"]}
    commands = {
        "resume": [(pretrain, pretrain_flags), (finetune, classify_flags)],
        "init": [(pretrain, pretrain_flags)],
        "finetune": [(finetune, classify_flags), (linprobe, classify_flags)],
        "checkpoint": [
            (runner(main_embed), images | output),
            (runner(main_visualize), images),
            (runner(main_export), {"format": "timm", "output": tmp_path / "x"}),
        ],
    }
    for command, flags in commands[flag]:
        message = user_error(lambda command=command, flags=flags: command(flags | {flag: path}))
        assert message.startswith(f"{path} is damaged: ")


# ---- files that can't be read just now


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/mem is Linux's")
def test_an_input_output_error_stops_the_run(pretrain_flags, pretrain, user_error):
    """The start of /proc/self/mem can't be read, like a bad sector."""
    pretrain(pretrain_flags | {"epochs": 1, "save_every": 1})
    last = pretrain_flags["output_dir"] / "checkpoint-last.pth"
    last.unlink()
    last.symlink_to("/proc/self/mem")
    assert user_error(lambda: pretrain(pretrain_flags)) == (
        f"checkpoint {last} can't be read: Input/output error; it may be whole, so mend that and "
        "repeat the command"
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder):
    """The flags of a run that is done, with its output_dir."""
    flags = {
        "data_path": image_folder,
        "output_dir": tmp_path_factory.mktemp("finished") / "out",
        "model": "tiny_test_model",
        "input_size": 8,
        "batch_size": 9,
        "epochs": 1,
        "warmup_epochs": 0,
        "save_every": 1,
        "num_workers": 0,
        "amp": "off",
        "device": "cpu",
    }
    code, _, err = run(UNPRIVILEGED, flags)
    assert code == 0, err
    return flags


@pytest.mark.skipif(sys.platform != "linux", reason="gives up Linux's capabilities")
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("checkpoint-last.pth", "can't be read: Permission denied; it may be whole"),
        ("log.txt", "can't be read: Permission denied; make it readable, or move it away"),
        ("", "can't be written: Permission denied"),
        (".lock", None),
    ],
    ids=["checkpoint", "log", "folder", "lock"],
)
def test_what_may_not_be_read_is_named(finished, tmp_path, name, error):
    output = tmp_path / "out"
    shutil.copytree(finished["output_dir"], output)
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.name != ".lock"}
    flags = finished | {"output_dir": output}
    (output / name).chmod(0)
    code, _, err = run(UNPRIVILEGED, flags)
    (output / name).chmod(0o700)
    if error is None:  # nothing but the protection from a second run is missing
        assert code == 0, err
        assert f"{output} can't be locked (Permission denied)" in err
        return
    assert code == 2, err
    assert f"{output / name} {error}" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert "--resume none" not in err
    assert before.items() <= {p.name: p.read_bytes() for p in output.iterdir()}.items()


def test_a_log_that_is_a_folder(pretrain_flags, pretrain, user_error):
    log = pretrain_flags["output_dir"] / "log.txt"
    log.mkdir(parents=True)
    assert user_error(lambda: pretrain(pretrain_flags)) == f"{log} is no file: move it away"


# ---- hostile files


def fuzz(folder, kinds, count):
    """Load so many files of each kind in a process of 1 GiB; returns a line for each."""
    flags = {"folder": folder / "fuzz", "kinds": kinds, "count": count}
    code, out, err = run(FUZZ, flags, timeout=500)
    assert code == 0, f"{out.splitlines()[-1:]} {err}"
    lines = out.splitlines()
    assert len(lines) == len(kinds) * count
    return lines


def test_hostile_files_take_no_memory_and_run_no_code(tmp_path):
    outcomes = dict(line.split(": ", 1) for line in fuzz(tmp_path, ["hostile"], len(HOSTILE)))
    reasons = {
        "bomb": "its entry 'x/data.pkl' is compressed, which torch never does",
        "overlapping": "its entries are said to be larger than the file",
        "beyond": "size",
        "bytearray": "it holds a bytearray",
        "code": "without running code",
        "view": "a tensor of shape (1099511627776,) is larger than the file",
        "meta": "a tensor without values",
        "nested": "has values that are not tensors",
        "doubling": "loaded",
        "long header": "its header is said to have 10,737,418,240 bytes",
    }
    assert outcomes.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in outcomes[name], name


KINDS = ["bytes", "pickle", "legacy", "safetensors", "header"]


def test_mutated_files_are_refused_or_load(tmp_path):
    lines = fuzz(tmp_path, KINDS, 8)
    assert not [x for x in lines if x.startswith(("bytes", "safetensors")) and "loaded" in x]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kinds", "count"),
    [(["bytes"], 250), (["pickle", "legacy"], 125), (["safetensors", "header"], 100)],
    ids=["archives", "pickles", "safetensors"],
)
def test_many_mutated_files_are_refused_or_load(tmp_path, kinds, count):
    lines = fuzz(tmp_path, kinds, count)
    assert not [x for x in lines if x.startswith(("bytes", "safetensors")) and "loaded" in x]
