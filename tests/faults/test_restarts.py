"""Ranks killed under `torchrun --max-restarts`, jobs requeued: runs go on and end in equal bits."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers import (
    ForkedScript,
    assert_same_bits,
    final_state,
    pretrain_kill_flags,
    run,
    start_fresh,
)

import main_pretrain
from util.errors import say_error

SCRIPT = "tests/tiny_pretrain.py"
RESTARTS = ("--max-restarts=3",)


@pytest.fixture
def flags(image_folder, tmp_path):
    """Flags of a run that saves after each of its updates, three in each of three epochs."""
    return pretrain_kill_flags(image_folder, tmp_path / "out") | {"batch_size": 1, "accum_iter": 3}


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory):
    """The folder of the same run by two processes, without any fault."""
    out_dir = tmp_path_factory.mktemp("undisturbed")
    flags = pretrain_kill_flags(image_folder, out_dir) | {"batch_size": 1, "accum_iter": 3}
    code, _, err = run(SCRIPT, flags, processes=2)
    assert code == 0, err
    return out_dir


def kill_rank(torchrun, rank):
    """Kill a rank that torchrun has started."""
    for task in Path(f"/proc/{torchrun.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
                    os.kill(int(pid), signal.SIGKILL)
                    return
    raise AssertionError(f"there is no rank {rank}")


def next_line(process, beginning):
    """Read a run's lines up to one that begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return line
    raise AssertionError(f"no line begins with {beginning!r}: {process.stderr.read()}")


def test_a_killed_rank_restarts_the_run(flags, undisturbed):
    """With `--resume none` beside a finished run's files: it begins anew only once."""
    shutil.copytree(undisturbed, flags["output_dir"])
    process = start_fresh(SCRIPT, flags | {"resume": "none"}, processes=2, torchrun=RESTARTS)
    next_line(process, "epoch 1/3  step 1/9")
    kill_rank(process, 1)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "with --resume none was restarted: continuing from its own checkpoint" in out
    assert "after step 9 of epoch 0" in out or "of epoch 1" in out
    assert err.count("is kept as") == 3
    assert_same_bits(final_state(flags["output_dir"]), final_state(undisturbed))


# Places of tests/faults/dying_pretrain.py, where ranks are killed in this order.
DEATHS = [
    ("0:imported", "1:store", "0:met"),
    ("1:imported", "0:store", "1:met"),
    ("0:connected", "1:step", "0:save"),
    ("1:connected", "0:step", "1:evaluation"),
    ("0:evaluation", "0:finished"),
    ("1:finished", "1:left"),
]


@pytest.mark.thorough
@pytest.mark.parametrize("deaths", DEATHS)
def test_ranks_killed_anywhere_restart_the_run(flags, undisturbed, deaths):
    command = "tests/faults/dying_pretrain.py"
    environment = os.environ | {"DEATHS": " ".join(deaths)}
    process = start_fresh(command, flags, processes=2, torchrun=RESTARTS, env=environment)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    died = {
        path.name.replace("-", ":") for path in (flags["output_dir"].parent / "deaths").iterdir()
    }
    assert died == set(deaths)
    assert_same_bits(final_state(flags["output_dir"]), final_state(undisturbed))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_does_not_come_is_named(flags, missing):
    process = ForkedScript(SCRIPT, flags | {"timeout_minutes": 0.02}, processes=2)
    process._ranks[missing].kill()
    assert process.wait_for(1 - missing, timeout=60) == 1
    _, err = process.communicate()
    assert f"rank {missing} didn't start within 0.02 minutes" in err


def test_an_error_of_all_ranks_is_said_once(flags):
    code, _, err = run(SCRIPT, flags | {"device": "tpu"}, processes=2)
    assert code == 2
    assert err.count("--device tpu is not one of") == 1


def test_an_error_of_one_rank_ends_all(flags):
    process = ForkedScript("tests/failing_pretrain.py", flags | {"seed": 2}, processes=2)
    codes = [process.wait_for(rank, timeout=60) for rank in (1, 0)]
    process.kill()
    _, err = process.communicate()
    assert codes == [2, 1], err
    assert err.count("error: [rank 1] rank 1 sees no images here: mount them\n") == 1


def test_an_error_of_one_rank_is_said(monkeypatch, capfd, tmp_path):
    """Also if another rank has another error, and if who has it dies before it is said."""
    (tmp_path / "attempt_0").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "1" / "error.json"))
    for rank, text in (("0", "no data"), ("1", "no data"), ("1", "no room")):
        monkeypatch.setenv("RANK", rank)
        say_error(text)
    assert capfd.readouterr().err == "error: no data\nerror: [rank 1] no room\n"
    for note in (tmp_path / "attempt_0").glob("said-*"):
        note.write_text("")
    monkeypatch.setattr("util.errors.SAID_WITHIN_SECONDS", 0)
    say_error("no data")
    assert capfd.readouterr().err == "error: [rank 1] no data\n"


# ---- launches with --resume none or PATH that are started again


TORCHRUN = {"TORCHELASTIC_ERROR_FILE": "/tmp/logs/none_a/attempt_0/0/error.json"}
TORCHRUN_AGAIN = {"TORCHELASTIC_ERROR_FILE": "/tmp/logs/none_a/attempt_1/0/error.json"}
ANOTHER_TORCHRUN = {"TORCHELASTIC_ERROR_FILE": "/tmp/logs/none_b/attempt_0/0/error.json"}
JOB = {"SLURM_JOB_ID": "7"}
REQUEUED = JOB | {"SLURM_RESTART_COUNT": "1"}
ANOTHER_JOB = {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}
RESTARTED = pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(TORCHRUN, TORCHRUN_AGAIN, id="torchrun"),
        pytest.param(JOB | TORCHRUN, REQUEUED | ANOTHER_TORCHRUN, id="slurm"),
    ],
)


@pytest.fixture
def attempt(pretrain, flags, monkeypatch, capsys):
    """Makes an attempt at a run of four epochs; returns its output.

    SIGTERM stops it in evaluation number `stop_after`, so that this epoch is saved as a whole.
    """
    evaluate = main_pretrain.evaluate

    def make(environment, stop_after=None, **changes):
        calls = []

        def stopped(*args, **kwargs):
            calls.append(len(calls))
            if len(calls) == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args, **kwargs)

        with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
            patch.setattr(main_pretrain, "evaluate", stopped)
            for name, value in environment.items():
                patch.setenv(name, value)
            pretrain(flags | {"epochs": 4} | changes)
        return "".join(capsys.readouterr())

    return make


@pytest.fixture
def older(attempt, flags):
    """A checkpoint of another training in output_dir, which has got to epoch 1, and a copy."""
    attempt({}, stop_after=2)
    return shutil.copy(flags["output_dir"] / "checkpoint-last.pth", flags["output_dir"].parent)


@RESTARTED
@pytest.mark.parametrize("resume", ["none", "PATH"])
def test_a_restarted_launch_continues_from_what_it_saved(
    attempt, older, flags, first, second, resume
):
    resume = older if resume == "PATH" else resume
    last = flags["output_dir"] / "checkpoint-last.pth"
    changes = {"resume": resume, "lr": 2e-2, "accept_changes": True}
    out = attempt(first, stop_after=1, **changes)
    epoch = 0 if resume == "none" else 2
    assert f"stopped after step 18 of epoch {epoch}" in out
    assert out.count("accepted: lr") == (resume == older)
    out = attempt(second, **changes)
    assert f"with --resume {resume} was restarted: continuing from its own checkpoint" in out
    assert f"resuming {last} after step 18 of epoch {epoch}" in out
    assert "accepted" not in out
    assert len(list(flags["output_dir"].glob("log.txt.old*"))) == 1
    state = final_state(flags["output_dir"])
    attempt({}, **changes | {"output_dir": flags["output_dir"] / "undisturbed"})
    undisturbed = final_state(flags["output_dir"] / "undisturbed")
    assert_same_bits((*state[:2], state[2][-2:]), (*undisturbed[:2], undisturbed[2][-2:]))


@RESTARTED
@pytest.mark.parametrize("resume", ["none", "PATH"])
def test_a_launch_that_saved_nothing_starts_as_it_was_told(
    attempt, older, flags, monkeypatch, first, second, resume
):
    """It doesn't take the older training's checkpoints, not even those that stay in place."""
    resume = older if resume == "PATH" else resume
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(main_pretrain, "train_one_epoch", lambda *_, **__: 1 / 0)
        attempt(first, resume=resume)
    out = attempt(second, resume=resume)
    assert f"with --resume {resume} was restarted: it has saved nothing yet" in out
    assert f"resuming {older} after step 18 of epoch 1" in out or resume == "none"
    assert "resuming" not in out or resume == older
    assert len(list(flags["output_dir"].glob("log.txt.old*"))) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TORCHRUN, ANOTHER_TORCHRUN),
        (JOB, JOB),
        (JOB, ANOTHER_JOB),
        (JOB | TORCHRUN, JOB | ANOTHER_TORCHRUN),
        ({}, {}),
    ],
)
def test_a_launch_of_its_own_begins_anew(attempt, flags, first, second):
    for environment in (first, second):
        out = attempt(environment, stop_after=1, resume="none")
        assert "stopped after step 18 of epoch 0" in out
        assert "restarted" not in out


def test_a_damaged_note_is_said(attempt, flags):
    attempt(TORCHRUN, stop_after=1, resume="none")
    note = flags["output_dir"] / ".launch.json"
    note.write_text("{")
    out = attempt(TORCHRUN_AGAIN, stop_after=1, resume="none")
    assert f"warning: {note} can't be read" in out
    assert "restarted" not in out
