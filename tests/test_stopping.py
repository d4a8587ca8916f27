"""Signals: acknowledged at once, obeyed after an update or an epoch; a second one ends the run."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, assert_same_bits, events, final_state, start_fresh

from util.checkpoint import load_checkpoint
from util.stopping import SIGNALS, StopSignals

SCRIPT = "tests/tiny_pretrain.py"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_is_acknowledged_and_its_echoes_are_not_a_second(number, capfd):
    """torchrun and schedulers send the same request several times."""
    before = signal.getsignal(number)
    with StopSignals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert signals.received == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == number
    assert signal.getsignal(number) == before
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{signal.Signals(number).name}: saving, then stopping")
    assert "a second signal (after 2 s) ends the run" in line


def test_signals_that_interrupt_each_other_are_no_deadlock():
    """A handler that holds a lock would wait for itself for ever; it did in one of ten seconds."""
    code = """
from util import stopping
stopping.SAME_REQUEST_SECONDS = 100.0
with stopping.StopSignals() as signals:
    print("ready", flush=True)
    input()
print(signals.received)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    for _ in range(4_000):
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        time.sleep(0.0001)
    out, err = process.communicate("\n", timeout=60)
    assert (process.returncode, int(out)) in ((0, signal.SIGINT), (0, signal.SIGTERM)), err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process(number):
    code = """
import time
from util import stopping
stopping.SAME_REQUEST_SECONDS = 0.0
with stopping.StopSignals():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("SIGINT: saving, then stopping")
    process.send_signal(number)
    assert process.wait(10) == -number
    assert "ended by a second signal, without a save" in process.stderr.read()


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_signal_during_an_evaluation_stops_after_it(
    pretrain_flags, classify_flags, request, monkeypatch, command
):
    """The epoch is complete, logged and drawn; the run continues to the same end."""
    main, module = request.getfixturevalue(command), sys.modules[f"main_{command}"]
    evaluate, calls = module.evaluate, []
    figure = "val_loss" if command == "pretrain" else "test_loss"

    def signalled(*args, **kwargs):
        calls.append(os.kill(os.getpid(), signal.SIGTERM) if not calls else None)
        return evaluate(*args, **kwargs)

    out_dir = pretrain_flags["output_dir"]
    flags = (pretrain_flags if command == "pretrain" else classify_flags) | {"epochs": 3}
    monkeypatch.setattr(module, "evaluate", signalled)
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 128 + signal.SIGTERM
    contents = load_checkpoint(out_dir / "checkpoint-last.pth")
    assert (contents["epoch"], contents["step"], contents["totals"]) == (0, 9, None)
    assert len((out_dir / "log.txt").read_text().splitlines()) == 1
    main(flags)
    undisturbed = out_dir / "undisturbed"
    main(flags | {"output_dir": undisturbed})
    assert_same_bits(final_state(out_dir, figure), final_state(undisturbed, figure))
    curve = "val_loss" if command == "pretrain" else "perf/test_loss"
    assert events(out_dir)[0][curve] == events(undisturbed)[0][curve]


def test_a_run_saves_though_its_reader_has_gone(pretrain_flags):
    """Ctrl-C in a terminal ends `| tee`, too."""
    flags = pretrain_flags | {"batch_size": 1, "epochs": 1000, "log_every": 1}
    process = start_fresh(SCRIPT, flags)
    assert any("step 3/18" in line for line in process.stdout)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert load_checkpoint(pretrain_flags["output_dir"] / "checkpoint-last.pth")["step"] >= 3


def test_no_process_leaves_before_the_save_is_whole(pretrain_flags):
    """A signal to rank 1 only: torchrun would kill rank 0 in the middle of a long save."""
    flags = pretrain_flags | {"batch_size": 1, "epochs": 1000, "log_every": 1}
    process = start_fresh("tests/slowly_saving_pretrain.py", flags, processes=2)
    for line in process.stdout:
        if line.startswith("rank 1 is process "):
            rank_1 = int(line.split()[-1])
        if "step 3/9" in line:
            break
    os.kill(rank_1, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "SIGTERM: stopped after step" in out, err
    left, saved = (pretrain_flags["output_dir"] / name for name in ("left", "saved"))
    # It notes nothing if torchrun, once rank 0 has gone, ends it first.
    assert not left.exists() or float(left.read_text()) > float(saved.read_text())
    step = int(out.split("stopped after step ")[1].split()[0])
    assert load_checkpoint(pretrain_flags["output_dir"] / "checkpoint-last.pth")["step"] == step
