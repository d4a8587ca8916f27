"""Processes started by torchrun: which one this is, and what all of them agree on.

A plain `python main_*.py` is the case of one process; no process group is made for it.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util import launching
from util.errors import LostProcess, UserError
from util.watching import Watch

# Of all processes, over gloo, for what is not a tensor of the model.
_control: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Process:
    """This process among `world_size`, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def select_device(name: str, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """A process's device.

    Args:
        name: auto (CUDA where there is some, else the CPU), cpu, cuda or cuda:INDEX.
        local_rank: the process's number on this machine, and its device's without an INDEX.
        local_world_size: how many processes there are on this machine.

    Raises:
        UserError: there is no such device, or it is one device for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not one of auto, cpu, cuda or cuda:INDEX")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: this machine has no usable CUDA device, use --device cpu"
        )
    if device.index is not None and local_world_size > 1:
        raise UserError(
            f"--device {name} is one device for {local_world_size} processes: use --device cuda"
        )
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: there is no {device} among {torch.cuda.device_count()} CUDA "
            "devices, start at most one process for each"
        )
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(device: str, timeout_minutes: float = 30) -> Iterator[Process]:
    """Join the group of processes that torchrun started, within this context.

    Args:
        device: `--device`: auto, cpu, cuda or cuda:INDEX.
        timeout_minutes: see `watching.Watch`.

    Yields:
        this `Process`.

    Raises:
        UserError: there is no such device; the processes can't reach each other.
        LostProcess: another process is gone.
    """
    global _control
    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (
            ("RANK", 0),
            ("WORLD_SIZE", 1),
            ("LOCAL_RANK", 0),
            ("LOCAL_WORLD_SIZE", 1),
        )
    )
    selected = select_device(device, local_rank, local_world_size)
    launching.stop_with_torchrun()
    if world_size == 1:
        yield Process(0, 1, selected)
        return
    process = Process(rank, world_size, selected)
    backend = "nccl" if process.device.type == "cuda" else "gloo"
    limit = timedelta(minutes=timeout_minutes)
    # A `Watch` speaks first, and says more than the groups would.
    timeout = 1.1 * limit + timedelta(seconds=30)
    launching.warn_of_shared_store()
    name, store = launching.store_of_this_attempt(rank, world_size, limit)
    client = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    watch = Watch(dist.PrefixStore(name, client), rank, world_size, limit.total_seconds())
    leaving_together = False
    try:
        with watch, _explain_loss(watch):
            with _explain_gloo():
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=world_size, timeout=timeout
                )
                # How long this one waits, the `Watch` decides.
                _control = dist.new_group(backend="gloo", timeout=timedelta(days=365))
            yield process
        leaving_together = True
    except SystemExit:  # stopped by a signal, on which all processes agreed
        leaving_together = True
        raise
    finally:
        # Destroying a group waits for its peers. After an error of this process they may never
        # come: leave at once instead, and torchrun ends them.
        if leaving_together:
            if backend == "gloo":
                # With torch 2.6, destroying the group hung in one of six starts beside busy
                # processes, where one process came much earlier than the other.
                with contextlib.suppress(RuntimeError):  # of one that has failed after all
                    dist.barrier()
            dist.destroy_process_group()
        _control = None


@contextlib.contextmanager
def _explain_gloo() -> Iterator[None]:
    """Turn what gloo says when processes can't connect into a UserError that says what to do."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError):  # of torchrun's own meeting point
        raise
    except RuntimeError as error:
        if any(text in str(error) for text in ("closed by peer", "reset by peer")):
            raise  # they have reached each other
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes can't reach each other ({reason}): gloo uses the address that the host "
            "name stands for; set GLOO_SOCKET_IFNAME to the network interface that the machines "
            "share, such as eth0"
        ) from error


@contextlib.contextmanager
def _explain_loss(watch: Watch) -> Iterator[None]:
    """Turn the error of a broken connection into a LostProcess that names the process."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            watch.say_lost(error)
            raise LostProcess from error
        raise


def data_parallel(model: nn.Module, process: Process) -> nn.Module:
    """The model wrapped so that backward averages gradients over the processes."""
    if process.world_size == 1:
        return model
    device_ids = [process.device] if process.device.type == "cuda" else None
    parallel = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    _settle_buckets(parallel)
    return parallel


def _settle_buckets(parallel: DistributedDataParallel) -> None:
    """Let DDP sort its buckets before the first step.

    It does so once, after the first backward pass, by the order in which gradients came. Then three
    or more processes add them up in another order, and a resumed run would end in other bits.
    """
    model = parallel.module
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.forward = lambda: sum(0 * p.sum() for p in parameters)  # backward runs from the last one
    try:
        parallel().backward()
    finally:
        del model.forward
    parallel.zero_grad()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `data_parallel`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def sync_gradients(model: nn.Module, when: bool) -> AbstractContextManager[None]:
    """Context of a forward and backward: average gradients over the processes only if `when`."""
    if when or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of rank 0, such as BatchNorm's running statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather(value: Any) -> list[Any]:
    """Every process's `value` (any object that pickles), as a list in rank order.

    It waits for as long as a process goes on, see `watching`.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every process's tensor; these have one shape and are on their devices."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def rank() -> int:
    """The number of this process in what `gather` returns."""
    return dist.get_rank() if dist.is_initialized() else 0


class Agreement:
    """Maximum of an integer over all processes, one step late.

    The all-reduce runs on the CPU beside the step, so that no step waits for it.
    """

    def __init__(self, process: Process) -> None:
        self._is_alone = process.world_size == 1
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __call__(self, value: int) -> int:
        """Give this step's value (>= 0); returns the maximum of the previous step's."""
        if self._is_alone:
            return value
        agreed = self.settle()
        tensor = torch.tensor(value)
        op = dist.ReduceOp.MAX
        self._pending = tensor, dist.all_reduce(tensor, op, group=_control, async_op=True)
        return agreed

    def settle(self) -> int:
        """Wait for the maximum under way and return it; 0 where there is none."""
        if self._pending is None:
            return 0
        tensor, work = self._pending
        work.wait()
        self._pending = None
        return tensor.item()
