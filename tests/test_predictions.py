"""--eval --predictions: a line for each image, the same however the images are shared out."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import fill, relative_names, run, write_images
from PIL import Image
from timm.data import create_transform

import main_finetune
import models_vit
from util.checkpoint import load_checkpoint
from util.image_files import ImagePaths
from util.predictions import likeliest_classes

SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def seven_classes(tmp_path_factory):
    """A checkpoint of a classifier of seven classes with names, its head far from zero."""
    torch.manual_seed(3)
    model = models_vit.build_model("tiny_test_vit", img_size=8, num_classes=7, global_pool=True)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    path = tmp_path_factory.mktemp("classifier") / "seven.pth"
    classes = ["a", "b", 'c, "d"', "e", "f", "g", "h"]
    torch.save({"model": model.state_dict(), "classes": classes}, path)
    return path


@pytest.fixture
def eval_flags(classify_flags, seven_classes, tmp_path):
    flags = classify_flags | {"finetune": seven_classes, "nb_classes": 7, "eval": True}
    return flags | {"predictions": tmp_path / "predictions.csv"}


def rows(path):
    with open(path, newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def by_timm(checkpoint, images, num_classes=7):
    """Probabilities [N, K] by timm's model and transform, one image at a time, in float64."""
    model = timm.models.VisionTransformer(
        **SIZES, num_classes=num_classes, global_pool="avg", fc_norm=True
    )
    model.load_state_dict(load_checkpoint(checkpoint)["model"])
    model.double().eval()
    transform = create_transform(8, interpolation="bicubic", crop_pct=224 / 256)
    with torch.no_grad():
        inputs = [transform(Image.open(path).convert("RGB")).double() for path in images]
        return torch.cat([model(image[None]) for image in inputs]).softmax(1).numpy()


def test_every_image_has_a_line_with_its_likeliest_classes(
    eval_flags, finetune, image_folder, seven_classes, capsys
):
    finetune(eval_flags)
    found = rows(eval_flags["predictions"])
    paths = ImagePaths(image_folder / "val")
    assert [row["file"] for row in found] == relative_names(paths)
    assert [row["label"] for row in found] == ["a", "a", "a", "b", "b"]
    columns = [f"{what}_{n}" for n in range(1, 6) for what in ("class", "probability")]
    assert list(found[0]) == ["file", "label", "predicted", *columns]
    expected = by_timm(seven_classes, paths)
    names = load_checkpoint(seven_classes)["classes"]
    for row, probabilities in zip(found, expected, strict=True):
        order = np.argsort(-probabilities)[:5]
        assert row["predicted"] == row["class_1"]
        assert [row[f"class_{n}"] for n in range(1, 6)] == [names[index] for index in order]
        shown = [float(row[f"probability_{n}"]) for n in range(1, 6)]
        np.testing.assert_allclose(shown, probabilities[order], rtol=2e-2)

    # The accuracy that is printed is the file's.
    listed = [[row[f"class_{n}"] for n in range(1, 6)] for row in found]
    hits = [labels.index(row["label"]) if row["label"] in labels else 9
            for row, labels in zip(found, listed, strict=True)]  # fmt: skip
    acc1, acc5 = (100 * np.mean(np.array(hits) < most) for most in (1, 5))
    out = capsys.readouterr().out
    assert f"* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}" in out
    figures = json.loads((eval_flags["output_dir"] / "eval.json").read_text())
    assert figures["test_acc1"] == pytest.approx(acc1, abs=1e-3)


def test_the_same_file_by_any_processes_workers_and_batches(eval_flags, finetune, tmp_path):
    folder = tmp_path / "images"
    write_images(folder / "val" / "a", 35, seed=7)
    flags = eval_flags | {"data_path": folder}
    finetune(flags)
    expected = flags["predictions"].read_bytes()
    assert expected.count(b"\n") == 36
    for name, change in {"batch": {"batch_size": 5}, "workers": {"num_workers": 2}}.items():
        other = flags | change | {"predictions": tmp_path / f"{name}.csv"}
        finetune(other)
        assert other["predictions"].read_bytes() == expected
    other = flags | {"predictions": tmp_path / "processes.csv"}
    code, out, err = run("tests/tiny_finetune.py", other, processes=2)
    assert code == 0, err
    assert out.count("* Acc@1") == 1
    assert other["predictions"].read_bytes() == expected


@pytest.mark.parametrize("layout", ["flat", "nested", "list", "flat val"])
def test_images_without_labels(eval_flags, finetune, tmp_path, seven_classes, layout, capsys):
    folder = tmp_path / "unlabelled"
    held = folder / {"nested": "x/y", "flat val": "val"}.get(layout, "")
    write_images(held, 3)
    place = folder
    if layout == "list":
        place = tmp_path / "list.txt"
        place.write_text("unlabelled/002.png\nunlabelled/000.png\n")
    finetune(eval_flags | {"data_path": place})
    out = capsys.readouterr().out
    found = rows(eval_flags["predictions"])
    names = {
        "nested": ["x/y/000.png", "x/y/001.png", "x/y/002.png"],
        "list": ["unlabelled/002.png", "unlabelled/000.png"],
    }.get(layout, ["000.png", "001.png", "002.png"])
    assert [row["file"] for row in found] == names
    assert {row["label"] for row in found} == {""}
    assert "Acc@1" not in out
    assert "has no labels: there is no accuracy" in out
    assert not (eval_flags["output_dir"] / "eval.json").exists()
    expected = by_timm(seven_classes, [held / os.path.basename(name) for name in names])
    shown = [float(row["probability_1"]) for row in found]
    np.testing.assert_allclose(shown, expected.max(axis=1), rtol=2e-2)


def test_shards_without_labels(eval_flags, finetune, tmp_path, capsys):
    import tarfile

    write_images(tmp_path / "files", 3)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "val-0.tar", "w") as tar:
        for file in sorted((tmp_path / "files").iterdir()):
            tar.add(file, f"p/{file.name}")
    finetune(eval_flags | {"data_path": tmp_path / "shards"})
    found = rows(eval_flags["predictions"])
    assert [row["file"] for row in found] == ["p/000.png", "p/001.png", "p/002.png"]
    assert "has no labels" in capsys.readouterr().out


def test_an_unreadable_image_has_a_line_without_a_prediction(
    eval_flags, finetune, tmp_path, capsys, user_error
):
    """Without labels. With them an accuracy is claimed, which needs every image."""
    write_images(tmp_path / "some", 3)
    (tmp_path / "some" / "001.png").write_bytes(b"no image")
    finetune(eval_flags | {"data_path": tmp_path / "some"})
    found = rows(eval_flags["predictions"])
    assert [row["file"] for row in found] == ["000.png", "001.png", "002.png"]
    assert set(found[1].values()) == {"001.png", ""}
    assert found[2]["predicted"]
    out = capsys.readouterr().out
    assert "unreadable, and there without a prediction: 1" in out
    (tmp_path / "labelled" / "val").mkdir(parents=True)
    shutil.copytree(tmp_path / "some", tmp_path / "labelled" / "val" / "a")
    message = user_error(lambda: finetune(eval_flags | {"data_path": tmp_path / "labelled"}))
    assert "evaluation needs every image" in message


def test_names_of_any_bytes(eval_flags, finetune, tmp_path):
    names = [b'a, "b".png', b"new\nline.png", b"caf\xe9.png"]
    write_images(tmp_path / "one", 1)
    content = (tmp_path / "one" / "000.png").read_bytes()
    fill(tmp_path / "odd", names, content)
    finetune(eval_flags | {"data_path": tmp_path / "odd"})
    found = [os.fsencode(row["file"]) for row in rows(eval_flags["predictions"])]
    assert found == sorted(names)


def test_classes_without_names_are_numbers(eval_flags, finetune, seven_classes, image_folder):
    """And two classes have two columns each."""
    contents = load_checkpoint(seven_classes)
    weights = {k: v[:2] if k.startswith("head.") else v for k, v in contents["model"].items()}
    path = eval_flags["predictions"].with_name("two.pth")
    torch.save({"model": weights}, path)
    finetune(eval_flags | {"finetune": path, "nb_classes": 2})
    found = rows(eval_flags["predictions"])
    assert [row["label"] for row in found] == ["0", "0", "0", "1", "1"]
    assert list(found[0])[3:] == ["class_1", "probability_1", "class_2", "probability_2"]
    for row in found:
        assert {row["class_1"], row["class_2"]} == {"0", "1"}
        total = float(row["probability_1"]) + float(row["probability_2"])
        assert total == pytest.approx(1, abs=1e-5)


def test_predictions_of_a_probe(classify_flags, linprobe, tmp_path, capsys):
    linprobe(classify_flags | {"epochs": 1})
    probe = classify_flags["output_dir"] / "checkpoint-best.pth"
    file = tmp_path / "probe.csv"
    capsys.readouterr()
    linprobe(classify_flags | {"eval": True, "resume": probe, "predictions": file})
    found = rows(file)
    acc1 = 100 * np.mean([row["label"] == row["predicted"] for row in found])
    assert f"* Acc@1 {acc1:.3f}" in capsys.readouterr().out
    assert {row["label"] for row in found} == {"a", "b"}


def test_equal_logits_are_ranked_by_their_number():
    logits = torch.zeros(2, 9)
    logits[1, 4] = 1
    assert likeliest_classes(logits).tolist() == [[0, 1, 2, 3, 4], [4, 0, 1, 2, 3]]


def test_faults_are_said_before_anything_is_computed(
    eval_flags, finetune, user_error, tmp_path, monkeypatch
):
    monkeypatch.setattr(main_finetune, "evaluate", None)
    message = user_error(lambda: finetune({**eval_flags, "predictions": tmp_path}))
    assert message == f"--predictions {tmp_path} is a folder: give a file"
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "p.csv"
    message = user_error(lambda: finetune({**eval_flags, "predictions": blocked}))
    assert "folder of --predictions" in message
    assert "can't be written" in message
    training = {name: value for name, value in eval_flags.items() if name != "eval"}
    assert user_error(lambda: finetune(training)) == (
        "--predictions is for --eval: add it, or leave out --predictions"
    )


def test_running_out_of_memory(eval_flags, finetune, user_error, monkeypatch):
    """--batch_size, which is of no help here, is advised without the flag."""

    def out_of_memory(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(main_finetune, "evaluate", out_of_memory)
    message = user_error(lambda: finetune(eval_flags))
    assert message.startswith("out of memory with 32 images at a time, as --predictions takes them")


def test_weights_that_are_not_finite(eval_flags, finetune, seven_classes, tmp_path, user_error):
    """No file is left, and what was there stays."""
    contents = load_checkpoint(seven_classes)
    contents["model"]["head.bias"][0] = float("nan")
    broken = tmp_path / "broken.pth"
    torch.save(contents, broken)
    write_images(tmp_path / "some", 3)
    eval_flags["predictions"].write_text("older")
    flags = eval_flags | {"data_path": tmp_path / "some", "finetune": broken}
    assert "not finite" in user_error(lambda: finetune(flags))
    assert eval_flags["predictions"].read_text() == "older"
