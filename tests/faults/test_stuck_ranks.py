"""A process that hangs or dies: the rest says which, and where it was last seen, and ends."""

import re
import signal
import socket
import time

import pytest
from helpers import ForkedScript, assert_ended_as_undisturbed, run

from util.checkpoint import load_checkpoint

SCRIPT = "tests/tiny_pretrain.py"
STEP = r"step \d+ of epoch \d+"
PLACE = rf"({STEP}|the evaluation after epoch \d+|batch \d+ of \S+)"
VICTIMS = [pytest.param(0, marks=pytest.mark.thorough), 1]


@pytest.fixture
def flags(pretrain_flags):
    """Flags of a run that goes on for ever, and waits for six seconds."""
    return pretrain_flags | {
        "batch_size": 1,
        "epochs": 10_000,
        "log_every": 1,
        "timeout_minutes": 0.1,
    }


def strike(script, flags, victim, number):
    """Send one of two processes a signal in its second epoch; what the other one leaves.

    Returns:
        the exit code and the lines on stderr that begin with "error:".
    """
    process = ForkedScript(script, flags, processes=2)
    assert any("epoch 1/10000  step 5/9" in line for line in process.stdout)
    process.send_signal(number, victim)
    code = process.wait_for(1 - victim)
    process.kill()
    _, err = process.communicate()
    return code, [line for line in err.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_process_that_hangs_is_named(flags, victim):
    code, (line,) = strike(SCRIPT, flags, victim, signal.SIGSTOP)
    assert code == 1
    assert re.match(rf"error: rank {victim} on \S+ answers no more, last seen at {PLACE}", line)
    assert re.search(r"nothing has moved for 0\.[1-9]\d? minutes, see --timeout_minutes", line)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_process_that_is_killed_is_named_at_once(flags, victim):
    began = time.monotonic()
    code, (line,) = strike(SCRIPT, flags | {"timeout_minutes": 30}, victim, signal.SIGKILL)
    assert code == 1
    assert re.match(rf"error: rank {victim} on \S+ answers no more, last seen at {PLACE}", line)
    assert "Connection" in line
    assert time.monotonic() - began < 100


def test_a_process_that_waits_for_its_images_for_ever_is_named(flags):
    """Its other threads go on, and it answers."""
    code, out, err = run("tests/faults/hanging_pretrain.py", flags, processes=2)
    assert code == 1, out
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    seen = (
        rf"error: rank 1 on \S+ does not go on, last seen at step 6 of epoch 0, the rest at {STEP}"
    )
    assert re.match(seen, line)


@pytest.mark.thorough
def test_a_run_that_was_stopped_as_a_whole_goes_on(flags):
    """As by Ctrl-Z, or by a scheduler that suspends it."""
    process = ForkedScript(SCRIPT, flags, processes=2)
    assert any("epoch 1/10000  step 5/9" in line for line in process.stdout)
    process.send_signal(signal.SIGSTOP)
    time.sleep(15)
    process.send_signal(signal.SIGCONT)
    for _ in range(5):
        assert any("step 5/9" in line for line in process.stdout)
    time.sleep(5)  # in which it would be ended
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.thorough
def test_a_save_under_way_is_finished_though_a_process_is_lost(flags):
    """Of three, so that two see it."""
    process = ForkedScript("tests/faults/slow_pretrain.py", flags | {"seed": 1}, processes=3)
    assert any(line == "at save_checkpoint\n" for line in process.stdout)
    process.send_signal(signal.SIGKILL, 2)
    assert process.wait_for(0) == process.wait_for(1) == 1
    _, err = process.communicate()
    assert len(re.findall("^error:", err, re.MULTILINE)) == err.count(" rank 2 on ") == 1
    assert load_checkpoint(flags["output_dir"] / "checkpoint-last.pth")["step"] == 6


def test_an_error_is_said_though_the_rest_hangs(flags):
    """Rank 0 never comes to where rank 1 fails."""
    flags = flags | {"timeout_minutes": 30, "seed": 3}
    process = ForkedScript("tests/failing_pretrain.py", flags, processes=2)
    assert process.wait_for(1) == 2
    process.kill()
    assert "error: [rank 1] rank 1 sees no images here" in process.communicate()[1]


def test_rank_0_is_named_though_it_held_the_store(flags):
    """As it does where torchrun's own is not shared."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    process = ForkedScript(SCRIPT, flags, 2, environment)
    assert any("epoch 1/10000  step 5/9" in line for line in process.stdout)
    end = time.monotonic() + 3  # in which rank 1 hears where rank 0 is
    assert any(time.monotonic() > end for _ in process.stdout)
    process.send_signal(signal.SIGKILL, 0)
    assert process.wait_for(1) == 1
    _, err = process.communicate()
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    seen = rf"error: rank 0 on \S+ answers no more, last seen at {PLACE}"
    assert re.match(seen, line), line


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_process_that_waits_for_a_slow_one_is_not_stuck(flags, seed):
    """Rank 0 takes twice as long as `timeout_minutes` for an evaluation or a save."""
    flags = flags | {"epochs": 1, "warmup_epochs": 0.5, "seed": seed}
    code, out, err = run("tests/faults/slow_pretrain.py", flags, processes=2)
    assert code == 0, err
    assert ["at evaluate", "at save_checkpoint"][seed] in out
    assert_ended_as_undisturbed(SCRIPT, flags, processes=2)
