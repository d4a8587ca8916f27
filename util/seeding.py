"""Random numbers as functions of their purpose, not of what was drawn before.

Every draw of a training starts from a seed computed from (seed, purpose, epoch, ...), so a resumed
run needs no generator state and results do not depend on the number of worker processes.
"""

import hashlib
import random

import numpy as np
import torch
from torch import Tensor


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that is a fixed function of `key`, a tuple of integers and strings."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(*key: int | str, device: torch.device | None = None) -> None:
    """Seed the generators that libraries draw from: Python's, numpy's, torch's for CPU and device.

    `torch.manual_seed` visits every backend, which takes a hundred times as long.
    """
    seed = derive_seed(*key)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def uniform_noise(
    shape: int | tuple[int, ...], *key: int | str, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform [0, 1) float32 noise of `shape` on `device`, a fixed function of `key`."""
    generator = torch.Generator(device).manual_seed(derive_seed(*key))
    return torch.rand(shape, generator=generator, device=device)
