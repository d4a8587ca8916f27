"""The learning rate as a pure function of training progress (paper, appendix A.1)."""

import math

import torch

from util.errors import warn


def make_schedule(
    effective_batch: int,
    lr: float | None,
    blr: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: int,
) -> dict[str, float]:
    """The keywords of `warmup_cosine_lr`; without an lr, it is blr x effective_batch / 256."""
    if warmup_epochs >= epochs:
        warn(f"warmup_epochs {warmup_epochs} is not below epochs {epochs}: no decay")
    lr = blr * effective_batch / 256 if lr is None else lr
    return dict(lr=lr, min_lr=min_lr, warmup_epochs=warmup_epochs, epochs=epochs)


def warmup_cosine_lr(
    epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float
) -> float:
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


def lr_jump(before: dict[str, float], after: dict[str, float], epoch: float) -> str:
    """What another schedule does to the learning rate at a fractional epoch, or "" if nothing.

    Args:
        before, after: the keywords of `warmup_cosine_lr`. A schedule stays at its last value.
    """
    rates = []
    for schedule in (before, after):
        if epoch >= schedule["epochs"] > schedule["warmup_epochs"]:
            rates.append(schedule["min_lr"])
        elif epoch >= schedule["epochs"]:
            rates.append(schedule["lr"] * schedule["epochs"] / schedule["warmup_epochs"])
        else:
            rates.append(warmup_cosine_lr(epoch, **schedule))
    shown = [f"{rate:.2e}" for rate in rates]
    return f"lr at this point {shown[0]} -> {shown[1]}" if shown[0] != shown[1] else ""


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of the optimizer `lr`, times its `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
