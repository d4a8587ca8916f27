"""The benchmarks' arithmetic, by hand, and every side's first steps."""

import json
from importlib import metadata

import pytest
import torch

from benchmarks import report, sides, table, train_step
from benchmarks.sides import Setting

CPU = torch.device("cpu")


def test_ratios_are_of_turns_of_one_round():
    assert report.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {
        "median": 2.0,
        "lowest": 1.0,
        "highest": 3.0,
    }


def test_sides_take_turns_and_the_first_round_warms_up():
    calls = []

    def side(name):
        return lambda: calls.append(name) or len(calls)

    assert report.take_turns({"a": side("a"), "b": side("b")}, 2) == {"a": [3, 5], "b": [4, 6]}
    assert calls == ["a", "b"] * 3


@pytest.mark.parametrize(
    "model, gflop",
    [
        ("mae_vit_base_patch16", 58.7),
        ("mae_vit_large_patch16", 124.5),
        ("mae_vit_huge_patch14", 291),
    ],
)
def test_work_of_an_image_is_the_reference_s(model, gflop):
    setting = Setting("pretrain", model, 224, 1, CPU, "off", False)
    assert train_step.training_flop(setting) / 1e9 == pytest.approx(gflop, rel=2e-3)


@pytest.mark.parametrize(
    "task, model", [("pretrain", "mae_vit_nano_patch4"), ("finetune", "vit_nano_patch4")]
)
@pytest.mark.parametrize("side", ["ours", "plain", "transformers", "lightly"])
def test_sides_train(side, task, model):
    if side == "lightly":
        pytest.importorskip("lightly")
        if task == "finetune":
            pytest.skip("lightly's model is pre-trained only")
    train = sides.SIDES[side](Setting(task, model, 8, 2, CPU, "bf16", False))
    train(2)


def test_transformers_side_is_of_the_same_size(monkeypatch):
    """Its optimizer is given as many values as ours has to train."""
    sizes, adamw = [], torch.optim.AdamW

    def spy(parameters, **options):
        parameters = list(parameters)
        groups = parameters if isinstance(parameters[0], dict) else [{"params": parameters}]
        sizes.append(sum(p.numel() for g in groups for p in g["params"] if p.requires_grad))
        return adamw(parameters, **options)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    setting = Setting("pretrain", "mae_vit_nano_patch4", 8, 2, CPU, "off", False)
    for side in ("ours", "plain", "transformers"):
        sides.SIDES[side](setting)
    assert len(set(sizes)) == 1


def test_train_step_writes_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    flags = "--model mae_vit_nano_patch4 --input_size 8 --batch_size 2 --pairs 2 --turn 0.01"
    flags += " --sides ours:off plain:off transformers:fp16 --device cpu"
    parser = train_step.get_args_parser()
    train_step.main(parser.parse_args(flags.split()))
    written = json.loads((tmp_path / "pretrain_mae_vit_nano_patch4_8px_cpu.json").read_text())
    assert list(written["results"]) == ["ours:off", "plain:off"]
    ours = written["results"]["ours:off"]
    assert ours["images_per_s"]["median"] > 0
    assert ours["times_as_fast_as"].keys() == {"plain:off"}
    assert written["versions"]["torch"] == metadata.version("torch")
    assert "transformers:fp16 can't be timed" in capsys.readouterr().out


def test_figures_are_the_turns_by_hand(tmp_path, monkeypatch):
    """Steps a second of three rounds, of which the first warms up, and of the peak's products."""
    rates = {
        "ours:off": [9.0, 4.0, 6.0, 5.0],
        "plain:off": [9.0, 2.0, 2.0, 2.0],
        "matmul:off": [9.0, 1.0, 1.0, 1.0],
    }

    class FakeSide:
        failure = None

        def __init__(self, label, _setting):
            self.turns = iter(rates[label])

        def steps_per_second(self, seconds):
            assert seconds == 5
            return next(self.turns)

        def close(self):
            return 1.5

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(train_step, "Side", FakeSide)
    flags = "--batch_size 10 --pairs 3 --device cpu --name by_hand --sides ours:off plain:off"
    train_step.main(train_step.get_args_parser().parse_args(flags.split()))
    results = json.loads((tmp_path / "by_hand.json").read_text())["results"]
    ours = results["ours:off"]
    assert ours["images_per_s"] == {"median": 50, "lowest": 40, "highest": 60}
    assert ours["seconds_per_step"] == 0.2
    assert ours["peak_memory_gib"] == 1.5
    assert ours["times_as_fast_as"] == {"plain:off": {"median": 2.5, "lowest": 2, "highest": 3}}
    assert ours["mfu"]["median"] == pytest.approx(50 * 58.7e9 / (2 * 2048**3), rel=2e-3)
    assert results["plain:off"]["times_as_fast_as"] == {}


def test_a_turn_has_as_many_steps_as_its_seconds_take():
    class Pipe:
        def send(self, steps):
            self.steps = steps

        def recv(self):
            return self.steps / 8  # eight steps a second

    side = object.__new__(train_step.Side)
    side._pipe, side._seconds_per_step = Pipe(), 0.125
    assert side.steps_per_second(2) == 8
    assert side._pipe.steps == 16
    assert side.steps_per_second(count=3) == 8
    assert side._pipe.steps == 3


@pytest.mark.parametrize("side", ["ours:fp16", "lightly:off"])
def test_nothing_is_written_where_no_side_can_be_timed(side, tmp_path, monkeypatch, user_error):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    flags = ["--task", "finetune", "--model", "vit_nano_patch4", "--device", "cpu", "--sides", side]
    args = train_step.get_args_parser().parse_args(flags)
    assert user_error(lambda: train_step.main(args)) == f"none of the sides {side} can be timed"
    assert not list(tmp_path.iterdir())


def test_a_side_that_dies_is_told_of(monkeypatch, user_error):
    """The kernel kills one where memory runs out."""
    side = train_step.Side(
        "ours:off", Setting("pretrain", "mae_vit_nano_patch4", 8, 2, CPU, "off", False)
    )
    side._process.kill()
    side._process.join()
    message = user_error(side.steps_per_second)
    assert message.startswith("the process of ours:off has ended, most likely for want of memory")


def test_the_page_has_the_tables_that_the_results_make():
    table.main(table.get_args_parser().parse_args(["--check"]))


def test_an_outdated_page_is_reported_and_written_anew(tmp_path, monkeypatch, user_error):
    monkeypatch.setattr(table, "PAGE", tmp_path / "RESULTS.md")
    table.PAGE.write_text("outdated\n")
    check, write = (table.get_args_parser().parse_args(flags) for flags in (["--check"], []))
    assert user_error(lambda: table.main(check)).endswith("run python -m benchmarks.table")
    table.main(write)
    table.main(check)
