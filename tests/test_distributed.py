"""Two gloo processes on the CPU against one, and what happens when one of them fails."""

import json
import os
import re
import signal
import sys
import time

import pytest
import torch
from helpers import (
    ForkedScript,
    assert_ended_as_undisturbed,
    final_state,
    run,
    start_fresh,
    write_images,
)

from util.distributed import Process
from util.loading import ShuffledBatches

SCRIPT = "tests/tiny_pretrain.py"


def spied(out_dir, rank):
    """What tests/spying_pretrain.py saw on a rank: images, masks' noise and the gradients."""
    return torch.load(out_dir / f"spied-{rank}.pt", weights_only=True)


def test_gradients_are_the_mean_over_both_processes(pretrain_flags):
    """Of one process with the same images and masks, also when gradients are accumulated."""
    flags = pretrain_flags | {"batch_size": 3, "accum_iter": 2, "epochs": 1, "warmup_epochs": 0.5}
    code, out, err = run("tests/spying_pretrain.py", flags, processes=2)
    assert code == 0, err
    assert out.count("done:") == 1
    first, second = (spied(flags["output_dir"], rank) for rank in (0, 1))
    for name, gradient in first["gradients"].items():
        assert torch.equal(gradient, second["gradients"][name])

    from models_mae import build_model

    model = build_model("tiny_test_model", img_size=8)
    model.load_state_dict(first["weights"])
    for step in (0, 1):
        for seen in (first, second):
            loss, _, _ = model(seen["imgs"][step], 0.75, seen["noise"][step])
            (loss / 4).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = first["gradients"][name]
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)

    assert len(first["saves"]) == 2  # last, before evaluation; checkpoint-0, which is last too
    assert second["saves"] == []
    record = json.loads((flags["output_dir"] / "log.txt").read_text())
    losses = first["losses"] + second["losses"]
    assert record["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)

    images = torch.cat([torch.cat(seen["imgs"]) for seen in (first, second)]).flatten(1)
    noise = torch.cat([torch.cat(seen["noise"]) for seen in (first, second)])
    assert len(images.unique(dim=0)) == len(noise.unique(dim=0)) == 18


def test_unreadable_images_of_every_process_are_counted(tmp_path, pretrain_flags):
    """The broken one falls to rank 1; resuming with another number of processes is refused."""
    folder = tmp_path / "one_broken"
    write_images(folder, 110, size=(8, 8))
    process = Process(1, 2, torch.device("cpu"))
    (_, index), *_ = next(iter(ShuffledBatches(110, 55, process, seed=0)))
    (folder / f"{index:03d}.png").write_bytes(b"no image")
    flags = pretrain_flags | {"data_path": folder, "batch_size": 55}
    code, _, err = run(SCRIPT, flags, processes=2)
    assert code == 0, err
    assert err.count("is unreadable") == 1
    records = [json.loads(s) for s in (flags["output_dir"] / "log.txt").read_text().splitlines()]
    assert [record["unreadable_images"] for record in records] == [1, 1]

    code, _, err = run(SCRIPT, flags)
    assert code == 2
    assert "processes (2 -> 1)" in err


def test_two_processes_train_as_one_and_only_rank_0_writes(pretrain_flags):
    """The same images a step; with masks of their own the held-out losses agree roughly."""
    losses = {}
    for processes, batch in ((1, 6), (2, 3)):
        out_dir = pretrain_flags["output_dir"] / str(processes)
        flags = pretrain_flags | {"batch_size": batch, "output_dir": out_dir}
        code, out, err = run(SCRIPT, flags, processes=processes)
        assert code == 0, err
        assert out.count("step 3/3") == 2
        losses[processes] = final_state(out_dir)[2]
        written = [path for path in out_dir.iterdir() if "tfevents" in path.name]
        assert len(written) == 1
    for one, two in zip(losses[1], losses[2], strict=True):
        assert abs(one[2] / two[2] - 1) < 0.1


def test_sigterm_to_torchrun_saves_and_resumes(pretrain_flags):
    flags = pretrain_flags | {"batch_size": 1, "epochs": 40, "log_every": 1}
    process = start_fresh(SCRIPT, flags, processes=2)
    for line in process.stdout:
        if "step 3/9" in line:
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGTERM: stopped after step" in out, err
    assert 'main_pretrain.py", line' not in err  # torchrun shows a traceback of its own
    process = ForkedScript(SCRIPT, flags, processes=2)
    assert any("resuming" in line for line in process.stdout)
    process.kill()
    process.communicate(timeout=60)


def test_three_processes_resume_to_the_same_bits(pretrain_flags):
    """Two add up in any order to the same sum; three don't."""
    flags = pretrain_flags | {"batch_size": 1, "epochs": 4, "log_every": 1}
    process = ForkedScript(SCRIPT, flags, processes=3)
    assert any("epoch 1/4  step 3/6" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    code, out, err = run(SCRIPT, flags, processes=3)
    assert code == 0, err
    assert "resuming" in out
    assert_ended_as_undisturbed(SCRIPT, flags, processes=3)


@pytest.mark.thorough
def test_a_dead_process_is_named_under_torchrun(pretrain_flags):
    """Though torchrun sends SIGTERM to the other one meanwhile."""
    flags = pretrain_flags | {"batch_size": 1, "epochs": 10_000, "log_every": 1}
    process = start_fresh("tests/slowly_saving_pretrain.py", flags, processes=2)
    for line in process.stdout:
        if line.startswith("rank 1 is process "):
            rank_1 = int(line.split()[-1])
        if "epoch 1/10000  step 3/9" in line:
            break
    os.kill(rank_1, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert "stopped after step" not in out
    assert len(re.findall("^error: rank 1 on .* answers no more", err, re.MULTILINE)) == 1
    assert "saving, then stopping" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of it")
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGUSR1, marks=pytest.mark.thorough)]
)
def test_processes_save_and_stop_when_torchrun_dies(pretrain_flags, number):
    flags = pretrain_flags | {"batch_size": 1, "epochs": 10_000, "log_every": 1}
    process = start_fresh(SCRIPT, flags, processes=2)
    assert any("epoch 1/10000  step 3/9" in line for line in process.stdout)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)  # they hold its pipes
    assert process.returncode == -number
    assert "SIGTERM: stopped after step" in out, err


def test_both_processes_stop_in_epochs_of_one_step(pretrain_flags):
    flags = pretrain_flags | {"batch_size": 9, "epochs": 1000}
    process = ForkedScript(SCRIPT, flags, processes=2)
    for line in process.stdout:
        if "epoch 3/1000  done" in line:
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "SIGTERM: stopped after step 1 of epoch" in out, err


def test_a_failing_rank_brings_the_job_down(pretrain_flags):
    flags = pretrain_flags | {"epochs": 1000, "batch_size": 1}
    began = time.monotonic()
    script = "tests/failing_pretrain.py"
    code, _, err = run(script, flags, processes=2, timeout=100, start=start_fresh)
    assert code != 0
    assert "rank 1 fails here" in err
    assert time.monotonic() - began < 60


def test_a_loss_that_is_not_finite_is_named_by_its_rank(pretrain_flags):
    flags = pretrain_flags | {"epochs": 1000, "batch_size": 1, "log_every": 3}
    code, _, err = run("tests/failing_pretrain.py", flags | {"seed": 1}, processes=2, timeout=100)
    assert code != 0
    assert "error: the loss is nan at epoch 0, step 4, rank 1" in err
    assert not list(flags["output_dir"].glob("*.pth"))
