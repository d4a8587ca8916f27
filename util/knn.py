"""Exact k-nearest-neighbour classification of features that are shared out over the processes.

Neighbours are the nearest by cosine similarity. Each votes for its class with weight
exp(similarity / temperature), as in InstDisc (arXiv 1805.01978) and DINO (arXiv 2104.14294).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from util import distributed
from util.image_files import Images

TEMPERATURE = 0.07
_QUERIES, _BANK = 512, 4096  # a block of similarities, 16 MiB
# A neighbour as one integer: its similarity in steps of 2^-30, then its number, the lower one the
# nearer. No two are equal, so that the nearest don't depend on blocks, processes or the device.
_SCALE, _NUMBERS = 2**30, 2**32


def nearest(queries: Tensor, bank: Tensor, numbers: Tensor, k: int) -> Tensor:
    """The most similar features of a bank.

    Args:
        queries: features [Q, D].
        bank: features [B, D] on the same device.
        numbers: int64 [B], the bank's images, each below 2^32; of two that are equally similar,
            the lower number is nearer.
        k: how many neighbours to find.

    Returns:
        int64 [Q, min(k, B)], the nearest first, to be merged by `merge` and read by `neighbours`.
    """
    queries = F.normalize(queries.double(), dim=1)
    found = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for block, own in zip(bank.split(_BANK), numbers.split(_BANK), strict=True):
        similarity = queries @ F.normalize(block.double(), dim=1).T  # [Q, a block of B]
        keys = (similarity * _SCALE).round().long() * _NUMBERS + (_NUMBERS - 1 - own)
        found = merge([found, keys], k)
    return found


def merge(found: list[Tensor], k: int) -> Tensor:
    """The k nearest of several results of `nearest` for the same queries."""
    candidates = torch.cat(found, dim=1)
    return candidates.topk(min(k, candidates.shape[1])).values


def neighbours(found: Tensor) -> tuple[Tensor, Tensor]:
    """Of a result of `nearest`: float64 similarities [Q, k] and the images' numbers [Q, k]."""
    similarity = torch.div(found, _NUMBERS, rounding_mode="floor").double() / _SCALE
    return similarity, _NUMBERS - 1 - found % _NUMBERS


def vote(similarity: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The class [Q] that neighbours elect; of equal ones that of the nearest neighbour.

    Args:
        similarity: float64 [Q, k], the nearest first.
        labels: int64 [Q, k], the neighbours' classes.
        temperature: the lower, the more the nearest count.
    """
    weights = (similarity / temperature).exp()
    same_class = labels[:, :, None] == labels[:, None, :]
    votes = (same_class * weights[:, None, :]).sum(dim=2)  # [Q, k], those for a neighbour's class
    return labels.gather(1, votes.argmax(dim=1, keepdim=True))[:, 0]


def accuracy(
    queries: Tensor, labels: Tensor, bank: Tensor, numbers: Tensor, bank_labels: Tensor, k: int
) -> float:
    """The percentage of all processes' queries whose class their k nearest neighbours elect.

    Each process compares the queries of all with its own shard of the bank, a block at a time.
    So no process ever holds all features of the bank or all similarities.

    Args:
        queries: this process's features [Q, D].
        labels: int64 [Q] on the CPU, their classes.
        bank: this process's features [B, D] of images whose classes are known.
        numbers: int64 [B] on the CPU, the numbers of these images, which no other process has.
        bank_labels: int64 [images] on the CPU, the class of each number; equal in all processes.
        k: how many neighbours vote.

    Returns:
        the same number in all processes; nan without queries or without a bank, or if a feature
        is not finite.
    """
    is_finite = bool((queries.sum() + bank.sum()).isfinite())
    sizes, finite = zip(*distributed.gather(((len(queries), len(bank)), is_finite)), strict=True)
    asked, known = map(sum, zip(*sizes, strict=True))
    if not asked or not known or not all(finite):
        return float("nan")
    rank, block = distributed.rank(), max(1, _QUERIES // len(sizes))
    numbers = numbers.to(bank.device)
    hits = 0
    for start in range(0, max(size for size, _ in sizes), block):
        own = queries[start : start + block].cpu().clone()  # a slice would travel as the whole
        blocks = distributed.gather(own)
        found = nearest(torch.cat(blocks).to(bank.device), bank, numbers, k)
        first = sum(len(part) for part in blocks[:rank])
        shards = [shard[first : first + len(own)] for shard in distributed.gather(found.cpu())]
        similarity, nearby = neighbours(merge(shards, k))
        elected = vote(similarity, bank_labels[nearby])
        hits += (elected == labels[start : start + block]).sum().item()
    return 100 * sum(distributed.gather(hits)) / asked


def describe(every: int, most: int, k: int, images: Images, bank: Images, unlabelled: str) -> str:
    """The line that says what a pre-training measures every so many epochs, and why no more.

    Args:
        most: how many images are taken of each.
        k: how many neighbours vote.
        images, bank: those to classify, and those whose classes are known.
        unlabelled: why there is no accuracy, or "".
    """
    of, known = (f"{min(most, len(taken)):,} images in {taken.origin}" for taken in (images, bank))
    epochs = f"every {every} epochs" if every > 1 else "every epoch"
    if unlabelled:
        return f"{epochs}: feature_std and rankme of {of}, but no k-NN accuracy, as {unlabelled}"
    classes = len(bank.classes)
    if k >= min(most, len(bank)):
        known += f" (all of which vote, as --knn_k is {k})"
    return f"{epochs}: k-NN accuracy of {of}, by {known} of {classes} classes; feature_std, rankme"
