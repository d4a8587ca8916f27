"""One epoch of masked-autoencoder pre-training, and the loss on held-out images."""

import torch

from util import distributed
from util.logs import EpochLog
from util.lr_sched import set_lr, warmup_cosine_lr
from util.precision import autocast
from util.seeding import uniform_noise


def train_one_epoch(
    model,
    loader,
    optimizer,
    scaler,
    *,
    epoch,
    first_step,
    totals,
    schedule,
    mask_ratio,
    accum_iter,
    clip_grad,
    amp_dtype,
    seed,
    process,
    run_log,
    checkpointer,
):
    """Train for the rest of an epoch.

    Args:
        model: a MaskedAutoencoderViT, or its data-parallel wrapper.
        loader: an `ImageLoader` of training images.
        optimizer, scaler: an optimizer and a gradient scaler, which may be disabled.
        epoch, first_step, totals: where to take up; totals are those of the `EpochLog` so far.
        schedule: lr, min_lr, warmup_epochs and epochs of the learning rate.
        mask_ratio: share of the patches to remove.
        accum_iter: steps whose gradients make one update; fewer at the end of the epoch.
        clip_grad: largest norm of the gradients, or None.
        amp_dtype: type to compute in under autocast, or None for float32.
        seed: of the masks, which are a function of (seed, epoch, step, rank).
        process: this `distributed.Process`.
        run_log, checkpointer: where the epoch is shown and saved.

    Returns:
        the epoch's entries for log.txt.
    """
    model.train()
    steps = len(loader)
    num_patches = distributed.unwrap(model).patch_embed.num_patches
    log = EpochLog(run_log, loader, epoch=epoch, first_step=first_step, totals=totals)

    for step, imgs in log.watch(loader.epoch(epoch, first_step)):
        group_start = step - step % accum_iter
        group_size = min(accum_iter, steps - group_start)
        updates = step + 1 == group_start + group_size
        if step == group_start:
            lr = warmup_cosine_lr(epoch + step / steps, **schedule)
            set_lr(optimizer, lr)

        mask_key = (seed, "mask", epoch, step, process.rank)
        noise = uniform_noise((len(imgs), num_patches), *mask_key, device=imgs.device)
        with distributed.sync_gradients(model, when=updates):
            with autocast(imgs.device, amp_dtype):
                loss, _, _ = model(imgs, mask_ratio, noise)
            scaler.scale(loss / group_size).backward()

        if updates:
            if clip_grad is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        log.add(step, loss, lr)
        if updates:
            checkpointer.save_if_due(epoch=epoch, step=step + 1, epoch_log=log)

    return log.summary()


@torch.no_grad()
def evaluate(model, loader, *, mask_ratio, amp_dtype, seed):
    """The masked loss of held-out images, with one fixed mask an image.

    Every readable image counts once, over any number of processes.

    Args:
        model: a MaskedAutoencoderViT without a data-parallel wrapper.
        loader: an `ImageLoader` over `OrderedBatches`.
        mask_ratio, amp_dtype: as in training.
        seed: of the masks, which are a function of (seed, image index).

    Returns:
        the entries for log.txt.
    """
    model.eval()
    num_patches = model.patch_embed.num_patches
    losses, counts = [], []
    for imgs, indices, readable in loader:
        if not readable.any():
            continue
        noise = torch.stack(
            [uniform_noise(num_patches, seed, "held-out mask", i) for i in indices.tolist()]
        )
        with autocast(imgs.device, amp_dtype):
            loss, _, _ = model(imgs[readable], mask_ratio, noise[readable].to(imgs.device))
        losses.append(loss)
        counts.append(readable.sum().item())
    own = sum(c * loss.item() for c, loss in zip(counts, losses, strict=True)), sum(counts)
    total, count = (sum(values) for values in zip(*distributed.gather(own), strict=True))
    return {"val_loss": total / count} if count else {}
