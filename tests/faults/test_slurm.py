"""slurm/train.sbatch under a real Slurm of four nodes on this machine, and what ends its jobs.

A run of two processes must end in the bits of an undisturbed one, whatever happened in between.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, assert_same_bits, command_line, final_state, run, start_fresh

FAULTS = Path(__file__).parent
SCRIPT = "tests/faults/slow_steps_pretrain.py"
TRAINING = r"epoch 0/3 +step 2/9"
SAVED = r"epoch 1/3 +step 1/9"  # a line that shows that there is a checkpoint
NODES = [f"127.0.0.{number}" for number in (2, 3, 4, 5)]


def shell(*command, **options):
    """Run a command; returns what it prints."""
    options = dict(check=True, text=True, stdout=subprocess.PIPE) | options
    return subprocess.run([str(word) for word in command], **options).stdout.strip()


def wait_until(condition, what, seconds=180):
    """The condition's first true value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return value


# ---- without Slurm: what the script makes of its arguments and of Slurm's variables


JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURMD_NODENAME": "n1",
    "SLURM_JOB_CPUS_PER_NODE": "96,64(x2)",
}


@pytest.fixture
def batch(tmp_path):
    """Runs the script as slurmstepd would, with an srun that only prints what it is asked."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\necho "srun: $*; $OMP_NUM_THREADS threads"\n')
    srun.chmod(0o755)
    clean = {name: v for name, v in os.environ.items() if not name.startswith(("SLURM_", "OMP_"))}
    path = f"{srun.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def started(*arguments, **variables):
        command = ["bash", ROOT / "slurm" / "train.sbatch", *arguments]
        environment = clean | {"PATH": path} | variables
        return subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True)

    return started


def test_wrong_uses_of_the_script_are_one_line(batch):
    for arguments, variables, message in (
        (["main_pretrain.py"], {}, "this is no Slurm job: sbatch slurm/train.sbatch COMMAND"),
        ([], JOB, "no command: sbatch slurm/train.sbatch main_pretrain.py"),
        (["main_x.py"], JOB, f"there is no main_x.py in {ROOT}: run sbatch in the repository"),
        (["main_pretrain.py"], JOB | {"SLURM_NTASKS": "8"}, "by --ntasks-per-node, not --ntasks"),
    ):
        script = batch(*arguments, **variables)
        assert script.returncode == 2
        assert script.stdout == ""
        (line,) = script.stderr.splitlines()
        assert line.startswith("error: train.sbatch: ") and message in line


def test_processes_are_those_that_slurm_was_asked_for(batch):
    """A process for each GPU, else for each task; threads share the cores of a node."""
    for command, variables, processes, threads in (
        ("main_pretrain.py", {"SLURM_GPUS_ON_NODE": "8"}, 8, 8),
        ("main_embed.py", {"SLURM_NTASKS_PER_NODE": "4", "SLURM_NTASKS": "8"}, 4, 16),
        ("main_finetune.py", {}, 1, 64),
        ("main_linprobe.py", {"OMP_NUM_THREADS": "3"}, 1, 3),
    ):
        script = batch(command, "--data_path", "two words", **JOB, **variables)
        assert script.returncode == 0, script.stderr
        assert "srun: --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=64" in script.stdout
        assert f"--nnodes 2 --nproc_per_node {processes} --master_addr n1" in script.stdout
        assert f"{command} --data_path two words; {threads} threads" in script.stdout
        assert script.stdout.endswith("train.sbatch: done\n")


def test_commands_of_one_process_are_started_once(batch):
    script = batch("main_export.py", **JOB, SLURM_GPUS_ON_NODE="8")
    assert "main_export.py runs as one process on one node" in script.stdout
    assert "srun: --nodes=1 " in script.stdout
    assert "--nnodes 1 --nproc_per_node 1 " in script.stdout


# ---- a Slurm, and its jobs


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A Slurm; SLURM_CONF says where."""
    for program in ("slurmctld", "slurmd", "munged", "sbatch"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed: make test-slurm installs it, as root")
    if os.geteuid():
        pytest.skip("Slurm's daemons are to be started by root")
    folder = tmp_path_factory.mktemp("slurm")
    down = ["bash", FAULTS / "slurm_down.sh", folder]
    up = ["bash", FAULTS / "slurm_up.sh", folder, str(free_ports(6))]
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "SBATCH_")):
                patch.delenv(name)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        # It ends the daemons after pytest, if that can't.
        wait = f'tail --pid={os.getpid()} -f /dev/null; exec "$@"'
        options = dict(start_new_session=True, stdout=subprocess.DEVNULL)
        guard = subprocess.Popen(["bash", "-c", wait, "guard", *map(str, down)], **options)
        try:
            started = subprocess.run(up, text=True, capture_output=True)
            if started.returncode:
                pytest.skip(f"Slurm does not start: {started.stderr.strip()}")
            yield folder
        finally:
            os.killpg(guard.pid, signal.SIGKILL)
            guard.wait()
            subprocess.run(down, stdout=subprocess.DEVNULL)


def free_ports(count):
    """The first of so many free ports in a row; xdist's workers get different ones."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for first in range(17000 + 20 * worker, 20000, 400):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    pytest.skip("no ports are free for Slurm's daemons")


class Job:
    """A job of train.sbatch: SCRIPT with flags, as two processes on two nodes."""

    def __init__(self, flags, *options, script=SCRIPT, nodes=2, **variables):
        self.log = Path(flags["output_dir"]).with_suffix(".log")
        variables |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        options = [f"--output={self.log}", f"--nodes={nodes}", *options]
        options += [f"--ntasks-per-node={2 // nodes}"]
        command = ["sbatch", "--parsable", *options, "slurm/train.sbatch", script]
        environment = os.environ | {"STEP_SECONDS": "0.5"} | variables
        self.id = shell(*command, *command_line(flags), cwd=ROOT, env=environment)

    def field(self, name):
        """A field that Slurm shows of the job, such as JobState."""
        text = shell("scontrol", "show", "job", self.id)
        return re.search(rf"\b{name}=(\S*)", text)[1]

    def text(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, pattern, count=1):
        """Wait until the log has so many matches."""

        def found():
            state = self.field("JobState")
            assert state in ("RUNNING", "PENDING", "COMPLETING"), f"{state}\n{self.text()}"
            return len(re.findall(pattern, self.text())) >= count

        wait_until(found, f"{pattern!r} in {self.log}")

    def start_again(self):
        """Wait until the job is requeued, and let it start soon instead of in two minutes.

        In the second of its end, a node would refuse it.
        """
        wait_until(lambda: self.field("JobState") == "PENDING", f"{self.text()}: requeued")
        shell("scontrol", "update", f"JobId={self.id}", "StartTime=now+2")

    def end(self):
        """Wait for the job's end; returns its state."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return wait_until(lambda: (s := self.field("JobState")) in ends and s, self.log)

    def kill_on(self, node):
        """SIGKILL torchrun and the processes that it has started on a node."""
        for line in shell("scontrol", "listpids", self.id, node).splitlines()[1:]:
            number = int(line.split()[0])
            with contextlib.suppress(OSError, ValueError):
                command = Path(f"/proc/{number}/cmdline").read_text(errors="replace")
                if number > 1 and "python" in command.split("\0")[0]:
                    os.kill(number, signal.SIGKILL)


def flags_of(image_folder, output_dir):
    """Flags of a run of 27 steps, in which two processes train."""
    return {
        "data_path": image_folder,
        "output_dir": output_dir,
        "model": "tiny_test_model",
        "input_size": 8,
        "batch_size": 1,
        "epochs": 3,
        "warmup_epochs": 1,
        "lr": 1e-2,
        "num_workers": 0,
        "log_every": 1,
        "amp": "off",
        "device": "cpu",
    }


@pytest.fixture
def flags(image_folder, tmp_path):
    return flags_of(image_folder, tmp_path / "out")


@pytest.fixture(scope="session")
def undisturbed(image_folder, tmp_path_factory):
    """The final state of the same run by torchrun, without Slurm."""
    output_dir = tmp_path_factory.mktemp("undisturbed")
    code, _, err = run(SCRIPT, flags_of(image_folder, output_dir), processes=2, start=start_fresh)
    assert code == 0, err
    return final_state(output_dir)


@pytest.fixture
def submit(slurm):
    """Submits jobs, and cancels those that are left."""
    jobs = []

    def submitted(*arguments, **options):
        jobs.append(Job(*arguments, **options))
        return jobs[-1]

    yield submitted
    for job in jobs:
        subprocess.run(["scancel", job.id])
        with contextlib.suppress(AssertionError):
            job.end()


def assert_as_undisturbed(job, flags, undisturbed):
    assert job.end() == "COMPLETED", job.text()
    assert_same_bits(final_state(flags["output_dir"]), undisturbed)


@pytest.mark.thorough
def test_a_job_ends_as_torchrun_does(submit, flags, undisturbed):
    job = submit(flags, STEP_SECONDS="0")
    assert_as_undisturbed(job, flags, undisturbed)
    assert job.text().count("train.sbatch: ") == 2
    assert "start 1, on 127.0.0.[2-3]: 2 x 1 processes" in job.text()


@pytest.mark.thorough
def test_a_time_limit_saves_and_requeues(submit, flags, undisturbed):
    """Slurm's own signal; it comes up to a minute early."""
    job = submit(flags, "--signal=B:USR1@60", nodes=1, STEP_SECONDS="3")
    job.wait_for(TRAINING)
    hours, minutes, _ = map(int, job.field("RunTime").split(":"))
    shell("scontrol", "update", f"JobId={job.id}", f"TimeLimit={hours * 60 + minutes + 2}")
    job.wait_for("SIGTERM: stopped after step")
    job.start_again()
    shell("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    assert_as_undisturbed(job, flags, undisturbed)
    assert "saving, then requeueing (restart 1 of at most 100)" in job.text()
    assert "job " + job.id + ", start 2, on" in job.text()


REQUEUES = {
    "requeue": "low",
    "preemption": "low",
    "preemption with time to save": "grace",
}


@pytest.mark.thorough
@pytest.mark.parametrize("fault", REQUEUES)
def test_a_job_that_is_requeued_goes_on(fault, submit, flags, undisturbed):
    job = submit(flags, f"--partition={REQUEUES[fault]}", nodes=1)
    job.wait_for(TRAINING)
    if fault == "requeue":
        shell("scontrol", "requeue", job.id)
    else:
        shell("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--wrap=true", cwd="/tmp")
    job.wait_for("SIGTERM: stopped after step")
    job.start_again()
    assert_as_undisturbed(job, flags, undisturbed)


@pytest.mark.thorough
@pytest.mark.parametrize("signal_option", [[], ["--signal=TERM"]], ids=["scancel", "TERM"])
def test_a_job_that_its_user_stops_is_not_requeued(signal_option, submit, flags, undisturbed):
    job = submit(flags)
    job.wait_for(TRAINING)
    shell("scancel", *signal_option, job.id)
    assert job.end() == ("FAILED" if signal_option else "CANCELLED")
    assert "SIGTERM: stopped after step" in job.text()
    assert job.field("Restarts") == "0"
    assert_as_undisturbed(submit(flags), flags, undisturbed)


@pytest.mark.thorough
def test_a_lost_node_requeues(slurm, submit, flags, undisturbed):
    """Restarts are not used up before Slurm has noticed it."""
    job = submit(flags, MAX_RESTARTS="1")
    job.wait_for(SAVED)
    lost = NODES[1]
    os.kill(int((slurm / f"{lost}.pid").read_text()), signal.SIGKILL)
    job.kill_on(lost)
    try:
        job.start_again()
        assert_as_undisturbed(job, flags, undisturbed)
        assert lost not in job.field("NodeList")
    finally:
        shell("slurmd", "-N", lost)
        wait_until(
            lambda: "idle" in shell("sinfo", "-h", "-n", lost, "-p", "low", "-o", "%T"), lost
        )


@pytest.mark.thorough
@pytest.mark.parametrize("node", NODES[:2], ids=["first node", "second node"])
def test_a_dead_torchrun_starts_all_again(node, submit, flags, undisturbed):
    """On the node that holds torchrun's store, or on the other, with the process it started."""
    job = submit(flags, STEP_SECONDS="1")
    job.wait_for(SAVED)
    job.kill_on(node)
    assert_as_undisturbed(job, flags, undisturbed)
    assert "starting all again on the same nodes (restart 1 of at most 3)" in job.text()
    assert re.search("resuming .* of epoch [01]", job.text())
    assert job.field("Restarts") == "0"


@pytest.mark.thorough
def test_two_jobs_on_the_same_nodes_do_not_meet(submit, flags, undisturbed, tmp_path):
    first = submit(flags | {"output_dir": tmp_path / "first"}, "--nodelist=127.0.0.[2-3]")
    second = submit(flags, "--nodelist=127.0.0.[2-3]")
    second.wait_for(TRAINING)
    shell("scancel", first.id)
    assert_as_undisturbed(second, flags, undisturbed)


@pytest.mark.thorough
def test_a_command_that_fails_is_not_requeued(submit, flags, tmp_path):
    wrong = submit(flags | {"output_dir": tmp_path / "wrong", "mask_ratio": 2})
    failing = submit(flags, script="tests/failing_pretrain.py", MAX_RESTARTS="1")
    assert wrong.end() == failing.end() == "FAILED"
    assert "an error for you to mend, see above: not requeued" in wrong.text()
    assert "(restart 1 of at most 1)" in failing.text()
    assert "(exit code 101) after 1 restarts: mend it" in failing.text()


@pytest.mark.thorough
def test_requeues_are_bounded(submit, flags):
    job = submit(flags, nodes=1, MAX_REQUEUES="1")
    job.wait_for(TRAINING)
    shell("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for("SIGTERM: stopped after step")
    job.start_again()
    job.wait_for("resuming")
    shell("scancel", "--batch", "--signal=USR1", job.id)
    assert job.end() == "FAILED"
    assert "(restart 1 of at most 1)" in job.text()
    assert "saving, then ending (MAX_REQUEUES is 1)" in job.text()
