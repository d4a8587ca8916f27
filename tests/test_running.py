"""The runner of the recipes' cells, with commands of a few milliseconds, and their folders."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import cifar10_folder
import folders
import knn
import numpy as np
import pytest
import running
import transfer
from helpers import ROOT, write_images
from PIL import Image
from running import Cell

from benchmarks import report
from util.errors import UserError


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """The recipes' results and outputs in a folder of the test."""
    monkeypatch.setattr(running, "ROOT", tmp_path)
    monkeypatch.setattr(running, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(running, "OUTPUT", tmp_path / "output")
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    monkeypatch.setattr(folders, "DATA", tmp_path / "data")


def script(text):
    """The arguments of a command that runs a few lines of Python."""
    return ["-c", textwrap.dedent(text)]


def log(cell, text="pass"):
    """A command that runs `text` and then adds a line to the cell's log.txt."""
    path = running.output("table", cell) / "log.txt"
    line = json.dumps({"epoch": 0, "train_loss": 1.5})
    return script(f"{text}\nopen({str(path)!r}, 'a').write({line + chr(10)!r})")


def run(cells, jobs=2, only=("*",)):
    table = running.Table("table", cells)
    return running.run(table, running.choose(table, only), jobs)


def result(name):
    return json.loads((running.RESULTS / "table" / f"{name}.json").read_text())


@contextlib.contextmanager
def nobody_reads():
    """Stdout is a pipe whose reader is gone, as after `| head`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream, contextlib.redirect_stdout(stream):
        with pytest.raises(BrokenPipeError):
            print("a line", flush=True)
        yield


def lines_of(name):
    return (running.ROOT / running.output("table", name) / "log.txt").read_text().splitlines()


def test_a_cell_leaves_what_it_ran_and_what_it_ran_on():
    cells = [Cell("a", [log("a"), log("a")], {"rows": 1}, seed=3)]
    assert run(cells)
    record = result("a")
    assert record["about"] == {"rows": 1} and record["seed"] == 3
    assert record["commands"] == running.lines(cells[0])
    assert record["outputs"] == {"log.txt": [{"epoch": 0, "train_loss": 1.5}] * 2}
    assert record["wall_s"] == pytest.approx(sum(p["wall_s"] for p in record["parts"]), abs=0.11)
    assert len(record["parts"]) == 2 and record["attempts_without_times"] == 0
    assert record["hardware"]["cpu"] and record["commit"] and record["versions"]["torch"]


def test_computing_is_counted_in_processes_that_a_command_starts_too():
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    text = f"import subprocess, sys\n{burn}\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    assert run([Cell("a", [script(text)], {})])
    assert result("a")["cpu_s"] >= 0.6


def test_commands_have_one_core_and_no_gpu():
    path = running.ROOT / "environment"
    names = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"
    text = f"import os; open({str(path)!r}, 'w').write(repr([os.environ[n] for n in {names}]))"
    assert run([Cell("a", [script(text)], {})])
    assert path.read_text() == "['1', '']"


def test_a_done_cell_is_skipped():
    cells = [Cell("a", [log("a")], {})]
    assert run(cells) and run(cells)
    assert len(lines_of("a")) == 1


def test_what_a_cell_needs_is_run_before_and_chosen_with_it():
    first = running.output("table", "first") / "log.txt"
    cells = [
        Cell("second", [log("second", f"open({str(first)!r})")], {}, needs=["first"]),
        Cell("third", [log("third")], {}),
        Cell("first", [log("first", "import time; time.sleep(0.2)")], {}),
    ]
    assert run(cells, only=["sec*"])
    assert sorted(path.stem for path in (running.RESULTS / "table").iterdir()) == [
        "first",
        "second",
    ]


def test_a_failed_cell_is_named_and_the_others_go_on(capsys):
    cells = [
        Cell("bad", [script("print('why'); exit(2)"), log("bad")], {}),
        Cell("later", [log("later")], {}, needs=["bad"]),
        Cell("good", [log("good")], {}),
    ]
    assert not run(cells, jobs=1)
    said = capsys.readouterr().out
    assert "failed: bad, see" in said and "not run: later, which needs bad" in said
    assert [path.stem for path in (running.RESULTS / "table").iterdir()] == ["good"]
    console = running.ROOT / running.output("table", "bad") / "console.txt"
    assert console.read_text() == "why\n"


def test_cells_are_run_and_listed_though_nobody_reads():
    cells = [Cell("bad", [script("exit(2)")], {}), Cell("good", [log("good")], {})]
    args = SimpleNamespace(into=None, only=["*"], list=True)
    with nobody_reads():
        assert not run(cells, jobs=1)
    assert [path.stem for path in (running.RESULTS / "table").iterdir()] == ["good"]
    with nobody_reads():
        running.start(args, lambda _args: cells, "table", lambda: None)


def test_what_a_cell_needs_is_run_again_if_its_output_is_gone(capsys):
    """To its end, even if that was interrupted; its record stays."""
    path = running.output("table", "first") / "log.txt"
    cells = [
        Cell("first", [log("first")], {}),
        Cell("second", [log("second", f"open({str(path)!r})")], {}, needs=["first"]),
    ]
    assert run(cells)
    kept = result("first")
    shutil.rmtree(running.OUTPUT)
    assert run(cells) and not running.OUTPUT.exists(), "all are done"
    (running.RESULTS / "table" / "second.json").unlink()
    (running.ROOT / running.output("table", "first")).mkdir(parents=True)
    assert run(cells, only=["second"])
    assert len(lines_of("first")) == 1
    assert result("first") == kept
    assert "first: done again, as its output was gone" in capsys.readouterr().out


def test_a_table_is_run_anew_in_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    """And the project's results and outputs stay."""
    cells = [Cell("a", [log("a")], {})]
    assert run(cells)
    kept = result("a")
    monkeypatch.setattr(sys, "argv", ["table.py", "--into", f"{tmp_path / 'anew'}"])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    running.main("", lambda args: [Cell("a", [log("a")], {})], "table")
    anew = result("a")
    assert anew["commands"] != kept["commands"]
    assert (tmp_path / "anew" / "output" / "table" / "a" / "log.txt").exists()
    assert json.loads((tmp_path / "results" / "table" / "a.json").read_text()) == kept
    monkeypatch.setattr(report, "COMMIT", "another")
    with pytest.raises(SystemExit):
        running.main("", lambda args: [], "table")
    assert "anew holds results of commit" in capsys.readouterr().err
    path = tmp_path / "anew" / "results" / "table" / "a.json"
    path.write_text(json.dumps(anew | {"commit": "first, another"}))
    running.write_below(tmp_path / "anew")


def test_a_folder_for_a_table_that_is_not_one_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--into .* can't be written"):
        running.write_below(tmp_path / "file")
    for own in (ROOT / "recipes", ROOT / "recipes" / "results"):
        with pytest.raises(UserError, match="holds the project's results"):
            running.write_below(own)


def test_an_error_in_a_cell_is_said_and_the_others_go_on(capsys, monkeypatch):
    monkeypatch.setattr(
        running, "collect", lambda folder: {}["bad"] if "bad" in str(folder) else {}
    )
    assert not run([Cell("bad", [log("bad")], {}), Cell("good", [log("good")], {})])
    assert result("good") and "failed: bad" in capsys.readouterr().out


def test_an_output_begun_by_other_commands_is_refused(capsys):
    assert not run([Cell("a", [script("exit(2)")], {})])
    assert not run([Cell("a", [log("a")], {})])
    assert "failed: a: " in (said := capsys.readouterr().out)
    assert "was begun by other commands: delete it" in said
    (running.ROOT / running.output("table", "a") / "attempts.json").write_text('{"com')
    assert not run([Cell("a", [log("a")], {})])
    assert "attempts.json is damaged: delete" in capsys.readouterr().out


def test_a_cell_is_run_by_one_runner_at_a_time(capsys):
    with running.cell_folder(running.ROOT / running.output("table", "a")):
        assert not run([Cell("a", [log("a")], {})])
    assert "failed: a: another runner, or " in capsys.readouterr().out


def test_a_command_that_a_killed_runner_left_keeps_others_away(tmp_path):
    """It may still write to the cell's folder. A runner's end closes its own file of the lock."""
    os.mkfifo(tmp_path / "end")
    runner, folder = running.Runner(running.Table("table", [])), tmp_path / "cell"
    with running.cell_folder(folder) as lock:
        attempts = running.Attempts(folder / running.ATTEMPTS, [])
        command = script("open('end').read()"), folder / "console.txt", attempts, lock
        left = threading.Thread(target=runner.execute, args=(0, *command))
        left.start()
        while not runner.processes:
            time.sleep(0.01)
    with pytest.raises(UserError, match="a command that one left behind"):
        running.cell_folder(folder).__enter__()
    (tmp_path / "end").write_text("")
    left.join()
    with running.cell_folder(folder):
        pass


def test_a_cell_that_another_runner_did_meanwhile_is_not_run_again(capsys):
    cell = Cell("a", [log("a")], {})
    assert run([cell])
    assert running.Runner(running.Table("table", [cell])).run(cell)
    assert len(lines_of("a")) == 1
    assert "a: done by another runner" in capsys.readouterr().out


def test_results_of_other_commands_are_refused():
    assert run([Cell("a", [log("a")], {})])
    with pytest.raises(UserError, match=r"results/table/a.json was made by other commands"):
        run([Cell("a", [log("a", "1")], {})])


def test_a_damaged_result_is_named():
    assert run([Cell("a", [log("a")], {})])
    (running.RESULTS / "table" / "a.json").write_text('{"com')
    with pytest.raises(UserError, match=r"results/table/a.json is damaged: delete it"):
        run([Cell("a", [log("a")], {})])


def test_a_result_of_another_name_is_refused():
    """Or a copy would count as a seed."""
    run([Cell("a", [log("a")], {})])
    copy = running.RESULTS / "table" / "b.json"
    shutil.copy(copy.with_name("a.json"), copy)
    with pytest.raises(UserError, match=r"results/table/b\.json is the result of a: delete"):
        running.record(copy)


def test_a_name_that_no_cell_has_is_refused():
    with pytest.raises(UserError, match="table has no cell b"):
        run([Cell("a", [log("a")], {})], only=["b"])


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)]
)
def test_an_interrupted_cell_goes_on_and_its_times_are_added(tmp_path, sent):
    """The command hears of Ctrl-C and ends as ours do; the second call finishes it."""
    program = tmp_path / "table.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import pathlib, sys
            sys.path.insert(0, {str(ROOT / "recipes")!r})
            import running
            running.ROOT = pathlib.Path({str(tmp_path)!r})
            running.RESULTS, running.OUTPUT = running.ROOT / "results", running.ROOT / "output"
            text = '''
            import pathlib, time
            begun = pathlib.Path("begun")
            if not begun.exists():
                begun.touch()
                try:
                    time.sleep(60)
                except KeyboardInterrupt:
                    time.sleep(0.2)
                    exit(130)
            '''
            import textwrap
            cell = running.Cell("a", [["-c", textwrap.dedent(text)]], {{}})
            running.main("A table.", lambda args: [cell], "table")
            """
        )
    )
    command = [sys.executable, program]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "interrupted: the same command goes on\n"
    assert not (tmp_path / "results").exists()

    subprocess.run(command, check=True, cwd=tmp_path, timeout=60, stdout=subprocess.DEVNULL)
    record = json.loads((tmp_path / "results" / "table" / "a.json").read_text())
    assert record["wall_s"] >= 0.4 and record["attempts_without_times"] == 0


def test_flags_are_arguments():
    settings = {"epochs": 3, "crop_scale": [0.5, 1], "norm_pix_loss": True, "eval": False}
    assert running.flags(settings) == [
        *("--epochs", "3", "--crop_scale", "0.5", "1", "--norm_pix_loss")
    ]


@pytest.fixture
def images(tmp_path):
    """Twenty training images and thirty held-out ones in each of two classes."""
    for number, name in enumerate("ab"):
        write_images(tmp_path / "images" / "train" / name, 20, seed=number)
        write_images(tmp_path / "images" / "val" / name, 30, seed=2 + number)
    return tmp_path / "images"


@pytest.fixture
def source(images, monkeypatch):
    """The folder of these images, as commands call it."""
    monkeypatch.setattr(folders, "planned", {})
    return folders.source("x", images)


def made(folder):
    folders.make_planned()
    return running.ROOT / folder


def linked(folder):
    """{class: the files that the links in a folder of classes lead to}."""
    return {path.name: sorted(map(os.path.realpath, path.iterdir())) for path in folder.iterdir()}


def test_each_seed_draws_its_own_labels_in_equal_shares(source, images):
    drawn = [made(folders.with_labels("x", source, 25, seed)) for seed in (0, 0, 1)]
    first, again, other = [linked(folder / "train") for folder in drawn]
    assert first == again != other
    assert {name: len(set(paths)) for name, paths in first.items()} == {"a": 5, "b": 5}
    everything = linked(images / "train")
    assert all(set(first[name]) < set(everything[name]) for name in "ab")
    held_out = linked(drawn[0] / "val")
    assert {name: len(paths) for name, paths in held_out.items()} == {"a": 20, "b": 20}


def test_images_stand_several_times_where_they_are_few(source):
    paths = linked(made(folders.with_labels("x", source, 10, 0, copies=3)) / "train")["a"]
    assert len(paths) == 6 and len(set(paths)) == 2


def test_trials_hold_out_training_images_and_never_see_the_others(source, images):
    folder = made(folders.for_trials("x", source))
    train, val = linked(folder / "train"), linked(folder / "val")
    for name, paths in linked(images / "train").items():
        assert sorted(train[name] + val[name]) == paths
        assert len(val[name]) == 2
    few = linked(made(folders.for_trials("x", source, 50)) / "train")
    assert all(len(few[name]) == 9 and set(few[name]) < set(train[name]) for name in "ab")


def test_other_files_are_no_images(source, images):
    (images / "train" / "a" / ".DS_Store").touch()
    (images / "train" / "notes.txt").touch()
    assert len(linked(made(folders.with_labels("x", source, 100, 0)) / "train")["a"]) == 20


def test_a_folder_without_held_out_images_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="val is missing"):
        folders.source("x", tmp_path)


def test_a_name_stands_for_one_folder(source, images, tmp_path):
    assert folders.source("x", images / ".." / "images") == source
    shutil.copytree(images, tmp_path / "others")
    with pytest.raises(UserError, match=r"data/x is a link to .*: for the same images in"):
        folders.source("x", tmp_path / "others")


def test_folders_are_made_when_cells_run_and_not_from_something_else(source, monkeypatch):
    folder = running.ROOT / folders.with_labels("x", source, 10, 0)
    assert not folder.exists()
    folders.make_planned()
    folders.make_planned()
    assert folder.exists()
    folders.with_labels("x", source, 10, 0, copies=2)
    with pytest.raises(UserError, match=r"x-10-seed0 was made from .* delete it"):
        folders.make_planned()


def test_a_folder_that_could_not_be_made_leaves_nothing(source):
    def fail(folder):
        folder.mkdir()
        raise OSError("disk full")

    folders.plan("y", "nothing", fail)
    with pytest.raises(OSError, match="disk full"):
        folders.make_planned()
    assert [path.name for path in folders.DATA.iterdir()] == ["x"]


@pytest.mark.parametrize("source_of_other", ["source", "another"])
def test_a_folder_that_another_runner_made_meanwhile_is_taken(source, source_of_other):
    other = folders.DATA / "y"

    def write_slower_than_the_other(folder):
        folder.mkdir()
        other.mkdir()
        (other / folders.MADE_FROM).write_text(json.dumps(source_of_other))
        (other / "of the other").touch()

    folders.plan("y", "source", write_slower_than_the_other)
    if source_of_other == "source":
        folders.make_planned()
    else:
        with pytest.raises(UserError, match="y was made from another, not source: delete it"):
            folders.make_planned()
    assert (other / "of the other").exists()
    assert sorted(path.name for path in folders.DATA.iterdir()) == ["x", "y"]


def test_neighbours_are_searched_among_the_labels_that_a_classifier_gets(source, images):
    """Each image's feature points at its own class only in the images of one draw."""
    count, percent = 20, 25
    drawn = [folders.draw(count, percent, 1, number) for number in range(2)]
    vectors = np.eye(2, dtype=np.float32).repeat(count, axis=0)[::-1].copy()
    for number in range(2):
        vectors[number * count + drawn[number]] = np.eye(2, dtype=np.float32)[number]
    bank = {
        "embeddings": vectors,
        "labels": np.repeat(np.arange(2), count),
        "classes": np.array(["a", "b"]),
    }
    queries = {"embeddings": np.eye(2, dtype=np.float32), "labels": np.arange(2)}
    assert knn.accuracies(bank, queries, [percent])["25"][1] == 100
    files = sorted((images / "train" / "a").iterdir())
    folder = linked(made(folders.with_labels("x", source, percent, 1)) / "train")
    assert folder["a"] == sorted(os.path.realpath(files[i]) for i in drawn[0])


def test_long_training_costs_what_pretraining_and_finetuning_cost():
    settings = transfer.Settings(
        pretrain={"epochs": 100},
        classify={},
        finetune={},
        scratch={},
        probe={},
        epochs={100: 10, 10: 30, 1: 30},
        probe_epochs={},
        copies={100: 1, 10: 1, 1: 10},
        image_cost=0.7,
    )
    # 100 epochs of all images at 0.7 of the cost: 70 epochs of all, or 700 of a tenth.
    assert transfer.long_epochs(settings, 100) == 80
    assert transfer.long_epochs(settings, 10) == 730
    assert transfer.long_epochs(settings, 1) == 730


def test_cifar10_becomes_an_image_folder(tmp_path, monkeypatch):
    random = np.random.default_rng(0)

    class Archive:
        classes = ("cat", "dog")

        def __init__(self, root, train, download):
            self.data = random.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
            self.targets = [0, 1, 1, 0]
            made.append(self)

    made = []
    monkeypatch.setattr(cifar10_folder, "CIFAR10", Archive)
    args = SimpleNamespace(out=tmp_path / "out")
    cifar10_folder.main(args)
    for part, images in zip(("train", "val"), made, strict=True):
        for number, name in enumerate(("cat", "dog", "dog", "cat")):
            pixels = Image.open(tmp_path / "out" / part / name / f"0000{number}.png")
            assert (np.asarray(pixels) == images.data[number]).all()

    def without_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(cifar10_folder, "CIFAR10", without_network)
    with pytest.raises(UserError, match=r"downloaded \(no network\): put cifar-10-python"):
        cifar10_folder.main(args)
