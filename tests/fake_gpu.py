"""A GPU that isn't there: CUDA tensors without values, and a list of what would wait for it.

Tensors on `GPU` have a device, a shape and a type; tensors on the CPU have values too. So the code
for CUDA runs on a machine without it: tensors on different devices, types that don't fit and
arguments that only CUDA takes raise what they would raise there.
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.counting import GPU, without_driver
from util import data

ROOT = Path(__file__).parent.parent
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
LINEAR = (aten.mm.default, aten.addmm.default)

# Why there can't be a fake GPU here; "" where there can.
REASON = ""
if torch.cuda.is_available():
    REASON = "a real GPU"
elif not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
    REASON = f"torch {torch.__version__} lacks what a fake GPU needs: _ensureCUDADeviceGuardSet"


class FakeGPU(TorchDispatchMode):
    """Within it tensors can be on `GPU`.

    Attributes:
        waits: functions of this project, as "module.function", in which the host would wait for
            the GPU: one entry a value that is read, which is 1, or a copy not `non_blocking`.
        unfinished: copies to the host that may still be under way: it has not waited since.
        linear_types: of the matrices that linear layers multiplied.
    """

    def __init__(self):
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits = []
        self.unfinished = 0
        self.linear_types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not on_gpu and not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.wait()
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten.index.Tensor:
            masks = [i is not None and i.dtype == torch.bool for i in args[1]]
            if any(masks):  # all true
                self.wait()
                indices = zip(args[1], masks, strict=True)
                args = (args[0], [torch.arange(len(i)) if m else i for i, m in indices])
        with self._fake:
            out = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if func in LINEAR:
            self.linear_types |= {x.dtype for x in tensors}
        copies = func in COPIES
        devices = {x.device.type for x in tensors if copies or x.ndim or x.is_cuda}
        if len(devices) > 1:
            if not (copies and _goes_on(func, args, kwargs)):
                self.wait()
            elif not out.is_cuda:
                self.unfinished += 1
        return tree_map(with_values, out)

    def synchronize(self):
        """In place of torch.cuda.synchronize."""
        self.wait()
        self.unfinished = 0

    def wait(self):
        """Note the function of this project that is running."""
        frame = sys._getframe(2)
        while frame.f_back and not self._named(frame.f_code):
            frame = frame.f_back
        self.waits.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")

    @staticmethod
    def _named(code):
        path = Path(code.co_filename)
        ours = ROOT in path.parents and ".venv" not in path.parts
        return ours and not code.co_name.startswith("<")


def _goes_on(copy, args, kwargs):
    """Whether the host goes on during a copy between devices, because it is told to."""
    if copy is aten._to_copy.default:
        return kwargs.get("non_blocking", False)
    return args[2:] == (True,)


def with_values(x):
    """Ones for what has come from the GPU; anything else as it is."""
    arrived = isinstance(x, FakeTensor) and x.device.type == "cpu"
    return torch.ones(x.shape, dtype=x.dtype) if arrived else x


def to(module, device):
    """`module.to(device)`, which tensors without values can't do."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = parameter.detach().to(device)
                part._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else buffer.to(device)
    return module


@contextlib.contextmanager
def running():
    """Commands and functions of this context compute on a `FakeGPU`, which it yields."""
    torch._C._ensureCUDADeviceGuardSet()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU) as an operation
    data._channel_statistics.cache_clear()
    gpu = FakeGPU()
    patches = without_driver() | {
        "torch.nn.Module.to": to,
        "torch.cuda.synchronize": gpu.synchronize,
        "util.distributed.select_device": lambda *_: GPU,
    }
    try:
        with contextlib.ExitStack() as stack:
            for name, replacement in patches.items():
                stack.enter_context(mock.patch(name, replacement))
            yield stack.enter_context(gpu)
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        data._channel_statistics.cache_clear()
