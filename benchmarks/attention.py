"""The two forms of attention on this machine's CPU: torch's fused kernel and plain products.

    python -m benchmarks.attention

Forward and backward pass at the lengths of pre-training: encoders that see a quarter of the
patches, decoders that see all. The forms are timed in turn, `ROUNDS` times, and the ratio is the
median of the rounds'. Writes benchmarks/results/attention.json.
"""

import time
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import report
from util import speed

ROUNDS = 7
SHAPES = {  # images, heads, tokens, width of a head
    "base encoder": (32, 12, 50, 64),
    "paper's decoder": (32, 16, 197, 32),
    "base classifier": (32, 12, 197, 64),
    "nano encoder, 28 px": (128, 4, 13, 32),
    "nano decoder, 28 px": (128, 4, 50, 24),
}


def plain_attention(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def main():
    speed.keep_freed_memory()  # as in training
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, shape in SHAPES.items():
            forms = {"fused": scaled_dot_product_attention, "plain": plain_attention}
            times = report.take_turns(
                {
                    form: partial(seconds, function, shape, dtype)
                    for form, function in forms.items()
                },
                ROUNDS,
            )
            results[f"{name}, {dtype}"] = {
                form: {"milliseconds": report.median_and_range([1e3 * t for t in times[form]])}
                for form in forms
            } | {"fused_to_plain": report.ratio(times["fused"], times["plain"])}
            print(name, dtype, results[f"{name}, {dtype}"], flush=True)
    report.write("attention", results, rounds=ROUNDS)


def seconds(attention, shape, dtype):
    """Of a forward and a backward pass, queries, keys and values laid out as in timm's block."""
    images, heads, tokens, width = shape
    qkv = torch.randn(images, tokens, 3, heads, width, dtype=dtype, requires_grad=True)
    started = time.perf_counter()
    output = attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    output.backward(torch.ones_like(output))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
