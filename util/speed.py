"""Other ways to compute the same: choices of speed and memory that leave the mathematics alone."""

import ctypes
import re
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def prepare(model, device, dtype, *, compile=False, grad_checkpointing=False):
    """Choose how a model's linear layers and blocks are computed; parameters and names stay.

    On a CPU the process keeps the memory it frees, see `keep_freed_memory`. In bf16 on a CPU
    attention becomes plain products and a softmax instead of torch's fused kernel, whose backward
    pass takes several times as long there; in float32, where `onednn_outruns_mkl`, linear layers
    become convolutions (benchmarks/forms.py measures both).

    Args:
        model: a model with timm's `Block`s, on `device`.
        device: the torch.device it computes on.
        dtype: a `resolve_amp` type.
        compile: compile every block, at its first use.
        grad_checkpointing: keep only the blocks' inputs for the backward pass and compute each
            block a second time there: less memory for about a third more work.
    """
    on_cpu = device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    convolves = on_cpu and dtype is None and onednn_outruns_mkl()
    for module in model.modules():
        if hasattr(module, "fused_attn") and on_cpu and dtype is torch.bfloat16:
            module.fused_attn = False
        if type(module) is nn.Linear and convolves:
            # Not by a `forward` of each layer's own, for which its block would be compiled anew.
            module.__class__ = ConvolvedLinear
            module.dilation = 1 if torch.get_num_threads() > 1 else 2
        if isinstance(module, Block):
            if compile:
                module.forward = torch.compile(module.forward, dynamic=False)
            if grad_checkpointing:
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def keep_freed_memory():
    """Have glibc keep freed memory for the next tensors; does nothing without glibc.

    It returns large blocks to the system by default, which zeroes and maps every page of them anew
    at the next allocation: at every operation on activations, in every step.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def onednn_outruns_mkl():
    """Whether float32 products are faster in oneDNN, which torch convolves with, than in MKL.

    MKL, which torch multiplies matrices with, keeps to AVX2 on processors that are not Intel's.
    AMD's compute AVX-512, which oneDNN uses, at twice the rate since Zen 5 (family 26).
    """
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    family = re.search(r"^vendor_id\s*: AuthenticAMD\ncpu family\s*: (\d+)$", cpu, re.MULTILINE)
    libraries = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return libraries and " avx512f " in cpu and family is not None and int(family[1]) >= 26


class ConvolvedLinear(nn.Linear):
    """A linear layer [..., D] -> [..., K], computed as a convolution of 1 x 1 over all rows.

    Its kernel's dilation means nothing to the result. With one thread, however, torch has MKL
    convolve with kernels of 1 x 1 that are not dilated.
    """

    dilation = 1

    def forward(self, x):
        rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, D, rows, 1]
        kernel = self.weight[:, :, None, None]
        outputs = F.conv2d(rows, kernel, self.bias, dilation=self.dilation)
        return outputs.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
