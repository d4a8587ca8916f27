"""Signals to one or all processes at any moment: a save, an exit code, and the same end."""

import os
import signal
import time

import pytest
from helpers import ForkedScript, assert_ended_as_undisturbed, run, start_fresh
from slow_pretrain import SLOW
from torch.distributed.launcher.api import LaunchConfig

from util.checkpoint import LAST, Writer

SCRIPT = "tests/tiny_pretrain.py"
SLOW_SCRIPT = "tests/faults/slow_pretrain.py"
MOMENTS = [name for _, name in SLOW]
thorough = pytest.mark.thorough


@pytest.fixture
def flags(pretrain_flags):
    """Flags of a run that also saves within an epoch."""
    return pretrain_flags | {"batch_size": 1, "save_minutes": 0.02, "log_every": 3}


@pytest.mark.parametrize(
    ("number", "moment", "only"),
    [
        (signal.SIGTERM, "save_checkpoint", None),
        pytest.param(signal.SIGINT, "save_checkpoint", 1, marks=thorough),
        pytest.param(signal.SIGUSR1, "save_checkpoint", 0, marks=thorough),
        (signal.SIGUSR1, "evaluate", 1),
        pytest.param(signal.SIGTERM, "evaluate", 0, marks=thorough),
        pytest.param(signal.SIGINT, "evaluate", None, marks=thorough),
        pytest.param(signal.SIGINT, "clip_and_step", 0, marks=thorough),
        pytest.param(signal.SIGUSR1, "clip_and_step", None, marks=thorough),
        pytest.param(signal.SIGTERM, "clip_and_step", 1, marks=thorough),
    ],
)
def test_a_signal_saves_and_the_run_ends_as_if_undisturbed(flags, number, moment, only):
    flags = flags | {"seed": MOMENTS.index(moment)}
    process = ForkedScript(SLOW_SCRIPT, flags, processes=2)
    assert any(line == f"at {moment}\n" for line in process.stdout)
    process.send_signal(number, only)
    out, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert f"{number.name}: stopped after step" in out
    assert (f"{number.name}: saving, then stopping" in err) == (only != 1)
    code, out, err = run(SCRIPT, flags, processes=2)
    assert code == 0, err
    assert "resuming" in out
    assert_ended_as_undisturbed(SCRIPT, flags, processes=2)


def test_a_process_that_waits_hears_signals(flags):
    """For one that hangs: the first signal is answered, the second ends it."""
    process = ForkedScript(SCRIPT, flags | {"epochs": 10_000}, processes=2)
    assert any("epoch 1/10000  step 6/9" in line for line in process.stdout)
    process.send_signal(signal.SIGSTOP, 1)
    time.sleep(1)  # so that rank 0 waits for rank 1
    process.send_signal(signal.SIGTERM, 0)
    while "SIGTERM: saving, then stopping" not in process.read_stderr():
        time.sleep(0.1)
    time.sleep(2.1)
    process.send_signal(signal.SIGTERM, 0)
    assert process.wait_for(0) == -signal.SIGTERM
    process.kill()
    assert "SIGTERM: ended by a second signal, without a save" in process.communicate()[1]


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(LaunchConfig, "shutdown_timeout"), reason="torch is too old")
def test_a_save_may_take_as_long_as_torchrun_is_told(flags):
    environment = {"SAVE_SECONDS": "35", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}
    flags = flags | {"epochs": 10_000, "save_minutes": 1000, "log_every": 1}
    script = "tests/slowly_saving_pretrain.py"
    process = start_fresh(script, flags, processes=2, env=os.environ | environment)
    assert any("step 3/9" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert "SIGTERM: stopped after step" in out, err
    assert (flags["output_dir"] / "checkpoint-last.pth").exists()


def test_a_save_that_takes_too_long_for_torchrun_is_said_once(tmp_path, capsys):
    writer = Writer(tmp_path, seconds_to_save=0.0)
    for step in (1, 2):
        writer.start([LAST], {"step": step})
        writer.wait()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: a save took 0 s, and torchrun kills its processes 0 s after")
    assert "set TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in line


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_first_compile(flags, tmp_path, number):
    """To the whole process group, with the compiler's own processes, as a terminal sends Ctrl-C."""
    flags = flags | {"seed": MOMENTS.index("compile_fx"), "compile": True}
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start_fresh(SLOW_SCRIPT, flags, env=environment, start_new_session=True)
    assert any(line == "at compile_fx\n" for line in process.stdout)
    time.sleep(3)  # the compiler's processes are at work
    os.killpg(process.pid, number)
    _out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    code, _, err = run(SCRIPT, flags)
    assert code == 0, err
