"""Two forms of attention and two of a linear layer, on this machine's CPU.

    python -m benchmarks.forms

Attention is torch's fused kernel, or plain products and a softmax; a linear layer, here the first
of a block's MLP, a product of matrices or a convolution. Their sizes are those of pre-training,
with encoders that see a quarter of the patches, and of a classifier. Timed are a forward and a
backward pass. The forms take turns, `ROUNDS` times, and the ratio is the median of the rounds'.
Writes benchmarks/results/forms.json.
"""

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import report
from util import cli, speed

ROUNDS = 7
SHAPES = {  # images, heads, tokens, width of a head
    "base encoder": (32, 12, 50, 64),
    "paper's decoder": (32, 16, 197, 32),
    "base classifier": (32, 12, 197, 64),
    "nano encoder, 28 px": (128, 4, 13, 32),
    "nano decoder, 28 px": (128, 4, 50, 24),
}


def attention_inputs(images, heads, tokens, width, dtype):
    """Queries, keys and values, laid out as in timm's block."""
    qkv = torch.randn(images, tokens, 3, heads, width, dtype=dtype, requires_grad=True)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def plain_attention(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def linear_inputs(images, heads, tokens, width, dtype):
    """The layer, which can be computed in both forms, and its inputs."""
    layer = speed.ConvolvedLinear(heads * width, 4 * heads * width, dtype=dtype)
    return layer, torch.randn(images, tokens, heads * width, dtype=dtype, requires_grad=True)


OPERATIONS = {
    "attention": (
        attention_inputs,
        {"fused": F.scaled_dot_product_attention, "plain": plain_attention},
    ),
    "linear": (
        linear_inputs,
        {"product": nn.Linear.forward, "convolution": speed.ConvolvedLinear.forward},
    ),
}


def main(_args):
    speed.keep_freed_memory()  # as in training
    results = {}
    for operation, (make_inputs, forms) in OPERATIONS.items():
        one, other = forms
        for dtype in (torch.float32, torch.bfloat16):
            for place, shape in SHAPES.items():
                turns = {
                    name: partial(seconds, form, partial(make_inputs, *shape, dtype))
                    for name, form in forms.items()
                }
                times = report.take_turns(turns, ROUNDS)
                case = f"{operation}, {place}, {dtype}"
                results[case] = {
                    name: {"milliseconds": report.median_and_range([1e3 * t for t in times[name]])}
                    for name in forms
                } | {f"{one}_to_{other}": report.ratio(times[one], times[other])}
                print(case, results[case], flush=True)
    report.write("forms", results, rounds=ROUNDS)


def seconds(form, make_inputs):
    """Of a forward and a backward pass on new inputs."""
    inputs = make_inputs()
    started = time.perf_counter()
    output = form(*inputs)
    output.backward(torch.ones_like(output))
    return time.perf_counter() - started


if __name__ == "__main__":
    cli.run(main, cli.ArgumentParser(description=__doc__))
