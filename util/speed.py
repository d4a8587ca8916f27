"""Faster or smaller ways to run the same model."""

import ctypes
import importlib.util
import os
import shutil
import sys
from functools import partial

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from util.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def prepare(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype | None,
    compile: bool = False,
    grad_checkpointing: bool = False,
) -> None:
    """Choose how a model's blocks are computed; parameters and their names stay.

    It also sets torch's own switches for this process: no TF32 in float32, and whole graphs.

    In bf16 on a CPU attention becomes plain products and a softmax instead of torch's fused
    kernel, whose backward pass takes several times as long there (benchmarks/README.md).

    Args:
        model: a model with timm's `Block`s, on `device`.
        device: the device it computes on.
        dtype: a `resolve_amp` type.
        compile: compile the blocks at their first use, one graph for each kind of block.
        grad_checkpointing: keep only the blocks' inputs for the backward pass and recompute the
            rest there: less memory for about a third more work.

    Raises:
        UserError: this machine lacks what compiling needs.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn") and device.type == "cpu" and dtype is torch.bfloat16:
            module.fused_attn = False
    if dtype is None:
        torch.backends.cudnn.allow_tf32 = False  # convolutions use it by default
    if compile:
        _check_compiler(device)
        # Else the blocks' graphs are cut where DDP's buckets of gradients end.
        torch._dynamo.config.optimize_ddp = False
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if compile:
            for name in ("drop_path1", "drop_path2"):
                if isinstance(getattr(block, name), DropPath):
                    setattr(block, name, TensorDropPath(getattr(block, name).drop_prob, device))
            # fullgraph: where a block can't be compiled as a whole, that is an error.
            block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)
        if grad_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _check_compiler(device: torch.device) -> None:
    """Refuse, with a UserError, to compile without the tools that torch.compile calls."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs Triton on a GPU: pip install triton, or leave it out")
    variable, names = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    if device.type == "cuda":
        variable, names = "CC", ["gcc", "clang"]
    given = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([given] if given else names)):
        raise UserError(
            f"--compile needs a compiler, and there is no {given or ' or '.join(names)}: install "
            f"one (and name it in {variable}), or leave out --compile"
        )


class TensorDropPath(nn.Module):
    """timm's DropPath with its rate in a tensor, so that blocks of all rates share one graph.

    torch.compile treats a float rate as a constant, and compiles each block anew.
    """

    def __init__(self, drop_prob: float, device: torch.device) -> None:
        super().__init__()
        self.keep_prob = torch.tensor(1 - drop_prob, device=device)  # no buffer: DDP shares those

    def forward(self, x: Tensor) -> Tensor:
        """Each sample of x [N, ...] dropped, or divided by the probability to be kept."""
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = torch.rand(shape, device=x.device) < self.keep_prob
        return x * (kept / self.keep_prob).to(x.dtype)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensors; does nothing without glibc.

    By default it returns large blocks to the system. Each later allocation then maps and zeroes
    their pages again, in every operation of every step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
