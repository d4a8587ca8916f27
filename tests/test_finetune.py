"""Fine-tuning and evaluation as their users run them, against timm and loops written by hand."""

import functools
import json
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from helpers import (
    ForkedScript,
    assert_same_bits,
    events,
    final_state,
    finetune_kill_flags,
    kill_and_resume,
    run,
    start_fresh,
    write_images,
)
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import models_vit
from util import data, decoding, image_files, training
from util.checkpoint import load_checkpoint
from util.errors import UserError
from util.lr_sched import warmup_cosine_lr
from util.seeding import derive_seed, seed_generators

SCRIPT = "tests/tiny_finetune.py"


def classifier_by_hand(encoder, drop_path, num_classes=2):
    """timm's classifier as main_finetune should make it: encoder, fresh small head."""
    torch.manual_seed(derive_seed(0, "init"))
    model = VisionTransformer(
        img_size=8,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=num_classes,
        global_pool="avg",
        drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    weights = torch.load(encoder, weights_only=True)["model"]
    kept = {k: v for k, v in weights.items() if k in model.state_dict()}
    assert len(kept) == len(model.state_dict()) - 4  # head and fc_norm are new
    model.load_state_dict(kept, strict=False)
    return model


def layer_decayed_adamw(model, weight_decay, layer_decay):
    """One group a parameter, with its scale by the layer it is in (head 3, blocks 2 and 1)."""
    groups = []
    for name, parameter in model.named_parameters():
        layer = {"head": 3, "fc_norm": 3}.get(name.split(".")[0], 0)
        if name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        plain = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        groups.append(
            {
                "params": [parameter],
                "weight_decay": 0.0 if plain else weight_decay,
                "scale": layer_decay ** (3 - layer),
            }
        )
    return torch.optim.AdamW(groups, betas=(0.9, 0.999))


@pytest.mark.parametrize("loss", ["mixup", "smoothing", "plain"])
def test_one_epoch_equals_a_loop_written_by_hand(
    classify_flags, encoder, finetune, spied_batches, loss
):
    """Learning rates, erasing, mixup, drop path, targets, accumulation, clipping and AdamW."""
    erasing = dict(reprob=0.5, remode="rand", recount=2)
    mixing = dict(mixup=0.8, cutmix=1.0, mixup_prob=0.9, mixup_switch_prob=0.4, mixup_mode="elem")
    flags = dict(
        min_lr=1e-4,
        weight_decay=0.3,
        layer_decay=0.5,
        drop_path=0.3,
        clip_grad=0.5,
        accum_iter=2,
        epochs=1,
        warmup_epochs=0.5,
        smoothing=0.0 if loss == "plain" else 0.2,
    )
    finetune(classify_flags | flags | erasing | (mixing if loss == "mixup" else {}))

    model = classifier_by_hand(encoder, drop_path=0.3)
    optimizer = layer_decayed_adamw(model, weight_decay=0.3, layer_decay=0.5)
    erase = RandomErasing(0.5, mode="rand", max_count=2, device="cpu")
    mix = Mixup(0.8, 1.0, None, 0.9, 0.4, "elem", label_smoothing=0.2, num_classes=2)
    criterion = {
        "mixup": SoftTargetCrossEntropy(),
        "smoothing": LabelSmoothingCrossEntropy(0.2),
        "plain": nn.CrossEntropyLoss(),
    }[loss]
    assert len(spied_batches) == 9
    losses = []
    for first in range(0, 9, 2):
        group = spied_batches[first : first + 2]
        for step, (imgs, labels) in enumerate(group, first):
            seed_generators(0, "step", 0, step, 0)
            imgs = erase(imgs)
            imgs, targets = mix(imgs, labels) if loss == "mixup" else (imgs, labels)
            value = criterion(model(imgs), targets)
            (value / len(group)).backward()
            losses.append(value.item())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        lr = warmup_cosine_lr(first / 9, lr=1e-2, min_lr=1e-4, warmup_epochs=0.5, epochs=1)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr * param_group["scale"]
        optimizer.step()
        optimizer.zero_grad()
    weights, _, logged = final_state(classify_flags["output_dir"], "test_loss")
    for name, value in model.state_dict().items():
        found = weights[name]
        if name.endswith("qkv.bias"):
            # The keys' biases have a gradient of 0; AdamW makes small steps of its rounding errors.
            keys = slice(len(value) // 3, 2 * len(value) // 3)
            torch.testing.assert_close(found[keys], value[keys], rtol=0, atol=1e-4)
            found[keys] = value[keys]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=2e-5)
    assert logged[0][1] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.fixture(scope="module")
def uninterrupted(image_folder, encoder, tmp_path_factory):
    """Gives the folder of a run in a type that nothing disturbed."""

    @functools.cache
    def outcome(amp):
        output_dir = tmp_path_factory.mktemp("uninterrupted")
        flags = finetune_kill_flags(image_folder, encoder, output_dir) | {"amp": amp}
        code, _, err = run(SCRIPT, flags, start=start_fresh)
        assert code == 0, err
        return output_dir

    return outcome


BF16 = pytest.param(signal.SIGKILL, "bf16", 14, marks=pytest.mark.thorough)


@pytest.mark.parametrize(
    ("number", "amp", "kill_line"),
    [(signal.SIGKILL, "off", 20), (signal.SIGTERM, "off", 7), BF16],
)
def test_killed_and_resumed_equals_uninterrupted(
    image_folder, encoder, tmp_path, uninterrupted, number, amp, kill_line
):
    flags = finetune_kill_flags(image_folder, encoder, tmp_path) | {"amp": amp}
    kill_and_resume(SCRIPT, flags, number, kill_line)
    undisturbed = uninterrupted(amp)
    assert_same_bits(final_state(tmp_path, "test_loss"), final_state(undisturbed, "test_loss"))
    best, expected = (
        load_checkpoint(folder / "checkpoint-best.pth") for folder in (tmp_path, undisturbed)
    )
    assert (best["epoch"], best["best"]) == (expected["epoch"], expected["best"])


def test_workers_do_not_change_the_result(image_folder, encoder, tmp_path, uninterrupted):
    flags = finetune_kill_flags(image_folder, encoder, tmp_path) | {"num_workers": 2}
    code, _, err = run(SCRIPT, flags)
    assert code == 0, err
    undisturbed = uninterrupted("off")
    assert_same_bits(final_state(tmp_path, "test_loss"), final_state(undisturbed, "test_loss"))


def test_outputs_of_a_run(classify_flags, finetune, capsys):
    out_dir = classify_flags["output_dir"]
    finetune(classify_flags | {"epochs": 4, "save_every": 3, "dist_eval": True})
    out = capsys.readouterr().out
    assert f"from {classify_flags['finetune']}" in out
    shown = re.findall(r"^\* Acc@1 (\S+) Acc@5 (\S+) loss (\S+)$", out, re.M)

    records = [json.loads(line) for line in (out_dir / "log.txt").read_text().splitlines()]
    for record, figures in zip(records, shown, strict=True):
        names = ("test_acc1", "test_acc5", "test_loss")
        assert figures == tuple(f"{record[name]:.3f}" for name in names)
        assert record["test_acc5"] == 100  # of two classes
        assert record["n_parameters"] == 27298
    accuracies = [record["test_acc1"] for record in records]
    scalars, _ = events(out_dir)
    perf = {"perf/test_acc1", "perf/test_acc5", "perf/test_loss"}
    assert set(scalars) == {"loss", "lr", "grad_norm", *perf}
    assert scalars["perf/test_acc1"] == pytest.approx(
        dict(zip((1, 2, 3, 4), accuracies, strict=True))
    )
    assert list(scalars["loss"]) == [1000, 2000, 3000, 4000]

    names = {path.name for path in out_dir.iterdir() if "tfevents" not in path.name} - {".lock"}
    kept = {f"checkpoint-{name}.pth" for name in ("2", "3", "best", "last")}
    assert names == kept | {"log.txt"}
    best = load_checkpoint(out_dir / "checkpoint-best.pth")
    assert best["best"] == max(accuracies)
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert best["classes"] == ["a", "b"]


def test_without_an_encoder_it_says_so(classify_flags, finetune, capsys):
    del classify_flags["finetune"]
    finetune(classify_flags | {"epochs": 1, "warmup_epochs": 0.5})
    assert "from scratch" in capsys.readouterr().out


def test_learns_classes_and_top_5_of_seven(tmp_path, classify_flags, finetune):
    """Seven flat colours, which are easily told apart, are."""
    random_colors = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label in range(7):
            folder = tmp_path / "colors" / split / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                color = np.array([36 * label, 255 - 36 * label, 128 * (label % 2)])
                color = (color + random_colors.integers(-9, 10, 3)).clip(0, 255)
                Image.new("RGB", (8, 8), tuple(color.tolist())).save(folder / f"{index}.png")
    flags = {
        "data_path": tmp_path / "colors",
        "nb_classes": 7,
        "batch_size": 14,
        "epochs": 12,
        "lr": 1e-2,
        "aa": "none",
        "reprob": 0,
        "drop_path": 0,
    }
    finetune(classify_flags | flags)
    log = (classify_flags["output_dir"] / "log.txt").read_text().splitlines()
    first, last = json.loads(log[0]), json.loads(log[-1])
    assert last["test_acc1"] == last["test_acc5"] == 100
    assert first["test_acc1"] < first["test_acc5"]


def test_an_epoch_that_runs_again_is_drawn_once(classify_flags, finetune, monkeypatch):
    """TensorBoard's accuracies, whose x is the epoch, can't be purged; losses can."""
    save_epoch, calls = training.Checkpoints.save_epoch, []

    def dying(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        save_epoch(self, *args, **kwargs)

    monkeypatch.setattr(training.Checkpoints, "save_epoch", dying)
    flags = classify_flags | {"epochs": 3}
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(flags)
    finetune(flags)
    scalars, _ = events(classify_flags["output_dir"])
    assert list(scalars["perf/test_acc1"]) == [1, 2, 3]
    assert list(scalars["loss"]) == [1000, 2000, 3000]
    log = (classify_flags["output_dir"] / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [0, 1, 2]


# ---- evaluation


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """One hundred and one images in seven classes, to evaluate."""
    root = tmp_path_factory.mktemp("album")
    for label in range(7):
        write_images(root / "val" / f"class {label}", 15 if label < 3 else 14, seed=label)
    return root


@pytest.fixture(scope="module")
def classifier(album, tmp_path_factory):
    """The checkpoint of a classifier of these classes, which chance has trained."""
    torch.manual_seed(0)
    model = models_vit.build_model("tiny_test_vit", img_size=8, num_classes=7)
    nn.init.normal_(model.head.weight, std=2.0)
    path = tmp_path_factory.mktemp("classifier") / "classifier.pth"
    torch.save({"model": model.state_dict(), "classes": [f"class {i}" for i in range(7)]}, path)
    return path


def eval_flags(album, classifier, output_dir):
    return {
        "eval": True,
        "resume": classifier,
        "data_path": album,
        "output_dir": output_dir,
        "model": "tiny_test_vit",
        "nb_classes": 7,
        "input_size": 8,
        "batch_size": 8,
        "num_workers": 0,
        "amp": "off",
        "device": "cpu",
    }


def test_evaluation_is_the_same_on_any_number_of_processes(album, classifier, tmp_path):
    """And that of every image classified on its own."""
    model = models_vit.build_model("tiny_test_vit", img_size=8, num_classes=7).eval()
    model.load_state_dict(torch.load(classifier, weights_only=True)["model"])
    paths = image_files.ImagePaths(album / "val")
    ranks, losses = [], []
    for path in paths:
        label = int(path.split("class ")[1][0])
        image = data.eval_transform(8)(decoding.read_image(path))
        logits = model(data.normalize(image[None]))[0].detach()
        ranks.append((logits > logits[label]).sum().item())
        losses.append(nn.functional.cross_entropy(logits, torch.tensor(label)).item())
    acc1, acc5 = (100 * sum(rank < k for rank in ranks) / 101 for k in (1, 5))
    expected = f"* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {np.mean(losses):.3f}"
    assert 0 < acc1 < acc5 < 100
    for processes in (1, 2, 3):
        flags = eval_flags(album, classifier, tmp_path / str(processes))
        code, out, err = run(SCRIPT, flags, processes=processes)
        assert code == 0, err
        assert out.splitlines()[1:] == [expected]
        assert json.loads((flags["output_dir"] / "eval.json").read_text()) == {
            "checkpoint": str(classifier),
            "images": 101,
            "test_acc1": round(acc1, 3),
            "test_acc5": round(acc5, 3),
            "test_loss": round(np.mean(losses), 3),
        }


def test_a_run_is_evaluated_as_it_was_in_training(classify_flags, finetune, capsys):
    """By --resume and by --finetune."""
    finetune(classify_flags)
    *_, line = (text for text in capsys.readouterr().out.splitlines() if text.startswith("* "))
    path = classify_flags.pop("finetune") and classify_flags["output_dir"] / "checkpoint-last.pth"
    for flag in ("resume", "finetune"):
        finetune(classify_flags | {"eval": True, flag: path})
        assert capsys.readouterr().out.splitlines()[1:] == [line]


def test_a_part_of_the_classes_is_evaluated_by_name(album, classifier, tmp_path, finetune, capsys):
    """Their share of the right answers over all classes; without names it is refused."""
    flags = eval_flags(album, classifier, tmp_path / "all")
    finetune(flags)
    part = tmp_path / "part"
    for label in (4, 6):
        shutil.copytree(album / f"val/class {label}", part / f"val/class {label}")
    model = models_vit.build_model("tiny_test_vit", img_size=8, num_classes=7).eval()
    contents = torch.load(classifier, weights_only=True)
    model.load_state_dict(contents["model"])
    hits = []
    for path in image_files.ImagePaths(part / "val"):
        image = data.eval_transform(8)(decoding.read_image(path))
        likeliest = model(data.normalize(image[None]))[0].argmax().item()
        hits.append(f"class {likeliest}/" in path)
    finetune(flags | {"data_path": part, "output_dir": tmp_path / "some"})
    figures = json.loads((tmp_path / "some/eval.json").read_text())
    assert figures["images"] == len(hits) == 28
    assert 0 < figures["test_acc1"] == round(100 * np.mean(hits), 3)
    assert "part/val has 2 of the 7 classes of" in capsys.readouterr().err
    torch.save({"model": contents["model"]}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"bare\.pth doesn't name its classes"):
        finetune(flags | {"data_path": part, "resume": tmp_path / "bare.pth"})


# ---- two processes


def test_two_processes_fine_tune_stop_and_evaluate(classify_flags):
    flags = classify_flags | {"batch_size": 2, "epochs": 3, "log_every": 1, "mixup": 0.5}
    process = ForkedScript(SCRIPT, flags, processes=2)
    for line in process.stdout:
        if "step 2/4" in line:
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "SIGTERM: stopped after step" in out, err
    code, out, err = run(SCRIPT, flags, processes=2)
    assert code == 0, err
    assert "resuming" in out
    *_, line = (text for text in out.splitlines() if text.startswith("* "))
    path = flags.pop("finetune") and flags["output_dir"] / "checkpoint-last.pth"
    code, out, err = run(SCRIPT, flags | {"eval": True, "resume": path}, processes=2)
    assert (code, out.splitlines()[1:]) == (0, [line]), err
