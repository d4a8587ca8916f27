"""What a training step holds, computes and moves, counted on tensors without values.

The step is the engines' own. Its tensors have a device, a shape and a type, but no values, so that
it takes no GPU and little memory.
"""

import contextlib
import weakref
from dataclasses import replace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import sides
from util import data, optim
from util.errors import UserError

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
OLDEST_TORCH = "2.14"


def count_step(setting):
    """A `Counter` of one of this project's training steps, and the bytes held before it.

    These are the weights, AdamW's state and the gradients. Gradients stay over the steps of an
    update, and with several GPUs all the time.

    Args:
        setting: a `Setting` on `GPU`, in bf16 or fp16, or on the CPU.

    Raises:
        UserError: this torch is too old.
    """
    if torch.__version__ < OLDEST_TORCH:
        raise UserError(
            f"counting takes torch {OLDEST_TORCH} or newer, {torch.__version__} is installed: "
            "upgrade torch"
        )
    with without_values(setting.device) as counter:
        train = sides.ours(ValuelessSetting(**vars(setting)))
        fixed = counter.held
        counter.restart()
        train(1)
    return counter, fixed


class Counter(TorchDispatchMode):
    """Counts what happens on a device.

    Attributes:
        held, peak: bytes of tensors now, and at most; in CUDA's units of 512 there.
        flop: operations of matrix products: {"products": of layers, "attention": its own}.
        moved: bytes that kernels read and write: the same, and those of the "rest".
    """

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.unit = 512 if device.type == "cuda" else 1
        self.held = 0
        self._storages = {}
        self.restart()

    def restart(self):
        """Count peak, operations and bytes from now on."""
        self.peak = self.held
        self.flop = {"products": 0, "attention": 0}
        self.moved = {"products": 0, "attention": 0, "rest": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # a question, such as for a tensor's device
            return out
        made = self._on_device(out)
        for tensor in made:
            self._hold(tensor.untyped_storage())
        kind = "rest"
        if formula := flop_registry.get(func.overloadpacket):
            kind = "attention" if "attention" in func.name() else "products"
            self.flop[kind] += formula(*args, **kwargs, out_val=out)
        self.moved[kind] += self._bytes_moved(func, args, kwargs, made)
        return out

    def _on_device(self, tree):
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        return [tensor for tensor in tensors if tensor.device.type == self.device.type]

    def _hold(self, storage):
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // self.unit) * self.unit

        def freed(_):
            del self._storages[key]
            self.held -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.held += size
        self.peak = max(self.peak, self.held)

    def _bytes_moved(self, func, args, kwargs, made):
        """Each argument is read and each new tensor written once; nothing for a view."""
        if "empty" in func.name():
            return 0
        read = self._on_device((args, kwargs))
        storages = {tensor.untyped_storage()._cdata for tensor in read}
        written = [tensor for tensor in made if tensor.untyped_storage()._cdata not in storages]
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                written += self._on_device(value)
        return sum(size(tensor) for tensor in read + written) if written else 0


def size(tensor):
    """A tensor's bytes in memory; an expanded one has fewer than values."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class ValuelessSetting(sides.Setting):
    """A setting whose model and images have no values."""

    def build_model(self):
        with unset_fake_temporarily(), torch.device("meta"):  # timm reads values
            model = super().build_model()
        return model.to_empty(device=self.device)

    def images(self):
        on_the_host = replace(self, device=torch.device("cpu"))  # where nothing is page-locked
        return sides.Setting.images(on_the_host)


@contextlib.contextmanager
def without_values(device):
    """Training on tensors without values on a `device`, and the `Counter` of it.

    On CUDA attention is flash attention. What would call CUDA's driver or read values is replaced.
    """
    patches = without_driver() | {
        "torch.nn.Module.to": lambda module, _device: module,
        "util.data._channel_statistics": data._channel_statistics.__wrapped__,  # not kept
        "util.optim.adamw": adamw_in_use,
        "util.logs.Meter.flush": lambda meter: None,  # reads the losses
        "util.logs.Meter.summary": lambda meter: {},
    }
    if device.type == "cuda":
        patches["torch.nn.functional.scaled_dot_product_attention"] = flash_attention
    saved = SavedTensors()
    with contextlib.ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack))
        yield stack.enter_context(Counter(device))


def without_driver():
    """What to replace where CUDA's driver is missing: names and replacements."""
    generator = torch.Generator
    return {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.Generator": lambda device="cpu": generator(),
        "torch._C._current_graph_task_id": lambda: 0,  # checkpointing asks for it
        "torch.Tensor.backward": backward,
    }


def adamw_in_use(groups, *, betas, adamw=optim.adamw):
    """AdamW with the state that its first step makes, and with gradients."""
    optimizer = adamw(groups, betas=betas)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def flash_attention(query, key, value, **_):
    """In place of torch's choice, which depends on the GPU."""
    return aten._scaled_dot_product_flash_attention(query, key, value)[0]


class SavedTensors:
    """Tensors saved for the backward pass, freed once they are used, as torch's engine does."""

    def __init__(self):
        self._tensors = {}
        self._count = 0

    def pack(self, tensor):
        self._count += 1
        self._tensors[self._count] = tensor
        return self._count

    def unpack(self, number):
        return self._tensors.pop(number)


def backward(loss):
    """`loss.backward()` in Python, because torch's engine asks for a CUDA driver.

    Like that engine, it takes the node made last among those that are ready, and drops each
    gradient as soon as it is used.
    """
    edges, nodes = {}, [loss.grad_fn]  # how many edges lead to a node
    for node in nodes:
        for successor, _ in node.next_functions:
            if successor is not None:
                if successor not in edges:
                    nodes.append(successor)
                edges[successor] = edges.get(successor, 0) + 1
    gradients, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = max(ready, key=lambda node: node._sequence_nr())
            ready.remove(node)
            for (successor, place), gradient in flow(node, gradients.pop(node, {})):
                if gradient is not None:
                    own = gradients.setdefault(successor, {})
                    own[place] = own[place] + gradient if place in own else gradient
                    del gradient, own
                edges[successor] -= 1
                if not edges[successor]:
                    ready.append(successor)


def flow(node, inputs):
    """Yield each edge of a node, as (successor, place), and the gradient along it, or None.

    `inputs` holds the gradients that have come, by place. At a parameter they end in its `grad`.
    """
    if hasattr(node, "variable"):
        if inputs and node.variable.grad is None:
            node.variable.grad = inputs.pop(0)
        elif inputs:
            node.variable.grad.add_(inputs.pop(0))
        return
    out = [None] * len(node.next_functions)
    if inputs:
        gradients = [inputs.get(place) for place in range(1 + max(inputs))]
        inputs.clear()
        result = node(*gradients)
        del gradients
        out = list(result) if isinstance(result, tuple) else [result]
        del result
    for successor, place in node.next_functions:
        gradient = out.pop(0)
        if successor is None:
            continue
        if gradient is not None:
            like = successor._input_metadata[place]
            gradient = gradient.sum_to_size(like.shape).to(like.dtype)
        yield (successor, place), gradient
