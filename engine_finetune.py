"""One epoch of training a classifier, fine-tuned or probed, and its accuracy."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util import distributed
from util.errors import UserError
from util.loading import ImageLoader
from util.logs import Meter
from util.lr_sched import set_lr, warmup_cosine_lr
from util.optim import clip_and_step
from util.precision import autocast
from util.predictions import Predictions, likeliest_classes
from util.seeding import seed_generators
from util.training import Checkpoints, TrainingState


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loader: ImageLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    state: TrainingState,
    meter: Meter,
    checkpoints: Checkpoints,
    schedule: dict[str, float],
    accum_iter: int,
    amp_dtype: torch.dtype | None,
    seed: int,
    rank: int,
    clip_grad: float | None = None,
    random_erasing: Callable[[Tensor], Tensor] | None = None,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Any]:
    """Train from `state` to the end of its epoch.

    Args:
        model: a classifier [N, 3, H, W] -> logits [N, K], or its data-parallel wrapper.
        criterion: loss of logits and labels [N], or of logits and shares [N, K] under mixup.
        loader, optimizer, scaler, state, meter, checkpoints, schedule, accum_iter, amp_dtype, rank,
            clip_grad: as in `engine_pretrain.train_one_epoch`.
        seed: seed of erasing, mixup and drop path: functions of (seed, epoch, step, rank).
        random_erasing: timm's RandomErasing of a batch of images, or None.
        mixup: timm's Mixup of a batch of images and labels, or None.

    Returns:
        the epoch's entries for log.txt.
    """
    model.train()
    epoch, steps = state.epoch, len(loader)

    for step, imgs, targets in meter.timed(loader.train_batches(epoch, state.step)):
        first_of_update = step - step % accum_iter
        steps_of_update = min(accum_iter, steps - first_of_update)
        is_last_of_update = step + 1 == first_of_update + steps_of_update
        if step == first_of_update:
            lr = warmup_cosine_lr(epoch + step / steps, **schedule)
            set_lr(optimizer, lr)

        seed_generators(seed, "step", epoch, step, rank, device=imgs.device)
        if random_erasing is not None:
            imgs = random_erasing(imgs)
        if mixup is not None:
            imgs, targets = mixup(imgs, targets)
        with distributed.sync_gradients(model, when=is_last_of_update):
            with autocast(imgs.device, amp_dtype):
                logits = model(imgs)
            loss = criterion(logits.float(), targets)
            scaler.scale(loss / steps_of_update).backward()

        grad_norm = None
        if is_last_of_update:
            measure = meter.shows_update(step, accum_iter)
            grad_norm = clip_and_step(model, optimizer, scaler, clip_grad, measure)
        meter.add(step, loss, lr, grad_norm)
        if is_last_of_update:
            state.step = step + 1
            checkpoints.save_if_due(state, meter)

    return meter.summary()


@torch.compiler.set_stance("force_eager")  # compiling for evaluation's shapes would not pay
@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: ImageLoader,
    *,
    amp_dtype: torch.dtype | None,
    predictions: Predictions | None = None,
) -> dict[str, float]:
    """A classifier's accuracy and loss; every image counts once, over any number of processes.

    Args:
        model: a classifier without a data-parallel wrapper.
        loader: gives every image once.
        amp_dtype: type to compute in under autocast, or None for float32.
        predictions: notes every image's likeliest classes; the batches are at most its size.

    Returns:
        test_acc1 and test_acc5, the percentage of images whose label is the likeliest class or one
        of the five likeliest (of all, if there are fewer), and test_loss, the mean cross entropy.

    Raises:
        UserError: an image is unreadable or the loss not finite; raised in every process.
    """
    model.eval()
    distributed.share_buffers(model)
    unreadable: list[str] = []
    sums = torch.zeros(3, dtype=torch.float64, device=loader.device)
    for imgs, labels, indices, readable in loader.eval_batches():
        unreadable += [loader.dataset.paths[index] for index in indices[~readable].tolist()]
        if predictions is not None:
            imgs = predictions.fill(imgs)
        with autocast(imgs.device, amp_dtype):
            logits = model(imgs)[: len(labels)].float()
        if predictions is not None:
            predictions.add(indices, logits)
        losses = F.cross_entropy(logits, labels, reduction="none")
        hits = likeliest_classes(logits) == labels[:, None]  # [N, 5], the likeliest first
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), losses.double().sum()])

    gathered, paths = zip(*distributed.gather((sums.tolist(), unreadable)), strict=True)
    unreadable = [path for own_paths in paths for path in own_paths]
    if unreadable:
        more = f" and {len(unreadable) - 1} more are" if len(unreadable) > 1 else " is"
        raise UserError(
            f"{unreadable[0]}{more} unreadable: evaluation needs every image, repair it"
        )
    top1, top5, loss = (sum(values) / len(loader.dataset) for values in zip(*gathered, strict=True))
    if not math.isfinite(loss):
        raise UserError(f"the loss on the held-out images is {loss}: the weights are of no use")
    return {"test_acc1": 100 * top1, "test_acc5": 100 * top5, "test_loss": loss}


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def predict(
    model: nn.Module,
    loader: ImageLoader,
    predictions: Predictions,
    *,
    amp_dtype: torch.dtype | None,
) -> None:
    """Note the likeliest classes of images without labels, but for unreadable ones.

    Args:
        model, loader, amp_dtype: as in `evaluate`.
        predictions: notes them; the batches are at most its size.
    """
    model.eval()
    distributed.share_buffers(model)
    for imgs, _, indices, readable in loader.eval_batches():
        with autocast(imgs.device, amp_dtype):
            logits = model(predictions.fill(imgs))[: len(imgs)].float()
        predictions.add(indices[readable], logits[readable.to(logits.device)])
