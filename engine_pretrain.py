"""One epoch of masked-autoencoder pre-training, and the loss on held-out images."""

import torch

from util import distributed
from util.lr_sched import set_lr, warmup_cosine_lr
from util.optim import clip_and_step
from util.precision import autocast
from util.seeding import uniform_noise


def train_one_epoch(
    model,
    loader,
    optimizer,
    scaler,
    *,
    run,
    epoch,
    schedule,
    mask_ratio,
    accum_iter,
    clip_grad,
    amp_dtype,
    seed,
):
    """Train for the rest of an epoch.

    Args:
        model: a MaskedAutoencoderViT, or its data-parallel wrapper.
        loader: an `ImageLoader` of training images.
        optimizer, scaler: an optimizer and a gradient scaler, which may be disabled.
        run: the `Run`, which shows and saves the epoch and knows the step it takes up at.
        epoch: counted from 0.
        schedule: lr, min_lr, warmup_epochs and epochs of the learning rate.
        mask_ratio: share of the patches to remove.
        accum_iter: steps whose gradients make one update; fewer at the end of the epoch.
        clip_grad: largest norm of the gradients, or None.
        amp_dtype: type to compute in under autocast, or None for float32.
        seed: of the masks, which are a function of (seed, epoch, step, rank).

    Returns:
        the epoch's entries for log.txt.
    """
    model.train()
    steps = len(loader)
    num_patches = distributed.unwrap(model).patch_embed.num_patches
    log = run.epoch_log(loader, epoch)

    for step, imgs, _ in log.steps():
        group_start = step - step % accum_iter
        group_size = min(accum_iter, steps - group_start)
        updates = step + 1 == group_start + group_size
        if step == group_start:
            lr = warmup_cosine_lr(epoch + step / steps, **schedule)
            set_lr(optimizer, lr)

        mask_key = (seed, "mask", epoch, step, run.process.rank)
        noise = uniform_noise((len(imgs), num_patches), *mask_key, device=imgs.device)
        with distributed.sync_gradients(model, when=updates):
            with autocast(imgs.device, amp_dtype):
                loss, _, _ = model(imgs, mask_ratio, noise, return_pred=False)
            scaler.scale(loss / group_size).backward()

        if updates:
            clip_and_step(model, optimizer, scaler, clip_grad)
        log.add(step, loss, lr)
        if updates:
            run.save_if_due(log, step + 1)

    return log.summary()


@torch.compiler.set_stance("force_eager")  # not compiled for its shapes
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
    for imgs, _, indices, readable in loader:
        loader.warn_unreadable(indices[~readable])
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
