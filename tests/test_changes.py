"""--accept_changes: what a resumed training may change, how it goes on, and what errors advise."""

import copy
import json
import re
import shutil

import pytest
import torch
from helpers import assert_same_bits, events, final_state, run, write_images

import main_finetune
import main_linprobe
import main_pretrain
from util import distributed, logs, optim
from util.checkpoint import load_checkpoint, save_checkpoint
from util.flags import acceptable, fixed
from util.lr_sched import lr_jump, warmup_cosine_lr

SCRIPT = "tests/tiny_pretrain.py"
ACCEPT = {"accept_changes": True}


def records(output_dir):
    return [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]


def accepted_lines(out):
    return re.findall(r"^accepted: (.*)$", out, re.MULTILINE)


# ---- the three kinds

ACCEPTABLE = {
    "mask_ratio", "crop_scale", "no_flip", "decode", "batch_size", "epochs", "accum_iter", "lr",
    "blr", "min_lr", "warmup_epochs", "weight_decay", "clip_grad", "seed", "processes", "images",
    "image_names", "dtype",
}  # fmt: skip
AUGMENTATION = {
    "drop_path", "layer_decay", "color_jitter", "aa", "smoothing", "reprob", "remode", "recount",
    "mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode",
}  # fmt: skip
PIXELS = {
    "in_chans", "bands", "value_range", "mean", "std", "nodata", "layout", "exif_orientation",
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "may", "never"),
    [
        (
            main_pretrain,
            ACCEPTABLE,
            {"norm_pix_loss", "decoder_depth", "decoder_embed_dim", "decoder_num_heads"},
        ),
        (main_finetune, ACCEPTABLE | AUGMENTATION, {"nb_classes", "global_pool"}),
        (main_linprobe, ACCEPTABLE - {"mask_ratio"}, {"nb_classes", "global_pool"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_setting_is_of_one_kind(command, may, never):
    parser = command.get_args_parser()
    assert acceptable(parser) == may - (set() if command is main_pretrain else {"mask_ratio"})
    defining = fixed(parser, {action.dest: None for action in parser._actions})
    assert defining.keys() - acceptable(parser) - {"help"} == never | PIXELS | {
        "model",
        "input_size",
    }


# ---- going on


def test_more_epochs_end_as_if_they_had_been_asked_for_at_first(
    pretrain_flags, pretrain, user_error, capsys
):
    """Under a constant learning rate, which the number of epochs does not alter."""
    flags = pretrain_flags | {"min_lr": 1e-2, "warmup_epochs": 0}
    whole, longer = (flags | {"output_dir": flags["output_dir"] / name} for name in "ab")
    pretrain(whole | {"epochs": 4})
    pretrain(longer | {"epochs": 2})
    message = user_error(lambda: pretrain(longer | {"epochs": 4}))
    assert "epochs (2 -> 4); restore them, add --accept_changes to go on" in message
    capsys.readouterr()
    pretrain(longer | {"epochs": 4} | ACCEPT)
    out = capsys.readouterr().out
    assert accepted_lines(out) == ["epochs 2 -> 4"]
    assert "lr at this point" not in out
    assert_same_bits(final_state(longer["output_dir"]), final_state(whole["output_dir"]))
    change = {"epoch": 2, "step": 0, "name": "epochs", "before": 2, "after": 4}
    logged = [record.get("accepted_changes") for record in records(longer["output_dir"])]
    assert logged == [None, None, [change], None]
    assert load_checkpoint(longer["output_dir"] / "checkpoint-3.pth")["accepted_changes"] == [
        change
    ]
    curves = [events(f["output_dir"])[0]["train_loss"] for f in (whole, longer)]
    assert curves[0] == curves[1]

    # Nothing changed since, so that nothing is said; what was accepted is kept.
    pretrain(longer | {"epochs": 4} | ACCEPT)
    assert "accepted" not in capsys.readouterr().out
    pretrain(longer | {"epochs": 5} | ACCEPT)
    kept = load_checkpoint(longer["output_dir"] / "checkpoint-last.pth")["accepted_changes"]
    assert [(c["name"], c["epoch"], c["after"]) for c in kept] == [
        ("epochs", 2, 4),
        ("epochs", 4, 5),
    ]


def test_fewer_epochs_than_are_trained(pretrain_flags, pretrain, capsys):
    pretrain(pretrain_flags)
    last = pretrain_flags["output_dir"] / "checkpoint-last.pth"
    before = last.read_bytes()
    capsys.readouterr()
    pretrain(pretrain_flags | {"epochs": 1, "warmup_epochs": 0.5} | ACCEPT)
    out = capsys.readouterr().out
    assert "2 epochs are trained, --epochs is 1: nothing is left" in out
    assert last.read_bytes() == before
    assert len(records(pretrain_flags["output_dir"])) == 2


def test_the_new_rate_is_the_new_schedule_s(pretrain_flags, pretrain, capsys):
    """And it is said where it jumps; peak and effective batch count, however they are given."""
    pretrain(pretrain_flags | {"epochs": 2, "save_every": 1})
    out_dir = pretrain_flags["output_dir"]
    capsys.readouterr()
    changed = pretrain_flags | {"resume": out_dir / "checkpoint-0.pth", "blr": 0.256} | ACCEPT
    del changed["lr"]
    pretrain(changed)
    out = capsys.readouterr().out
    assert accepted_lines(out) == ["lr 0.01 -> not given", "blr 0.001 -> 0.256"]
    assert "lr at this point 1.00e-02 -> 2.00e-03" in out
    lr = warmup_cosine_lr(1 + 8 / 9, lr=0.002, min_lr=0, warmup_epochs=1, epochs=2)
    assert records(out_dir)[1]["train_lr"] == pytest.approx(lr)


def test_jumps_of_the_learning_rate():
    one = {"lr": 1.0, "min_lr": 0.1, "warmup_epochs": 1, "epochs": 2}
    assert lr_jump(one, one, 0.5) == ""
    assert lr_jump(one, one | {"lr": 0.5}, 0.5) == "lr at this point 5.00e-01 -> 2.50e-01"
    assert lr_jump(one, one | {"epochs": 3}, 2) == "lr at this point 1.00e-01 -> 5.50e-01"
    flat = one | {"warmup_epochs": 2}  # which never decays
    assert lr_jump(flat, flat | {"epochs": 4}, 2) == ""
    slow = one | {"warmup_epochs": 4}
    assert lr_jump(slow, slow | {"epochs": 8}, 2) == ""


# ---- what the optimizer keeps and what it gets anew


def test_the_optimizer_gets_the_new_settings(classify_flags, finetune, monkeypatch):
    """By hand: with two blocks, lr_scale is decay^3, ^2, ^1 and 1 from the patches to the head."""
    finetune(classify_flags | {"epochs": 1})
    seen = {}
    original = main_finetune.train_one_epoch

    def spy(*args, **options):
        optimizer = args[3]
        seen["groups"] = [dict(group) for group in optimizer.param_groups]
        seen["steps"] = {int(state["step"]) for state in optimizer.state.values()}
        return original(*args, **options)

    monkeypatch.setattr(main_finetune, "train_one_epoch", spy)
    finetune(classify_flags | {"weight_decay": 0.3, "layer_decay": 0.5} | ACCEPT)
    assert {group["weight_decay"] for group in seen["groups"]} == {0.0, 0.3}
    assert {group["lr_scale"] for group in seen["groups"]} == {0.125, 0.25, 0.5, 1.0}
    assert seen["steps"] == {9}


def step(model, groups, scale=1.0, optimizer=None):
    optimizer = optimizer or optim.adamw(groups, betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 0.3 * group.get("lr_scale", 1)
    for parameter in model.parameters():
        parameter.grad = scale * torch.arange(1.0, parameter.numel() + 1).view_as(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("decays", [(0.1, 0.4), (0.0, 0.4), (0.1, 0.0)])
def test_new_weight_decay_acts_as_if_moments_and_settings_were_given_by_hand(decays):
    """timm has one group in the model's order without weight decay, and two in another with it."""
    torch.manual_seed(0)
    old = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 3))
    first = step(old, optim.weight_decay_groups(old, decays[0]))
    ours, theirs = copy.deepcopy(old), copy.deepcopy(old)
    resumed = optim.adamw(optim.weight_decay_groups(ours, decays[1]), betas=(0.9, 0.95))
    saved = copy.deepcopy(first.state_dict())  # loading shares the tensors
    optim.load_state(resumed, ours, saved, optim.parameter_names(first, old))
    assert {group["weight_decay"] for group in resumed.param_groups} == {0.0, decays[1]}
    step(ours, None, 0.5, resumed)

    for (name, parameter), before in zip(theirs.named_parameters(), old.parameters(), strict=True):
        decay = decays[1] if name.endswith("weight") else 0.0
        by_hand = torch.optim.AdamW([parameter], lr=0.3, betas=(0.9, 0.95), weight_decay=decay)
        by_hand.state[parameter] = {k: v.clone() for k, v in first.state[before].items()}
        parameter.grad = 0.5 * torch.arange(1.0, parameter.numel() + 1).view_as(parameter)
        by_hand.step()
    for mine, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("names", ["known", "unknown"])
@pytest.mark.parametrize("other", [(3, 3), (2, 3)], ids=str)
def test_moments_of_other_parameters_are_refused(other, names, user_error):
    old, new = torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.nn.Linear(*other)
    first = step(old, optim.weight_decay_groups(old, 0.1))
    optimizer = optim.adamw(optim.weight_decay_groups(new, 0.1), betas=(0.9, 0.95))
    known = optim.parameter_names(first, old) if names == "known" else None
    message = user_error(lambda: optim.load_state(optimizer, new, first.state_dict(), known))
    assert "different parameters or groups of them" in message
    assert not optimizer.state


# ---- within an epoch


@pytest.fixture
def half_an_epoch(pretrain_flags, pretrain, monkeypatch):
    """Flags of a run whose last checkpoint is after step 4 of epoch 0's nine."""
    add = logs.Meter.add

    def fail_at_step_4(self, step, *figures):
        if step == 4:
            raise RuntimeError("killed")
        add(self, step, *figures)

    flags = pretrain_flags | {"save_minutes": 0, "log_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(logs.Meter, "add", fail_at_step_4)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain(flags)
    contents = load_checkpoint(flags["output_dir"] / "checkpoint-last.pth")
    assert (contents["epoch"], contents["step"], contents["totals"]["steps"]) == (0, 4, 4)
    return flags


@pytest.mark.parametrize(
    ("changed", "steps", "cause"),
    [
        ({"batch_size": 3}, 6, "batch_size"),
        ({"accum_iter": 3}, 9, "accum_iter"),
        ({"seed": 2}, 9, "seed"),
        ({"lr": 1e-3, "mask_ratio": 0.5, "clip_grad": 1}, 5, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_epoch_goes_on_or_begins_again(
    half_an_epoch, pretrain, spied_batches, capsys, changed, steps, cause
):
    pretrain(half_an_epoch | {"epochs": 1, "warmup_epochs": 1} | changed | ACCEPT)
    out = capsys.readouterr().out
    again = "epoch 0 begins again, with the weights after its step 4, as its steps have changed"
    assert (f"{again} ({cause})" in out) == bool(cause)
    assert len(spied_batches) == steps
    (record,) = records(half_an_epoch["output_dir"])
    assert {c["name"] for c in record["accepted_changes"]} == {*changed, "epochs"}
    step = 0 if cause else 4
    assert {c["step"] for c in record["accepted_changes"]} == {step}


def test_the_weights_are_kept_where_an_epoch_begins_again(half_an_epoch, pretrain):
    """At a learning rate of 0 and without decay they end as they were saved."""
    last = half_an_epoch["output_dir"] / "checkpoint-last.pth"
    weights = load_checkpoint(last)["model"]
    still = {"lr": 0, "weight_decay": 0, "batch_size": 6, "epochs": 1}
    pretrain(half_an_epoch | still | ACCEPT)
    contents = load_checkpoint(last)
    assert contents["step"] == 3
    assert all(torch.equal(weights[key], contents["model"][key]) for key in weights)


def test_an_epoch_that_lacks_its_evaluation_is_not_trained_again(
    pretrain_flags, pretrain, spied_batches, monkeypatch, capsys
):
    def fail(*_args, **_kwargs):
        raise RuntimeError("in the evaluation")

    with monkeypatch.context() as patch:
        patch.setattr(main_pretrain, "evaluate", fail)
        with pytest.raises(RuntimeError, match="evaluation"):
            pretrain(pretrain_flags | {"epochs": 1})
    spied_batches.clear()
    pretrain(pretrain_flags | {"epochs": 1, "batch_size": 3} | ACCEPT)
    assert not spied_batches
    assert "begins again" not in capsys.readouterr().out
    assert "val_loss" in records(pretrain_flags["output_dir"])[0]


# ---- images, processes, type


def test_more_images(pretrain_flags, pretrain, tmp_path, capsys):
    folder = tmp_path / "growing"
    write_images(folder, 4)
    flags = pretrain_flags | {"data_path": folder, "epochs": 1}
    pretrain(flags)
    write_images(folder, 6)
    capsys.readouterr()
    pretrain(flags | {"epochs": 2} | ACCEPT)
    names = [line.split()[0] for line in accepted_lines(capsys.readouterr().out)]
    assert names == ["epochs", "images", "image_names:"]
    changes = records(flags["output_dir"])[1]["accepted_changes"]
    assert {"epoch": 1, "step": 0, "name": "images", "before": 4, "after": 6} in changes


def test_more_and_fewer_processes(pretrain_flags, pretrain, capsys):
    pretrain(pretrain_flags | {"epochs": 1})
    code, out, err = run(SCRIPT, pretrain_flags | ACCEPT, processes=2)
    assert code == 0, err
    assert accepted_lines(out) == ["epochs 1 -> 2", "processes 1 -> 2"]
    capsys.readouterr()
    pretrain(pretrain_flags | {"epochs": 3} | ACCEPT)
    assert accepted_lines(capsys.readouterr().out) == ["epochs 2 -> 3", "processes 2 -> 1"]
    assert [r["epoch"] for r in records(pretrain_flags["output_dir"])] == [0, 1, 2]


def test_another_type(pretrain_flags, pretrain, capsys):
    pretrain(pretrain_flags | {"epochs": 1})
    capsys.readouterr()
    pretrain(pretrain_flags | {"amp": "bf16"} | ACCEPT)
    assert "dtype float32 -> bfloat16" in accepted_lines(capsys.readouterr().out)


def test_processes_that_were_given_different_flags(
    pretrain_flags, pretrain, user_error, monkeypatch
):
    gather = distributed.gather

    def with_another(value):
        if isinstance(value, dict) and "accept_changes" in value:
            return [value, value | {"accept_changes": not value["accept_changes"]}]
        return gather(value)

    monkeypatch.setattr(distributed, "gather", with_another)
    message = user_error(lambda: pretrain(pretrain_flags))
    assert "given different flags or see different files (accept_changes)" in message


# ---- what can't change


def test_what_cannot_change_is_refused_and_named_alone(pretrain_flags, pretrain, user_error):
    pretrain(pretrain_flags | {"epochs": 1})
    changed = {"norm_pix_loss": True, "input_size": 16, "lr": 1}
    message = user_error(lambda: pretrain(pretrain_flags | changed | ACCEPT))
    assert "input_size (8 -> 16), norm_pix_loss (False -> True); these can't change" in message
    assert "lr" not in message.split(":", 1)[1].replace("norm_pix", "")
    message = user_error(lambda: pretrain(pretrain_flags | changed))
    assert (
        "restore input_size, norm_pix_loss, which can't change, and restore the rest or" in message
    )
    message = user_error(
        lambda: pretrain(pretrain_flags | {"epochs": 1, "mean": [0] * 3, "std": [1] * 3})
    )
    assert "mean (0.485 0.456 0.406 -> 0 0 0)" in message
    assert "these can't change" in message
    assert "--accept_changes" not in message


def test_other_classes_are_refused(classify_flags, finetune, user_error, image_folder, tmp_path):
    """Under the same number of classes and of images, too: labels would mean something else."""
    finetune(classify_flags | {"epochs": 1})
    renamed = tmp_path / "renamed"
    shutil.copytree(image_folder, renamed)
    for split in ("train", "val"):
        (renamed / split / "b").rename(renamed / split / "c")
    flags = classify_flags | {"data_path": renamed} | ACCEPT
    message = user_error(lambda: finetune(flags))
    assert "different settings: classes (lost b; new c); these can't change" in message
    message = user_error(lambda: finetune(classify_flags | {"nb_classes": 3} | ACCEPT))
    assert "nb_classes (2 -> 3); these can't change" in message


def test_another_encoder_is_refused(classify_flags, encoder, linprobe, user_error, tmp_path):
    linprobe(classify_flags | {"epochs": 1})
    contents = load_checkpoint(encoder)
    contents["model"]["cls_token"] += 1
    save_checkpoint(tmp_path / "changed.pth", contents)
    flags = classify_flags | {"finetune": tmp_path / "changed.pth"} | ACCEPT
    assert "these can't change" in user_error(lambda: linprobe(flags))
    linprobe(classify_flags | {"epochs": 2, "blr": 1, "batch_size": 3} | ACCEPT)


# ---- every error that advises a change of settings: its advice works


def advised(message, **values):
    """The flags that a message names, of these: with the value given, or the one it names."""
    found = {}
    for name, value in values.items():
        assert f"--{name}" in message, message
        found[name] = value
        if value is ...:
            found[name] = re.search(rf"--{name} (\S+)", message)[1]
    return found


def test_a_diverged_run_goes_on_as_its_error_says(pretrain_flags, pretrain, user_error, capsys):
    """Case C3 of the field: the message's advice, to the letter."""
    diverging = {"lr": 30, "weight_decay": 1, "warmup_epochs": 0.5, "epochs": 4}
    flags = pretrain_flags | diverging | {"save_minutes": 0}
    message = user_error(lambda: pretrain(flags))
    assert "not finite" in message or "the loss is nan" in message
    assert "checkpoint-last.pth (after step " in message
    assert "is of no use, as the loss was" in message
    assert "and add --resume none, which begins anew: " in message
    change = advised(message, accept_changes=True, lr=1e-3, warmup_epochs=1, clip_grad=1)
    pretrain(flags | change | {"resume": "none"})
    assert records(flags["output_dir"])[-1]["val_loss"] < 2


def test_a_later_divergence_goes_back_to_what_is_still_of_use(
    pretrain_flags, pretrain, user_error, capsys
):
    """A good epoch, then a wrecked one, as a too high learning rate is accepted."""
    flags = pretrain_flags | {"save_every": 1, "save_minutes": 0, "weight_decay": 1}
    pretrain(flags | {"epochs": 1})
    message = user_error(lambda: pretrain(flags | {"epochs": 4, "lr": 30} | ACCEPT))
    change = advised(message, accept_changes=True, lr=1e-3, resume=...)
    assert change["resume"] == f"{flags['output_dir']}/checkpoint-0.pth"
    capsys.readouterr()
    pretrain(flags | change | {"epochs": 2})
    out = capsys.readouterr().out
    assert f"resuming {change['resume']}" in out
    assert {"epochs 1 -> 2", "lr 0.01 -> 0.001"} <= {*accepted_lines(out)}
    assert records(flags["output_dir"])[-1]["val_loss"] < 2


def test_the_error_names_where_it_goes_on_and_an_earlier_checkpoint(
    pretrain_flags, pretrain, user_error, capsys, monkeypatch
):
    pretrain(pretrain_flags | {"save_every": 1})
    out_dir, flags = pretrain_flags["output_dir"], pretrain_flags | {"epochs": 3} | ACCEPT
    with monkeypatch.context() as patch:
        patch.setattr(logs.Meter, "_check_finite", fail_in_epoch_2)
        message = user_error(lambda: pretrain(flags))
    loss = f"{records(out_dir)[1]['train_loss']:.4g}"
    newest = f"it continues from {out_dir}/checkpoint-last.pth (after step 9 of epoch 1, whose loss"
    assert f"{newest} was {loss})" in message
    earlier = advised(message, resume=..., accept_changes=True, clip_grad=1)
    assert earlier["resume"] == f"{out_dir}/checkpoint-0.pth"
    capsys.readouterr()
    pretrain(flags | earlier | {"lr": 1e-4})
    out = capsys.readouterr().out
    assert f"resuming {out_dir}/checkpoint-0.pth" in out
    assert {"lr 0.01 -> 0.0001", "clip_grad not given -> 1"} <= {*accepted_lines(out)}


def fail_in_epoch_2(meter, losses):
    if meter.epoch == 2:
        raise logs.NotFinite("the loss is nan")


def test_fewer_images_than_a_batch(pretrain_flags, pretrain, user_error):
    pretrain(pretrain_flags | {"epochs": 1})
    message = user_error(lambda: pretrain(pretrain_flags | {"batch_size": 20}))
    assert "fewer than one global batch" in message
    flags = advised(message, batch_size=3, accept_changes=True)
    pretrain(pretrain_flags | {"epochs": 1} | flags)


def test_unreadable_images_are_removed(pretrain_flags, pretrain, user_error, tmp_path):
    folder = tmp_path / "spoiling"
    write_images(folder, 30, size=(8, 8))
    flags = pretrain_flags | {"data_path": folder, "epochs": 1}
    pretrain(flags)
    for index in range(1, 31, 2):
        (folder / f"{index:03d}.png").write_bytes(b"no image")
    message = user_error(lambda: pretrain(flags | {"epochs": 2} | ACCEPT))
    assert "images are unreadable" in message
    for index in range(1, 31, 2):
        (folder / f"{index:03d}.png").unlink()
    pretrain(flags | {"epochs": 2} | advised(message, accept_changes=True))


@pytest.mark.parametrize("command", ["pretrain", "linprobe"])
def test_out_of_memory(pretrain_flags, classify_flags, request, user_error, monkeypatch, command):
    def out_of_memory(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    main = request.getfixturevalue(command)
    given = (pretrain_flags if command == "pretrain" else classify_flags) | {"batch_size": 4}
    main(given | {"epochs": 1})
    module = main_pretrain if command == "pretrain" else main_finetune
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_one_epoch", out_of_memory)
        message = user_error(lambda: main(given | ACCEPT))
    assert "out of memory" in message
    change = advised(message, batch_size=2, accept_changes=True)
    if command == "pretrain":
        change |= advised(message, accum_iter=2)
    main(given | change)


def test_the_machine_has_another_type(pretrain_flags, pretrain, user_error, capsys):
    pretrain(pretrain_flags | {"epochs": 1, "amp": "bf16"})
    message = user_error(lambda: pretrain(pretrain_flags | {"amp": "fp16"}))
    assert "use bf16 or off, with --accept_changes if" in message
    pretrain(pretrain_flags | {"amp": "off"} | ACCEPT)
    assert "dtype bfloat16 -> float32" in accepted_lines(capsys.readouterr().out)
