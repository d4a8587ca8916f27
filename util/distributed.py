"""Processes started by torchrun: who this one is, and what all of them agree on.

A plain `python main_*.py` is the case of one process; no process group is made for it.
"""

import contextlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from util.errors import UserError


@dataclass(frozen=True)
class Process:
    """This process among `world_size`, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def select_device(name, local_rank=0):
    """The device of a process.

    Args:
        name: auto (CUDA where there is some, else the CPU), cpu, cuda or cuda:INDEX.
        local_rank: the process's number on this machine, and its device's unless INDEX says.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not one of auto, cpu, cuda or cuda:INDEX")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: this machine has no usable CUDA device, use --device cpu"
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
def process_group(device):
    """Join the group of processes that torchrun started, for the time of the context.

    Args:
        device: `--device`: auto, cpu, cuda or cuda:INDEX.

    Yields:
        this `Process`.

    Raises:
        UserError: there is no such device.
    """
    rank, world_size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    process = Process(rank, world_size, select_device(device, local_rank))
    if world_size == 1:
        yield process
        return
    backend = "nccl" if process.device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    leaving_together = False
    try:
        yield process
        leaving_together = True
    except SystemExit:  # stopped by a signal, on which all processes agreed
        leaving_together = True
        raise
    finally:
        # Destroying an NCCL group waits for its peers. After an error of this process they would
        # never come: leave at once instead, and torchrun ends them.
        if leaving_together or backend == "gloo":
            dist.destroy_process_group()


def data_parallel(model, process):
    """The model wrapped so that backward averages gradients over the processes."""
    if process.world_size == 1:
        return model
    device_ids = [process.device] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def unwrap(model):
    """The model inside `data_parallel`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def sync_gradients(model, when):
    """Context of a forward and backward: average gradients over the processes only if `when`."""
    if when or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def share_buffers(model):
    """Give every process the buffers of rank 0, such as BatchNorm's running statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather(value):
    """Every process's `value` (any object that pickles), as a list in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Agreement:
    """The largest of all processes' wishes, known to all of them one step later.

    An all-reduce on the CPU runs beside the step, so that following a wish costs no step a wait.
    """

    def __init__(self):
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending = None

    def __call__(self, wish):
        """Tell this step's wish (an int >= 0); returns the previous step's largest."""
        if self._group is None:
            return wish
        agreed = self.settle()
        tensor = torch.tensor(wish)
        op = dist.ReduceOp.MAX
        self._pending = tensor, dist.all_reduce(tensor, op, group=self._group, async_op=True)
        return agreed

    def settle(self):
        """Wait for the wish under way; returns the largest, 0 where there is none."""
        if self._pending is None:
            return 0
        tensor, work = self._pending
        work.wait()
        self._pending = None
        return tensor.item()
