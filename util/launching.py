"""What torchrun does to its processes, and how they find each other again after a restart."""

import ctypes
import math
import os
import signal
import sys
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig

from util.errors import LostProcess, warn


def stop_with_torchrun() -> None:
    """Get SIGTERM when torchrun dies, and not train on without it. Only Linux can promise that."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM))


def warn_of_shared_store() -> None:
    """Say it where torchruns on several machines keep one store for all attempts.

    Then each notes rank 0's address once, and one that comes later never learns it.
    """
    has_several = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if has_several and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        warn(
            "this run can't go on once a machine's torchrun is started anew: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, on all machines"
        )


def store_of_this_attempt(rank: int, world_size: int, timeout: timedelta) -> tuple[str, dist.Store]:
    """A store to meet in, which no process of an earlier attempt has written to, and its name.

    torchrun's store outlives an attempt. In it gloo and NCCL would read the addresses of dead
    processes (https://github.com/pytorch/pytorch/issues/135712, 167288). Its count of restarts
    tells no attempts apart: each node has its own. So rank 0 makes up a name for this attempt,
    and gives it to those who ask for it under names of their own, which nobody has had before. A
    dead process's question may still lie there, but only a living process confirms the answer.

    Raises:
        LostProcess: a process doesn't come within the timeout.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore("attempts", store)
    name = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    missing = {0} if rank else set(range(1, world_size))
    if rank:
        store.set(f"question/{rank}", name)
    while missing:
        if not rank:
            for other in missing:
                if store.check([f"question/{other}"]):
                    store.set(f"answer/{store.get(f'question/{other}').decode()}", name)
            missing = {other for other in missing if not store.check([f"{name}/{other}"])}
        elif store.check([f"answer/{name}"]):
            name = store.get(f"answer/{name}").decode()
            store.set(f"{name}/{rank}", "")
            missing = set()
        if missing and time.monotonic() > deadline:
            raise LostProcess(
                f"rank {', '.join(map(str, sorted(missing)))} didn't start within "
                f"{timeout.total_seconds() / 60:g} minutes: see what its machine says"
            )
        time.sleep(0.05)
    return name, dist.PrefixStore(name, store)


def seconds_to_save() -> float:
    """How long torchrun lets its processes live after SIGTERM; inf where there is no torchrun.

    torch 2.6 always waits for 30 seconds; 2.14 reads the variable.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return math.inf
    if not hasattr(LaunchConfig, "shutdown_timeout"):
        return 30.0
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
