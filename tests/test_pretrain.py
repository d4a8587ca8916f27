"""Pre-training as its users run it: outputs, accumulation, resuming after any death."""

import functools
import json
import math
import signal
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    assert_same_bits,
    events,
    final_state,
    kill_and_resume,
    pretrain_kill_flags,
    run,
    start_fresh,
    write_images,
)
from PIL import Image

import main_finetune
import models_mae
from engine_pretrain import evaluate
from util import data, decoding, image_files, loading, logs, training
from util.checkpoint import load_checkpoint
from util.distributed import Process
from util.lr_sched import warmup_cosine_lr
from util.seeding import derive_seed, uniform_noise

SCRIPT = "tests/tiny_pretrain.py"


@pytest.fixture(scope="module")
def uninterrupted(image_folder, tmp_path_factory):
    """Gives the final state of a run of three epochs in a type that nothing disturbed."""

    @functools.cache
    def state(amp):
        output_dir = tmp_path_factory.mktemp("uninterrupted")
        code, _, err = run(
            SCRIPT, pretrain_kill_flags(image_folder, output_dir) | {"amp": amp}, start=start_fresh
        )
        assert code == 0, err
        return final_state(output_dir)

    return state


@pytest.mark.parametrize(
    ("number", "workers", "amp", "kill_line"),
    [
        (signal.SIGKILL, 0, "off", 5),
        (signal.SIGTERM, 0, "off", 10),
        (signal.SIGINT, 0, "off", 19),
        (signal.SIGKILL, 2, "off", 16),
        (signal.SIGTERM, 2, "off", 24),
        (signal.SIGINT, 2, "off", 6),
        (signal.SIGKILL, 0, "bf16", 12),
        (signal.SIGTERM, 2, "bf16", 5),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    image_folder, tmp_path, uninterrupted, number, workers, amp, kill_line
):
    flags = pretrain_kill_flags(image_folder, tmp_path, workers) | {"amp": amp}
    kill_and_resume(SCRIPT, flags, number, kill_line)
    assert_same_bits(final_state(tmp_path), uninterrupted(amp))


def test_workers_do_not_change_the_result(image_folder, tmp_path, uninterrupted):
    code, _, err = run(SCRIPT, pretrain_kill_flags(image_folder, tmp_path, workers=3))
    assert code == 0, err
    assert_same_bits(final_state(tmp_path), uninterrupted("off"))


def test_outputs_of_a_run(pretrain_flags, pretrain, capsys):
    out_dir = pretrain_flags["output_dir"]
    pretrain(pretrain_flags | {"log_every": 4, "save_every": 1, "accum_iter": 2})
    out = capsys.readouterr().out
    assert "0.1 M parameters" in out or "0.0 M parameters" in out
    steps = [line.split("step ")[1].split()[0] for line in out.splitlines() if "eta" in line]
    assert steps == ["4/9", "8/9", "9/9"] * 2

    records = [json.loads(line) for line in (out_dir / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    for record in records:
        assert record["unreadable_images"] == 0
        assert record["images_per_s"] > 0
        assert 0 < record["train_loss"] < 10
        assert 0 < record["val_loss"] < 10
    names = {path.name for path in out_dir.iterdir() if "tfevents" not in path.name} - {".lock"}
    checkpoints = {"checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-last.pth"}
    assert names == {"log.txt", "encoder.safetensors"} | checkpoints

    scalars, images = events(out_dir)
    assert set(scalars) == {"train_loss", "lr", "grad_norm", "val_loss"}
    assert list(scalars["grad_norm"]) == list(scalars["train_loss"])
    assert list(scalars["train_loss"]) == [444, 888, 1000, 1444, 1888, 2000]
    schedule = dict(lr=1e-2, min_lr=0.0, warmup_epochs=1, epochs=2)
    # Step 3 (of 0 to 8) belongs to the update that began at step 2, step 8 to a tail of its own.
    assert scalars["lr"][444] == pytest.approx(warmup_cosine_lr(2 / 9, **schedule))
    assert scalars["lr"][1000] == pytest.approx(warmup_cosine_lr(8 / 9, **schedule))
    assert list(scalars["val_loss"]) == [1000, 2000]
    assert images == {"reconstruction": [1000, 2000]}

    contents = load_checkpoint(out_dir / "checkpoint-last.pth")
    assert contents["epoch"] == 1
    assert contents["args"]["model"] == "tiny_test_model"
    assert contents["versions"]["torch"] == torch.__version__


@pytest.fixture
def spied_batches(monkeypatch):
    """The (images, noise) of every training step of the models that run in this test."""
    batches = []
    original = models_mae.MaskedAutoencoderViT.forward

    def spy(self, imgs, mask_ratio, noise):
        if self.training:
            batches.append((imgs, noise))
        return original(self, imgs, mask_ratio, noise)

    monkeypatch.setattr(models_mae.MaskedAutoencoderViT, "forward", spy)
    return batches


def test_one_epoch_equals_a_loop_written_by_hand(pretrain_flags, pretrain, spied_batches):
    """Learning rate, target, accumulation with its tail, clipping and AdamW, step by step."""
    del pretrain_flags["lr"]
    flags = {
        "blr": 0.64,  # x 4 images / 256 = 1e-2
        "min_lr": 1e-3,
        "weight_decay": 0.3,
        "mask_ratio": 0.5,
        "norm_pix_loss": True,
        "accum_iter": 2,
        "clip_grad": 0.1,
        "epochs": 1,
        "warmup_epochs": 0.5,
    }
    pretrain(pretrain_flags | flags)
    batches = spied_batches[:]
    schedule = dict(lr=1e-2, min_lr=1e-3, warmup_epochs=0.5, epochs=1)

    torch.manual_seed(derive_seed(0, "init"))
    model = models_mae.build_model("tiny_test_model", img_size=8, norm_pix_loss=True)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    assert len(batches) == 9
    losses = []
    for start_step in range(0, 9, 2):
        group = batches[start_step : start_step + 2]
        for imgs, noise in group:
            loss = model(imgs, 0.5, noise)[0]
            (loss / len(group)).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for param_group in optimizer.param_groups:
            param_group["lr"] = warmup_cosine_lr(start_step / 9, **schedule)
        optimizer.step()
        optimizer.zero_grad()
    contents = load_checkpoint(pretrain_flags["output_dir"] / "checkpoint-last.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(contents["model"][name], value), name
    record = json.loads((pretrain_flags["output_dir"] / "log.txt").read_text())
    assert record["train_loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_masks_differ_between_samples_steps_epochs_and_seeds(
    pretrain_flags, pretrain, spied_batches
):
    for seed in (0, 1):
        out_dir = pretrain_flags["output_dir"] / str(seed)
        pretrain(pretrain_flags | {"seed": seed, "output_dir": out_dir})
    rows = {tuple(row.tolist()) for _, noise in spied_batches for row in noise}
    assert len(rows) == 2 * 2 * 18


def test_held_out_loss_is_the_mean_over_readable_images_under_fixed_masks(tmp_path, capfd):
    write_images(tmp_path, 6, size=(8, 8))
    (tmp_path / "002.png").write_bytes(b"no image")
    torch.manual_seed(0)
    model = models_mae.build_model("tiny_test_model", img_size=8)
    paths = image_files.ImagePaths(tmp_path)
    transform = data.eval_transform(8)
    losses = []
    for index in (0, 1, 3, 4, 5):
        image = data.normalize(transform(decoding.read_image(paths[index]))[None])
        noise = uniform_noise((1, 4), 7, "held-out mask", index).view(1, 4)
        losses.append(model(image, 0.75, noise)[0].item())
    process = Process(0, 1, torch.device("cpu"))
    dataset = loading.ImageDataset(paths, transform, seed=7)
    for batch_size in (1, 4, 6):
        batches = loading.OrderedBatches(6, batch_size, process)
        loader = loading.ImageLoader(dataset, batches, process, num_workers=0, pin_mem=False)
        result = evaluate(model, loader, mask_ratio=0.75, amp_dtype=None, seed=7)
        assert result == {"val_loss": pytest.approx(np.mean(losses), rel=1e-5)}
    assert len({round(loss, 4) for loss in losses}) == 5


@pytest.mark.parametrize("native", [False, True])
def test_bf16_is_the_default_where_the_cpu_computes_it(
    pretrain_flags, pretrain, monkeypatch, capsys, native
):
    """The run's first line says which type it is."""
    monkeypatch.setattr("util.precision.cpu_computes_bf16", lambda: native)
    losses = {}
    for amp in ("auto", "off", "bf16"):
        out_dir = pretrain_flags["output_dir"] / amp
        pretrain(pretrain_flags | {"amp": amp, "output_dir": out_dir})
        losses[amp] = [loss for _, loss, _ in final_state(out_dir)[2]]
        types = {"auto": "bfloat16" if native else "float32", "off": "float32", "bf16": "bfloat16"}
        _, _, first_line, *_ = capsys.readouterr().out.splitlines()  # after what was found
        assert first_line.endswith(f"1 x cpu, computing in {types[amp]}")
    assert losses["auto"] == losses["bf16" if native else "off"]
    assert losses["bf16"] != losses["off"]
    assert losses["bf16"] == pytest.approx(losses["off"], rel=0.02)


def test_non_square_input(pretrain_flags, pretrain):
    pretrain(pretrain_flags | {"input_size": [8, 16], "norm_pix_loss": True, "epochs": 1})
    contents = load_checkpoint(pretrain_flags["output_dir"] / "checkpoint-last.pth")
    assert contents["args"]["input_size"] == (8, 16)
    assert contents["model"]["pos_embed"].shape == (1, 1 + 2 * 4, 32)


def test_learns_the_images(tmp_path, pretrain_flags, pretrain):
    """The loss on flat-coloured images, which one visible patch determines, falls."""
    folder = tmp_path / "flat"
    folder.mkdir()
    colors = np.random.default_rng(0).integers(0, 256, (32, 3), dtype=np.uint8)
    for index, color in enumerate(colors):
        Image.new("RGB", (8, 8), tuple(color.tolist())).save(folder / f"{index}.png")
    flags = {"data_path": folder, "batch_size": 8, "epochs": 60, "warmup_epochs": 5, "lr": 3e-3}
    pretrain(pretrain_flags | flags)
    records = (pretrain_flags["output_dir"] / "log.txt").read_text().splitlines()
    first, last = (json.loads(records[i])["train_loss"] for i in (0, -1))
    assert last < 0.2 * first
    assert "val_loss" not in records[0]  # nothing is held out


def test_a_complete_run_is_left_as_it_is(pretrain_flags, pretrain, capsys):
    pretrain(pretrain_flags)
    before = (pretrain_flags["output_dir"] / "log.txt").read_text()
    pretrain(pretrain_flags)
    assert "resuming" in capsys.readouterr().out
    assert (pretrain_flags["output_dir"] / "log.txt").read_text() == before


def test_resume_passes_over_a_torn_checkpoint(pretrain_flags, pretrain, capsys):
    out_dir = pretrain_flags["output_dir"]
    flags = pretrain_flags | {"save_every": 1}
    pretrain(flags)
    expected = final_state(out_dir)
    for name in ("checkpoint-last.pth", "checkpoint-1.pth"):
        whole = (out_dir / name).read_bytes()
        (out_dir / name).write_bytes(whole[: len(whole) // 2])
        time.sleep(0.01)
    pretrain(flags)
    captured = capsys.readouterr()
    assert "checkpoint-last.pth is torn" in captured.err
    assert "resuming" in captured.out
    assert "checkpoint-0.pth" in captured.out.split("resuming")[1].splitlines()[0]
    assert_same_bits(final_state(out_dir), expected)


def test_resume_none_starts_anew_and_a_path_is_taken(pretrain_flags, pretrain, capsys):
    out_dir = pretrain_flags["output_dir"]
    pretrain(pretrain_flags | {"save_every": 1})
    expected = final_state(out_dir)
    capsys.readouterr()
    pretrain(pretrain_flags | {"resume": "none"})
    captured = capsys.readouterr()
    assert "resuming" not in captured.out
    assert f"what {out_dir}/checkpoint-1.pth was is kept as checkpoint-1.pth.old" in captured.err
    assert f"what {out_dir}/log.txt was is kept as log.txt.old" in captured.err
    assert_same_bits(final_state(out_dir), expected)

    elsewhere = out_dir.parent / "elsewhere"
    pretrain(pretrain_flags | {"output_dir": elsewhere, "resume": out_dir / "checkpoint-0.pth.old"})
    assert "resuming" in capsys.readouterr().out
    model, optimizer, losses = final_state(elsewhere)
    assert_same_bits((model, optimizer, expected[2]), expected)
    assert losses == expected[2][1:]


def test_files_set_aside_never_replace_each_other(pretrain_flags, pretrain):
    """The resumed file, from another run, may be one of them."""
    out_dir, flags = pretrain_flags["output_dir"], pretrain_flags | {"epochs": 1}
    for seed in (0, 1, 2):
        pretrain(flags | {"seed": seed, "resume": "none"})
    kept = ["checkpoint-last.pth.old", "checkpoint-last.pth.old1", "checkpoint-last.pth"]
    assert [load_checkpoint(out_dir / name)["args"]["seed"] for name in kept] == [0, 1, 2]
    pretrain(flags | {"seed": 0, "resume": out_dir / kept[0]})
    assert [load_checkpoint(out_dir / name)["args"]["seed"] for name in kept] == [0, 1, 2]
    assert len(list(out_dir.glob("log.txt.old*"))) == 3


def test_a_new_start_keeps_files_of_others(pretrain_flags, pretrain, encoder):
    out_dir = pretrain_flags["output_dir"]
    out_dir.mkdir()
    (out_dir / "checkpoint-last.pth").write_bytes(encoder.read_bytes())
    pretrain(pretrain_flags | {"epochs": 1, "resume": "none"})
    assert (out_dir / "checkpoint-last.pth.old").read_bytes() == encoder.read_bytes()


def test_a_resume_from_elsewhere_writes_its_own_best(classify_flags, finetune, monkeypatch):
    """Though the best epoch was before: the file of that one is elsewhere."""
    accuracies = iter([80.0, 60.0])
    evaluate = main_finetune.evaluate

    def scripted(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"test_acc1": next(accuracies)}

    monkeypatch.setattr(main_finetune, "evaluate", scripted)
    out_dir, elsewhere = classify_flags["output_dir"], classify_flags["output_dir"] / "elsewhere"
    monkeypatch.setattr(training.Checkpoints, "stop_if_asked", lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        finetune(classify_flags | {"save_every": 1})
    monkeypatch.undo()
    monkeypatch.setattr(main_finetune, "evaluate", scripted)
    flags = {"output_dir": elsewhere, "resume": out_dir / "checkpoint-0.pth"}
    finetune(classify_flags | flags)
    assert load_checkpoint(elsewhere / "checkpoint-best.pth")["best"] == 60


@pytest.mark.parametrize("resume", ["none", "checkpoint-0.pth"])
def test_after_a_start_from_an_earlier_point_auto_continues_that_run(
    pretrain_flags, pretrain, monkeypatch, capsys, resume
):
    """And not the one before, which had come further."""
    out_dir, flags = pretrain_flags["output_dir"], pretrain_flags | {"save_every": 1, "epochs": 3}
    pretrain(flags)
    expected = final_state(out_dir)
    resume = resume if resume == "none" else out_dir / resume
    save_epoch = training.Checkpoints.save_epoch

    def dying(self, state, score=None):
        save_epoch(self, state, score)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(training.Checkpoints, "save_epoch", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain(flags | {"resume": resume})
    capsys.readouterr()
    pretrain(flags)
    epoch = 0 if resume == "none" else 1
    assert f"checkpoint-last.pth after step 9 of epoch {epoch}" in capsys.readouterr().out
    assert_same_bits(final_state(out_dir), expected)


def test_unreadable_images_are_skipped_named_and_counted(tmp_path, pretrain_flags, pretrain, capfd):
    folder = tmp_path / "some_broken"
    write_images(folder, 120)
    (folder / "017.png").write_bytes(b"no image")
    flags = pretrain_flags | {"data_path": folder, "batch_size": 60}
    pretrain(flags)
    err = capfd.readouterr().err
    assert err.count("warning:") == err.count("017.png") == 1
    records = (pretrain_flags["output_dir"] / "log.txt").read_text().splitlines()
    assert [json.loads(line)["unreadable_images"] for line in records] == [1, 1]


@pytest.mark.parametrize("broken", [9, 10])
def test_more_than_one_percent_and_ten_unreadable_stop(
    tmp_path, pretrain_flags, pretrain, user_error, broken
):
    folder = tmp_path / "broken"
    write_images(folder, 125)
    for number in range(broken):
        (folder / f"{17 + number:03d}.png").write_bytes(b"no image")
    flags = pretrain_flags | {"data_path": folder, "batch_size": 125, "epochs": 1}
    if broken < 10:
        pretrain(flags)
        return
    message = user_error(lambda: pretrain(flags))
    assert message.startswith("10 of the folder's 125 images are unreadable, at least 10 and more ")
    assert not list(pretrain_flags["output_dir"].glob("*.pth"))


def test_ten_of_a_thousand_are_one_percent_and_eleven_are_more(user_error):
    loader = mock.MagicMock(images_per_step=1000, dataset=range(1000))
    state = SimpleNamespace(totals={}, epoch=0, step=0)
    meter = logs.Meter(None, state, loader, log_every=1)
    state.totals["bad"] = 10
    meter._check_readable()
    state.totals["bad"] = 11
    assert user_error(meter._check_readable).startswith("11 of the folder's 1,000 images are ")


def test_a_run_that_died_in_evaluation_keeps_its_curves(pretrain_flags, pretrain, monkeypatch):
    calls = []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr("main_pretrain.evaluate", dying)
    flags = pretrain_flags | {"save_every": 1, "save_minutes": 0}
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(flags)
    pretrain(flags)
    scalars, images = events(flags["output_dir"])
    assert list(scalars["val_loss"]) == images["reconstruction"] == [1000, 2000]
    assert list(scalars["train_loss"])[-1] == 2000
    assert {1000, 2000} <= set(scalars["train_loss"])

    undisturbed = flags["output_dir"] / "undisturbed"
    pretrain(flags | {"output_dir": undisturbed})
    assert_same_bits(final_state(flags["output_dir"]), final_state(undisturbed))


def test_non_finite_loss_stops_without_a_checkpoint(pretrain_flags, pretrain, user_error):
    message = user_error(lambda: pretrain(pretrain_flags | {"lr": 1e30, "warmup_epochs": 0}))
    assert "epoch 0, step 1, rank 0" in message
    assert not list(pretrain_flags["output_dir"].glob("*.pth"))


# ---- the gradients' norm


@pytest.fixture
def norms(monkeypatch):
    """The gradients' norm, by hand, at every step of an optimizer in this test."""
    found, step = [], torch.amp.GradScaler.step

    def spy(self, optimizer):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        found.append(math.sqrt(sum(grad.double().square().sum().item() for grad in grads)))
        return step(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "step", spy)
    return found


def test_the_norm_is_measured_at_log_lines(pretrain_flags, pretrain, norms, capsys):
    """Nine steps in updates of two: 0-1, 2-3, 4-5, 6-7 and 8, the lines after 4, 8 and 9 steps."""
    pretrain(pretrain_flags | {"accum_iter": 2, "log_every": 4, "epochs": 1})
    measured = [norms[1], norms[3], norms[4]]
    record = json.loads((pretrain_flags["output_dir"] / "log.txt").read_text())
    assert record["grad_norm"] == pytest.approx(sum(measured) / 3, rel=1e-5)
    drawn = events(pretrain_flags["output_dir"])[0]["grad_norm"]
    assert list(drawn.values()) == pytest.approx(measured, rel=1e-5)
    out = capsys.readouterr().out
    assert all(f"  grad norm {norm:.3g}  " in out for norm in measured)


@pytest.mark.parametrize(
    ("accum_iter", "log_every", "measured"),
    [
        (1, 3, [2, 5, 8]),
        (1, 20, [8]),
        (2, 3, [1, 5, 8]),  # lines after the steps 2, 5 and 8: updates end with 1, 3, 5, 7, 8
        (4, 3, [3, 8]),  # before the first line no update ends, after step 7 there is no line
        (20, 3, [8]),
    ],
)
def test_which_updates_are_measured(accum_iter, log_every, measured):
    loader = mock.Mock(images_per_step=1, __len__=lambda _: 9)
    meter = logs.Meter(None, SimpleNamespace(totals={}, epoch=0, step=0), loader, log_every)
    ends = [step for step in range(9) if (step + 1) % accum_iter == 0 or step == 8]
    assert [step for step in ends if meter.shows_update(step, accum_iter)] == measured


def test_a_clip_gives_the_norm_of_all_updates_before_it_clips(
    classify_flags, finetune, norms, monkeypatch
):
    """Also in fine-tuning. A mean over updates that clipping would leave at 0.01."""
    unclipped, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        grads = [p.grad.double() for p in parameters if p.grad is not None]
        unclipped.append(math.sqrt(sum(grad.square().sum().item() for grad in grads)))
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    finetune(classify_flags | {"clip_grad": 0.01, "log_every": 4, "epochs": 1, "drop_path": 0})
    assert len(unclipped) == 9
    assert max(norms) < 0.0101 < min(unclipped)
    record = json.loads((classify_flags["output_dir"] / "log.txt").read_text())
    assert record["grad_norm"] == pytest.approx(sum(unclipped) / 9, rel=1e-5)


def test_measuring_changes_no_bit(pretrain_flags, pretrain):
    """Every update is measured, or only the last."""
    for log_every in (1, 20):
        pretrain(
            pretrain_flags
            | {"log_every": log_every, "output_dir": pretrain_flags["output_dir"] / str(log_every)}
        )
    often, seldom = (final_state(pretrain_flags["output_dir"] / name) for name in ("1", "20"))
    assert_same_bits(often, seldom)
