"""Curves of runs: what is drawn is what log.txt says."""

import json
import sys

import pytest
from helpers import command_line
from PIL import Image

import main_visualize
from util import curves

pytest.importorskip("matplotlib")


def show(flags):
    main_visualize.main(main_visualize.get_args_parser().parse_args(command_line(flags)))


def write_log(folder, records, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return folder


PRETRAIN = [
    {"epoch": e, "train_loss": 1 / (e + 1), "train_lr": 1e-3 * e, "val_loss": 2 / (e + 1)}
    for e in range(4)
]
PRETRAIN[1]["knn_acc1"], PRETRAIN[3]["knn_acc1"] = 50.0, 70.5
FINETUNE = [
    {"epoch": e, "train_loss": 3.0 - e, "train_lr": 0.1, "test_loss": 2.5 - e, "test_acc1": 40.0}
    for e in range(2)
]
ALL = ["training loss", "held-out loss", "learning rate", "k-NN accuracy of features (%)"]


def drawn(figure):
    """{title: {run: [(x, y), ...]}} of a figure's panels, as matplotlib has them."""
    return {
        axes.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in figure.axes
    }


def curve(records, entry):
    return [[r["epoch"], r[entry]] for r in records if entry in r]


def test_the_lines_are_those_of_the_logs(tmp_path):
    first, second = write_log(tmp_path / "long", PRETRAIN), write_log(tmp_path / "b", FINETUNE)
    figure = curves.draw(curves.read_runs([str(first), str(second)]))
    assert drawn(figure) == {
        ALL[0]: {"long": curve(PRETRAIN, "train_loss"), "b": curve(FINETUNE, "train_loss")},
        ALL[1]: {"long": curve(PRETRAIN, "val_loss"), "b": curve(FINETUNE, "test_loss")},
        ALL[2]: {"long": curve(PRETRAIN, "train_lr"), "b": curve(FINETUNE, "train_lr")},
        ALL[3]: {"long": [[1, 50.0], [3, 70.5]]},
        "accuracy (%)": {"b": curve(FINETUNE, "test_acc1")},
    }
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["long", "b"]
    colours = {line.get_label(): line.get_color() for axes in figure.axes for line in axes.lines}
    assert len(set(colours.values())) == 2
    limits = {axes.get_xlim() for axes in figure.axes}
    assert len(limits) == 1  # shared


def test_only_panels_with_data_and_names_that_differ(tmp_path):
    bare = [{"epoch": 0, "train_loss": 1.0, "val_loss": float("nan"), "train_lr": None}]
    folders = [str(write_log(tmp_path / name / "out", bare)) for name in "ab"]
    assert drawn(curves.draw(curves.read_runs(folders))) == {
        "training loss": {folder: [[0, 1.0]] for folder in folders}
    }


def test_a_real_run_is_drawn(pretrain, pretrain_flags, tmp_path, capsys):
    pretrain(pretrain_flags | {"knn_every": 1, "epochs": 3})
    folder, output = pretrain_flags["output_dir"], tmp_path / "new" / "curves.png"
    show({"curves": folder, "output": output})
    assert capsys.readouterr().out.endswith(f"{output}: {folder}\n")
    assert Image.open(output).width > 500
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    figure = curves.draw(curves.read_runs([str(folder)]))
    entries = ("train_loss", "val_loss", "train_lr", "knn_acc1")
    expected = {t: {"out": curve(records, entry)} for t, entry in zip(ALL, entries, strict=True)}
    assert drawn(figure) == expected
    assert len(expected[ALL[3]]["out"]) == 3


def test_a_torn_line_is_said_and_left_out(tmp_path, capsys):
    folder = write_log(tmp_path / "run", PRETRAIN, tail='{"epoch": 4, "train_l')
    assert curves.read_log(folder) == PRETRAIN
    assert capsys.readouterr().err == (
        f"warning: {folder}/log.txt: left out as torn or as no epoch's entry: line 5\n"
    )


def test_wrong_input_is_refused(tmp_path, user_error, monkeypatch):
    good = write_log(tmp_path / "good", PRETRAIN)
    flags = {"curves": good, "output": tmp_path / "c.png"}
    for wrong, message in (
        ({"curves": [good, tmp_path / "none"]}, "none/log.txt can't be read (No such file"),
        ({"curves": write_log(tmp_path / "empty", [])}, "empty/log.txt has no epochs to draw"),
        ({"curves": write_log(tmp_path / "t", [], '{"ep')}, "t/log.txt has no epochs to draw"),
        ({"curves": write_log(tmp_path / "x", [{"epoch": 0}])}, "have no figures to draw"),
        ({"output": tmp_path / "c.xyz"}, "c.xyz has no suffix of an image format"),
        ({"checkpoint": "c.pth"}, "leave out --checkpoint"),
        ({"images": "cat.jpg"}, "leave out --images"),
    ):
        assert message in user_error(lambda wrong=wrong: show(flags | wrong))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in user_error(lambda: show(flags))


@pytest.mark.parametrize("flags", [{"images": "cat.jpg"}, {"checkpoint": "c.pth"}])
def test_a_reconstruction_still_needs_its_flags(flags, user_error):
    message = user_error(lambda: show(flags))
    assert message == "give a model by --checkpoint, and images by --images or --data_path"
