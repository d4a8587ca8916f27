"""A training's state: restored under the same settings only, locked, and of which version."""

import errno
import multiprocessing
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import CPU, ForkedScript, assert_same_bits, final_state, run

import main_finetune
import main_linprobe
import main_pretrain
from util import checkpoint, flags, locking, optim, precision, training
from util.checkpoint import load_checkpoint, save_checkpoint
from util.distributed import Process
from util.errors import NotFinite, UserError
from util.stopping import StopSignals

ALONE = Process(0, 1, CPU)
SCRIPT = "tests/tiny_pretrain.py"


def small_training(output_dir):
    """A state after one step, and its checkpoints."""
    model = torch.nn.Linear(2, 2)
    optimizer = optim.adamw(model.parameters(), betas=(0.9, 0.95))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = training.TrainingState(model, optimizer, precision.grad_scaler(CPU, None), step=1)
    checkpoints = training.Checkpoints(
        output_dir,
        ALONE,
        signals=StopSignals(),
        settings={},
        defaults={},
        contents={},
        epochs=2,
        save_every=1,
        save_minutes=5,
    )
    return state, checkpoints


# ---- saves


def test_training_goes_on_while_a_file_is_written(tmp_path, monkeypatch):
    """Values are those of the save's time; the next save and the end wait for it."""
    state, checkpoints = small_training(tmp_path)
    state.model.weight.data.fill_(1)
    events, may_write, save = [], threading.Event(), checkpoint.save_checkpoint

    def slow_save(path, contents):
        may_write.wait(30)
        save(path, contents)
        events.append(contents["step"])

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow_save)
    checkpoints.save_last(state)
    state.model.weight.data.fill_(2)
    state.step = 2
    events.append("went on")
    threading.Timer(0.2, may_write.set).start()
    checkpoints.save_last(state)  # only one is pending
    events.append("saved again")
    assert events[:2] == ["went on", 1]
    assert (load_checkpoint(tmp_path / "checkpoint-last.pth")["model"]["weight"] == 1).all()
    checkpoints.finish()
    assert events.count(2) == 1
    assert (load_checkpoint(tmp_path / "checkpoint-last.pth")["model"]["weight"] == 2).all()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/io is Linux's")
def test_advice_reads_no_values_of_checkpoints(tmp_path):
    """Each process gives it, and checkpoints are large."""
    _, checkpoints = small_training(tmp_path)
    contents = {"model": {"w": torch.zeros(1 << 20)}, "step": 7, "loss": 0.5}
    for epoch in range(3):
        save_checkpoint(tmp_path / f"checkpoint-{epoch}.pth", contents | {"epoch": epoch})
    torch.save({"w": torch.zeros(1)}, tmp_path / "checkpoint-3.pth")  # another project's
    before = bytes_read()
    with pytest.raises(UserError) as caught, checkpoints:
        raise NotFinite("the loss is nan")
    assert bytes_read() - before < 1 << 20  # of 12
    newest = tmp_path / "checkpoint-2.pth"
    message = f"continues from {newest} (after step 7 of epoch 2, whose loss was 0.5)"
    assert message in str(caught.value)
    assert f"--resume {tmp_path / 'checkpoint-1.pth'} (after" in str(caught.value)


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_state_before_the_first_step_is_saved(tmp_path):
    """fp16's scaler may skip the first updates."""
    state, checkpoints = small_training(tmp_path)
    state.optimizer = optim.adamw(state.model.parameters(), betas=(0.9, 0.95))
    checkpoints.save_last(state)
    checkpoints.finish()
    assert load_checkpoint(tmp_path / "checkpoint-last.pth")["optimizer"]["state"] == {}


def test_a_save_is_finished_however_the_run_ends(tmp_path, monkeypatch, capsys):
    """And a failure is said at once, not at the next save."""
    state, checkpoints = small_training(tmp_path)
    save = checkpoint.save_checkpoint

    def slow_save(path, contents):
        time.sleep(0.3)
        save(path, contents)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow_save)
    with pytest.raises(RuntimeError, match="evaluation"), checkpoints:
        checkpoints.save_last(state)
        raise RuntimeError("in the evaluation")
    assert load_checkpoint(tmp_path / "checkpoint-last.pth")["step"] == 1
    (tmp_path / "checkpoint-last.pth").unlink()
    (tmp_path / "checkpoint-last.pth").mkdir()
    with pytest.raises(RuntimeError, match="evaluation"), checkpoints:
        checkpoints.save_last(state)
        raise RuntimeError("in the evaluation")
    assert "checkpoint-last.pth could not be written" in capsys.readouterr().err


def test_a_name_that_cannot_be_written_costs_no_other(tmp_path, capsys, user_error):
    state, checkpoints = small_training(tmp_path)
    (tmp_path / "checkpoint-best.pth").mkdir()
    checkpoints.save_epoch(state, score=1.0)
    assert "could not be written" in user_error(checkpoints.finish)
    assert "checkpoint-best.pth could not be written" in capsys.readouterr().err
    for name in ("checkpoint-0.pth", "checkpoint-last.pth"):
        assert load_checkpoint(tmp_path / name)["epoch"] == 0


def test_a_host_without_memory_for_a_copy_costs_a_save_and_not_the_run(
    tmp_path, monkeypatch, capsys, user_error
):
    state, checkpoints = small_training(tmp_path)

    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(training, "tree_map_only", fail)
    checkpoints.save_last(state)
    assert "no checkpoint is written, the host has no memory" in capsys.readouterr().err
    assert "could not be written" in user_error(checkpoints.finish)


def test_a_worker_killed_while_a_save_begins_is_no_lack_of_memory(tmp_path, monkeypatch, capsys):
    state, checkpoints = small_training(tmp_path)

    def fail(*_):  # torch raises this wherever the main thread is
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(training, "tree_map_only", fail)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        checkpoints.save_last(state)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("has_links", [True, False])
def test_an_epoch_is_written_once_under_all_of_its_names(tmp_path, monkeypatch, has_links):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr("os.link", no_links)
    state, checkpoints = small_training(tmp_path)
    for epoch in (0, 1):
        checkpoints.save_epoch(state, score=1.0 - epoch)
        state.begin_next_epoch()
    checkpoints.finish()
    epochs = {p.name: load_checkpoint(p)["epoch"] for p in tmp_path.iterdir()}
    assert epochs == {
        "checkpoint-best.pth": 0,
        "checkpoint-0.pth": 0,
        "checkpoint-1.pth": 1,
        "checkpoint-last.pth": 1,
    }
    files = {name: (tmp_path / name).stat().st_ino for name in epochs}
    assert (files["checkpoint-best.pth"] == files["checkpoint-0.pth"]) == has_links
    assert (files["checkpoint-last.pth"] == files["checkpoint-1.pth"]) == has_links
    assert files["checkpoint-0.pth"] != files["checkpoint-1.pth"]


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_state_that_is_not_finite_is_not_written(tmp_path, part, user_error):
    state, checkpoints = small_training(tmp_path)
    model, optimizer = state.model, state.optimizer
    checkpoints.save_last(state)
    checkpoints.finish()
    (tmp_path / "checkpoint-last.pth").rename(tmp_path / "good.pth")
    broken = model.weight.data if part == "model" else optimizer.state[model.weight]["exp_avg_sq"]
    broken[0, 0] = float("inf")
    state.step = 2
    message = user_error(lambda: checkpoints.save_last(state))
    assert f"the {part} holds values that are not finite after step 2 of epoch 0" in message
    assert [path.name for path in tmp_path.iterdir()] == ["good.pth"]


# ---- the same settings


def test_a_resume_in_another_type_is_refused(pretrain_flags, pretrain, user_error):
    pretrain(pretrain_flags | {"epochs": 1})
    message = user_error(lambda: pretrain(pretrain_flags | {"epochs": 1, "amp": "bf16"}))
    assert "dtype (float32 -> bfloat16)" in message
    assert "--amp" in message


def test_what_is_computed_defines_a_training_and_not_the_flag_for_it(
    pretrain_flags, pretrain, monkeypatch, user_error, capsys
):
    """--amp auto goes on as off on a CPU without bf16, and is refused on one with it."""
    flags = pretrain_flags | {"epochs": 1, "amp": "auto"}
    monkeypatch.setattr("util.precision.cpu_computes_bf16", lambda: False)
    pretrain(flags)
    pretrain(flags | {"amp": "off"})
    assert "resuming" in capsys.readouterr().out
    monkeypatch.setattr("util.precision.cpu_computes_bf16", lambda: True)
    assert "dtype (float32 -> bfloat16)" in user_error(lambda: pretrain(flags))


FREE = (
    "data_path num_workers pin_mem output_dir log_dir device resume compile amp save_every "
    "save_minutes log_every timeout_minutes max_pixels accept_changes"
).split()
FREE_FLAGS = {
    main_pretrain: {
        *(*FREE, "grad_checkpointing", "init"),
        *("knn_every", "knn_k", "knn_images", "knn_layer"),
    },
    main_finetune: {*FREE, "grad_checkpointing", "finetune", "eval", "dist_eval", "predictions"},
    main_linprobe: {*FREE, "finetune", "eval", "dist_eval", "predictions"},
}


@pytest.mark.parametrize("command", FREE_FLAGS, ids=lambda module: module.__name__)
def test_only_these_flags_may_change(command):
    parser = command.get_args_parser()
    every = {action.dest for action in parser._actions} - {"help"}
    fixed = flags.fixed(parser, dict.fromkeys(every))
    assert every - fixed.keys() == FREE_FLAGS[command]


@pytest.mark.parametrize(
    ("changed", "value"), [("num_workers", 1), ("log_every", 1), ("compile", True)]
)
def test_flags_that_may_change(pretrain_flags, pretrain, capsys, changed, value):
    pretrain(pretrain_flags | {"epochs": 1})
    pretrain(pretrain_flags | {"epochs": 1, changed: value})
    assert "resuming" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["finetune", "linprobe"])
def test_an_encoder_may_be_moved_but_not_replaced(
    classify_flags, encoder, tmp_path, request, capsys, user_error, command
):
    main, flags = request.getfixturevalue(command), classify_flags | {"epochs": 1}
    main(flags)
    moved, changed = tmp_path / "moved.pth", tmp_path / "changed.pth"
    moved.write_bytes(encoder.read_bytes())
    main(flags | {"finetune": moved})
    assert "resuming" in capsys.readouterr().out
    contents = load_checkpoint(encoder)
    contents["model"]["cls_token"] += 1
    save_checkpoint(changed, contents)
    assert "encoder (" in user_error(lambda: main(flags | {"finetune": changed}))


def as_version_1(path, **changed):
    """Rewrite a checkpoint as version 0.1 wrote it: without the type, with the flag for it."""
    contents = load_checkpoint(path)
    contents["format"] = 1
    del contents["training"]["dtype"], contents["versions"]["mae"]
    contents["training"] |= {"amp": contents["args"]["amp"]} | changed
    save_checkpoint(path, contents)


@pytest.mark.parametrize("amp", ["auto", "off"])
def test_trainings_of_version_0_1_resume(pretrain_flags, pretrain, user_error, monkeypatch, amp):
    """In float32, which --amp auto on a CPU meant, too; with --amp off on a CPU with bf16."""
    out_dir = pretrain_flags["output_dir"]
    flags = pretrain_flags | {"save_every": 1}
    pretrain(flags)
    expected = final_state(out_dir)
    path = out_dir / "checkpoint-0.pth"
    as_version_1(path, amp=amp)
    for name in ("checkpoint-1.pth", "checkpoint-last.pth"):
        (out_dir / name).unlink()
    monkeypatch.setattr("util.precision.cpu_computes_bf16", lambda: True)
    message = user_error(lambda: pretrain(flags | {"amp": "auto"}))
    assert "dtype (float32 -> bfloat16)" in message
    assert "--amp chooses the dtype: off is float32" in message
    pretrain(flags)
    assert_same_bits(final_state(out_dir), expected)


def test_fine_tunings_of_version_0_1_resume(classify_flags, finetune, capsys):
    flags = classify_flags | {"epochs": 1}
    finetune(flags)
    for path in classify_flags["output_dir"].glob("*.pth"):
        as_version_1(path, amp="off")
    finetune(flags)
    assert "resuming" in capsys.readouterr().out


def test_a_format_of_the_future_is_refused(pretrain_flags, pretrain, user_error):
    pretrain(pretrain_flags | {"epochs": 1})
    path = pretrain_flags["output_dir"] / "checkpoint-last.pth"
    contents = load_checkpoint(path)
    versions = contents["versions"] | {"mae": "9.0"}
    save_checkpoint(path, contents | {"format": 99, "versions": versions})
    for other in path.parent.glob("checkpoint-*[0-9].pth"):
        other.unlink()
    message = user_error(lambda: pretrain(pretrain_flags | {"epochs": 1}))
    assert "format 99, written by version 9.0 of this project" in message


# ---- the lock


def test_a_second_run_is_refused_while_the_first_lives(pretrain_flags):
    """The lock of a killed run doesn't hold, though its workers may live a little longer."""
    flags = pretrain_flags | {"epochs": 1000, "log_every": 1, "num_workers": 2}
    first = ForkedScript(SCRIPT, flags)
    assert any("step 2/9" in line for line in first.stdout)
    code, out, err = run(SCRIPT, flags)
    assert code == 2, err
    assert "step" not in out
    assert err.startswith(f"error: another run (process {first.pid} on ")
    assert len(err.splitlines()) == 1
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = ForkedScript(SCRIPT, flags)
    assert any("step 2/9" in line for line in second.stdout)
    second.kill()
    second.communicate()


def test_a_refused_run_leaves_the_lock_to_the_first(tmp_path, user_error):
    def hold(output_dir, locked, release):
        with locking.lock(output_dir, ALONE):
            locked.set()
            release.wait(30)

    context = multiprocessing.get_context("fork")
    locked, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, locked, release))
    holder.start()
    assert locked.wait(30)
    for _ in range(2):
        message = user_error(lambda: locking.lock(tmp_path, ALONE).__enter__())
        assert message.startswith(f"another run (process {holder.pid} on ")
    release.set()
    holder.join()
    with locking.lock(tmp_path, ALONE):
        pass


def test_both_of_two_processes_are_refused(pretrain_flags):
    flags = pretrain_flags | {"batch_size": 1, "epochs": 1000, "log_every": 1}
    first = ForkedScript(SCRIPT, flags)
    assert any("step 2/18" in line for line in first.stdout)
    code, _, err = run(SCRIPT, flags, processes=2)
    assert code == 2, err
    assert err.count("another run (process") == 1  # said once for both
    first.kill()
    first.communicate()


def test_where_locks_are_not_supported_a_warning_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with locking.lock(tmp_path, ALONE):
        pass
    assert "can't be locked (No locks available)" in capsys.readouterr().err
