"""Tar shards: packed ones against their folder, the webdataset package and tarfile, torn ones."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    assert_same_bits,
    command_line,
    encode,
    fill,
    final_state,
    kill_and_resume,
    photograph,
    pretrain_kill_flags,
    run,
)
from PIL import Image

import main_data
from util import data, decoding, image_files, packing, shards
from util.decoding import read_image, read_samples
from util.image_files import ImagePaths
from util.loading import ImageDataset
from util.pixels import PixelFormat
from util.shards import find_shards


def run_pack(folder, output, **flags):
    """Runs `main_data.py pack` in this process."""
    words = command_line({"data_path": folder, "output": output, "num_workers": 0} | flags)
    main_data.main(main_data.get_args_parser().parse_args(["pack", *words]))
    return output


def write_tar(path, members):
    """A tar of (name, content) pairs; a TarInfo stands for a name with more to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if member.isreg():
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def contents(images):
    return [images.source(index).content for index in range(len(images))]


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.tar"))}


def assert_like_the_folder(images, paths):
    assert len(images) == len(paths)
    assert images.classes == paths.classes
    assert images.labels.tolist() == paths.labels.tolist()
    assert images.labels.dtype == torch.int64
    assert images.fingerprint == paths.fingerprint
    assert contents(images) == [Path(paths[i]).read_bytes() for i in range(len(paths))]


@pytest.fixture(scope="module")
def packed(image_folder, tmp_path_factory):
    return run_pack(image_folder, tmp_path_factory.mktemp("packed") / "out")


# ---- packed shards and their folder


def test_packed_shards_are_like_their_folder(image_folder, packed):
    for split in ("train", "val"):
        images = find_shards(packed, split)
        assert_like_the_folder(images, ImagePaths(image_folder / split))
    assert find_shards(packed, "test") is None
    assert find_shards(packed / "nowhere", "train") is None
    assert find_shards(packed, "train")[3] == f"{packed}/train-000000.tar: a/003.png"
    assert (packed / "classes.txt").read_text() == "a\nb\n"
    assert json.loads((packed / "pack.json").read_text())["finished"]


@pytest.mark.parametrize(
    "names",
    [
        ["1.jpg", "2.jpg"],
        ["a/1.jpg", "a/b/c/2.jpg", "b.c/photo.v2.jpg", "b.c/photo.v1.jpg", "b.c/photo.jpeg"],
        ["\u65e5\u672c/1.JPG", "z/" + "long" * 40 + ".jpg", "\u00e4/\U0001f408.jpg"],
        ["1.jpg", "a/1.jpg"],
        [b"\xff\xfe/1.jpg", b"a/\xfa.jpg"],
    ],
    ids=repr,
)
def test_names_and_classes_of_any_kind(tmp_path, names):
    folder = fill(tmp_path / "in" / "train", names)
    assert_like_the_folder(
        find_shards(run_pack(folder.parent, tmp_path / "out"), "train"), ImagePaths(folder)
    )


def test_a_split_with_some_of_the_classes(tmp_path):
    fill(tmp_path / "in", ["train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/1.jpg"])
    output = run_pack(tmp_path / "in", tmp_path / "out")
    assert_like_the_folder(find_shards(output, "val"), ImagePaths(tmp_path / "in" / "val"))


def test_samples_of_a_dataset_are_the_same_bits(image_folder, packed):
    folder, tars = (
        ImageDataset(images, data.pretrain_transform(8), seed=3)
        for images in (ImagePaths(image_folder / "train"), find_shards(packed, "train"))
    )
    for key in [(epoch, index) for epoch in (0, 1) for index in range(len(folder))]:
        image, label, index, problem = folder[key]
        other = tars[key]
        assert torch.equal(image, other[0])
        assert (label, index, problem) == other[1:]


def test_a_run_over_shards_killed_within_an_epoch_ends_in_the_folders_bits(
    image_folder, packed, tmp_path
):
    of_folder = pretrain_kill_flags(image_folder, tmp_path / "folder")
    of_shards = pretrain_kill_flags(packed, tmp_path / "shards", workers=2)
    assert run("tests/tiny_pretrain.py", of_folder)[0] == 0
    kill_and_resume("tests/tiny_pretrain.py", of_shards, signal.SIGKILL, kill_line=13)
    assert_same_bits(final_state(tmp_path / "shards"), final_state(tmp_path / "folder"))


def test_a_classifier_of_shards_is_that_of_the_folder(
    image_folder, packed, finetune, classify_flags, tmp_path
):
    states, losses = [], []
    for number, data_path in enumerate((image_folder, packed)):
        output = tmp_path / str(number)
        flags = classify_flags | {"data_path": data_path, "output_dir": output}
        finetune(flags)
        del flags["finetune"]
        finetune(flags | {"eval": True, "resume": output / "checkpoint-last.pth"})
        states.append(final_state(output, "test_acc1"))
        losses.append(json.loads((output / "eval.json").read_text())["test_loss"])
    assert losses[0] == losses[1]
    assert_same_bits(*states)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same_bytes(packed, context):
    images = find_shards(packed, "train")
    images.source(0)  # opens a shard before the fork
    dataset = ImageDataset(images, data.eval_transform(8), seed=0)
    keys = [[(0, index)] for index in range(len(images))]
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, num_workers=2, multiprocessing_context=context
    )
    for index, (image, *_) in enumerate(loader):
        assert torch.equal(image[0], dataset[0, index][0])


def test_the_webdataset_package_reads_packed_shards(image_folder, packed):
    webdataset = pytest.importorskip("webdataset")
    paths = ImagePaths(image_folder / "train")
    urls = [str(packed / "train-000000.tar")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == len(paths)
    for index, sample in enumerate(samples):
        assert sample["png"] == Path(paths[index]).read_bytes()
        assert int(sample["cls"]) == paths.labels[index]
        assert (
            os.path.join(image_folder, "train", json.loads(sample["json"])["name"]) == paths[index]
        )


def test_shards_of_the_webdataset_package_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    expected = {}
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"train-{number}.tar")) as writer:
            for index in range(5):
                content = encode("JPEG", quality=50 + 10 * number + index)
                key = f"some/{number}{index}"
                writer.write({"__key__": key, "jpg": content, "cls": 10 * index, "txt": "words"})
                expected[f"{tmp_path}/train-{number}.tar: {key}.jpg"] = (content, 10 * index)
    images = find_shards(tmp_path, "train")
    labels = [int(images.classes[label]) for label in images.labels.tolist()]
    found = dict(zip(images, zip(contents(images), labels, strict=True), strict=True))
    assert found == expected
    assert images.classes == [str(number) for number in range(41)]
    assert images.found.images == {".jpg": 10}
    assert images.found.others == {".txt": 10}


# ---- what is in a shard

JPEG = encode("JPEG")


def test_labels_and_names_by_hand(tmp_path):
    members = [
        ("./z/1.jpg", JPEG + b"1"),
        ("z/1.cls", b" 2\n"),
        ("z", b""),
        ("a/2.png", JPEG + b"2"),
        ("a/2.cls", b"0"),
        ("a/2.mask.png", b"a part"),
        ("._a/3.jpg", b"hidden"),
        ("a/._2.jpg", b"hidden"),
        ("notes", b"no suffix"),
        ("a/b.c/4.v2.jpg", JPEG + b"4"),
        ("a/b.c/4.CLS", b"2"),
        ("a/b.c/4.json", json.dumps({"caption": "a cat"}).encode()),
    ]
    write_tar(tmp_path / "train-0.tar", members)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    images = find_shards(tmp_path, "train")
    assert list(images) == [
        f"{tmp_path}/train-0.tar: {name}" for name in ("z/1.jpg", "a/2.png", "a/b.c/4.v2.jpg")
    ]
    assert contents(images) == [JPEG + b"1", JPEG + b"2", JPEG + b"4"]
    assert [images.classes[label] for label in images.labels.tolist()] == ["cat", "ant", "cat"]
    assert images.classes == ["ant", "cat"]
    assert images.found.images == {".jpg": 2, ".png": 1}
    assert images.found.others == {"": 2, ".mask.png": 1}
    assert images.found.hidden_files == 2


def test_classes_by_their_names(tmp_path):
    names = ["dog", "cat", "dog", "\u00e4 b"]
    members = [
        (f"{i}.{e}", c)
        for i, n in enumerate(names)
        for e, c in (("jpg", JPEG), ("cls", n.encode()))
    ]
    write_tar(tmp_path / "train-0.tar", members)
    images = find_shards(tmp_path, "train")
    assert images.classes == ["cat", "dog", "\u00e4 b"]
    assert images.labels.tolist() == [1, 0, 1, 2]


def test_images_without_a_class(tmp_path, capsys):
    write_tar(tmp_path / "train-0.tar", [("1.jpg", JPEG), ("2.jpg", JPEG)])
    images = find_shards(tmp_path, "train")
    assert (images.classes, images.labels.tolist()) == ([""], [0, 0])
    assert "warning" not in capsys.readouterr().err
    write_tar(tmp_path / "val-0.tar", [("1.jpg", JPEG), ("2.jpg", JPEG), ("2.cls", b"1")])
    images = find_shards(tmp_path, "val")
    assert [images.classes[label] for label in images.labels.tolist()] == ["", "1"]
    assert (
        f"1 of 2 images have no .cls, such as {tmp_path}/val-0.tar: 1.jpg"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("text", [b"-1", b"1.5", b"", b"1e3", b"99999999", b"nan1"])
def test_a_cls_that_is_no_class(tmp_path, user_error, text):
    members = [("1.jpg", JPEG), ("1.cls", b"0"), ("k.jpg", JPEG), ("k.cls", text)]
    write_tar(tmp_path / "train-0.tar", members)
    message = user_error(lambda: find_shards(tmp_path, "train"))
    assert "train-0.tar: k" in message
    assert repr(text.decode()) in message


@pytest.mark.parametrize("lines", ["a\nb\n", "a\nb\nb\nc\n"])
def test_classes_txt_that_does_not_fit(tmp_path, user_error, lines):
    write_tar(tmp_path / "train-0.tar", [("1.jpg", JPEG), ("1.cls", b"2")])
    (tmp_path / "classes.txt").write_text(lines)
    assert "classes.txt" in user_error(lambda: find_shards(tmp_path, "train"))


def test_two_images_of_a_sample(tmp_path, user_error):
    write_tar(tmp_path / "train-0.tar", [("a/k.jpg", JPEG), ("a/k.png", JPEG)])
    message = user_error(lambda: find_shards(tmp_path, "train"))
    assert all(part in message for part in ("train-0.tar", "a/k.jpg", "a/k.png"))


def linked(kind):
    member = tarfile.TarInfo("b.jpg")
    member.type, member.linkname = kind, "a.jpg"
    return member


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_links_are_refused_by_name(tmp_path, user_error, kind):
    write_tar(tmp_path / "train-0.tar", [("a.jpg", JPEG), (linked(kind), b"")])
    message = user_error(lambda: find_shards(tmp_path, "train"))
    assert "train-0.tar: b.jpg" in message
    assert "--dereference" in message


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_a_sparse_file_is_refused_by_name(tmp_path, user_error, format):
    with open(tmp_path / "1.jpg", "wb") as file:
        file.write(JPEG)
        file.seek(1 << 20)
        file.write(b"end")
    command = ["tar", "-C", tmp_path, "--sparse", f"--format={format}", "-cf"]
    subprocess.run([*command, tmp_path / "train-0.tar", "1.jpg"], check=True)
    message = user_error(lambda: find_shards(tmp_path, "train"))
    assert "train-0.tar: 1.jpg is a link or a sparse file" in message


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_sizes_in_pax_headers(tmp_path, format):
    long = "folder/" * 30 + "\u00e4" * 90 + ".jpg"
    with tarfile.open(tmp_path / "train-0.tar", "w:", format=format) as tar:
        for name, content in ((long, JPEG + b"1"), ("2.jpg", JPEG + b"2")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if format == tarfile.PAX_FORMAT:
                member.pax_headers = {"size": str(len(content)), "comment": "x" * 2000}
            tar.addfile(member, io.BytesIO(content))
    images = find_shards(tmp_path, "train")
    assert list(images) == [f"{tmp_path}/train-0.tar: {name}" for name in (long, "2.jpg")]
    assert contents(images) == [JPEG + b"1", JPEG + b"2"]


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused(tmp_path, user_error, mode):
    for name in (f"train-0.tar.{mode}", "train-0.tar"):
        with tarfile.open(tmp_path / name, f"w:{mode}") as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"))
        message = user_error(lambda: find_shards(tmp_path, "train"))
        assert f"{name} is compressed" in message
        (tmp_path / name).unlink()


def test_no_images(tmp_path, user_error):
    write_tar(tmp_path / "train-0.tar", [("1.txt", b"words")])
    assert "no images" in user_error(lambda: find_shards(tmp_path, "train"))


def test_a_missing_number_is_said(tmp_path, capsys):
    for number in (3, 4, 6):
        write_tar(tmp_path / f"train-{number:06d}.tar", [(f"{number}.jpg", JPEG)])
    assert len(find_shards(tmp_path, "train")) == 3
    assert "no shard 5" in capsys.readouterr().err


# ---- torn shards


def test_every_torn_shard_is_named(tmp_path, packed, user_error):
    whole = (packed / "train-000000.tar").read_bytes()
    cuts = np.random.default_rng(0).integers(0, len(whole), 20).tolist()
    for cut in [*cuts, 0, 511, 512, len(whole) - 1024, len(whole) - 512, len(whole) - 1]:
        (tmp_path / "train-000000.tar").write_bytes(whole[:cut])
        message = user_error(lambda: find_shards(tmp_path, "train"))
        assert "train-000000.tar is torn" in message, cut


@pytest.mark.parametrize("place", [0, 1024, 20 * 512])
def test_a_damaged_header_is_named(tmp_path, packed, user_error, place):
    content = bytearray((packed / "train-000000.tar").read_bytes())
    content[place : place + 512] = b"\xa5" * 512
    (tmp_path / "train-000000.tar").write_bytes(content)
    message = user_error(lambda: find_shards(tmp_path, "train"))
    assert "train-000000.tar is torn" in message
    assert f"at byte {place}" in message or not place


def test_what_follows_the_end_of_a_tar_is_not_lost(tmp_path, user_error):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", JPEG)])
    both = [(tmp_path / f"{name}.tar").read_bytes() for name in ("a", "b")]
    (tmp_path / "train-0.tar").write_bytes(b"".join(both))
    assert "goes on after its last whole member" in user_error(
        lambda: find_shards(tmp_path, "train")
    )
    (tmp_path / "train-0.tar").write_bytes(both[0] + bytes(2 << 20))  # as a download reserves
    assert "goes on after its last whole member" in user_error(
        lambda: find_shards(tmp_path, "train")
    )


def test_a_shard_that_shrinks_in_a_run(tmp_path):
    path = write_tar(tmp_path / "train-0.tar", [("1.jpg", JPEG)])
    images = find_shards(tmp_path, "train")
    os.truncate(path, 600)
    with pytest.raises(shards.UnreadableImage, match=r"train-0\.tar: 1\.jpg"):
        images.source(0)


# ---- the index


def test_the_index_is_kept_and_follows_the_shards(tmp_path, capsys):
    path = write_tar(tmp_path / "train-0.tar", [("1.jpg", JPEG), ("1.cls", b"1")])
    assert len(find_shards(tmp_path, "train")) == 1
    assert "indexing 1 shards" in capsys.readouterr().err
    kept = find_shards(tmp_path, "train")
    assert "indexing" not in capsys.readouterr().err
    assert (contents(kept), kept.classes, kept.found.images) == ([JPEG], ["0", "1"], {".jpg": 1})
    # Other names in the same size, another time only.
    time.sleep(0.02)
    write_tar(path, [("2.jpg", JPEG), ("2.cls", b"0")])
    assert find_shards(tmp_path, "train")[0].endswith("2.jpg")
    write_tar(tmp_path / "train-1.tar", [("3.jpg", JPEG)])
    assert len(find_shards(tmp_path, "train")) == 2
    (tmp_path / "train-0.tar").unlink()
    assert len(find_shards(tmp_path, "train")) == 1


def test_a_damaged_index_is_built_anew(tmp_path):
    write_tar(tmp_path / "train-0.tar", [(f"{number}.jpg", JPEG) for number in range(50)])
    expected = list(find_shards(tmp_path, "train"))
    file = tmp_path / ".train.index.npz"
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    for cut in random.integers(0, len(whole), 5).tolist():
        file.write_bytes(whole[:cut])
        assert list(find_shards(tmp_path, "train")) == expected
    for place in random.integers(0, len(whole), 20).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        file.write_bytes(damaged)
        assert list(find_shards(tmp_path, "train")) == expected
    file.write_bytes(pickle.dumps({"code": os.getcwd}))
    assert list(find_shards(tmp_path, "train")) == expected


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    write_tar(tmp_path / "train-0.tar", [("1.jpg", JPEG)])
    (tmp_path / ".train.index.npz").mkdir()  # a read-only folder doesn't stop root
    assert contents(find_shards(tmp_path, "train")) == [JPEG]
    assert "every command will index these shards" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"train-0.tar", ".train.index.npz"}


# ---- packing


def test_many_shards_in_order_whatever_the_workers(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "in"
    for index in range(30):
        fill(folder, [f"{index:02d}.bmp"], noise(random))
    output = run_pack(folder, tmp_path / "out", shard_mb=1)
    assert_like_the_folder(find_shards(output, "train"), ImagePaths(folder))
    tars = shard_bytes(output)
    assert len(tars) == 10
    assert all(len(content) <= 10**6 for content in tars.values())
    assert shard_bytes(run_pack(folder, tmp_path / "again", shard_mb=1, num_workers=2)) == tars


def noise(random):
    """An image of 300 kB, three for a shard of a megabyte."""
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (300, 333, 3), np.uint8)).save(buffer, "BMP")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """12 MB of noise, for 13 shards."""
    folder = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    for index in range(40):
        fill(folder, [f"{index:02d}.bmp"], noise(random))
    fill(folder, ["07b.bmp", "39b.bmp"], b"torn")
    return folder


@pytest.mark.parametrize("shown_lines", [1, 7])
def test_a_killed_pack_continues_to_the_same_bytes(large_folder, tmp_path, shown_lines):
    flags = {"data_path": large_folder, "num_workers": 0, "shard_mb": 1}
    expected = run_pack(large_folder, tmp_path / "expected", shard_mb=1)
    output = tmp_path / "out"
    words = command_line(flags | {"output": output})
    process = subprocess.Popen(
        [sys.executable, ROOT / "main_data.py", "pack", *words], stdout=subprocess.PIPE, text=True
    )
    shown = (line for line in process.stdout if line.endswith(" MB\n"))
    for _ in range(shown_lines):
        next(shown)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = shard_bytes(output)
    assert shown_lines <= len(killed) < len(shard_bytes(expected))
    assert not json.loads((output / "pack.json").read_text())["finished"]
    run_pack(large_folder, output, shard_mb=1)
    assert shard_bytes(output) == shard_bytes(expected)
    assert not list(output.glob(".*.tmp"))


def test_a_lost_shard_is_written_again(large_folder, tmp_path):
    output = run_pack(large_folder, tmp_path / "out", shard_mb=1)
    expected = shard_bytes(output)
    assert shard_bytes(run_pack(large_folder, output, shard_mb=1)) == expected
    (output / "train-000004.tar").unlink()
    assert shard_bytes(run_pack(large_folder, output, shard_mb=1)) == expected


def test_an_unfinished_pack_is_said(packed, tmp_path, capsys):
    fill(tmp_path, ["train-000000.tar"], (packed / "train-000000.tar").read_bytes())
    fill(tmp_path, ["pack.json"], b'{"finished": false, "shards": []}')
    find_shards(tmp_path, "train")
    assert f"{tmp_path} isn't packed to its end" in capsys.readouterr().err


def test_other_settings_or_images_are_refused(tmp_path, user_error):
    folder = fill(tmp_path / "in", ["1.jpg"])
    output = run_pack(folder, tmp_path / "out")
    assert "max_side (None, now 9)" in user_error(lambda: run_pack(folder, output, max_side=9))
    fill(folder, ["2.jpg"])
    assert "another train" in user_error(lambda: run_pack(folder, output))
    (output / "pack.json").unlink()
    assert "another origin" in user_error(lambda: run_pack(folder, output))


def test_unreadable_files_are_named_and_left_out(tmp_path, capsys, user_error):
    folder = fill(tmp_path / "in", [f"{index:02d}.jpg" for index in range(20)])
    fill(folder, [f"torn{index}.jpg" for index in range(9)], encode("JPEG")[:200])
    images = find_shards(run_pack(folder, tmp_path / "out"), "train")
    shown = capsys.readouterr()
    assert [name.rpartition(" ")[2] for name in images] == [f"{i:02d}.jpg" for i in range(20)]
    assert all(f"left out as unreadable: {folder}/torn{i}.jpg" in shown.err for i in range(9))
    assert "20 train images in 1 shards" in shown.out
    assert "9 unreadable files left out" in shown.out
    fill(folder, ["torn9.jpg"], b"torn")
    message = user_error(lambda: run_pack(folder, tmp_path / "more"))
    assert "lacks 10 unreadable files, more than 1%" in message
    assert len(find_shards(tmp_path / "more", "train")) == 20


def test_a_full_disk_is_one_line(tmp_path, user_error, monkeypatch):
    folder = fill(tmp_path / "in", ["1.jpg"])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.os, "truncate", fail)
    message = user_error(lambda: run_pack(folder, tmp_path / "out"))
    assert f"{tmp_path / 'out'} can't be written (No space left on device)" in message
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_large_images_are_resized(tmp_path, capsys):
    folder = tmp_path / "in"
    large = photograph(61, 47)
    grey, turned = large.convert("L"), Image.Exif()
    turned[0x0112] = 6
    (folder / "train").mkdir(parents=True)
    large.save(folder / "train" / "0.jpg", quality=95, exif=turned)
    grey.save(folder / "train" / "1.jpg", quality=95)
    large.save(folder / "train" / "2.webp", lossless=True)
    large.convert("P").save(folder / "train" / "3.gif")
    grey.save(folder / "train" / "4.tif", exif=turned)
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "train" / "5.png")
    large.resize((32, 25)).save(folder / "train" / "6.bmp")
    np.save(folder / "train" / "7.npy", np.asarray(large))
    images = find_shards(run_pack(folder, tmp_path / "out", max_side=32), "train")
    opened = [Image.open(io.BytesIO(content)) for content in contents(images)[:7]]
    kinds = [(image.format, image.mode, image.size) for image in opened]
    assert kinds == [
        ("JPEG", "RGB", (32, 25)),
        ("JPEG", "L", (32, 25)),
        ("PNG", "RGB", (32, 25)),
        ("PNG", "RGB", (32, 25)),
        ("PNG", "L", (32, 25)),
        ("PNG", "I;16", (61, 47)),
        ("BMP", "RGB", (32, 25)),
    ]
    assert [image.getexif().get(0x0112) for image in opened] == [6, None, None, None, 6, None, None]
    assert contents(images)[7:] in ([], [(folder / "train" / "7.npy").read_bytes()])
    assert f"{len(images) - 6} images above --max_side keep their size" in capsys.readouterr().out
    expected = np.asarray(large.resize((32, 25), Image.LANCZOS)).astype(int)
    assert (np.asarray(opened[2]) == expected).all()
    assert abs(np.asarray(opened[0]) - expected).mean() < 4
    expected = np.asarray(grey.resize((32, 25), Image.LANCZOS))
    assert (np.asarray(opened[4]) == expected).all()  # stored, so not turned


def test_what_alpha_hides_is_resized_as_it_is_read(tmp_path):
    image = photograph(64, 48).convert("RGBA")
    image.putalpha(0)
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "1.png")
    images = find_shards(run_pack(tmp_path / "in", tmp_path / "out", max_side=32), "train")
    expected = photograph(64, 48).resize((32, 24), Image.LANCZOS)
    found = read_image(images.source(0)).permute(1, 2, 0).numpy()
    assert (found == np.asarray(expected)).all()


# ---- pages


def test_each_page_becomes_an_image(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    random = np.random.default_rng(0)
    folder = tmp_path / "in"
    folder.mkdir()

    def draw(*shape, dtype=np.uint8):
        top = np.iinfo(dtype).max
        return random.integers(0, top, shape, dtype=dtype, endpoint=True)

    arrays = {
        "a8.tif": draw(3, 20, 30),
        "b16.tif": draw(5, 20, 30, dtype=np.uint16),
        "c_rgb.tif": draw(2, 20, 30, 3),
        "d_bands.tif": draw(2, 20, 30, 5, dtype=np.uint16),
        "e_planes.tif": draw(2, 3, 20, 30, dtype=np.uint16),
        "f_float.tif": random.normal(size=(3, 20, 30)).astype(np.float32),
        "g_one.tif": draw(20, 30, dtype=np.uint16),
    }
    options = {
        "c_rgb.tif": {"photometric": "rgb"},
        "d_bands.tif": {"photometric": "minisblack", "planarconfig": "contig"},
        "e_planes.tif": {"photometric": "rgb", "planarconfig": "separate"},
    }
    for name, array in arrays.items():
        kept = options.get(name, {"photometric": "minisblack"})
        tifffile.imwrite(folder / name, array, extratags=[(0x0112, "H", 1, 6, False)], **kept)
    frames = [photograph(61, 47, seed=seed) for seed in range(3)]
    frames[0].save(folder / "h.webp", save_all=True, append_images=frames[1:], lossless=True)
    expected = []
    for name, array in arrays.items():
        array = np.moveaxis(array, 1, -1) if name == "e_planes.tif" else array
        if name == "g_one.tif":
            expected.append((name, array))
        else:
            expected += [(f"{name} page {page}", array[page]) for page in range(len(array))]
    expected += [(f"h.webp page {page}", np.asarray(frames[page])) for page in range(3)]

    images = find_shards(run_pack(folder, tmp_path / "out", pages="each"), "train")
    assert [name.split(": ")[1] for name in images] == [name for name, _ in expected]
    for index, (name, array) in enumerate(expected):
        bands = array.shape[2] if array.ndim == 3 else 1
        found = decoding.read_samples(images.source(index), PixelFormat(in_chans=bands))
        assert found.dtype == array.dtype, name
        assert (found.reshape(array.shape) == array).all(), name
        orientation = decoding.describe(images.source(index)).orientation
        assert orientation == (1 if name.startswith("h.webp") else 6), name
    is_png = [content.startswith(b"\x89PNG") for content in contents(images)]
    assert is_png == [array.dtype == np.uint8 for _, array in expected]


def test_whole_files_of_many_pages_are_copied(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "1.tif", np.zeros((3, 20, 30), np.uint8))
    images = find_shards(run_pack(tmp_path / "in", tmp_path / "out"), "train")
    assert contents(images) == [(tmp_path / "in" / "1.tif").read_bytes()]


def test_one_page_that_holds_a_stack_of_imagej(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "in").mkdir()
    stack = np.random.default_rng(0).integers(0, 65536, (4, 20, 30), np.uint16)
    description = "ImageJ=1.53\nimages=4\nslices=4\n"
    # One page of the first image, whose samples the other ones follow, as ImageJ writes it.
    tifffile.imwrite(tmp_path / "in" / "1.tif", stack[0], description=description, metadata=None)
    with open(tmp_path / "in" / "1.tif", "ab") as file:
        file.write(stack[1:].tobytes())
    images = find_shards(run_pack(tmp_path / "in", tmp_path / "out", pages="each"), "train")
    for index in range(4):
        found = decoding.read_samples(images.source(index), PixelFormat(in_chans=1))
        assert (found[..., 0] == stack[index]).all()


def test_what_needs_flags_to_be_read_is_copied_whole(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    bands = np.random.default_rng(0).normal(size=(20, 30, 13)).astype(np.float32)
    bands[0, 0] = np.nan
    fill(tmp_path / "in", ["0.jpg"])
    tifffile.imwrite(
        tmp_path / "in" / "1.tif", bands, photometric="minisblack", planarconfig="contig"
    )
    tifffile.imwrite(tmp_path / "in" / "2.tif", np.zeros((20, 30), np.int8))
    images = find_shards(run_pack(tmp_path / "in", tmp_path / "out", max_side=9), "train")
    assert contents(images)[1:] == [(tmp_path / "in" / f"{n}.tif").read_bytes() for n in (1, 2)]


@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_pages_become_bands(tmp_path, layout):
    """Of a stack, a page a channel, as microscopes write them."""
    tifffile = pytest.importorskip("tifffile")
    stack = np.random.default_rng(0).integers(0, 2**16, (5, 12, 10), dtype=np.uint16)
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in/stack.tif", stack)
    tifffile.imwrite(tmp_path / "in/single.tif", stack[0])
    out = run_pack(tmp_path / "in", tmp_path / "out", pages="bands", layout=layout)
    images = find_shards(out, "train")
    names = [images[index].rpartition(": ")[2] for index in range(2)]
    assert names == ["single.tif", "stack.tif"]
    pixels = PixelFormat(5, layout=layout)
    assert np.array_equal(read_samples(images.source(1), pixels), np.moveaxis(stack, 0, 2))
    assert np.array_equal(read_samples(images.source(0), pixels)[..., 0], stack[0])


def test_pages_of_different_sizes_are_no_bands(tmp_path, capsys):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "in").mkdir()
    with tifffile.TiffWriter(tmp_path / "in/1.tif") as file:
        for side in (8, 9):
            file.write(np.zeros((side, side), np.uint16), photometric="minisblack")
    tifffile.imwrite(tmp_path / "in/2.tif", np.zeros((8, 8), np.uint16))
    run_pack(tmp_path / "in", tmp_path / "out", pages="bands")
    captured = capsys.readouterr()
    assert "1.tif page 1: has another size than the first page" in captured.err
    assert "1 unreadable files left out" in captured.out


def test_a_packed_shard_that_is_missing_is_named(image_folder, tmp_path, user_error):
    out = run_pack(image_folder, tmp_path / "out")
    (out / "train-000000.tar").rename(out / "train-000001.tar")
    message = user_error(lambda: find_shards(out, "train"))
    assert message.startswith(f"{out} lacks train-000000.tar, which pack.json lists")
    (out / "pack.json").unlink()
    assert len(find_shards(out, "train")) == 18


def test_a_shard_that_changes_during_a_run_is_not_read(image_folder, tmp_path):
    out = run_pack(image_folder, tmp_path / "out")
    images = find_shards(out, "train")
    shard = out / "train-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    os.utime(shard, ns=(1, 1))
    with pytest.raises(decoding.UnreadableImage, match="has changed since the start"):
        images.source(0)


def test_shards_are_not_packed_again(image_folder, packed, tmp_path, user_error):
    message = user_error(lambda: run_pack(packed, tmp_path / "again"))
    assert "are shards already" in message


def test_a_damaged_pack_json_is_the_users_error(image_folder, tmp_path, user_error):
    out = run_pack(image_folder, tmp_path / "out")
    (out / "pack.json").write_text("{")
    assert "pack.json is damaged" in user_error(lambda: run_pack(image_folder, out))


def test_what_lies_beside_is_said(image_folder, tmp_path, capsys):
    out = run_pack(image_folder, tmp_path / "out")
    fill(out, ["loose.jpg"])
    assert find_shards(out, "train").found.others == {".jpg": 1}
    fill(out, ["train/1.jpg"])
    assert len(image_files.find_images(out, "train")) == 1
    assert f"{out}/train-*.tar is passed over, as there is {out}/train" in capsys.readouterr().err


@pytest.mark.parametrize("pages", ["each", "bands"])
def test_pages_of_a_stack_of_which_only_the_first_is_described(tmp_path, pages):
    tifffile = pytest.importorskip("tifffile")
    stack = np.random.default_rng(0).integers(0, 2**16, (5, 12, 10), dtype=np.uint16)
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in/1.tif", stack, truncate=True, photometric="minisblack")
    images = find_shards(run_pack(tmp_path / "in", tmp_path / "out", pages=pages), "train")
    read = [read_samples(images.source(index)) for index in range(len(images))]
    assert np.array_equal(np.concatenate(read, axis=2), np.moveaxis(stack, 0, 2))
