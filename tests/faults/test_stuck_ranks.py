"""A process that hangs or dies: the rest says which, and where it was last seen, and ends."""

import re
import signal
import time

import pytest
from helpers import ForkedScript, assert_same_bits, final_state, run

SCRIPT = "tests/tiny_pretrain.py"
STEP = r"step \d+ of epoch \d+"
PLACE = rf"({STEP}|the evaluation after epoch \d+)"
VICTIMS = [pytest.param(0, marks=pytest.mark.thorough), 1]


@pytest.fixture
def flags(pretrain_flags):
    """Flags of a run that goes on for ever, and waits for three seconds."""
    return pretrain_flags | {
        "batch_size": 1,
        "epochs": 10_000,
        "log_every": 1,
        "timeout_minutes": 0.05,
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
    assert "nothing has moved for 0.05 minutes (--timeout_minutes)" in line


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


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_process_that_waits_for_a_slow_one_is_not_stuck(flags, seed):
    """Rank 0 takes twice as long as `timeout_minutes` for an evaluation or a save."""
    flags = flags | {"epochs": 1, "warmup_epochs": 0.5, "seed": seed}
    code, out, err = run("tests/faults/slow_pretrain.py", flags, processes=2)
    assert code == 0, err
    assert ["at evaluate", "at save_checkpoint"][seed] in out
    undisturbed = flags["output_dir"] / "undisturbed"
    assert run(SCRIPT, flags | {"output_dir": undisturbed}, processes=2)[0] == 0
    assert_same_bits(final_state(flags["output_dir"]), final_state(undisturbed))
