"""docs/results.md: its arithmetic, by hand, and that page and pictures are what the JSON makes."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import ablations
import cifar10
import cifar10_trials
import compare
import efficient
import fashion_mnist
import figures
import folders
import numpy as np
import plots
import pytest
import running
import section_anew
import section_transfer
import section_trials
import section_worth
import table
from helpers import ROOT

import main_pretrain
import models_mae
from util import cli
from util.errors import UserError


def cell(about, seed=0, cpu_s=3600.0, **outputs):
    """A cell's JSON, as recipes/running.py writes it; `eval` is the accuracy of eval/eval.json."""
    names = {"eval": "eval/eval.json", "probe": "probe_eval/eval.json", "knn": "knn.json"}
    contents = {}
    for name, content in outputs.items():
        found = {"test_acc1": content} if isinstance(content, float) else content
        contents[names.get(name, name)] = found
    return {
        "about": about,
        "seed": seed,
        "commands": ["python main_pretrain.py --epochs 2", "python main_embed.py"],
        "started": "2026-11-01T12:00:00Z",
        "wall_s": cpu_s,
        "cpu_s": cpu_s,
        "parts": [
            {"wall_s": 1.0, "cpu_s": cpu_s * 0.75},
            {"wall_s": 1.0, "cpu_s": cpu_s * 0.25},
        ],
        "attempts_without_times": 0,
        "commit": "abc1234",
        "hardware": {"cpu": "Zen 5"},
        "amp_auto": "bfloat16",
        "versions": {"python": "3.12", "torch": "2.9"},
        "outputs": contents,
    }


LOG = [
    {"epoch": 0, "train_loss": 0.9, "val_loss": 0.95},
    {"epoch": 1, "train_loss": 0.7, "val_loss": 0.8, "knn_acc1": 61.5},
]


def transfer_cells(finetuned=(70.0, 72.0, 74.0), scratch=(50.0, 51.0, 52.0)):
    """Of one model: all but the probes, and from scratch as long with one seed only."""
    about = {"what": "pretrain", "model": "nano", "epochs": 100}
    cells = [cell(about, cpu_s=5 * 3600, **{"log.txt": LOG})]
    draws = {"100": [60.0], "10": [50.0, 51.0, 52.0], "1": [30.0, 30.0, 33.0]}
    cells.append(cell({"what": "knn", "model": "nano"}, cpu_s=360, knn=draws))
    kinds = [("finetune", finetuned), ("scratch", scratch), ("scratch_long", [73.0])]
    for what, accuracies in kinds:
        for seed, accuracy in enumerate(accuracies):
            about = {"what": what, "model": "nano", "labels": 10, "epochs": 30}
            cells.append(cell(about, seed, cpu_s=1800, eval=accuracy))
    return cells


def ablation_cells():
    """The base setting, one value of each ablation with two seeds, one with a single seed."""
    settings = [
        ({"vary": "base"}, [60.0, 62.0]),
        ({"vary": "mask_ratio", "value": 0.25}, [55.0, 56.0]),
        ({"vary": "decoder_depth", "value": 1}, [63.0, 65.0]),
        ({"vary": "target", "value": "raw"}, [40.0]),
    ]
    return [
        cell(about, seed, cpu_s=240, knn={"100": [a]}, probe=a + 5, eval=a + 10)
        for about, accuracies in settings
        for seed, a in enumerate(accuracies)
    ]


def cheap_cells():
    cells = []
    for recipe, gain in (("paper", 0.0), ("cheap", 3.0)):
        for budget in (1, 2):
            for seed in (0, 1):
                about = {"recipe": recipe, "budget": budget}
                accuracy = 50.0 + 10 * budget + gain + seed
                figures_ = {
                    "knn": {"100": [accuracy]},
                    "probe": accuracy + 5,
                    "eval": accuracy + 10,
                }
                cells.append(cell(about, seed, 80 * budget, **figures_))
    return cells


def trial_cells():
    """By name: of a pre-training, and of a classifier."""
    logs = {"pretrain/log.txt": LOG}
    return {
        "pretrain-raw": cell({"kind": "pretrain"}, cpu_s=90, eval=44.44, **logs),
        "scratch-lr2e-3": cell({"kind": "scratch"}, eval=33.0),
    }


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's root without results; call it with a table's name and cells to add them."""
    monkeypatch.setattr(running, "ROOT", tmp_path)
    monkeypatch.setattr(running, "RESULTS", tmp_path / "recipes" / "results")
    monkeypatch.setattr(running, "OUTPUT", tmp_path / "recipes" / "output")
    monkeypatch.setattr(section_anew, "FOLDER", tmp_path / "anew")
    monkeypatch.setattr(plots, "FOLDER", tmp_path / "docs" / "images" / "results")
    monkeypatch.setattr(table, "PAGE", tmp_path / "docs" / "results.md")
    monkeypatch.setattr(table, "README", tmp_path / "README.md")
    monkeypatch.setattr(table, "CARD", tmp_path / "encoder" / "README.md")
    monkeypatch.setattr(table, "IN_README", "cifar10")
    monkeypatch.setattr(table, "SMALL", tmp_path / "recipes" / "small")
    table.CARD.parent.mkdir()
    for path in (table.README, table.CARD):
        path.write_text(f"before\n{table.START}old\n{table.END}after\n")

    def add(name, cells):
        folder = running.RESULTS / name
        folder.mkdir(parents=True)
        if isinstance(cells, list):
            cells = {f"cell{number}": made for number, made in enumerate(cells)}
        for cell_name, made in cells.items():
            made |= {"table": name, "cell": cell_name}
            (folder / f"{cell_name}.json").write_text(json.dumps(made))

    return add


def run(monkeypatch, *flags):
    """The exit code of recipes/table.py."""
    monkeypatch.setattr(sys, "argv", ["table.py", *flags])
    try:
        cli.run(table.main, table.parser())
    except SystemExit as end:
        return end.code
    return 0


def rows_of(text, head):
    """The rows of the table on a page whose head begins so: {first cell: the others}."""
    block = next(b for b in text.split("\n\n") if b.startswith(f"| {head}"))
    rows = [line.strip("| ").split(" | ") for line in block.splitlines()[2:]]
    return {first: rest for first, *rest in rows}


def test_the_page_is_what_the_results_make():
    """As the command line says it."""
    command = [sys.executable, "recipes/table.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---- arithmetic


@pytest.mark.parametrize(
    "values, expected, text",
    [
        ([70.0, 72.0, 74.0], 3, "72.0 ± 2.0, n = 3"),
        ([70.0, 73.0], 3, "71.5 ± 2.1, 2 of 3 seeds"),  # 1.5 * sqrt(2)
        ([70.04], 3, "70.0, 1 of 3 seeds"),
        ([70.0], 1, "70.0, n = 1"),
        ([], 3, "not run"),
    ],
)
def test_mean_and_sample_standard_deviation(values, expected, text):
    assert figures.mean_and_std(values, expected) == text


def test_a_difference_is_that_of_the_same_seeds():
    """By hand: 20, 21 and 22, whose standard deviation is 1; and scipy's interval."""
    samples = [70.0, 72.0, 74.0], [50.0, 51.0, 52.0]
    assert figures.difference(*samples) == pytest.approx((21.0, 4.303 / math.sqrt(3)))
    assert figures.difference([1.0, 2.0], [3.0, 4.0, 5.0]) is None
    assert figures.difference([1.0, 2.0], [3.0, 4.0]) is None
    stats = pytest.importorskip("scipy.stats")
    for own, other in (samples, ([1.0, 2.5, 2.0], [3.0, 3.5, 7.0])):
        points, half = figures.difference(own, other)
        interval = stats.ttest_rel(own, other).confidence_interval()
        assert (points - half, points + half) == pytest.approx((interval.low, interval.high), 1e-3)


@pytest.mark.parametrize(
    "compared, said",
    [
        ((2.1, 2.0), "ahead"),
        ((-2.1, 2.0), "behind"),
        ((2.0, 2.0), "within the noise"),
        ((-1.9, 2.0), "within the noise"),
    ],
)
def test_a_difference_counts_where_its_interval_holds_no_zero(compared, said):
    assert figures.verdict(compared) == said


def test_the_scatter_of_seeds_is_pooled():
    """Squares of 1 + 1 and of 4 + 0 + 4, over 1 + 2 degrees of freedom; a single seed has none."""
    samples = [[1.0, 3.0], [10.0, 12.0, 14.0], [7.0]]
    assert figures.pooled_std(samples) == pytest.approx(math.sqrt((2 + 8) / 3))
    assert figures.pooled_std([[7.0]]) is None


def test_a_pre_training_s_share_of_a_cell():
    assert figures.pretraining_minutes(cell({}, cpu_s=240)) == 3  # three quarters of 4 minutes


def test_a_mean_time_is_of_one_processor_and_of_whole_times(project):
    about = {"what": "finetune", "model": "nano", "labels": 10, "epochs": 30}
    on_gpu = {"hardware": {"cpu": "Zen 5", "gpu": "H100"}}
    elsewhere = cell(about, 2, cpu_s=36000, eval=62.0) | on_gpu
    killed = cell(about, 3, cpu_s=3600, eval=62.0) | {"attempts_without_times": 1}
    zen = [cell(about, seed, cpu_s=hours * 3600, eval=62.0) for seed, hours in enumerate((2, 4))]
    tiny = cell(about | {"model": "tiny"}) | {"hardware": {"cpu": "another"}}
    project("fashion_mnist", [elsewhere, killed, *zen, tiny])
    *read, tiny = figures.read("fashion_mnist")
    assert [made["timed"] for made in read] == [False, False, True, True]
    assert tiny["timed"]  # most of its model's cells ran there
    assert figures.core_hours(read) == 3
    assert figures.core_hours(read[:2]) is None
    assert section_worth.minutes_text(read) == "135.0"  # three quarters of 3 hours
    assert section_worth.minutes_text(read[:2]) == "no comparable time"


# ---- tables


def test_cells_that_were_not_run_say_so(project):
    text, charts = table.page()
    assert charts == []
    assert "![" not in text
    rows = {row: ["not run"] * 3 for row in section_transfer.ROWS.values()}
    assert rows_of(text, "accuracy (%)") == rows
    assert text.count("No cell was run.") == 7  # five tables, one of them anew beside the project's
    assert rows_of(text, "decoder blocks")["2"] == ["not run"] * 4 + ["70.0", "84.9"]


def test_transfer_by_hand(project):
    project("fashion_mnist", transfer_cells())
    text, _ = section_transfer.section("fashion_mnist")
    empty = ["not run"] * 3
    assert rows_of(text, "accuracy (%)") == {
        "MAE, fine-tuned": ["not run", "72.0 ± 2.0, n = 3", "not run"],
        "MAE, linear probe (frozen)": empty,
        "MAE, k-NN (frozen)": ["60.0, n = 1", "51.0 ± 1.0, n = 3", "31.0 ± 1.7, n = 3"],
        "from scratch, fine-tuning's epochs": ["not run", "51.0 ± 1.0, n = 3", "not run"],
        "from scratch, as long as pre-training and fine-tuning": [
            "not run",
            "73.0, 1 of 3 seeds",
            "not run",
        ],
    }
    costs = rows_of(text, "epochs; time")
    assert costs["MAE, fine-tuned"] == ["not run", "30; 30.0 min (5.5 h)", "not run"]
    assert costs["MAE, k-NN (frozen)"] == ["6.0 min (5.1 h)"] * 3
    assert costs["from scratch, fine-tuning's epochs"][1] == "30; 30.0 min"
    assert "epochs: 5.0 h." in text
    compared = [line.split(" | ") for line in text.splitlines() if " | 10% | " in line]
    short, long = (section_transfer.ROWS[row] for row in ("scratch", "scratch_long"))
    assert compared == [
        ["| MAE, fine-tuned", short, "10%", "+21.0", "+18.5 to +23.5", "ahead |"],
        ["| MAE, fine-tuned", long, "10%", "", "", "too few seeds |"],
        ["| MAE, linear probe (frozen)", short, "10%", "", "", "not run |"],
        ["| MAE, linear probe (frozen)", long, "10%", "", "", "not run |"],
    ]
    assert "Of 12 comparisons: 1 ahead, 1 too few seeds, 10 not run." in text
    assert "9 cells: commit abc1234; Zen 5; bfloat16; python 3.12, torch 2.9." in text


@pytest.mark.parametrize("what", ["finetune", "probe"])
@pytest.mark.parametrize(
    "accuracies, verdict",
    [([47.0, 47.0, 48.0], "behind"), ([51.0, 51.5, 52.0], "within the noise")],
)
def test_where_pre_training_does_not_pay_is_said(what, accuracies, verdict, project):
    changed = transfer_cells() if what == "probe" else transfer_cells(accuracies)
    if what == "probe":
        about = {"what": "probe", "model": "nano", "labels": 10, "epochs": 30}
        changed += [cell(about, seed, eval=found) for seed, found in enumerate(accuracies)]
    project("cifar10", changed)
    text, _ = section_transfer.section("cifar10")
    rows = section_transfer.ROWS
    (row,) = [
        line
        for line in text.splitlines()
        if line.startswith(f"| {rows[what]} | {rows['scratch']} | 10% |")
    ]
    assert row.endswith(f" | {verdict} |")


def test_verdicts_are_counted():
    verdicts = ["not run", "behind", "ahead", "within the noise", "behind", "too few seeds"]
    assert section_transfer.conclusion(verdicts) == (
        "Of 6 comparisons: 1 ahead, 2 behind, 1 within the noise, 1 too few seeds, 1 not run.\n\n"
    )


def test_chosen_trials_are_the_settings_of_the_table():
    """The trials' lr is blr times batch / 256."""
    trials = {"pretrain": cifar10_trials.PRETRAININGS} | cifar10_trials.CLASSIFIERS
    settings = cifar10.SETTINGS
    flags = {"pretrain": settings.pretrain, "finetune": settings.finetune}
    flags |= {"scratch": settings.scratch, "probe": settings.probe}
    rest = set()
    for chosen in cifar10_trials.CHOSEN:
        kind, name = chosen.split("-", 1)
        used = settings.classify | flags[kind]
        used |= {"lr": used["blr"] * used["batch_size"] / 256}
        for flag, value in trials[kind][name].items():
            assert used[flag] == value, chosen
        rest.add(kind)
    assert rest == {*trials}


def test_a_setting_that_is_not_given_is_the_command_s():
    args = main_pretrain.get_args_parser().parse_args(["--data_path", "images"])
    nano = models_mae.MODELS["mae_vit_nano_patch4"](img_size=32)
    assert {"mask_ratio": args.mask_ratio, "decoder_depth": len(nano.decoder_blocks)} == (
        section_worth.DEFAULTS
    )


def test_ablations_by_hand(project, monkeypatch):
    base = {"mask_ratio": 0.75, "decoder_depth": 2, "target": "normalised"}
    monkeypatch.setattr(section_worth, "BASE", base)
    project("ablations", ablation_cells())
    text, charts = section_worth.ablations_section()
    assert rows_of(text, "mask ratio") == {
        "0.1": ["not planned"] * 4 + ["54.6"],
        "0.25": [*(f"{a} ± 0.7, n = 2" for a in (55.5, 60.5, 65.5)), "3.0"],
        "0.5": ["not run"] * 4,
        "0.75": [*(f"{a} ± 1.4, n = 2" for a in ("61.0", "66.0", "71.0")), "3.0", "73.5"],
        "0.9": ["not run"] * 4,
    }
    depths = rows_of(text, "decoder blocks")
    assert [*depths] == ["1", "2", "4", "8", "12"]
    assert depths["2"] == [*rows_of(text, "mask ratio")["0.75"][:4], "70.0", "84.9"]
    assert depths["12"] == ["not planned"] * 4 + ["73.3", "84.4"]
    raw = ["40.0, 1 of 2 seeds", "45.0, 1 of 2 seeds", "50.0, 1 of 2 seeds", "3.0", "73.5", "84.9"]
    assert rows_of(text, "pixels to predict")["raw"] == raw
    assert "means are at 0.75 (k-NN), 0.75 (linear probe) and 0.75 (fine-tuned)." in text
    assert "scatter by 1.1, 1.1 and 1.1 points" in text  # squares of 0.5 and 2, in two degrees
    depth = charts[1]
    ours, theirs = depth["rows"]
    assert ours[0]["ticks"] == [[0, "1"], [1, "2"], [2, "4"], [3, "8"], [4, "12"]]
    (line,) = ours[1]["lines"]
    assert (line["x"], line["y"]) == ([0, 1], [69.0, 66.0])
    assert line["points"] == [[0, 68.0], [0, 70.0], [1, 65.0], [1, 67.0]]
    assert theirs[0] is None
    assert theirs[2]["lines"][0]["y"] == [84.8, 84.9, 84.9, 84.9, 84.4]


def test_the_cheap_recipe_by_hand(project):
    project("efficient", cheap_cells())
    text, (chart,) = section_worth.cheap_section()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| the cheap one")]
    _, budgets, _, *columns = zip(*rows, strict=True)
    assert budgets == ("1", "2", "4")
    assert columns == [
        ("1.0", "2.0", "not run"),
        ("63.5 ± 0.7, n = 2", "73.5 ± 0.7, n = 2", "not run"),
        ("68.5 ± 0.7, n = 2", "78.5 ± 0.7, n = 2", "not run"),
        ("73.5 ± 0.7, n = 2 |", "83.5 ± 0.7, n = 2 |", "not run |"),
    ]
    lines = chart["rows"][0][2]["lines"]
    assert [(line["x"], line["y"]) for line in lines] == [
        ([1.0, 2.0], [70.5, 80.5]),
        ([1.0, 2.0], [73.5, 83.5]),
    ]


def test_trials_by_hand(project, monkeypatch):
    monkeypatch.setattr(cifar10_trials, "CHOSEN", {"scratch-lr2e-3"})
    project("cifar10_trials", trial_cells())
    text, _ = section_trials.section()
    lines = text.splitlines()
    assert "| pre-training | no `--norm_pix_loss` | 61.5 | 44.4 | 1.5 |  |" in lines
    assert "| pre-training | `--crop_scale 0.5 1` | not run |  |  |  |" in lines
    assert "| from scratch | `--lr 0.002` |  | 33.0 | 60.0 | chosen |" in lines


def test_small_scripts_tell_what_was_measured(project, tmp_path):
    path = tmp_path / "fashion_mnist.sh"
    path.write_text("# before\n# measured: a\n# measured: b\nrun\n")
    assert table.script(path).count("not run\n") == 4
    accuracies = {f"nano-finetune-100-seed{seed}": 80.0 + seed for seed in range(3)}
    about = {"what": "finetune", "model": "nano", "labels": 100}
    cells = {
        name: cell(about, seed, 5400, eval=accuracy)
        for seed, (name, accuracy) in enumerate(accuracies.items())
    }
    knn = cell({"what": "knn", "model": "nano"}, knn={"100": [45.67]})
    pretrained = cell({"what": "pretrain", "model": "nano"}, cpu_s=600)
    project("fashion_mnist", cells | {"nano-knn": knn, "nano-pretrain": pretrained})
    assert table.script(path).splitlines() == [
        "# before",
        "# measured: MAE, fine-tuned (%): 81.0 ± 1.0, n = 3",
        "# measured: MAE, linear probe (frozen) (%): not run",
        "# measured: pre-training: 10.0 min of a core, Zen 5",
        "# measured: fine-tuning: 1.5 h of a core, Zen 5",
        "run",
    ]
    killed = pretrained | {"attempts_without_times": 1}
    (running.RESULTS / "fashion_mnist" / "nano-pretrain.json").write_text(json.dumps(killed))
    assert "# measured: pre-training: no comparable time\n" in table.script(path)


SCRIPTS = (ablations, cifar10, cifar10_trials, efficient, fashion_mnist)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_results_are_of_cells_that_their_scripts_would_run(script, tmp_path, monkeypatch):
    """Or the page would name settings that its figures don't have."""
    for part in ("train", "val"):
        (tmp_path / "images" / part).mkdir(parents=True)
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    monkeypatch.setattr(running, "ROOT", tmp_path)
    monkeypatch.setattr(running, "OUTPUT", tmp_path / "recipes" / "output")
    monkeypatch.setattr(folders, "DATA", tmp_path / "recipes" / "data")
    monkeypatch.setattr(folders, "planned", {})
    made = script.make_cells(SimpleNamespace(data_path=tmp_path / "images"))
    cells = {cell.name: cell for cell in made}
    for found in figures.read(script.__name__):
        cell = cells[found["cell"]]
        assert found["commands"] == running.lines(cell)
        assert (found["about"], found["seed"]) == (cell.about, cell.seed)


def test_several_origins_are_counted_and_lost_times_said():
    cells = [cell({}), cell({}), cell({}) | {"commit": "def5678", "attempts_without_times": 2}]
    assert figures.origin(cells) == (
        "3 cells: commit abc1234 (2) and commit def5678 (1); Zen 5; bfloat16; python 3.12, torch "
        "2.9. In 1 of them an attempt was killed and its time is not counted."
    )


def test_a_cell_without_its_output_is_named(project, monkeypatch, capsys):
    project("fashion_mnist", [cell({"what": "knn", "model": "nano"})])
    assert run(monkeypatch) == 2
    assert capsys.readouterr().err == (
        "error: recipes/results/fashion_mnist/cell0.json has no knn.json: delete it and run the "
        "cell again\n"
    )


def test_paragraphs_are_filled_and_tables_are_not():
    words, row = "word " * 60, f"| {'cell ' * 60}|"
    made = table.wrapped(f"{words}\n\n- one\n  two\n- {words}\n\n{row}\n{row}\n")
    first, items, rows = made.removesuffix("\n").split("\n\n")
    assert max(map(len, first.splitlines())) == 119
    assert first.split() == words.split()
    assert items.splitlines()[0] == "- one two"
    assert items.splitlines()[2].startswith("  word")
    assert rows == f"{row}\n{row}"


# ---- a table that was run anew


@pytest.fixture
def anew(project, tmp_path, monkeypatch, capsys):
    """Call it with a table's cells, and those that were run anew; (exit code, output, rows)."""

    def run_compare(cells, others):
        project("fashion_mnist", cells)
        results = running.RESULTS
        monkeypatch.setattr(running, "RESULTS", tmp_path / "anew" / "results")
        project("fashion_mnist", others)
        monkeypatch.setattr(running, "RESULTS", results)
        with pytest.raises(SystemExit) as end:
            compare.main(SimpleNamespace(folder=tmp_path / "anew"))
        said = capsys.readouterr().out
        return end.value.code, said, rows_of(said, "figure")

    return run_compare


def test_a_table_run_anew_is_compared_seed_by_seed(anew):
    """Fine-tuned: a standard deviation of 2, so that the mean may differ by 4 points."""
    cells = transfer_cells()
    others = transfer_cells(finetuned=(71.0, 72.0, 75.0), scratch=(60.0, 61.0, 62.0))
    code, said, rows = anew(cells, others[:-1])
    found = {name.split(",")[0]: row for name, row in rows.items() if "accuracy" in name}
    assert code == 1
    assert found == {
        "finetune": [
            "72.0 ± 2.0, n = 3",
            "72.7 ± 2.1, n = 3",
            "+1.00 +0.00 +1.00",
            "within the spread",
        ],
        "scratch": [
            "51.0 ± 1.0, n = 3",
            "61.0 ± 1.0, n = 3",
            "+10.00 +10.00 +10.00",
            "beyond it",
        ],
        "scratch_long": ["73.0, n = 1", "not run", "", "not run"],
    }
    loss = rows["pretrain, nano, epochs 100: held-out loss"]
    assert loss == ["0.800, n = 1", "0.800, n = 1", "+0.0000", "equal"]
    assert "7 figures: 4 equal, 1 within the spread, 1 beyond it, 1 not run" in said


@pytest.mark.parametrize(
    "neighbours, loss, code", [(60.9, 0.809, 0), (58.9, 0.8, 1), (60.0, 0.82, 1)]
)
def test_a_figure_of_one_seed_is_judged_too(neighbours, loss, code, anew):
    """By a point of accuracy, and 0.01 of the loss: 60.0% and 0.8 before."""
    others = transfer_cells()
    others[0]["outputs"]["log.txt"] = [*LOG[:-1], LOG[-1] | {"val_loss": loss}]
    others[1]["outputs"]["knn.json"]["100"] = [neighbours]
    assert anew(transfer_cells(), others)[0] == code


def test_seeds_that_were_not_run_anew_are_not_mixed_up(anew):
    cells, others = transfer_cells(), transfer_cells(finetuned=(0.0, 72.5, 74.0))
    del others[2]  # fine-tuned, seed 0
    code, _, rows = anew(cells, others)
    (found,) = (row for name, row in rows.items() if name.startswith("finetune,"))
    part = ["72.0 ± 2.0, n = 3", "73.2 ± 1.1, 2 of 3 seeds", "+0.50 +0.00", "within it, in part"]
    assert found == part
    assert code == 1


def test_seeds_that_were_run_anew_are_judged_though_others_are_missing(anew):
    cells, others = transfer_cells(), transfer_cells(finetuned=(0.0, 77.0, 79.0))
    del others[2]
    _, _, rows = anew(cells, others)
    (found,) = (row for name, row in rows.items() if name.startswith("finetune,"))
    assert found[2:] == ["+5.00 +5.00", "beyond it"]


def test_a_table_run_anew_with_the_same_figures_is_equal(anew):
    code, said, _ = anew(transfer_cells(), transfer_cells())
    assert code == 0
    assert "7 figures: 7 equal" in said


def test_a_probe_and_a_fine_tuning_of_one_cell_are_two_figures():
    both = cell({}, eval=70.0, probe=50.0)
    assert compare.measures(both) == {"accuracy": [70.0], "accuracy, linear probe": [50.0]}


def test_the_page_has_the_table_that_was_run_anew(anew):
    """By hand: 5 hours, 6 minutes and seven runs of half an hour."""
    _, said, _ = anew(transfer_cells(), transfer_cells(finetuned=(71.0, 72.0, 75.0)))
    text, _ = section_anew.section()
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert len(rows) == 9 and set(rows) <= set(text.splitlines())
    assert "\n7 figures: 6 equal, 1 within the spread.\n" in text
    assert "\nAnew, 8.6 core-hours: 9 cells: commit abc1234; Zen 5; bfloat16" in text


@pytest.mark.parametrize("folder", ["anew/output", "/new 'tables/output"])
@pytest.mark.parametrize("name, words", [("cell0", "run anew by other"), ("new", "has no t/new")])
def test_only_the_same_cells_are_compared(name, words, folder, project):
    """Their commands differ in the output folder only."""
    own = [{"table": "t", "cell": "cell0", "commands": ["python a.py --out recipes/output/t/b"]}]

    def line(cell):
        return shlex.join(["python", "a.py", "--out", f"{folder}/t/{cell}"])

    again = [own[0] | {"cell": name, "commands": [line("c")]}]
    with pytest.raises(UserError, match=words):
        compare.check_same_commands(own, again)
    compare.check_same_commands(own, [own[0] | {"commands": [line("b")]}])


def test_a_folder_without_results_is_refused(tmp_path):
    (tmp_path / "results" / "table").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no results: run a table with --into"):
        compare.main(SimpleNamespace(folder=tmp_path))
    with pytest.raises(UserError, match="holds the project's results"):
        compare.main(SimpleNamespace(folder=ROOT / "recipes"))


# ---- pictures, and what is out of date


@pytest.fixture
def all_tables(project):
    project("cifar10", transfer_cells())
    project("ablations", ablation_cells())
    project("efficient", cheap_cells())
    project("cifar10_trials", trial_cells())


def test_what_is_out_of_date_is_said_without_matplotlib(all_tables, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert run(monkeypatch) == 0
    assert "see [docs/results.md](../docs/results.md)" in table.CARD.read_text()
    before, made, after = re.split("|".join((table.START, table.END)), table.README.read_text())
    assert (before, after) == ("before\n", "after\n")
    assert "| MAE, fine-tuned | not run | 72.0 ± 2.0, n = 3 | not run |" in made
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(monkeypatch, "--check") == 0
    assert capsys.readouterr().out == ""

    def lines():
        assert run(monkeypatch, "--check") == 1
        return [line.split(" is ")[0] for line in capsys.readouterr().out.splitlines()]

    shutil.copy(plots.FOLDER / "cheap-recipe.svg", plots.FOLDER / "old.svg")
    assert lines() == ["docs/images/results/old.svg"]
    changed = running.RESULTS / "efficient" / "cell0.json"
    changed.write_text(changed.read_text().replace("60.0", "61.0"))
    stale = ["docs/results.md", "docs/images/results/cheap-recipe.svg"]
    assert lines() == [*stale, "docs/images/results/old.svg"]
    (plots.FOLDER / "ablation-target.svg").unlink()
    table.README.write_text(table.README.read_text().replace("72.0", "99.0"))
    assert {*lines()} == {
        *stale,
        "README.md",
        "docs/images/results/ablation-target.svg",
        "docs/images/results/old.svg",
    }
    assert run(monkeypatch) == 2
    assert capsys.readouterr().err.endswith("needs matplotlib: pip install matplotlib\n")


def test_the_page_says_what_all_cells_cost(project):
    project("efficient", [cell({}, cpu_s=5400), cell({}, cpu_s=2160)])
    assert "the cells on this page took 2.1 core-hours" in table.spent()


def test_an_interval_s_end_keeps_its_sign():
    assert [section_transfer.bound(end) for end in (-5.69, -0.042, 0.16)] == [
        "-5.7",
        "-0.04",
        "+0.2",
    ]


def panels_of(charts):
    return [panel for chart in charts for row in chart["rows"] for panel in row if panel]


def test_pictures_show_their_charts(all_tables, monkeypatch):
    """Each panel's lines and seeds, and the same bytes whenever they are drawn."""
    pytest.importorskip("matplotlib")
    _, charts = table.page()
    assert [chart["name"] for chart in charts] == [
        "cifar10-nano-pretraining",
        "ablation-mask-ratio",
        "ablation-decoder-depth",
        "ablation-target",
        "cheap-recipe",
    ]
    for chart in charts:
        panels = panels_of([chart])
        figure = plots.draw(chart)
        assert [axes.get_title() for axes in figure.axes] == [panel["title"] for panel in panels]
        for axes, panel in zip(figure.axes, panels, strict=True):
            low, high = axes.get_ylim()
            assert panel["y"] != plots.ACCURACY or high - low >= panel.get("span", 5) - 1e-9
            expected, joined = [], []
            for line in panel["lines"]:
                if line.get("points"):
                    expected.append(line["points"])
                    joined.append(False)
                expected.append(np.transpose([line["x"], line["y"]]))
                joined.append("apart" not in line)
            assert [line.get_linestyle() != "None" for line in axes.lines] == joined
            drawn = [line.get_xydata() for line in axes.lines]
            assert len(drawn) == len(expected)
            for one, other in zip(drawn, expected, strict=True):
                np.testing.assert_array_equal(one, other)
    assert any("apart" in line for panel in panels_of(charts) for line in panel["lines"])
    assert any("span" in panel for panel in panels_of(charts))
    assert plots.svg(charts[0]) == plots.svg(charts[0])
