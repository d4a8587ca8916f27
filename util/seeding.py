"""Random numbers as functions of what they are for, not of what was drawn before.

Every draw of a training starts from a seed computed from (seed, purpose, epoch, ...), so a resumed
run needs no generator state and results do not depend on the number of worker processes.
"""

import hashlib
import random

import numpy as np
import torch


def derive_seed(*key):
    """A 63-bit seed that is a fixed function of `key`, a tuple of integers and strings."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(*key, device=None):
    """Seed the generators that libraries draw from: Python's, numpy's, torch's for CPU and device.

    `torch.manual_seed` would visit every backend, at a hundred times the cost a sample.
    """
    seed = derive_seed(*key)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def uniform_noise(shape, *key, device="cpu"):
    """Uniform [0, 1) float32 noise of `shape` on `device`, a fixed function of `key`."""
    generator = torch.Generator(device).manual_seed(derive_seed(*key))
    return torch.rand(shape, generator=generator, device=device)
