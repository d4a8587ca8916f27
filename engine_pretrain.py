"""One epoch of masked-autoencoder pre-training, the loss on held-out images, and their features."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from util import distributed, features, knn, spread
from util.errors import warn
from util.loading import ImageLoader
from util.logs import Meter
from util.lr_sched import set_lr, warmup_cosine_lr
from util.optim import clip_and_step
from util.precision import autocast
from util.seeding import uniform_noise
from util.training import Checkpoints, TrainingState


def train_one_epoch(
    model: nn.Module,
    loader: ImageLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    state: TrainingState,
    meter: Meter,
    checkpoints: Checkpoints,
    schedule: dict[str, float],
    mask_ratio: float,
    accum_iter: int,
    clip_grad: float | None,
    amp_dtype: torch.dtype | None,
    seed: int,
    rank: int,
) -> dict[str, Any]:
    """Train from `state` to the end of its epoch.

    Args:
        model: a MaskedAutoencoderViT, or its data-parallel wrapper.
        loader: gives batches of training images.
        optimizer, scaler: an optimizer and a gradient scaler, which may be disabled.
        state: the epoch and the step to start from; kept up to date.
        meter: averages the losses and shows them.
        checkpoints: save the state when it is time, or when a signal asks to stop.
        schedule: lr, min_lr, warmup_epochs and epochs of the learning rate.
        mask_ratio: share of the patches to remove.
        accum_iter: steps per optimizer update; the last update of an epoch may have fewer.
        clip_grad: largest norm of the gradients, or None.
        amp_dtype: type to compute in under autocast, or None for float32.
        seed: seed of the masks, which are a function of (seed, epoch, step, rank).
        rank: number of this process.

    Returns:
        the epoch's entries for log.txt.
    """
    model.train()
    epoch, steps = state.epoch, len(loader)
    num_patches = distributed.unwrap(model).patch_embed.num_patches

    for step, imgs, _ in meter.timed(loader.train_batches(epoch, state.step)):
        first_of_update = step - step % accum_iter
        steps_of_update = min(accum_iter, steps - first_of_update)
        is_last_of_update = step + 1 == first_of_update + steps_of_update
        if step == first_of_update:
            lr = warmup_cosine_lr(epoch + step / steps, **schedule)
            set_lr(optimizer, lr)

        mask_key = (seed, "mask", epoch, step, rank)
        noise = uniform_noise((len(imgs), num_patches), *mask_key, device=imgs.device)
        with distributed.sync_gradients(model, when=is_last_of_update):
            with autocast(imgs.device, amp_dtype):
                loss, _, _ = model(imgs, mask_ratio, noise)
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
    mask_ratio: float,
    amp_dtype: torch.dtype | None,
    seed: int,
) -> dict[str, float]:
    """The masked loss on held-out images, with one fixed mask for each image.

    Every readable image counts once, over any number of processes.

    Args:
        model: a MaskedAutoencoderViT without a data-parallel wrapper.
        loader: gives every image once.
        mask_ratio, amp_dtype: as in training.
        seed: seed of the masks, which are a function of (seed, image index).

    Returns:
        the entries for log.txt.
    """
    model.eval()
    num_patches = model.patch_embed.num_patches
    count, total = 0, torch.zeros((), dtype=torch.float64, device=loader.device)
    for imgs, _, indices, readable in loader.eval_batches():
        if not readable.all():  # only then: to pick some images is to wait for a GPU
            imgs, indices = imgs[readable], indices[readable]
        if not len(imgs):
            continue
        noise = torch.stack(
            [uniform_noise(num_patches, seed, "held-out mask", i) for i in indices.tolist()]
        )
        with autocast(imgs.device, amp_dtype):
            loss, _, _ = model(imgs, mask_ratio, noise.to(imgs.device, non_blocking=True))
        total += len(imgs) * loss.double()
        count += len(imgs)
    totals, counts = zip(*distributed.gather((total.item(), count)), strict=True)
    return {"val_loss": sum(totals) / sum(counts)} if any(counts) else {}


@torch.compiler.set_stance("force_eager")  # compiling for evaluation's shapes would not pay
@torch.no_grad()
def evaluate_features(
    model: nn.Module,
    loader: ImageLoader,
    bank_loader: ImageLoader | None,
    *,
    k: int,
    layer: int,
    amp_dtype: torch.dtype | None,
) -> dict[str, float]:
    """What the features are worth that the weights of now give: nothing is trained or drawn.

    An image's feature is the mean of its patch tokens, all patches seen. The class token is not
    trained by the loss. Every readable image counts once, over any number of processes.

    Args:
        model: a MaskedAutoencoderViT without a data-parallel wrapper.
        loader: gives the images to classify, once each, with labels.
        bank_loader: gives the images whose classes are known, once each; None to classify none.
        k: how many neighbours elect a class, see `knn`.
        layer: the block that the tokens are taken after, see `features.tokens`.
        amp_dtype: as in training.

    Returns:
        the entries for log.txt: knn_acc1, the percentage of images whose neighbours elect their
        class, only with a bank; feature_std and rankme, see `spread`, of the images to classify.
    """

    def extract(loader: ImageLoader) -> tuple[Tensor, Tensor]:
        """This process's features [N, D] on the device, and the images' indices [N]."""
        pooled = [torch.empty(0, model.pos_embed.shape[-1], device=loader.device)]
        numbers = [torch.empty(0, dtype=torch.int64)]
        for imgs, _, indices, readable in loader.eval_batches():
            with autocast(imgs.device, amp_dtype):
                x = features.tokens(model, imgs, layer)  # [N, 1 + L, D]
            x = features.pool(model, x.float(), "mean")
            pooled.append(x if readable.all() else x[readable])
            numbers.append(indices[readable])
        return torch.cat(pooled), torch.cat(numbers)

    was_training = model.training
    model.eval()
    queries, indices = extract(loader)
    figures = {}
    if bank_loader is not None:
        bank, numbers = extract(bank_loader)
        labels, bank_labels = loader.dataset.paths.labels, bank_loader.dataset.paths.labels
        figures["knn_acc1"] = knn.accuracy(queries, labels[indices], bank, numbers, bank_labels, k)
    model.train(was_training)
    figures |= {"feature_std": spread.feature_std(queries), "rankme": spread.rankme(queries)}
    finite = {name: value for name, value in figures.items() if math.isfinite(value)}
    if len(finite) < len(figures):
        missing = " and ".join(name for name in figures if name not in finite)
        warn(f"no {missing}: too few images, or features not finite")
    return finite
