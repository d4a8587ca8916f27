"""A process that loads images is killed, as where memory runs out."""

import os
import signal
from pathlib import Path

from helpers import ForkedScript, assert_ended_as_undisturbed, pretrain_kill_flags, run

SCRIPT = "tests/tiny_pretrain.py"


def test_a_killed_worker_ends_the_run_in_one_line_and_it_resumes(image_folder, tmp_path):
    flags = pretrain_kill_flags(image_folder, tmp_path / "out", workers=2)
    process = ForkedScript(SCRIPT, flags)
    assert any("epoch 0/3  step 6/9" in line for line in process.stdout)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert line.startswith("error: a worker, a process that loads images, was killed")

    code, out, err = run(SCRIPT, flags)
    assert code == 0, err
    assert "resuming" in out
    assert_ended_as_undisturbed(SCRIPT, flags)
