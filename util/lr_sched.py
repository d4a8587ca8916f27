"""The learning rate as a pure function of training progress (paper, appendix A.1)."""

import math


def warmup_cosine_lr(epoch, *, lr, min_lr, warmup_epochs, epochs):
    """Learning rate at a fractional epoch: a linear warm-up from 0, then half a cosine to min_lr.

    Args:
        epoch: progress, 0 at the start and `epochs` at the end; fractions are expected.
        lr: peak learning rate, reached at `warmup_epochs`.
        min_lr: learning rate at the end.
        warmup_epochs, epochs: lengths of the warm-up and of the whole training.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer, lr):
    """Give every group of the optimizer `lr`, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
