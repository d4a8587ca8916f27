"""Finding images below folders and by lists, and what is said of them: folders made by hand."""

import io
import os
import sys

import numpy as np
import pytest
from helpers import encode, fill, photograph, relative_names
from PIL import Image

from util import cli, decoding, image_files, searching, survey
from util.errors import UserError
from util.pixels import PixelFormat

# ---- folders


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg"], ["cat/1.jpg", "dog/2.jpg"]),
        (["train/2.jpg", "train/1.jpg", "3.jpg"], ["1.jpg", "2.jpg"]),
        (
            ["train/a/b/c/1.jpg", "train/a/2.jpg", "train/3.jpg"],
            ["3.jpg", "a/2.jpg", "a/b/c/1.jpg"],
        ),
        (["2.jpg", "1.jpg"], ["1.jpg", "2.jpg"]),
        (["cat/1.jpg", "dog/2.jpg"], ["cat/1.jpg", "dog/2.jpg"]),
        (["a/b/c/1.jpg", "a/2.jpg", "3.jpg"], ["3.jpg", "a/2.jpg", "a/b/c/1.jpg"]),
    ],
    ids=["labelled", "flat train", "nested train", "flat", "labelled without train", "nested"],
)
def test_training_images_are_those_below_train_or_else_all(tmp_path, names, expected):
    paths = image_files.find_images(fill(tmp_path, names), "train")
    assert relative_names(paths) == expected
    assert len(paths) == len(expected)
    assert all(decoding.read_image(path).shape == (3, 47, 61) for path in paths)


def test_held_out_images_are_those_below_val_or_none(tmp_path):
    fill(tmp_path, ["train/cat/1.jpg", "2.jpg"])
    assert image_files.find_images(tmp_path, "val") is None
    fill(tmp_path, ["val/cat/3.jpg"])
    assert relative_names(image_files.find_images(tmp_path, "val")) == ["cat/3.jpg"]


def test_hidden_files_and_other_files_are_ignored(tmp_path):
    fill(tmp_path, [".1.jpg", "._2.jpg", ".cache/3.jpg", "a/.b/4.jpg", "a/._5.jpg"])
    fill(tmp_path, ["labels.csv", "a/notes.txt", "a/6.jpg.txt", "a/jpg", "a/7jpg", "Thumbs.db"])
    fill(tmp_path, ["a/8.jpg", "folder.jpg/9.jpg"])
    fill(tmp_path, ["@eaDir/8.jpg/thumb.jpg", "a/__MACOSX/1.jpg", "$RECYCLE.BIN/1.jpg"])
    assert relative_names(image_files.ImagePaths(tmp_path)) == ["a/8.jpg", "folder.jpg/9.jpg"]


def test_links_in_circles_are_broken_and_a_pipe_is_unreadable(tmp_path):
    fill(tmp_path, ["a/1.jpg", "2.jpg"])
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to(tmp_path / "a")
    (tmp_path / "a/loop").symlink_to("loop")
    paths = image_files.ImagePaths(tmp_path)
    assert relative_names(paths) == ["2.jpg", "a/1.jpg"]
    assert sorted(paths.found.circles) == ["a/self", "a/up"]
    assert paths.found.missing == ["a/loop"]
    assert paths.found.again == []
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(decoding.UnreadableImage, match=r"pipe\.jpg"):
        decoding.read_image(tmp_path / "pipe.jpg")


def test_a_folder_counts_as_often_as_it_is_linked(tmp_path):
    fill(tmp_path, ["b/1.jpg", "b/deep/2.jpg", "c/3.jpg"])
    for link in ("a", "d", "c/b"):
        (tmp_path / link).symlink_to(tmp_path / "b")
    paths = image_files.ImagePaths(tmp_path)
    assert relative_names(paths) == [
        *("a/1.jpg", "a/deep/2.jpg", "b/1.jpg", "b/deep/2.jpg"),
        *("c/3.jpg", "c/b/1.jpg", "c/b/deep/2.jpg", "d/1.jpg", "d/deep/2.jpg"),
    ]
    assert paths.classes == ["a", "b", "c", "d"]
    assert sorted(paths.found.again) == ["a", "c/b", "d"]
    assert paths.found.circles == []


def test_folders_linked_into_each_other_are_walked_until_they_meet_themselves(tmp_path):
    fill(tmp_path, ["a/1.jpg", "b/2.jpg"])
    (tmp_path / "a/to").symlink_to("../b")
    (tmp_path / "b/to").symlink_to("../a")
    paths = image_files.ImagePaths(tmp_path)
    assert relative_names(paths) == ["a/1.jpg", "a/to/2.jpg", "b/2.jpg", "b/to/1.jpg"]
    assert sorted(paths.found.circles) == ["a/to/to", "b/to/to"]


def test_links_that_multiply_without_end_are_the_users_error(tmp_path, user_error):
    """Twenty folders, each linked into the next one twice."""
    for level in range(20):
        fill(tmp_path, [f"{level:02d}/1.jpg"])
        for link in "ab":
            (tmp_path / f"{level:02d}" / link).symlink_to(f"../{level + 1:02d}")
    assert "links multiply" in user_error(lambda: image_files.ImagePaths(tmp_path))


def test_what_leads_nowhere_or_is_closed_is_passed_over_and_noted(tmp_path, monkeypatch, capfd):
    fill(tmp_path, ["a/1.jpg", "closed/2.jpg"])
    (tmp_path / "a/3.jpg").symlink_to("gone.jpg")
    (tmp_path / "b").symlink_to("gone")
    scandir = os.scandir

    def refuse(path):
        if path.rstrip(b"/").endswith(b"closed"):  # as root, every folder could be read
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(searching.os, "scandir", refuse)
    paths = image_files.find_images(tmp_path, "train")
    assert relative_names(paths) == ["a/1.jpg"]
    assert capfd.readouterr().err.splitlines() == [
        f"warning: {tmp_path}: 1 folder (closed) can't be read: check the permissions",
        f"warning: {tmp_path}: 2 names (a/3.jpg, b) passed over, without a file behind: "
        "repair or remove them",
    ]
    with pytest.raises(UserError, match=r"closed can't be read: Permission denied"):
        image_files.ImagePaths(tmp_path / "closed")


def test_symlinked_folders_and_files_are_followed(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", ["cats/1.jpg", "2.jpg"])
    fill(tmp_path / "images", ["train/dog/3.jpg"])
    (tmp_path / "images/train/cat").symlink_to(elsewhere / "cats")
    (tmp_path / "images/train/dog/4.jpg").symlink_to(elsewhere / "2.jpg")
    paths = image_files.find_images(tmp_path / "images", "train")
    assert relative_names(paths) == ["cat/1.jpg", "dog/3.jpg", "dog/4.jpg"]
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    assert relative_names(image_files.find_images(tmp_path / "linked", "train")) == relative_names(
        paths
    )


@pytest.mark.parametrize(
    "name",
    [
        "with space .jpg",
        "a folder/it's.jpg",
        "na\u00efve \u65e5\u672c.jpg",
        "new\nline.jpg",
        pytest.param(
            b"caf\xe9/\xff.jpg",
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses such names"),
        ),
    ],
    ids=ascii,
)
def test_any_name_is_found_and_read(tmp_path, name):
    (path,) = image_files.find_images(fill(tmp_path, [name]), "train")
    assert os.fsencode(path) == os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    assert decoding.read_image(path).shape == (3, 47, 61)


def test_paths_are_in_the_order_of_their_bytes(tmp_path):
    names = ["b/1.jpg", "a/9.jpg", "a/10.jpg", "a b/1.jpg", "a.jpg", "Z.jpg", "\u00e4.jpg", "z.jpg"]
    paths = image_files.ImagePaths(fill(tmp_path, names))
    expected = sorted(names, key=os.fsencode)
    assert relative_names(paths) == expected
    for index in (5, 0, 7, 4):
        assert paths[index] == str(tmp_path / expected[index])


def test_the_fingerprint_is_that_of_the_names(tmp_path):
    """Wherever the folder is and in whatever order its files were written."""
    names = ["a/1.jpg", "a/2.jpg", "b/1.jpg"]
    fingerprint = image_files.ImagePaths(fill(tmp_path / "original", names)).fingerprint
    copy = fill(tmp_path / "copy", reversed(names))
    assert image_files.ImagePaths(copy).fingerprint == fingerprint
    seen = {fingerprint}
    for number, changed in enumerate(
        [
            [*names, "b/2.jpg"],
            names[:-1],
            ["a/1.jpg", "a/2.jpg", "b/3.jpg"],
            ["a/1.jpg", "b/1.jpg", "b/2.jpg"],
            ["a/1.jpga/2.jpg", "b/1.jpg"],
        ],
        start=1,
    ):
        seen.add(image_files.ImagePaths(fill(tmp_path / str(number), changed)).fingerprint)
        assert len(seen) == 1 + number


@pytest.mark.parametrize("split", ["train", "val"])
def test_folders_without_images_are_the_users_error(tmp_path, split):
    (tmp_path / split).mkdir()
    with pytest.raises(UserError, match=f"{split} has no images"):
        image_files.find_images(tmp_path, split)
    fill(tmp_path, [f"{split}/notes.txt", f"{split}/.1.jpg"])
    with pytest.raises(UserError, match=f"{split} has no images"):
        image_files.find_images(tmp_path, split)


def test_a_missing_path_and_a_file_are_the_users_error(tmp_path):
    with pytest.raises(UserError, match="missing does not exist"):
        image_files.find_images(tmp_path / "missing", "train")
    fill(tmp_path, ["1.jpg"])
    with pytest.raises(UserError, match=r"1\.jpg is a file"):
        image_files.find_images(tmp_path / "1.jpg", "train")


@pytest.mark.parametrize("count", [1, 30, 100])
def test_a_folder_with_no_readable_image_is_the_users_error(tmp_path, count):
    names = [f"{index:03d}.jpg" for index in range(count)]
    fill(tmp_path, names, b"torn")
    with pytest.raises(UserError, match=r"no readable images.*000\.jpg"):
        image_files.find_images(tmp_path, "train")


@pytest.mark.parametrize("readable", range(0, 20, 3))
def test_one_readable_image_in_a_small_folder_is_enough(tmp_path, readable):
    fill(tmp_path, [f"{index:03d}.jpg" for index in range(20)], b"torn")
    fill(tmp_path, [f"{readable:03d}.jpg"])
    assert len(image_files.find_images(tmp_path, "train")) == 20


# ---- held-out images


def test_held_out_folders_are_left_out_where_a_folder_stands_in_for_train(tmp_path, capfd):
    fill(tmp_path, ["photos/1.jpg", "photos/val/2.jpg", "val/3.jpg", "test/a/4.jpg", "5.jpg"])
    (tmp_path / "photos/more").symlink_to(tmp_path / "val")
    fill(tmp_path, ["valid/6.jpg", "Val/7.jpg", "test2017/8.jpg", "value/9.jpg", "dev/notes.txt"])
    paths = image_files.find_images(tmp_path, "train")
    names = ["5.jpg", "Val/7.jpg", "photos/1.jpg", "photos/val/2.jpg", "test2017/8.jpg"]
    assert relative_names(paths) == [*names, "valid/6.jpg", "value/9.jpg"]
    out, err = capfd.readouterr()
    assert "passed over: 3 held-out folders (photos/more, test, val), 1 other" in out
    (line,) = err.splitlines()
    assert line.startswith(
        f"warning: {tmp_path}: among the images to train on are Val, test2017, valid, ...: "
    )
    assert relative_names(image_files.find_images(tmp_path, "val")) == ["3.jpg"]


def test_a_folder_of_held_out_images_alone_is_the_users_error(tmp_path, user_error):
    fill(tmp_path, ["val/1.jpg", "test/2.jpg"])
    message = user_error(lambda: image_files.find_images(tmp_path, "train"))
    assert message.startswith(f"{tmp_path} has no images (")
    assert message.endswith("in it or below; passed over: 2 held-out folders (test, val)")


def test_train_is_taken_as_it_is(tmp_path, capfd):
    names = ["train/val/1.jpg", "train/test/2.jpg"]
    paths = image_files.find_images(fill(tmp_path, names), "train")
    assert relative_names(paths) == ["test/2.jpg", "val/1.jpg"]
    (line,) = capfd.readouterr().err.splitlines()
    assert "train: it holds test and val: it may be what --data_path should name" in line
    fill(tmp_path, ["train/a/3.jpg"])
    image_files.find_images(tmp_path, "train")
    assert capfd.readouterr().err == ""


# ---- lists


def write_list(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"b/2.jpg\na/1.jpg\nb/2.jpg",
        b"\xef\xbb\xbfb/2.jpg\r\na/1.jpg\r\n\r\n  \nb/2.jpg\r\n",
        "b/2.jpg\na/1.jpg\nb/2.jpg\n".encode("utf-16"),
    ],
)
def test_a_list_keeps_its_order_and_its_repeated_lines(tmp_path, content, capsys):
    fill(tmp_path, ["a/1.jpg", "b/2.jpg", "c/3.jpg"])
    paths = image_files.find_images(write_list(tmp_path / "list.txt", content), "train")
    assert relative_names(paths) == ["b/2.jpg", "a/1.jpg", "b/2.jpg"]
    assert [*paths] == [str(tmp_path / name) for name in ("b/2.jpg", "a/1.jpg", "b/2.jpg")]
    assert (paths.classes, paths.labels.tolist()) == (["a", "b"], [1, 0, 1])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/list.txt: 3 images (.jpg 3), 8-bit RGB, 61 x 47",
        "1 line repeating another one",
    ]
    assert image_files.find_images(tmp_path / "list.txt", "val") is None


def test_a_list_may_name_files_anywhere_by_any_bytes(tmp_path, capsys):
    elsewhere = fill(tmp_path / "elsewhere", ["x/1.jpg", b"caf\xe9/2.jpg", " spaced .jpg"])
    (tmp_path / "here").mkdir()
    lines = [b"../elsewhere/caf\xe9/2.jpg", os.fsencode(elsewhere / "x/1.jpg")]
    lines += [b"../elsewhere/ spaced .jpg", b"../elsewhere/x/../x/./1.jpg"]
    file = write_list(tmp_path / "here/any.list", b"\n".join(lines))
    paths = image_files.ImagePaths(file)
    assert [os.path.realpath(os.fsencode(path)) for path in paths] == [
        os.fsencode(elsewhere) + name
        for name in (b"/caf\xe9/2.jpg", b"/x/1.jpg", b"/ spaced .jpg", b"/x/1.jpg")
    ]
    assert [paths.classes[label] for label in paths.labels] == ["caf\udce9", "x", "elsewhere", "x"]


def test_lines_that_lead_nowhere_are_passed_over_by_name(tmp_path, capfd):
    fill(tmp_path, ["1.jpg"])
    file = write_list(tmp_path / "some.txt", b"a.jpg\n1.jpg\n.\nb.jpg\nc.jpg")
    assert relative_names(image_files.find_images(file, "train")) == ["1.jpg"]
    assert capfd.readouterr().err == (
        f"warning: {file}: 4 names (a.jpg, ., b.jpg, ...) passed over, without a file behind: "
        "repair or remove them\n"
    )


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"1.jpg\0", "is a file, but no list of paths"),
        ("a.jpg", b"x.jpg", "is a file, but no list of paths"),
        ("a.txt", b"", "names no file that exists: a line is a path"),
        ("a.txt", b"x.jpg 1\n", "names no file that exists (its first line is x.jpg 1): a line"),
        ("a.txt", b"\xff\xfe\x00", "names no file that exists"),
    ],
)
def test_a_file_that_is_no_list_is_the_users_error(tmp_path, user_error, name, content, told):
    file = write_list(tmp_path / name, content)
    assert told in user_error(lambda: image_files.find_images(file, "train"))


def test_lists_stand_for_missing_folders(tmp_path, user_error, capfd):
    fill(tmp_path, ["all/a/1.jpg", "all/a/2.jpg", "all/b/3.jpg", "all/b/4.jpg"])
    write_list(tmp_path / "train.txt", b"all/b/3.jpg\nall/a/1.jpg\n")
    for lists in ("val", "test"):
        write_list(tmp_path / f"{lists}.txt", b"all/a/2.jpg\nall/b/4.jpg\n")
    train, val = image_files.find_labelled_images(tmp_path, 2)
    assert relative_names(train) == ["all/b/3.jpg", "all/a/1.jpg"]
    assert relative_names(val) == ["all/a/2.jpg", "all/b/4.jpg"]
    assert train.classes == val.classes == ["a", "b"]
    assert (train.labels.tolist(), val.labels.tolist()) == ([1, 0], [0, 1])
    for split, expected in (("train", train), ("val", val), ("test", val)):
        assert [*image_files.find_images(tmp_path, split)] == [*expected]
    assert capfd.readouterr().err == ""

    fill(tmp_path, ["val/a/5.jpg"])
    assert relative_names(image_files.find_images(tmp_path, "val")) == ["a/5.jpg"]
    assert "val.txt is passed over, as there is" in capfd.readouterr().err

    (tmp_path / "train.txt").unlink()
    message = user_error(lambda: image_files.find_images(tmp_path, "train"))
    assert message.startswith(f"{tmp_path}/val.txt lists images that are held out")


def test_a_list_given_to_a_classifier_is_the_users_error(tmp_path, user_error):
    file = write_list(fill(tmp_path, ["a/1.jpg"]) / "train.txt", b"a/1.jpg")
    message = user_error(lambda: image_files.find_labelled_images(file, 1))
    assert message.startswith(f"{file} is a file: a classifier takes a folder")


def test_a_missing_folder_is_named_with_what_there_is_of_it(tmp_path, user_error):
    message = user_error(lambda: image_files.find_images(tmp_path / "no/such/folder", "train"))
    assert message.startswith(
        f"{tmp_path}/no/such/folder does not exist (of it there is only {tmp_path}): "
    )
    message = user_error(lambda: image_files.find_images(tmp_path / "no", "train"))
    assert message.startswith(f"{tmp_path}/no does not exist: ")


def test_a_home_folder_is_expanded_also_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert cli.path("~/images") == "/home/me/images"
    assert cli.path("images/~") == "images/~"


# ---- what is said


@pytest.fixture
def said(capsys):
    """Surveys a folder; returns its lines and its warnings."""

    def lines(*args, find=image_files.find_images):
        find(*args)
        out, err = capsys.readouterr()
        return out.splitlines(), err.splitlines()

    return lines


def test_an_odd_folder_of_what_systems_and_people_leave(tmp_path, said):
    fill(tmp_path, [f"2021/{number}.png" for number in range(10)], encode("PNG"))
    fill(tmp_path, ["a.jpg", "b.JPG", "c.jpeg"])
    fill(tmp_path, [f"phone/{number}.DCM" for number in range(25)], b"heic")
    fill(tmp_path, ["notes.txt", "2021/list.TXT", "README", "x.cr2", "1.a", "2.b", "3.c"], b"")
    fill(tmp_path, ["._a.jpg", "2021/Thumbs.db", "desktop.ini", ".git/x.png", "@eaDir/a.jpg/b.jpg"])
    assert said(tmp_path, "train") == (
        [
            f"{tmp_path}: 13 images (.png 10, .jpg 2, .jpeg 1), 8-bit RGB, 61 x 47",
            "passed over: 32 other files (.dcm 25: convert to .tif or .npy; .txt 2; no suffix 1; "
            ".a 1; .b 1; 2 other suffixes 2), 3 hidden or system files, 2 hidden or system folders "
            "(.git, @eaDir)",
        ],
        [],
    )


def test_an_odd_folder_of_links_and_sizes(tmp_path, said):
    for number in range(1200):
        fill(tmp_path, [f"train/cat/{number:04d}.jpg"])
    for name, width in (("dog", 90), ("b\nird", 30), ("zebra", 40)):
        fill(tmp_path, [f"train/{name}/x"], b"")
        photograph(width, width // 2).save(tmp_path / f"train/{name}/{width}.png")
    for link in ("cat2", "dog/cat3"):
        (tmp_path / f"train/{link}").symlink_to(tmp_path / "train/cat")
    (tmp_path / "train/zebra/up").symlink_to("..")
    lines, warnings = said(tmp_path, 5, ["train"], find=image_files.find_labelled_images)
    assert lines == [
        f"{tmp_path}/train: 3,603 images (.jpg 3,600, .png 3), 8-bit RGB, 61 x 47 (of 32 sampled: "
        "30 x 15 to 61 x 47); 5 classes (b\\nird, cat, cat2, ...)",
        "passed over: 3 other files (no suffix 3), 1 circular link (zebra/up); reached more than "
        "once: 2 folders (cat2, dog/cat3)",
    ]
    assert warnings == []


def test_an_odd_folder_of_types(tmp_path, said):
    """Pages, alpha, depth, orientation: each is said with what to do."""
    photograph(61, 47).save(tmp_path / "1.jpg", exif=orientation(6))
    pages = [photograph(61, 47, seed=seed).copy() for seed in range(5)]
    pages[0].save(tmp_path / "2.tif", save_all=True, append_images=pages[1:])
    photograph(20, 30).convert("RGBA").save(tmp_path / "3.png")
    Image.fromarray(np.arange(0, 4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "4.png")
    fill(tmp_path, ["5.jpg"], b"torn")
    lines, warnings = said(tmp_path, "train")
    assert lines == [
        f"{tmp_path}: 5 images (.jpg 2, .png 2, .tif 1), 8-bit RGB 2, 8-bit RGBA 1, 16-bit grey 1, "
        "61 x 47 (of 4 sampled: 20 x 30 to 64 x 64)",
    ]
    torn, pages, alpha, types, turned, used = warnings
    assert torn.startswith(f"warning: will be skipped as unreadable: {tmp_path}/5.jpg: ")
    about = f"warning: {tmp_path}: "
    assert pages == (
        f"{about}1 of 4 sampled have 5 pages, of which the first is read: python "
        "main_data.py pack makes an image of each (--pages each) or a band (--pages bands)"
    )
    assert alpha.startswith(f"{about}1 of 4 sampled have an alpha band, which is dropped: ")
    assert types.startswith(f"{about}files of different types, each on the scale of its own")
    assert turned == (
        f"{about}1 of 4 sampled have an EXIF orientation, which is not applied: "
        "--exif_orientation turns them upright"
    )
    assert used == (
        f"{about}the sample uses 0 to 4095 of 0 to 65535, 6% of the range: --value_range 0 4095 "
        "would use it all, or see python main_data.py stats"
    )


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def save_levels(folder, levels):
    Image.fromarray(np.asarray(levels, dtype=np.uint16)[None]).save(folder / "levels.png")


@pytest.mark.parametrize(
    ("levels", "pixels", "told"),
    [
        ([0, 65535], PixelFormat(), []),
        ([1000, 7553], PixelFormat(), ["uses 1000 to 7553 of 0 to 65535, 10% of the range"]),
        ([1000, 7555], PixelFormat(), []),
        ([0, 100], PixelFormat(), ["0 to 100 of 0 to 65535, under 1% of the range"]),
        ([0, 4095], PixelFormat(value_range=(0, 4095)), []),
        ([0, 4095], PixelFormat(value_range=(0, 65535)), ["6% of the range"]),
        ([*range(98), 200, 255], PixelFormat(value_range=(0, 100)), ["2% of the sampled values"]),
        ([*range(99), 255], PixelFormat(value_range=(0, 100)), []),
        ([*range(50), 65535], PixelFormat(nodata=65535), ["uses 0 to 49 of 0 to 65535"]),
        ([5, 5], PixelFormat(nodata=5), []),
    ],
    ids=str,
)
def test_the_range_in_use_is_that_of_the_samples(tmp_path, said, levels, pixels, told):
    save_levels(tmp_path, levels)
    _, warnings = said(tmp_path, "train", pixels)
    assert len(warnings) == len(told)
    for warning, text in zip(warnings, told, strict=True):
        assert text in warning


def test_8_bits_that_use_little_of_their_range_are_a_concern(tmp_path, said):
    """Such as masks, or samples of 4 bits in bytes; a black image is none."""
    Image.new("L", (9, 7), 3).save(tmp_path / "dark.png")
    assert said(tmp_path, "train")[1] == []
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / "mask.png")
    (warning,) = said(tmp_path, "train")[1]
    assert "the sample uses 0 to 15 of 0 to 255, 6% of the range: --value_range 0 15" in warning


def test_a_file_that_needs_a_flag_is_the_users_error(tmp_path, user_error):
    fill(tmp_path, ["1.jpg", "3.jpg"])
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "2.tif")
    message = user_error(lambda: image_files.find_images(tmp_path, "train"))
    assert message == (
        f"{tmp_path}/2.tif holds float32 grey, a type without a scale of its own: "
        "add --value_range LO HI"
    )


def test_unreadable_files_of_the_sample_are_named(tmp_path, said):
    fill(tmp_path, [f"{number:02d}.jpg" for number in range(62)])
    fill(tmp_path, [f"{number:02d}.jpg" for number in range(3, 33, 2)], b"torn")
    fill(tmp_path, ["02.jpg"], b"torn, but not of the sample")
    sampled = {int(61 * step / 31) for step in range(32)}
    broken = sorted(sampled & {2, *range(3, 33, 2)})
    lines, warnings = said(tmp_path, "train")
    assert lines == [
        f"{tmp_path}: 62 images (.jpg 62), 8-bit RGB, 61 x 47 (of {32 - len(broken)} sampled)"
    ]
    assert len(warnings) == 6
    for number, warning in zip(broken, warnings[:5], strict=False):
        name = f"{tmp_path}/{number:02d}.jpg: "
        assert warning.startswith(f"warning: will be skipped as unreadable: {name}")
        assert len(warning) > len(f"warning: will be skipped as unreadable: {name}")
    assert warnings[5].endswith(f"so will {len(broken) - 5} more of the files sampled")


def test_large_files_are_sampled_in_part(tmp_path, said, monkeypatch):
    """The first ones that fit into the budget, and always one."""
    fill(tmp_path, [f"{number}.jpg" for number in range(9)])
    read = []
    monkeypatch.setattr(survey, "DECODED_VALUES", 2 * 3 * 61 * 47 + 1)
    monkeypatch.setattr(decoding, "read_image", lambda source, pixels: read.append(source.name))
    said(tmp_path, "train")
    assert read == [f"{tmp_path}/{number}.jpg" for number in range(3)]


def test_only_the_main_process_says_it_and_all_raise_errors(
    tmp_path, said, user_error, monkeypatch
):
    monkeypatch.setenv("RANK", "1")
    fill(tmp_path, ["val/a/1.jpg", "val/b/3.jpg", "notes.txt"])
    assert said(tmp_path, "val") == ([], [])
    fill(tmp_path, ["val/a/2.jpg"], b"torn")
    assert said(tmp_path, "val") == ([], [])
    user_error(lambda: image_files.find_labelled_images(tmp_path, 2, ["val"]))


def test_any_name_can_be_said_on_any_terminal(tmp_path, monkeypatch):
    """Also one in bytes that are no UTF-8, where only ASCII can be shown."""
    fill(tmp_path, [b"val/caf\xe9/1.jpg", "val/\u65e5/2.jpg"])
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    image_files.find_labelled_images(tmp_path, 2, ["val"])
    sys.stdout.flush()
    assert buffer.getvalue().endswith(rb"; 2 classes (caf\xe9, \u65e5)" + b"\n")


def test_links_into_held_out_folders_are_not_trained_on(tmp_path, said):
    fill(tmp_path, ["1.jpg", "val/cats/2.jpg"])
    (tmp_path / "extra").symlink_to(tmp_path / "val/cats")
    (tmp_path / "3.jpg").symlink_to(tmp_path / "val/cats/2.jpg")
    assert relative_names(image_files.find_images(tmp_path, "train")) == ["1.jpg"]
    assert "3.jpg, extra, val" in said(tmp_path, "train")[0][1]


def test_a_name_with_controls_is_shown_escaped(tmp_path, said):
    fill(tmp_path, ["1.jpg"])
    fill(tmp_path, ["a\x1b[31mred\n.jpg"], b"torn")
    (warning,) = said(tmp_path, "train")[1]
    assert warning.startswith(
        f"warning: will be skipped as unreadable: {tmp_path}/a\\x1b[31mred\\n.jpg: "
    )
