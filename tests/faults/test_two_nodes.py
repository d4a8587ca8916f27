"""Two torchruns on two loopback addresses, as on two machines, and what keeps machines apart."""

import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    ForkedScript,
    assert_same_bits,
    command_line,
    final_state,
    pretrain_kill_flags,
    run,
)

from util.launching import warn_of_shared_store

SCRIPT = "tests/tiny_pretrain.py"
FIRST, SECOND = "127.0.0.2", "127.0.0.3"


@pytest.fixture
def flags(image_folder, tmp_path):
    """Flags of a run that saves after each of its updates, three in each of three epochs."""
    return pretrain_kill_flags(image_folder, tmp_path / "out") | {"batch_size": 1, "accum_iter": 3}


class Node:
    """A machine that runs the command in docs/clusters.md, with addresses for machines' names."""

    def __init__(self, address, port, flags):
        torchrun = (
            "--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id mae "
            f"--rdzv_endpoint {FIRST}:{port} --local-addr {address} --max-restarts 3"
        )
        script = [str(ROOT / SCRIPT), *command_line(flags)]
        self.torchrun = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *torchrun.split(), *script],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )
        if address == FIRST:  # where both addresses are its own, a torchrun that comes first hosts
            while self.torchrun.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection((FIRST, port)):
                    break
                time.sleep(0.1)

    def kill(self):
        """Kill torchrun and the process that it started."""
        for task in Path(f"/proc/{self.torchrun.pid}/task").glob("*/children"):
            for pid in task.read_text().split():
                os.kill(int(pid), 9)
        self.torchrun.kill()
        self.torchrun.communicate()


@pytest.fixture
def nodes(flags):
    """Starts the node of an address; what still runs is killed at the end."""
    with socket.socket() as free:
        free.bind((FIRST, 0))
        port = free.getsockname()[1]
    started = []

    def start(address):
        started.append(Node(address, port, flags))
        return started[-1]

    yield start
    for node in started:
        if node.torchrun.poll() is None:
            node.kill()


def assert_undisturbed(flags):
    """The run ends as one of two processes on one machine."""
    out_dir = flags["output_dir"] / "undisturbed"
    code, _, err = run(SCRIPT, flags | {"output_dir": out_dir}, processes=2)
    assert code == 0, err
    assert_same_bits(final_state(flags["output_dir"]), final_state(out_dir))


@pytest.mark.thorough
def test_a_machine_that_is_lost_and_comes_again(flags, nodes):
    """The first one notices at once, and waits up to ten minutes (torchrun's join_timeout)."""
    first, second = nodes(FIRST), nodes(SECOND)
    assert any(line.startswith("epoch 1/3  step 1/9") for line in first.torchrun.stdout)
    second.kill()
    second = nodes(SECOND)
    out = first.torchrun.communicate(timeout=300)[0]
    assert first.torchrun.returncode == 0, out
    assert second.torchrun.wait(60) == 0
    assert out.count("resuming") == 1
    assert_undisturbed(flags)


@pytest.mark.thorough
def test_without_the_machine_that_hosts_the_meeting_the_others_end(flags, nodes):
    """At once and with an exit code; the same commands then continue."""
    first, second = nodes(FIRST), nodes(SECOND)
    assert any(line.startswith("epoch 1/3  step 1/9") for line in first.torchrun.stdout)
    first.kill()
    out = second.torchrun.communicate(timeout=120)[0]
    assert second.torchrun.returncode == 1, out
    assert "connection to the C10d store has failed" in out
    first, second = nodes(FIRST), nodes(SECOND)
    out = first.torchrun.communicate(timeout=300)[0]
    assert first.torchrun.returncode == second.torchrun.wait(60) == 0, out
    assert out.count("resuming") == 1
    assert_undisturbed(flags)


def test_torchruns_that_could_not_be_replaced_say_so(monkeypatch, capfd):
    for name, value in {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(name, value)
    for shared, lines in (("False", 0), ("True", 1)):
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
        warn_of_shared_store()
        said = capfd.readouterr().err
        assert said.count("set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == lines


def test_an_unknown_network_interface_is_named(flags):
    start = functools.partial(ForkedScript, environment={"GLOO_SOCKET_IFNAME": "nowhere0"})
    code, _, err = run(SCRIPT, flags, processes=2, start=start)
    assert code == 2, err
    assert err.count("error: ") == 1
    assert "nowhere0" in err
    assert "GLOO_SOCKET_IFNAME" in err


# Two machines: network namespaces with one wire. Both names stand for 127.0.1.1, as in Debian.
MACHINES = """
mount --bind "$1" /etc/hosts && hostname machine0 && ip link set lo up || exit 77
unshare --net --uts sleep 300 & other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.1; done
ip link add wire0 type veth peer name wire1 netns $other
ip addr add 10.77.0.1/24 dev wire0 && ip link set wire0 up
machine1="nsenter --target $other --net --uts"
$machine1 sh -c "hostname machine1; ip addr add 10.77.0.2/24 dev wire1
    ip link set wire1 up; ip link set lo up"
shift
export WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29500
RANK=1 $machine1 env ${INTERFACES:+GLOO_SOCKET_IFNAME=wire1} "$@" & rank1=$!
RANK=0 env ${INTERFACES:+GLOO_SOCKET_IFNAME=wire0} "$@" & rank0=$!
wait -n $rank0 $rank1; code=$?
if [ -n "$INTERFACES" ]; then wait $rank0 && wait $rank1 || code=$?; fi
kill -9 $rank0 $rank1 $other 2>/dev/null
exit $code
"""


@pytest.mark.thorough
@pytest.mark.parametrize("interfaces", ["", "given"])
def test_host_names_that_do_not_reach(flags, tmp_path, interfaces):
    unshare = ["unshare", "--net", "--uts", "--mount"]
    if not shutil.which("ip") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs root, which may make network namespaces, and ip of iproute2")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 machine0 machine1\n")
    command = [sys.executable, str(ROOT / SCRIPT), *command_line(flags)]
    ended = subprocess.run(
        [*unshare, "bash", "-c", MACHINES, "bash", str(hosts), *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"INTERFACES": interfaces},
    )
    if ended.returncode == 77:
        pytest.skip(f"the namespace can't be made: {ended.stderr}")
    if interfaces:
        assert ended.returncode == 0, ended.stderr
        assert_undisturbed(flags)
    else:
        assert ended.returncode == 2, ended.stderr
        assert re.search(r"error: (\[rank 1\] )?the processes can't reach each", ended.stderr)
        assert "set GLOO_SOCKET_IFNAME" in ended.stderr
