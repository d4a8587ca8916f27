"""The linear probe as its users run it, against a loop written by hand."""

import functools
import signal

import pytest
import torch
from helpers import (
    assert_same_bits,
    final_state,
    kill_and_resume,
    linprobe_kill_flags,
    run,
    start_fresh,
)
from torch import nn

import models_vit
from util.checkpoint import load_checkpoint
from util.lars import LARS
from util.lr_sched import warmup_cosine_lr
from util.pretrained import load_encoder
from util.seeding import derive_seed

SCRIPT = "tests/tiny_linprobe.py"


@pytest.fixture
def spied_model(monkeypatch):
    """The model that a run in this test probes."""
    models = []
    original = models_vit.add_probe_head

    def spy(model):
        models.append((model, {k: v.clone() for k, v in model.state_dict().items()}))
        original(model)

    monkeypatch.setattr(models_vit, "add_probe_head", spy)
    return models


def test_one_epoch_equals_a_loop_written_by_hand(
    classify_flags,
    encoder,
    linprobe,
    spied_batches,
    spied_model,
):
    """Features of the frozen class token, batch norm, cross entropy, LARS and accumulation."""
    flags = {"accum_iter": 2, "epochs": 1, "warmup_epochs": 0.5, "lr": 0.5, "weight_decay": 0.1}
    linprobe(classify_flags | flags)
    (model, before) = spied_model[0]

    torch.manual_seed(derive_seed(0, "init"))
    features = models_vit.build_model("tiny_test_vit", img_size=8, num_classes=2, global_pool=False)
    load_encoder(features, torch.load(encoder, weights_only=True)["model"])
    linear = nn.Linear(32, 2)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    normalise = nn.BatchNorm1d(32, affine=False, eps=1e-6)
    optimizer = LARS(linear.parameters(), lr=0.0, weight_decay=0.1)
    assert len(spied_batches) == 9
    for first in range(0, 9, 2):
        group = spied_batches[first : first + 2]
        for imgs, labels in group:
            with torch.no_grad():
                tokens = features.forward_features(imgs)[:, 0]
            loss = nn.functional.cross_entropy(linear(normalise(tokens)), labels)
            (loss / len(group)).backward()
        lr = warmup_cosine_lr(first / 9, lr=0.5, min_lr=0, warmup_epochs=0.5, epochs=1)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

    weights, _, _ = final_state(classify_flags["output_dir"], "test_loss")
    by_hand = nn.ModuleDict({"head": nn.Sequential(normalise, linear)}).state_dict()
    assert weights.keys() == by_hand.keys()
    for name, value in by_hand.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7)
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, before[name]), name


def test_checkpoints_hold_the_head_alone(classify_flags, linprobe):
    linprobe(classify_flags)
    contents = load_checkpoint(classify_flags["output_dir"] / "checkpoint-best.pth")
    shapes = {name: list(value.shape) for name, value in contents["model"].items()}
    assert shapes == {
        "head.0.running_mean": [32],
        "head.0.running_var": [32],
        "head.0.num_batches_tracked": [],
        "head.1.weight": [2, 32],
        "head.1.bias": [2],
    }
    sizes = [v.numel() for s in contents["optimizer"]["state"].values() for v in s.values()]
    assert sorted(sizes) == [2, 64]
    assert contents["classes"] == ["a", "b"]


@pytest.fixture(scope="module")
def uninterrupted(image_folder, encoder, tmp_path_factory):
    """Gives the final state of a run in a type that nothing disturbed."""

    @functools.cache
    def outcome(amp):
        output_dir = tmp_path_factory.mktemp("uninterrupted")
        flags = linprobe_kill_flags(image_folder, encoder, output_dir) | {"amp": amp}
        code, _, err = run(SCRIPT, flags, start=start_fresh)
        assert code == 0, err
        return final_state(output_dir, "test_loss")

    return outcome


BF16 = pytest.param(signal.SIGTERM, "bf16", 18, marks=pytest.mark.thorough)


@pytest.mark.parametrize(
    ("number", "amp", "kill_line"),
    [(signal.SIGKILL, "off", 13), (signal.SIGTERM, "off", 4), BF16],
)
def test_killed_and_resumed_equals_uninterrupted(
    image_folder, encoder, tmp_path, uninterrupted, number, amp, kill_line
):
    flags = linprobe_kill_flags(image_folder, encoder, tmp_path) | {"amp": amp}
    kill_and_resume(SCRIPT, flags, number, kill_line)
    assert_same_bits(final_state(tmp_path, "test_loss"), uninterrupted(amp))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_probe_is_evaluated_as_it_was_in_training(classify_flags, processes):
    """With two processes, whose batch statistics differ, too; then by one."""
    flags = classify_flags | {"batch_size": 4, "lr": 5}
    code, out, err = run(SCRIPT, flags, processes=processes)
    assert code == 0, err
    *_, line = (text for text in out.splitlines() if text.startswith("* "))
    path = flags["output_dir"] / "checkpoint-last.pth"
    code, out, err = run(SCRIPT, flags | {"eval": True, "resume": path})
    assert (code, out.splitlines()[1:]) == (0, [line]), err
