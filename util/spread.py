"""How far features spread, without labels: two alarms for a collapse, not scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from util import distributed

_BLOCK = 4096


def feature_std(features: Tensor) -> float:
    """Standard deviation of L2-normalised features, the mean over their dimensions.

    It is 0 if all images have the same feature, and at most 1 / sqrt(D), if they spread evenly in
    all directions (SimSiam, arXiv 2011.10566, section 4.1).

    Args:
        features: this process's share [N, D] of all; nan if these are fewer than two.
    """
    blocks = [F.normalize(block.double(), dim=1) for block in features.split(_BLOCK)]
    zeros = features.new_zeros(features.shape[1], dtype=torch.float64)
    count = sum(distributed.gather(len(features)))
    if count < 2:
        return math.nan
    mean = distributed.total(sum((block.sum(dim=0) for block in blocks), zeros)) / count
    squares = sum(((block - mean).square().sum(dim=0) for block in blocks), zeros)
    return (distributed.total(squares) / count).sqrt().mean().item()


def rankme(features: Tensor) -> float:
    """RankMe, the effective rank of features: exp of the entropy of their singular values.

    These are divided by their sum (arXiv 2210.02885). 1 if all features are multiples of one, and
    at most D.

    Args:
        features: this process's share [N, D] of all, as they are; nan if these are fewer than two.
    """
    if sum(distributed.gather(len(features))) < 2:
        return math.nan
    zeros = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    blocks = (block.double() for block in features.split(_BLOCK))
    products = distributed.total(sum((block.T @ block for block in blocks), zeros))
    if not products.isfinite().all():
        return math.nan
    squares = torch.linalg.eigvalsh(products.cpu())  # of the singular values, ascending
    # What is smaller than this is the products' rounding.
    rounding = squares[-1] * len(squares) * torch.finfo(torch.float64).eps
    singular_values = squares.where(squares > rounding, 0).sqrt()
    return torch.special.entr(singular_values / singular_values.sum()).sum().exp().item()
