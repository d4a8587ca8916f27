"""The two forms of attention on this machine's CPU: torch's fused kernel and plain products.

    python -m benchmarks.attention

Forward and backward pass at the lengths of pre-training: encoders that see a quarter of the
patches, decoders that see all. The forms are timed in turn, `ROUNDS` times, and the ratio is the
median of the rounds'. Writes benchmarks/results/attention.json.
"""

import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

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
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, shape in SHAPES.items():
            pairs = [
                (
                    seconds(scaled_dot_product_attention, shape, dtype),
                    seconds(plain_attention, shape, dtype),
                )
                for _ in range(ROUNDS + 1)
            ][1:]
            fused, plain = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
            ratios = sorted(f / p for f, p in pairs)
            results[f"{name}, {dtype}"] = {
                "fused_ms": round(fused, 1),
                "plain_ms": round(plain, 1),
                "fused_to_plain": round(statistics.median(ratios), 2),
                "lowest_and_highest": [round(ratios[0], 2), round(ratios[-1], 2)],
            }
            print(f"{name:20} {dtype}", *results[f"{name}, {dtype}"].values(), flush=True)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    report = {
        "command": "python -m benchmarks.attention",
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "commit": commit,
        "results": results,
    }
    path = Path(__file__).parent / "results" / "attention.json"
    path.write_text(json.dumps(report, indent=2) + "\n")


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
