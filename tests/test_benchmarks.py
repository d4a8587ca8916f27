"""The benchmarks' arithmetic, by hand, and every side's first steps."""

import json
import mmap
import os
import subprocess
import sys
from contextlib import nullcontext
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, FORKS, ROOT, photograph
from PIL import Image
from torch import nn

from benchmarks import (
    data_loading,
    golden,
    gpu,
    load,
    report,
    scaling,
    sides,
    table,
    train_step,
    whole_run,
)
from benchmarks.sides import Setting
from util.distributed import Process
from util.errors import UserError
from util.image_files import ImagePaths


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


def test_a_copy_without_its_history_can_be_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.commit() == "an unknown commit"


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
    flop = train_step.training_flop(Setting("pretrain", model, 224, 1, CPU, "off", False))
    assert flop / 1e9 == pytest.approx(gflop, rel=2e-3)


@pytest.mark.parametrize(
    "task, model", [("pretrain", "mae_vit_nano_patch4"), ("finetune", "vit_nano_patch4")]
)
@pytest.mark.parametrize("side", sides.SIDES)
def test_sides_train(side, task, model):
    if side == "lightly":
        pytest.importorskip("lightly", "1.6")
        if task == "finetune":
            pytest.skip("lightly's masked autoencoder only pre-trains")
    train = sides.SIDES[side](Setting(task, model, 8, 2, CPU, "bf16", False))
    train(2)


def test_sides_are_of_the_same_size(monkeypatch):
    """Their optimizers are given as many values as ours has to train."""
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


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 compiles each layer anew")
@pytest.mark.parametrize(
    "task, model, graphs",
    [("pretrain", "mae_vit_nano_patch4", 2), ("finetune", "vit_nano_patch4", 1)],
)
def test_transformers_layers_are_compiled_whole(task, model, graphs, monkeypatch):
    """Like ours: one graph for all layers of the encoder, and one for those of the decoder."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **kw: compile_module(self, backend="eager", **kw)
    )
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    sides.transformers(Setting(task, model, 8, 2, CPU, "bf16", True))(2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def train_step_args(flags):
    return train_step.get_args_parser().parse_args([*flags.split(), "--device", "cpu"])


def test_train_step_writes_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setitem(train_step.PEAK_SIZE, "cpu", 64)
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


@pytest.fixture
def time_fakes(tmp_path, monkeypatch):
    """Times sides that take the given steps a second in their turns; returns what is written.

    An error among them is raised.
    """

    def run(rates, peak):
        class FakeSide:
            seconds_per_step, peak_memory_gib = 0.5, 1.5

            def __init__(self, label, _setting):
                self.turns = iter(rates[label])

            def warm_up(self):
                pass

            def train(self, steps):
                assert steps == 10  # five seconds
                rate = next(self.turns)
                if isinstance(rate, Exception):
                    raise rate
                return steps / rate

        monkeypatch.setattr(report, "RESULTS", tmp_path)
        monkeypatch.setattr(train_step, "Side", FakeSide)
        monkeypatch.setattr(train_step, "matmul_flop_per_s", lambda device, dtype: peak())
        monkeypatch.setattr(train_step, "resolve_amp", lambda amp, device: torch.bfloat16)
        train_step.main(train_step_args(f"--batch_size 10 --pairs 3 --sides {' '.join(rates)}"))
        return json.loads((tmp_path / "pretrain_mae_vit_base_patch16_224px_cpu.json").read_text())

    return run


def test_figures_are_the_turns_by_hand(time_fakes):
    """Steps a second of three rounds, of which the first warms up, and of the peak."""
    rates = {"ours:bf16": [9.0, 4.0, 6.0, 5.0], "transformers:off": [9.0, 2.0, 2.0, 2.0]}
    written = time_fakes(rates, peak=lambda: 1e13)
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


def test_a_side_that_dies_between_its_turns_leaves_the_others_results(time_fakes, capsys):
    dies = [9.0, 2.0, UserError("the process of plain:bf16 has ended")]
    rates = {"ours:bf16": [9.0, 4.0, 6.0, 5.0], "plain:bf16": dies, "transformers:off": [2.0] * 4}
    written = time_fakes(rates, peak=lambda: 1e13)
    assert list(written["results"]) == ["ours:bf16", "transformers:off"]
    assert written["results"]["ours:bf16"]["images_per_s"]["median"] == 50
    assert capsys.readouterr().out.startswith("the process of plain:bf16 has ended\nwritten to ")


def test_without_the_peak_only_mfu_is_missing(time_fakes, capsys):
    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory.\nand more")

    written = time_fakes({"ours:bf16": [9.0, 4.0, 6.0, 5.0]}, no_memory)
    assert "mfu" not in written["results"]["ours:bf16"]
    assert "| ours, bf16 (`--amp auto`) | 50 |  | 1.5 GiB |" in table.step_table(written)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "the peak can't be measured, so there is no MFU: CUDA out of memory."
    assert second.startswith("written to ")


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


@pytest.fixture
def served():
    """Runs a side's process here; returns its answer to the question for one step."""

    def answer(label, setting):
        asking, answering = FORKS.Pipe()
        asking.send(1)
        asking.send(0)  # ends it
        train_step.serve(answering, label, setting)
        return str(asking.recv())

    return answer


def test_lightly_is_left_out_in_one_line_where_it_is_missing(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly.models", None)
    setting = Setting("pretrain", "mae_vit_nano_patch4", 8, 2, CPU, "off", False)
    answer = served("lightly:off", setting)
    assert answer.startswith("lightly:off can't be timed, its package is missing or too old: ")
    assert "lightly" in answer.partition(": ")[2]


def test_a_side_computes_on_the_device_that_was_asked_for(served, monkeypatch):
    """And a full one is reported in one line."""
    calls = []

    def full(setting):
        calls.append("side")
        raise torch.OutOfMemoryError("CUDA out of memory.\nand more")

    monkeypatch.setitem(sides.SIDES, "ours", full)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    second = torch.device("cuda", 1)
    setting = Setting("pretrain", "mae_vit_nano_patch4", 8, 2, second, "bf16", False)
    answer = served("ours:bf16", setting)
    assert answer == "ours:bf16 can't be timed: the GPU has no memory left for it"
    assert calls == [second, "side"]


def test_a_whole_run_s_figures_by_hand(tmp_path, monkeypatch):
    """Of two rounds, after one that warms up; a checkpoint's 3 seconds are 1% of 5 minutes."""
    images_per_s = iter([9, 9, 80, 60, 90, 45])  # by turns quiet and busy

    class FakeSide:
        def __init__(self, label, _setting):
            assert label == "ours"

        def warm_up(self):
            pass

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


def test_loading_s_figures_by_hand(tmp_path, monkeypatch, capsys):
    """Of two rounds, after one that warms up; nothing is compared where Pillow has no turn."""
    rates = iter([9, 9, 300, 100, 200, 50, 9, 4, 6])

    def sides(*names):
        return lambda *_: {name: lambda: next(rates) for name in names}

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(data_loading, "make_jpegs", lambda folder, photographs, count: 1.5)
    monkeypatch.setattr(data_loading, "make_large_jpegs", lambda folder, paths: 2.5)
    monkeypatch.setattr(data_loading, "ImagePaths", lambda folder: None)
    monkeypatch.setattr(data_loading, "sides_of_one_core", sides("ours", "pillow"))
    for name in ("sides_of_workers", "sides_of_shards", "sides_of_bands"):
        monkeypatch.setattr(data_loading, name, sides())
    monkeypatch.setattr(data_loading, "sides_of_large_images", sides("--decode scaled"))
    flags = ["--pairs", "2", "--device", "cpu"]
    data_loading.main(data_loading.get_args_parser().parse_args(flags))
    written = json.loads((tmp_path / "data_loading.json").read_text())
    assert written["mean_kilobytes_of_a_large_jpeg"] == 2.5
    printed = table.loading_table(written)
    assert printed.splitlines()[2:5] == [
        "| one core, ours | 250 | 3.50 (3.00 to 4.00) | 150528 |",
        "| one core, Pillow and floats | 75 |  | 602112 |",
        "| one core, 4000 x 2667, --decode scaled | 5 |  | 150528 |",
    ]
    assert printed in capsys.readouterr().out


def test_every_side_of_the_loading_table_reads_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr(data_loading, "LARGE_IMAGES", 2)
    monkeypatch.setattr(data_loading, "BATCH_SIZE", 2)
    usual, large = tmp_path / "usual", tmp_path / "large"
    data_loading.make_jpegs(usual, data_loading.PHOTOGRAPHS, 4)
    data_loading.make_large_jpegs(large, ImagePaths(usual))
    assert [Image.open(path).size for path in ImagePaths(large)] == [(4000, 2667)] * 2
    counts = {}
    monkeypatch.setattr(data_loading, "rate", lambda items: len(list(items)))
    for name, sides_ in (
        ("usual", data_loading.sides_of_one_core(usual)),
        ("workers", data_loading.sides_of_workers(usual, 1, Process(0, 1, CPU))),
        ("large", data_loading.sides_of_large_images(large)),
        ("shards", data_loading.sides_of_shards(usual, tmp_path / "shards")),
        ("bands", data_loading.sides_of_bands(tmp_path / "bands")),
    ):
        counts[name] = [side() for side in sides_.values()]
    expected = {"usual": [4] * 3, "workers": [4] * 2, "large": [2] * 5, "shards": [4] * 2}
    assert counts == expected | {"bands": [64] * 2}


def test_pillow_s_draft_mode_sees_the_region_of_its_pipeline(tmp_path):
    path = tmp_path / "large.jpg"
    photograph(2000, 1500).save(path, quality=95)
    for seed in range(6):
        samples = []
        for crop in (None, data_loading.draft_crop):
            torch.manual_seed(seed)
            samples.append(data_loading.pillow_transform(crop)(Image.open(path)))
        assert samples[0].shape == samples[1].shape == (3, 224, 224)
        assert (samples[0] - samples[1]).abs().mean() < 0.02


def test_the_busy_process_ends_with_its_turn():
    with whole_run.busy_process() as process:
        assert process.poll() is None
    assert process.poll() is not None


def test_the_page_has_the_tables_that_the_results_make():
    assert table.PAGE.read_text() == table.page(), "run python -m benchmarks.table"


# ---- load


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_load_writes_what_it_has_seen_of_real_runs(tmp_path, monkeypatch, capsys):
    """But packing and starting, which take longer than a test should, are left out."""
    starts = {"folder": dict(zip("abc", (7, 2, 1), strict=True)), "tar shards": {"a": 6}}
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(load, "pack", lambda images, shards: 0.5)
    monkeypatch.setattr(load, "measure_starts", lambda folder, batch_size: starts)
    flags = "--files 100 --steps 25 --epochs 4".split()
    load.main(load.get_args_parser().parse_args(flags))
    written = json.loads((tmp_path / "load.json").read_text())
    assert written["batch_size"] == 4
    for run, epochs, steps in (("one epoch", 1, 25), ("many epochs", 4, 16)):
        figures = written["results"][run]
        assert (figures["epochs"], figures["steps"]) == (epochs, steps)
        for sample in figures["samples"]:
            assert sample["workers"] >= 1
            assert sample["open_files"] >= 6  # of two processes at least
            assert sample["mib_of_main"] > 50
            assert sample["mib_of_workers"] > 50
            assert sample["mib_shared_once"] > 50
    assert table.load_tables(written) in capsys.readouterr().out


def test_a_list_has_the_first_files_and_all_that_are_held_out(tmp_path):
    load.make_images(tmp_path / "images", 150)
    load.list_images(tmp_path / "images", tmp_path / "part", 30)
    assert len(ImagePaths(tmp_path / "images" / "train")) == 150
    train, val = (ImagePaths(tmp_path / "part" / f"{split}.txt") for split in ("train", "val"))
    assert [train[0], train[29]] == [
        f"{tmp_path}/images/train/000/000000.jpg",
        f"{tmp_path}/images/train/029/000029.png",
    ]
    assert (len(train), len(val)) == (30, 150)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_process_and_its_child_take_more(tmp_path):
    """64 MiB, a file, two pipes, and the child's own."""
    before = load.look_at(os.getpid())
    held = mmap.mmap(-1, 2**26)  # the allocator may have as much left
    held.write(b"1" * len(held))
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    with open(tmp_path / "a", "w"), subprocess.Popen("cat", bufsize=0, **pipes) as child:
        child.stdin.write(b"line\n")
        child.stdout.readline()  # it has started
        after = load.look_at(os.getpid())
        child_files = load.memory_and_files(child.pid)[-1]
        child.stdin.close()
    assert after["workers"] == before["workers"] + 1
    assert after["open_files"] == before["open_files"] + 1 + 2 + child_files  # pipes
    for memory in ("mib_of_main", "mib_shared_once"):
        assert after[memory] - before[memory] == pytest.approx(64, abs=16)
    assert 0 < after["mib_of_workers"] - before["mib_of_workers"] < 16


def test_memory_that_grows_is_not_flat():
    """2 MiB per 1,000 steps, and one more or less about the line."""
    steps = [*range(0, 10_000, 100)]
    noise = [(-1) ** index for index in range(100)]
    level = load.fit(steps, [100 + y for y in noise])
    assert level["is_flat"]
    assert level["scatter_mib"] == pytest.approx(2, abs=0.01)
    rising = load.fit(steps, [100 + step / 500 + y for step, y in zip(steps, noise, strict=True)])
    assert not rising["is_flat"]
    assert rising["kib_per_1000_steps"] == pytest.approx(2048, rel=0.02)
    assert rising["rise_mib"] == pytest.approx(19.8, rel=0.02)


# ---- scaling on paper


COUNTED = json.loads((report.RESULTS / "memory.json").read_text())["results"]


def forward_flop(blocks, tokens, width):
    return blocks * (24 * tokens * width**2 + 4 * tokens**2 * width)


@pytest.mark.parametrize(
    "task, model, parameters, forward",
    [
        (
            "pretrain",
            "mae_vit_base_patch16",
            111_907_840 - 197 * (768 + 512),  # less the fixed tables of positions
            forward_flop(12, 50, 768) + forward_flop(8, 197, 512),  # 49 of 196 patches are seen
        ),
        ("finetune", "vit_base_patch16", 86_567_656, forward_flop(12, 197, 768)),
        ("finetune", "vit_large_patch16", 304_326_632, forward_flop(24, 197, 1024)),
        ("finetune", "vit_huge_patch14", 632_045_800, forward_flop(32, 257, 1280)),
    ],
)
def test_scaling_is_of_the_published_sizes_and_of_operations_by_hand(
    task, model, parameters, forward
):
    """The blocks' operations, three times the forward pass; the other layers are the rest."""
    figures = COUNTED[task][model]
    assert scaling.gradient_bytes(figures) == 4 * parameters
    assert scaling.flop(figures) == pytest.approx(3 * forward, rel=0.03)


@pytest.mark.parametrize(
    "gpus, cluster, compute, reduce_, added",
    [
        # 64 x 58.8 GFLOP at 395.6 TFLOP/s. 447 MB x 126 / 64 at 320 GB/s, and 18 buckets' starts;
        # one of them, 26.2 MB, is left over when the backward pass ends.
        (64, scaling.INFINIBAND, 9.52e-3, 2.748e-3 + 0.9e-3, 0.161e-3 + 0.05e-3),
        # 512 x 58.8 GFLOP. 447 MB x 14 / 8 at 360 GB/s.
        (8, scaling.ETHERNET, 76.1e-3, 2.171e-3 + 0.9e-3, 0.1274e-3 + 0.05e-3),
        # 447 MB x 126 / 64 at 2.5 GB/s, of which 6.34 ms are hidden.
        (64, scaling.ETHERNET, 9.52e-3, 351.7e-3 + 0.9e-3, 346.3e-3),
    ],
)
def test_a_step_of_base_by_hand(gpus, cluster, compute, reduce_, added):
    base = COUNTED["pretrain"]["mae_vit_base_patch16"]
    figures = scaling.step(base, 4096 // gpus, gpus, cluster)
    assert figures == pytest.approx((compute, reduce_, added), rel=2e-3)


def test_the_page_has_the_section_that_scaling_makes():
    page = scaling.PAGE.read_text()
    made = table.put_between(page, scaling.START, scaling.END, scaling.section())
    assert page == made, "run python -m benchmarks.scaling"


# ---- make gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_without_a_gpu_its_command_says_so_in_one_line():
    command = [sys.executable, "-m", "benchmarks.gpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: this machine has no GPU")
    assert len((result.stdout + result.stderr).splitlines()) == 1


@pytest.mark.parametrize("failing", [[], ["b"], ["benchmarks.table"]])
def test_parts_go_on_after_one_that_fails(failing, monkeypatch):
    ran = []
    card = SimpleNamespace(total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(gpu, "parts", lambda gib: ["a", "b", "c"])
    monkeypatch.setattr(gpu, "run", lambda part, seconds: ran.append(part) or part not in failing)
    with pytest.raises(SystemExit) if failing else nullcontext() as stopped:
        gpu.main(None)
    assert ran == ["a", "b", "c", "benchmarks.table"]
    assert not failing or stopped.value.code.split() == ["failed:", *failing]


@pytest.mark.parametrize(
    "part, seconds, outcome",
    [
        ("keyword", 60, "exit code 0"),
        ("no_such_module", 60, "exit code 1"),
        ("timeit -n1 -r1 __import__('time').sleep(99)", 1, "took too long"),
    ],
)
def test_a_part_has_its_time(part, seconds, outcome, capfd):
    assert gpu.run(part, seconds) == (outcome == "exit code 0")
    assert f"==== {outcome} after " in capfd.readouterr().out


@pytest.mark.parametrize(
    "gib, batches, without_all_sides",
    [
        (79.1, [256, 128, 128, 64], 0),
        (39.4, [128, 64, 64, 32], 1),
        (23.5, [64, 32, 32, 16], 2),
        (15.7, [32, 16, 16, 8], 2),
    ],
)
def test_parts_fit_the_card(gib, batches, without_all_sides):
    tests, golden_, *tables, loader, whole_run_ = gpu.parts(gib)
    parse = train_step.get_args_parser().parse_args
    flags = [parse(part.split()[1:]) for part in tables]
    assert [args.batch_size for args in flags] == batches
    assert sum(args.sides is not None for args in flags) == without_all_sides
    assert (ROOT / tests.split()[1]).exists()
    golden.get_args_parser().parse_args(golden_.split()[1:])
    data_loading.get_args_parser().parse_args(loader.split()[1:])
    whole_run.get_args_parser().parse_args(whole_run_.split()[1:])
