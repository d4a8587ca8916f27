"""One epoch of training a classifier, fine-tuned or probed, and its accuracy."""

import math

import torch
import torch.nn.functional as F

from util import distributed
from util.errors import UserError
from util.lr_sched import set_lr, warmup_cosine_lr
from util.optim import clip_and_step
from util.precision import autocast
from util.seeding import seed_generators


def train_one_epoch(
    model,
    criterion,
    loader,
    optimizer,
    scaler,
    *,
    run,
    epoch,
    seed,
    schedule,
    accum_iter,
    amp_dtype,
    clip_grad=None,
    random_erasing=None,
    mixup=None,
):
    """Train for the rest of an epoch.

    Args:
        model: a classifier [N, 3, H, W] -> logits [N, K], or its data-parallel wrapper.
        criterion: loss of logits and labels [N], or of logits and shares [N, K] under mixup.
        loader: an `ImageLoader` of training images.
        optimizer, scaler: an optimizer and a gradient scaler, which may be disabled.
        run: the `Run`, which shows and saves the epoch and knows the step it takes up at.
        epoch: counted from 0.
        seed: of erasing, mixup and drop path, which are functions of (seed, epoch, step, rank).
        schedule: lr, min_lr, warmup_epochs and epochs of the learning rate.
        accum_iter: steps whose gradients make one update; fewer at the end of the epoch.
        amp_dtype: type to compute in under autocast, or None for float32.
        clip_grad: largest norm of the gradients, or None.
        random_erasing: timm's RandomErasing of a batch of images, or None.
        mixup: timm's Mixup of a batch of images and labels, or None.

    Returns:
        the epoch's entries for log.txt.
    """
    model.train()
    steps = len(loader)
    log = run.epoch_log(loader, epoch)

    for step, imgs, targets in log.steps():
        group_start = step - step % accum_iter
        group_size = min(accum_iter, steps - group_start)
        updates = step + 1 == group_start + group_size
        if step == group_start:
            lr = warmup_cosine_lr(epoch + step / steps, **schedule)
            set_lr(optimizer, lr)

        seed_generators(seed, "step", epoch, step, run.process.rank, device=imgs.device)
        if random_erasing is not None:
            imgs = random_erasing(imgs)
        if mixup is not None:
            imgs, targets = mixup(imgs, targets)
        with distributed.sync_gradients(model, when=updates):
            with autocast(imgs.device, amp_dtype):
                logits = model(imgs)
            loss = criterion(logits.float(), targets)
            scaler.scale(loss / group_size).backward()

        if updates:
            clip_and_step(model, optimizer, scaler, clip_grad)
        log.add(step, loss, lr)
        if updates:
            run.save_if_due(log, step + 1)

    return log.summary()


@torch.compiler.set_stance("force_eager")  # not compiled for its shapes
@torch.no_grad()
def evaluate(model, loader, *, amp_dtype):
    """Accuracy and loss of a classifier; every image counts once, over any number of processes.

    Args:
        model: a classifier without a data-parallel wrapper.
        loader: an `ImageLoader` over `OrderedBatches`.
        amp_dtype: type to compute in under autocast, or None for float32.

    Returns:
        test_acc1 and test_acc5, the percentage of images whose label is the likeliest class or
        among the five likeliest (of fewer classes: among all of them), and test_loss, the mean
        cross entropy.

    Raises:
        UserError: in every process, an image of any of them is unreadable or the loss not finite.
    """
    model.eval()
    distributed.share_buffers(model)
    broken = []
    sums = torch.zeros(3, dtype=torch.float64, device=loader.device)
    for imgs, labels, indices, readable in loader:
        broken += [loader.dataset.paths[index] for index in indices[~readable].tolist()]
        with autocast(imgs.device, amp_dtype):
            logits = model(imgs)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        likeliest = logits.topk(min(5, logits.shape[1])).indices  # [N, 5], the likeliest first
        hits = likeliest == labels[:, None]
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), losses.double().sum()])

    gathered, broken = zip(*distributed.gather((sums.tolist(), broken)), strict=True)
    broken = [path for paths in broken for path in paths]
    if broken:
        others = f" and {len(broken) - 1} others are" if len(broken) > 1 else " is"
        raise UserError(f"{broken[0]}{others} unreadable: evaluation takes every image, repair it")
    top1, top5, loss = (sum(values) / len(loader.dataset) for values in zip(*gathered, strict=True))
    if not math.isfinite(loss):
        raise UserError(f"the loss on the held-out images is {loss}: the weights are of no use")
    return {"test_acc1": 100 * top1, "test_acc5": 100 * top5, "test_loss": loss}
