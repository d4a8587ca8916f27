"""Other ways to compute the same: choices of speed and memory that leave the mathematics alone."""

import ctypes
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch.utils.checkpoint import checkpoint

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def prepare(model, device, dtype, *, compile=False, grad_checkpointing=False):
    """Choose how the transformer blocks of a model are computed; parameters and names stay.

    On a CPU the process keeps the memory it frees, see `keep_freed_memory`. In bf16 on a CPU
    attention becomes plain products and a softmax instead of torch's fused kernel, whose backward
    pass takes several times as long there (benchmarks/attention.py).

    Args:
        model: a model with timm's `Block`s, on `device`.
        device: the torch.device it computes on.
        dtype: a `resolve_amp` type.
        compile: compile every block, at its first use.
        grad_checkpointing: keep only the blocks' inputs for the backward pass and compute each
            block a second time there: less memory for about a third more work.
    """
    if device.type == "cpu":
        keep_freed_memory()
    for module in model.modules():
        if hasattr(module, "fused_attn") and device.type == "cpu" and dtype is torch.bfloat16:
            module.fused_attn = False
        if isinstance(module, Block):
            if compile:
                module.forward = torch.compile(module.forward, dynamic=False)
            if grad_checkpointing:
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def keep_freed_memory():
    """Have glibc keep freed memory for the next tensors; does nothing under another C library.

    It returns large blocks to the system by default, which zeroes and maps every page of them anew
    at the next allocation: at every operation on activations, in every step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
