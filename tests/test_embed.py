"""Files of features: timm's and transformers' numbers, the same bytes however they are computed."""

import csv
import fcntl
import signal
import time

import numpy as np
import pytest
import safetensors.torch
import tiny_finetune  # noqa: F401, for its model
import torch
from helpers import ForkedScript, encode, fill, run, runner, write_images
from PIL import Image
from test_models_mae import transformers_twin

import main_data
import main_embed
import models_mae
import models_vit
from util import data, decoding, feature_files
from util.checkpoint import save_safetensors
from util.errors import UserError

MAE = {"model": "tiny_test_model", "input_size": 8, "norm_pix_loss": False, "in_chans": 3}
CLASSIFIER = {"model": "tiny_test_vit", "input_size": 8, "nb_classes": 3, "global_pool": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of four and three images, of which one has 16 bits, without train or val."""
    root = tmp_path_factory.mktemp("photographs")
    write_images(root / "b", 4, seed=1)
    write_images(root / "a", 2, seed=2)
    grey = np.random.default_rng(3).integers(0, 65536, (12, 14), dtype=np.uint16)
    Image.fromarray(grey).save(root / "a" / "002.png")
    return root


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    """A file of a pre-training, with its model."""
    torch.manual_seed(0)
    model = models_mae.build_saved(MAE, 3)
    randomize(model)
    path = tmp_path_factory.mktemp("pretraining") / "full.pth"
    torch.save({"model": model.state_dict(), "args": MAE}, path)
    return path, model.eval()


def randomize(model):
    """Let no weight be 0 or 1, such as those of norms."""
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)


def classifier(tmp_path, global_pool):
    torch.manual_seed(1)
    saved = CLASSIFIER | {"global_pool": global_pool}
    model = models_vit.build_saved(saved, 3)
    randomize(model)
    torch.save({"model": model.state_dict(), "args": saved}, tmp_path / "classifier.pth")
    return tmp_path / "classifier.pth", model.eval()


def embed(**given):
    runner(main_embed)({"device": "cpu", "num_workers": 0} | given)
    output = given["output"]
    if output.suffix == ".npz":
        with np.load(output, allow_pickle=False) as arrays:
            return dict(arrays)
    return np.load(output) if output.suffix == ".npy" else rows_of(output)


def rows_of(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def seen(paths, size=8):
    """The images as the model sees them, transformed one by one."""
    transform = data.eval_transform(size)
    return torch.cat([data.normalize(transform(decoding.read_image(p))[None]) for p in paths])


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=1e-5)


# ---- which numbers


@pytest.mark.parametrize("global_pool", [True, False])
@torch.no_grad()
def test_a_classifier_s_features_are_what_timm_s_head_sees(folder, tmp_path, global_pool, capsys):
    checkpoint, model = classifier(tmp_path, global_pool)
    flags = {"checkpoint": checkpoint, "data_path": folder, "output": tmp_path / "new" / "x.npz"}
    found = embed(**flags)
    names = [f"a/00{i}.png" for i in range(3)] + [f"b/00{i}.png" for i in range(4)]
    imgs = seen([folder / name for name in names])
    tokens = model.forward_features(imgs)
    close(found["embeddings"], model.forward_head(tokens, pre_logits=True))
    assert found["embeddings"].dtype == np.float32
    assert found["filenames"].tolist() == names
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert found["labels"].dtype == np.int64
    assert found["classes"].tolist() == ["a", "b"]
    close(embed(**flags, pool="none")["embeddings"], tokens[:, 1:])
    out = capsys.readouterr().out
    assert ("mean of the patch tokens" if global_pool else "class token") in out
    assert "in float32" in out
    assert "x.npz exists, and will be replaced" in out
    before = model.forward_intermediates(imgs, [0], norm=True, output_fmt="NLC")[1][0]
    close(embed(**flags, pool="none", layer=0)["embeddings"], before)
    close(embed(**flags, pool="none", layer=-2)["embeddings"], before)


@torch.no_grad()
def test_an_encoder_s_features_are_those_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    saved = {"model": "embedded_test_model", "input_size": 32}
    models_mae.MODELS[saved["model"]] = models_mae.factory(8, (32, 2, 4), (16, 1, 2))
    model = models_mae.build_saved(saved | {"norm_pix_loss": False}, 3)
    randomize(model)
    torch.save({"model": model.state_dict(), "args": saved}, tmp_path / "full.pth")
    write_images(tmp_path / "images", 3, size=(50, 40))
    flags = {"checkpoint": tmp_path / "full.pth", "data_path": tmp_path / "images"}
    found = embed(**flags, output=tmp_path / "x.npz", pool="none")
    assert found.keys() == {"embeddings", "filenames"}  # without class folders

    twin = transformers_twin(model).vit.eval()
    twin.config.mask_ratio = 0.0
    imgs = seen(sorted((tmp_path / "images").iterdir()), 32)
    in_order = torch.arange(16.0).expand(3, -1)
    tokens = twin(pixel_values=imgs, noise=in_order).last_hidden_state
    close(found["embeddings"], tokens[:, 1:])
    close(embed(**flags, output=tmp_path / "x.npy"), tokens[:, 1:].mean(1))
    close(embed(**flags, output=tmp_path / "x.npy", pool="cls"), tokens[:, 0])


def test_files_of_an_encoder(pretraining, folder, tmp_path, user_error):
    """The same encoder in full, published without decoder, as .safetensors and as a vit_ model."""
    checkpoint, model = pretraining
    weights = {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(("decoder", "mask_token"))
    }
    about = {"args": MAE, "command": "main_pretrain.py"}
    save_safetensors(tmp_path / "encoder.safetensors", weights, about)
    safetensors.torch.save_file(weights, tmp_path / "bare.safetensors")
    flags = {"data_path": folder, "output": tmp_path / "x.npz"}
    expected = embed(**flags, checkpoint=checkpoint)["embeddings"]
    found = embed(**flags, checkpoint=tmp_path / "encoder.safetensors")["embeddings"]
    assert np.array_equal(found, expected)
    flags["checkpoint"] = tmp_path / "bare.safetensors"
    assert "does not say its model: add --model" in user_error(lambda: embed(**flags))
    for name in ("tiny_test_model", "tiny_test_vit"):
        flags["model"] = name
        assert "add --input_size" in user_error(lambda: embed(**flags))
        assert np.array_equal(embed(**flags, input_size=8)["embeddings"], expected)


def test_bands_and_rectangles_are_read_from_the_checkpoint(tmp_path):
    saved = MAE | {"input_size": (8, 12), "in_chans": 2, "value_range": (0.0, 4.0)}
    saved |= {"mean": (0.1, 0.2), "std": (0.5, 2.0), "layout": "chw"}
    model = models_mae.build_saved(saved, 2)
    checkpoint = tmp_path / "full.safetensors"
    save_safetensors(checkpoint, model.state_dict(), {"args": saved})
    image = 4 * np.random.default_rng(0).random((2, 9, 13), dtype=np.float32)  # only cropped
    np.save(tmp_path / "image.npy", image)
    found = embed(
        checkpoint=checkpoint,
        images=tmp_path / "image.npy",
        output=tmp_path / "x.npz",
        input_size=[8, 12],
    )
    assert found["filenames"].tolist() == [str(tmp_path / "image.npy")]
    crop = torch.from_numpy(image / 4)[None, :, 0:8, 0:12]
    imgs = crop - torch.tensor([0.1, 0.2])[:, None, None]
    imgs = imgs / torch.tensor([0.5, 2.0])[:, None, None]
    with torch.no_grad():
        tokens, _, _ = model.forward_encoder(imgs, 0, torch.arange(6.0)[None])
    close(found["embeddings"], tokens[:, 1:].mean(1))


# ---- the same bytes


def test_the_file_does_not_depend_on_how_it_is_computed(
    folder, pretraining, tmp_path, capsys, monkeypatch
):
    """A batch of all sizes: 8-bit and 16-bit images in one, unreadable ones, parts of blocks."""
    images = tmp_path / "images"
    fill(images, ["c/torn.jpg"], encode("JPEG")[:500])
    for link in ("a", "b"):
        (images / link).symlink_to(folder / link)
    flags = {"checkpoint": pretraining[0], "data_path": images, "device": "cpu"}
    monkeypatch.setattr(main_embed, "BLOCK_TOKENS", 3 * 4)
    monkeypatch.setattr(main_embed, "SECONDS_BETWEEN_LINES", 0)
    first = tmp_path / "first.npz"
    embed(**flags, output=first)
    assert "\n3 of 8 images  eta 0:00:00  " in capsys.readouterr().out
    for size, workers in ((1, 0), (3, 2), (64, 2)):
        embed(**flags, output=tmp_path / "x.npz", batch_size=size, num_workers=workers)
        assert (tmp_path / "x.npz").read_bytes() == first.read_bytes()
    flags |= {"output": tmp_path / "y.npz", "batch_size": 2, "num_workers": 0}
    code, out, err = run("tests/tiny_embed.py", flags, processes=2)
    assert code == 0, err
    assert (tmp_path / "y.npz").read_bytes() == first.read_bytes()
    assert out.count("1 unreadable image left out") == 1
    assert err.count("torn.jpg") == 2  # as the folder is looked at, and as it is read


def test_shards_and_lists_hold_the_folder_s_images(folder, pretraining, tmp_path):
    flags = {"checkpoint": pretraining[0]}
    expected = embed(**flags, data_path=folder, output=tmp_path / "x.npz")
    packed = {"data_path": folder, "output": tmp_path / "shards", "num_workers": 0}
    main_data.main(
        main_data.get_args_parser().parse_args(
            ["pack", *(f"--{name}={value}" for name, value in packed.items())]
        )
    )
    embed(**flags, data_path=tmp_path / "shards", split="train", output=tmp_path / "y.npz")
    assert (tmp_path / "y.npz").read_bytes() == (tmp_path / "x.npz").read_bytes()
    order = [4, 0, 5]
    names = [str(folder / expected["filenames"][i]) for i in order]
    (tmp_path / "list.txt").write_text("\n".join(names))
    found = embed(**flags, data_path=tmp_path / "list.txt", output=tmp_path / "y.npz")
    assert found["filenames"].tolist() == names
    assert found["labels"].tolist() == [1, 0, 1]
    close(found["embeddings"], torch.from_numpy(expected["embeddings"][order]))


# ---- formats


def test_tables_hold_the_same_bits(folder, pretraining, tmp_path, capsys):
    flags = {"checkpoint": pretraining[0], "data_path": folder}
    expected = embed(**flags, output=tmp_path / "x.npz")
    header, *rows = embed(**flags, output=tmp_path / "x.csv")
    assert header == ["filename", *(f"embedding_{i}" for i in range(32))]
    assert [row[0] for row in rows] == expected["filenames"].tolist()
    numbers = np.array([row[1:] for row in rows]).astype(np.float32)
    assert np.array_equal(numbers, expected["embeddings"])
    assert "holds no labels" in capsys.readouterr().out
    assert np.array_equal(embed(**flags, output=tmp_path / "x.npy"), expected["embeddings"])
    header, *rows = rows_of(tmp_path / "x.names.csv")
    assert header == ["filename", "label", "class"]
    labels = [(str(label), expected["classes"][label]) for label in expected["labels"]]
    assert [tuple(row) for row in rows] == [
        (name, *label) for name, label in zip(expected["filenames"], labels, strict=True)
    ]
    assert "x.names.csv lists them" in capsys.readouterr().out


def test_any_name(pretraining, tmp_path):
    names = [
        b'comma, and "quotes".jpg',
        b"line\nbreak.jpg",
        b"no utf-8 \xff.jpg",
        "ü 雪.jpg".encode(),
    ]
    fill(tmp_path / "images", names)
    flags = {"checkpoint": pretraining[0], "data_path": tmp_path / "images"}
    found = embed(**flags, output=tmp_path / "x.npz")["filenames"].tolist()
    assert [name.encode("utf-8", "surrogateescape") for name in found] == sorted(names)
    rows = embed(**flags, output=tmp_path / "x.csv")
    assert [row[0] for row in rows] == ["filename", *found]


def test_unreadable_images_are_left_out(folder, pretraining, tmp_path, capsys, user_error):
    write_images(tmp_path / "images", 60)
    flags = {"checkpoint": pretraining[0], "data_path": tmp_path / "images"}
    whole = embed(**flags, output=tmp_path / "x.npz")
    torn = tmp_path / "images" / "017.png"
    torn.write_bytes(torn.read_bytes()[:60])
    found = embed(**flags, output=tmp_path / "y.npz")
    kept = whole["filenames"] != "017.png"
    assert np.array_equal(found["filenames"], whole["filenames"][kept])
    assert np.array_equal(found["embeddings"], whole["embeddings"][kept])
    assert np.array_equal(embed(**flags, output=tmp_path / "y.npy"), found["embeddings"])
    out, err = capsys.readouterr()
    assert "features 59 x 32 in float32; 1 unreadable image left out" in out
    assert "017.png" in err
    for number in range(0, 60, 6):
        (tmp_path / "images" / f"{number:03d}.png").write_bytes(b"x")
    message = user_error(lambda: embed(**flags, output=tmp_path / "z.npz"))
    assert message == "11 of 60 images are unreadable, see above: repair or remove them"
    assert not [path for path in tmp_path.iterdir() if "z.npz" in path.name]


# ---- whole or absent


def test_a_killed_run_leaves_no_output(pretraining, tmp_path):
    write_images(tmp_path / "images", 30)
    output = tmp_path / "x.npz"
    flags = {"checkpoint": pretraining[0], "data_path": tmp_path / "images", "output": output}
    flags |= {"device": "cpu", "num_workers": 0}
    process = ForkedScript("tests/tiny_embed.py", flags | {"batch_size": 1, "wait": 0.2})
    temporary = tmp_path / ".x.npz.tmp"
    deadline = time.monotonic() + 30
    while not temporary.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    code, _, err = run("tests/tiny_embed.py", flags)
    assert code == 2
    assert "another run is writing" in err
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert temporary.exists()
    assert not output.exists()
    code, _, err = run("tests/tiny_embed.py", flags)
    assert code == 0, err
    assert len(np.load(output)["embeddings"]) == 30
    assert not temporary.exists()


def test_a_disk_that_is_full(folder, pretraining, tmp_path, user_error, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    output = tmp_path / "x.npz"
    output.write_bytes(b"older")
    monkeypatch.setattr("shutil.copyfileobj", full)
    message = user_error(lambda: embed(checkpoint=pretraining[0], data_path=folder, output=output))
    assert message == f"--output {output} can't be written: No space left on device"
    assert output.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


# ---- bad input


def test_wrong_input_is_refused(folder, pretraining, tmp_path, user_error):
    probe = tmp_path / "probe.pth"
    about = {"command": "main_linprobe.py", "args": MAE | {"finetune": "encoder.pth"}}
    torch.save({"model": {"head.1.weight": torch.zeros(2, 32)}} | about, probe)
    broken = tmp_path / "broken.pth"
    weights = pretraining[1].state_dict()
    torch.save({"model": weights | {"norm.bias": torch.full((32,), 3e38)}, "args": MAE}, broken)
    wider = tmp_path / "wider.pth"
    torch.save({"model": weights, "args": MAE | {"model": "mae_vit_nano_patch4"}}, wider)
    unknown = tmp_path / "unknown.pth"
    torch.save({"model": weights, "args": MAE | {"model": "resnet50"}}, unknown)
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    flags = {"checkpoint": pretraining[0], "data_path": folder, "output": tmp_path / "x.npz"}
    image = folder / "a" / "000.png"
    for wrong, message in (
        ({"checkpoint": probe}, "give the file that it was trained on, --checkpoint encoder.pth"),
        ({"checkpoint": broken}, "the features of a/000.png are not finite"),
        ({"checkpoint": wider}, "has width 32 and 2 blocks, the model width 128 and 6 blocks"),
        ({"checkpoint": unknown}, "unknown model 'resnet50': choose one of mae_vit_nano_patch4, "),
        ({"checkpoint": tmp_path / "none.pth"}, "does not exist"),
        ({"model": "mae_vit_nano_patch4"}, "says model tiny_test_model: leave out --model"),
        ({"input_size": 16}, "says input_size 8: leave out --input_size"),
        ({"layer": 2}, "layer 2 does not exist: the model has the blocks 0 to 1"),
        ({"output": tmp_path / "x.txt"}, "x.txt must end in .npz, .npy, .csv"),
        ({"output": tmp_path / "x.csv", "pool": "none"}, "write .npz or .npy"),
        ({"output": text / "x.npz"}, "can't be written"),
        ({"data_path": tmp_path / "none"}, "does not exist"),
        ({"split": "none"}, f"{folder}/none does not exist: choose an existing --split"),
        ({"images": image}, "either by --data_path or by --images"),
        ({"in_chans": 1}, "leave out --in_chans"),
    ):
        assert message in user_error(lambda wrong=wrong: embed(**flags | wrong))
    del flags["data_path"]
    for wrong, message in (
        ({}, "either by --data_path or by --images"),
        ({"images": tmp_path / "none.png"}, f"--images {tmp_path / 'none.png'} doesn't exist"),
        ({"images": folder}, "is a folder: use --data_path"),
        ({"images": text}, "has no readable images"),
        ({"images": image, "split": "val"}, "leave it out"),
    ):
        assert message in user_error(lambda wrong=wrong: embed(**flags | wrong))
    folder_of_output = tmp_path / "folder.npz"
    folder_of_output.mkdir()
    wrong = {"images": image, "output": folder_of_output}
    assert "is a folder" in user_error(lambda: embed(**flags | wrong))


def test_images_in_no_class_are_said(folder, pretraining, tmp_path, capsys):
    images = tmp_path / "images"
    fill(images, ["loose.jpg"])
    (images / "a").symlink_to(folder / "a")
    found = embed(checkpoint=pretraining[0], data_path=images, output=tmp_path / "x.npz")
    assert "1 image in no class folder" in capsys.readouterr().err
    assert found["classes"][found["labels"]].tolist() == ["a", "a", "a", ""]


def test_which_images_are_taken_is_said(image_folder, pretraining, tmp_path, capsys):
    flags = {"checkpoint": pretraining[0], "data_path": image_folder, "output": tmp_path / "x.npz"}
    assert len(embed(**flags)["filenames"]) == 5
    assert f"without --split, the images of {image_folder / 'val'} are" in capsys.readouterr().out
    assert len(embed(**flags, split="train")["filenames"]) == 18
    assert len(embed(**flags | {"data_path": image_folder / "train"})["filenames"]) == 18
    assert "without --split" not in capsys.readouterr().out


def test_a_file_that_another_run_has_just_finished_is_not_touched(tmp_path, monkeypatch):
    """It was still the temporary one when this run opened it."""
    path = tmp_path / "f.npy"
    temporary = tmp_path / ".f.npy.tmp"
    temporary.write_bytes(b"whole")
    lock = fcntl.lockf

    def finished_meanwhile(*args):
        if temporary.exists():
            temporary.rename(path)
        return lock(*args)

    monkeypatch.setattr(feature_files.fcntl, "lockf", finished_meanwhile)
    with (
        pytest.raises(UserError, match="another run is writing"),
        feature_files.writing(path, (2,), 1, None),
    ):
        pass
    assert path.read_bytes() == b"whole"
