"""The benchmarks' arithmetic, by hand, and every side's first steps."""

import json
from importlib import metadata

import pytest
import torch
from helpers import CPU, FORKS

from benchmarks import report, sides, table, train_step, whole_run
from benchmarks.sides import Setting


@pytest.fixture(autouse=True)
def forked_sides(monkeypatch):
    """Processes of sides are forked from one that has done their imports, which take seconds."""
    monkeypatch.setattr(train_step.multiprocessing, "get_context", lambda _method: FORKS)


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
    with torch.device("meta"):
        flop = train_step.training_flop(setting)
    assert flop / 1e9 == pytest.approx(gflop, rel=2e-3)


@pytest.mark.parametrize(
    "task, model", [("pretrain", "mae_vit_nano_patch4"), ("finetune", "vit_nano_patch4")]
)
@pytest.mark.parametrize("side", ["ours", "transformers"])
def test_sides_train(side, task, model):
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
    for side in ("ours", "transformers"):
        sides.SIDES[side](setting)
    assert len(set(sizes)) == 1


def train_step_args(flags):
    return train_step.get_args_parser().parse_args([*flags.split(), "--device", "cpu"])


def test_train_step_writes_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    flags = "--model mae_vit_nano_patch4 --input_size 8 --batch_size 2 --pairs 2 --turn 0.01"
    train_step.main(train_step_args(f"{flags} --sides ours:off transformers:off transformers:fp16"))
    written = json.loads((tmp_path / "pretrain_mae_vit_nano_patch4_8px_cpu.json").read_text())
    assert list(written["results"]) == ["ours:off", "transformers:off"]
    ours = written["results"]["ours:off"]
    assert ours["images_per_s"]["median"] > 0
    assert ours["peak_memory_gib"] > 0
    assert ours["times_as_fast_as"].keys() == {"transformers:off"}
    assert written["versions"]["torch"] == metadata.version("torch")
    printed = capsys.readouterr().out
    assert "transformers:fp16 can't be timed" in printed
    assert table.step_table(written) in printed


def test_figures_are_the_turns_by_hand(tmp_path, monkeypatch):
    """Steps a second of three rounds, of which the first warms up, and of the peak."""
    rates = {"ours:bf16": [9.0, 4.0, 6.0, 5.0], "transformers:off": [9.0, 2.0, 2.0, 2.0]}

    class FakeSide:
        seconds_per_step, peak_memory_gib = 0.5, 1.5

        def __init__(self, label, _setting):
            self.turns = iter(rates[label])

        def train(self, steps):
            assert steps == 10  # five seconds
            return steps / next(self.turns)

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(train_step, "Side", FakeSide)
    monkeypatch.setattr(train_step, "matmul_flop_per_s", lambda device, dtype: 1e13)
    monkeypatch.setattr(train_step, "resolve_amp", lambda amp, device: torch.bfloat16)
    train_step.main(train_step_args("--batch_size 10 --pairs 3 --sides ours:auto transformers:off"))
    written = json.loads((tmp_path / "pretrain_mae_vit_base_patch16_224px_cpu.json").read_text())
    ours = written["results"]["ours:bf16"]
    assert ours["images_per_s"] == {"median": 50, "lowest": 40, "highest": 60}
    assert ours["peak_memory_gib"] == 1.5
    assert ours["times_as_fast_as"] == {
        "transformers:off": {"median": 2.5, "lowest": 2, "highest": 3}
    }
    assert ours["mfu"]["median"] == pytest.approx(50 * 58.7e9 / 1e13, abs=1e-3)
    assert written["results"]["transformers:off"]["times_as_fast_as"] == {}
    first, second, *_ = table.step_table(written).splitlines()[2:]
    assert first.startswith(
        "| ours, bf16 (`--amp auto`) | 50 | 29% | 1.5 GiB | 2.50 (2.00 to 3.00)"
    )
    assert second.startswith("| transformers, float32 | 20 | 12% | 1.5 GiB |  |")


@pytest.mark.parametrize("seconds, steps", [(2, 16), (2.01, 17), (0.01, 1), (0, 1)])
def test_a_turn_has_as_many_steps_as_fill_its_seconds(seconds, steps):
    assert train_step.steps_in(seconds, seconds_per_step=0.125) == steps


@pytest.mark.parametrize("side", ["ours:fp16", "transformers:fp16"])
def test_nothing_is_written_where_no_side_can_be_timed(side, tmp_path, monkeypatch, user_error):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    args = train_step_args(f"--task finetune --model vit_nano_patch4 --sides {side}")
    assert user_error(lambda: train_step.main(args)) == f"none of the sides {side} can be timed"
    assert not list(tmp_path.iterdir())


def test_a_side_that_dies_is_reported(user_error):
    """The kernel kills it where memory runs out."""
    setting = Setting("pretrain", "mae_vit_nano_patch4", 8, 2, CPU, "off", False)
    side = train_step.Side("ours:off", setting)
    side.process.kill()
    side.process.join()
    message = user_error(lambda: side.train(1))
    assert message.startswith("the process of ours:off has ended, most likely for want of memory")


def test_a_whole_run_s_figures_by_hand(tmp_path, monkeypatch):
    """Of two rounds, after one that warms up; a checkpoint's 3 seconds are 1% of 5 minutes."""
    images_per_s = iter([9, 9, 80, 60, 90, 45])  # by turns quiet and busy

    class FakeSide:
        def __init__(self, label, _setting):
            assert label == "ours"

        def train(self, steps):
            return steps * 10 / 100  # a batch of 10, 100 images a second

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(whole_run, "Side", FakeSide)
    monkeypatch.setattr(whole_run, "make_jpegs", lambda folder, photographs, count: None)
    monkeypatch.setattr(
        whole_run,
        "train_two_epochs",
        lambda folder, args: {
            "images_per_s": next(images_per_s),
            "checkpoint_seconds": 3,
            "data_wait": 0.02,
        },
    )
    flags = ["--batch_size", "10", "--pairs", "2", "--device", "cpu"]
    whole_run.main(whole_run.get_args_parser().parse_args(flags))
    written = json.loads((tmp_path / "whole_run.json").read_text())
    results = written["results"]
    assert results["share_lost"] == {"median": 0.16, "lowest": 0.11, "highest": 0.21}
    assert results["busy_to_quiet"] == {"median": 0.62, "lowest": 0.5, "highest": 0.75}
    assert table.whole_run_table(written).splitlines()[2:5] == [
        "| main_pretrain.py | 85 |  | 16.0% (11.0% to 21.0%) | 2.0% |",
        "| main_pretrain.py beside a busy process | 52.5 | 0.62 (0.50 to 0.75) |  |  |",
        "| bare steps | 100 |  |  |  |",
    ]


def test_the_busy_process_ends_with_its_turn():
    with whole_run.busy_process() as process:
        assert process.poll() is None
    assert process.poll() is not None


def test_the_page_has_the_tables_that_the_results_make():
    assert table.PAGE.read_text() == table.page(), "run python -m benchmarks.table"
