"""The counted memory and work of training steps, against real steps and figures by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import CPU
from torch.profiler import ProfilerActivity, profile

import models_mae
from benchmarks import counting, memory, report, sides, table, train_step
from benchmarks.counting import GPU, count_step
from benchmarks.sides import Setting
from util import data

counts = pytest.mark.skipif(
    torch.__version__ < counting.OLDEST_TORCH,
    reason=f"counting takes torch {counting.OLDEST_TORCH} or newer",
)
PRETRAIN = Setting("pretrain", "mae_vit_nano_patch4", 28, 8, CPU, "off", False)
FINETUNE = Setting("finetune", "vit_nano_patch4", 28, 8, CPU, "off", False)
TINY = replace(PRETRAIN, model="tiny_test_model", amp="bf16")
ON_GPU = replace(TINY, device=GPU)
RESULTS = json.loads((report.RESULTS / "memory.json").read_text())["results"]


def real_peak(setting):
    """Bytes that a real step on the CPU holds at most, beyond those it starts with."""
    with mock.patch("util.optim.adamw", counting.adamw_in_use):
        train = sides.ours(setting)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train(1)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@counts
@pytest.mark.parametrize(
    "setting",
    [PRETRAIN, replace(PRETRAIN, grad_checkpointing=True), TINY, FINETUNE],
    ids=["pretrain", "checkpointing", "bf16", "finetune"],
)
def test_counted_memory_is_that_of_a_real_step(setting):
    """torch's profiler notes each allocation.

    Held before are weights, gradients and two means of AdamW; positions; AdamW's count of steps of
    each parameter; and the images' statistics.
    """
    counter, held = count_step(setting)
    trained = [p.numel() for p in setting.build_model().parameters() if p.requires_grad]
    positions = {PRETRAIN.model: 50 * (128 + 96), TINY.model: 50 * (32 + 16)}.get(setting.model, 0)
    assert held == pytest.approx(4 * (4 * sum(trained) + positions + len(trained)), abs=100)
    assert counter.peak - held == pytest.approx(real_peak(setting), rel=0.03)


@counts
def test_counting_leaves_no_tensor_without_values_behind():
    count_step(replace(TINY, batch_size=2))
    black = data.normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    torch.testing.assert_close(
        black[0, :, 0, 0], torch.tensor([-2.1179, -2.0357, -1.8044]), atol=1e-4, rtol=0
    )


@counts
def test_counted_operations_are_the_method_s():
    """But flash attention's backward pass takes 2.5 times its forward pass, not twice, and images
    have no gradient.

    49 patches of 48 values, 13 tokens in 2 blocks of width 32 and 50 in one of width 16.
    """
    counter, _ = count_step(ON_GPU)
    projection = 2 * 49 * 48 * 32
    attention = 2 * 2 * (2 * 13**2 * 32 + 50**2 * 16)
    method = train_step.training_flop(ON_GPU)
    assert counter.flop["attention"] == 8 * 3.5 * attention
    assert counter.flop["products"] == 8 * (method - projection - 3 * attention)


@counts
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_other_batches_are_on_the_line(grad_checkpointing):
    setting = replace(ON_GPU, grad_checkpointing=grad_checkpointing, batch_size=64)
    line, _ = memory.memory_line(setting)
    third, _ = count_step(setting)
    assert memory.peak_gib(line, 64) * 2**30 == pytest.approx(third.peak, rel=0.005)


@pytest.mark.parametrize(
    "model, trained",
    [  # the published sizes, less the fixed tables of positions
        ("mae_vit_base_patch16", 111_907_840 - 197 * (768 + 512)),
        ("mae_vit_large_patch16", 329_541_888 - 197 * (1024 + 512)),
        ("mae_vit_huge_patch14", 657_074_508 - 257 * (1280 + 512)),
    ],
)
def test_parameters_and_operations_of_the_paper_s_models(model, trained):
    figures = RESULTS["pretrain"][model]
    assert figures["parameters"] == trained
    with torch.device("meta"):
        method = train_step.training_flop(Setting("pretrain", model, 224, 1, CPU, "off", False))
    assert figures["plain"]["gflop_per_image"] == pytest.approx(method / 1e9, rel=0.01)
    # Blocks, nearly all of the forward pass's third, are computed twice.
    assert 1.2 < figures["grad_checkpointing"]["gflop_per_image"] / (method / 1e9) < 4 / 3


def test_every_model_is_in_the_table():
    assert [*RESULTS["pretrain"]] == [f"mae_{name}" for name in RESULTS["finetune"]]
    names = {name for name in models_mae.MODELS if "test" not in name}
    assert RESULTS["pretrain"].keys() == {n for n in names if not n.endswith("_dec512d8b")}


@pytest.mark.parametrize(
    "card_gib, images",
    [(25, 2048), (3.2, 64), (2.5, 24), (1.5, 0), (1000, 4096)],
)
def test_largest_batch_by_hand(card_gib, images):
    """8% of 25 GiB are lost, CUDA takes 1 GiB and the model 1: 21 are left for 2100 images."""
    assert memory.largest_batch({"fixed_gib": 1, "mib_per_image": 10.24}, card_gib) == images


def test_estimate_by_hand():
    """0.6 PFLOP in products take a second, 0.15 in attention one more, 5.2 TB two on an H100."""
    counter = SimpleNamespace(
        flop={"products": 600e12, "attention": 150e12},
        moved={"products": 9e12, "attention": 9e12, "rest": 5.2e12},
    )
    figures = memory.estimate(counter, batch_size=400, width=768)
    assert figures["H100"] == {"rest_ms": 2000, "images_per_s": 100}
    assert figures["H200"]["rest_ms"] == pytest.approx(2000 * 3.35 / 4.8, abs=0.1)


def test_an_old_torch_is_named(monkeypatch, user_error):
    monkeypatch.setattr(counting, "OLDEST_TORCH", "99.0")
    message = user_error(lambda: count_step(ON_GPU))
    assert message.startswith("counting takes torch 99.0 or newer")


def test_the_page_has_the_tables_that_the_results_make():
    assert table.MEMORY_PAGE.read_text() == table.memory_page(), "run python -m benchmarks.table"
