"""The training steps that benchmarks/train_step.py compares: this project's and its peers'.

A side is a function that builds the model and the optimizer of a `Setting` and returns a function
that trains for a number of steps. All sides of a setting have the same sizes, float32 weights and
synthetic images, which start on the host, where a data loader leaves them.
"""

import functools
import math
from dataclasses import dataclass

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import nn

import engine_finetune
import engine_pretrain
import models_mae
import models_vit
from util import optim, speed
from util.data import normalize
from util.distributed import Process
from util.errors import UserError
from util.loading import Batch
from util.logs import Meter
from util.precision import autocast, grad_scaler, resolve_amp
from util.stopping import StopSignals
from util.training import Checkpoints, TrainingState

MASK_RATIO = 0.75
CLASSES = 1000
SCHEDULE = {"lr": 1e-4, "min_lr": 0.0, "warmup_epochs": 0, "epochs": 1}


@dataclass(frozen=True)
class Setting:
    """What a side trains, and how: task, model's name, image size, batch, device and precision.

    `grad_checkpointing` is for this project's side only.
    """

    task: str
    model: str
    input_size: int
    batch_size: int
    device: torch.device
    amp: str
    compile: bool
    grad_checkpointing: bool = False

    @property
    def dtype(self):
        return resolve_amp(self.amp, self.device)

    def build_model(self):
        if self.task == "pretrain":
            return models_mae.build_model(self.model, img_size=self.input_size, norm_pix_loss=True)
        return models_vit.build_model(
            self.model, img_size=self.input_size, num_classes=CLASSES, drop_path_rate=0.1
        )

    def build_sizes(self):
        """The model for its sizes only; without values, unless timm reads them (1.0.12 does)."""
        with torch.device("meta" if self.task == "pretrain" else "cpu"):
            return self.build_model()

    def batch_augmentation(self):
        """Random erasing and mixup as in the ImageNet recipe for fine-tuning."""
        return {
            "random_erasing": RandomErasing(0.25, mode="pixel", device=self.device),
            "mixup": Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES),
        }

    def images(self):
        """uint8 images [N, 3, H, W] and their labels on the host, page-locked for a GPU."""
        shape = (self.batch_size, 3, self.input_size, self.input_size)
        images = torch.randint(256, shape, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (self.batch_size,))
        return (images.pin_memory(), labels.pin_memory()) if self.on_gpu else (images, labels)

    @property
    def on_gpu(self):
        return self.device.type == "cuda"


class SyntheticLoader:
    """In place of an `ImageLoader`: one batch again and again, made in the first step."""

    def __init__(self, setting):
        self.device = setting.device
        self.steps = 0
        self.images_per_step = setting.batch_size
        self.batch = functools.cache(setting.images)  # making it takes longer than a step

    def __len__(self):
        return self.steps

    def train_batches(self, _epoch, _first_step):
        for step in range(self.steps):
            images, labels = self.batch()
            imgs = normalize(images.to(self.device, non_blocking=True))
            yield Batch(step, imgs, labels.to(self.device, non_blocking=True), unreadable=0)


def ours(setting):
    """The engines of this project, as main_pretrain.py and main_finetune.py set them up."""
    if not setting.on_gpu:
        speed.keep_freed_memory()
    model = setting.build_model().to(setting.device)
    speed.prepare(
        model,
        setting.device,
        setting.dtype,
        compile=setting.compile,
        grad_checkpointing=setting.grad_checkpointing,
    )
    if setting.task == "pretrain":
        groups, betas = optim.weight_decay_groups(model, 0.05), (0.9, 0.95)
        engine, task = engine_pretrain, {"mask_ratio": MASK_RATIO}
    else:
        groups, betas = optim.layer_decay_groups(model, 0.05, 0.75), (0.9, 0.999)
        engine, task = engine_finetune, setting.batch_augmentation()
        task["criterion"] = nn.CrossEntropyLoss()
    optimizer = optim.adamw(groups, betas=betas)
    scaler = grad_scaler(setting.device, setting.dtype)
    checkpoints = Checkpoints(  # which never saves
        ".",
        Process(0, 1, setting.device),
        signals=StopSignals(),
        settings={},
        defaults={},
        contents={},
        epochs=1,
        save_every=1,
        save_minutes=math.inf,
    )

    loader = SyntheticLoader(setting)

    def train(steps):
        state = TrainingState(model, optimizer, scaler)
        loader.steps = steps
        engine.train_one_epoch(
            model=model,
            loader=loader,
            optimizer=optimizer,
            scaler=scaler,
            state=state,
            meter=Meter(None, state, loader, log_every=20),
            checkpoints=checkpoints,
            schedule=SCHEDULE,
            accum_iter=1,
            clip_grad=None,
            amp_dtype=setting.dtype,
            seed=0,
            rank=0,
            **task,
        )

    return train


def plain(setting):
    """This project's model in an unoptimised, eager loop.

    Attention is an explicit softmax, AdamW is torch's default, and every step fetches the value of
    the loss.
    """
    if setting.compile:
        raise UserError("the plain loop is eager")
    model = setting.build_model().to(setting.device)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    augmentation = setting.batch_augmentation()

    def loss_of(images, labels):
        if setting.task == "pretrain":
            return model(images, MASK_RATIO)[0]
        images, labels = augmentation["mixup"](augmentation["random_erasing"](images), labels)
        return nn.functional.cross_entropy(model(images), labels)

    return tutorial_loop(setting, loss_of, optimizer, fetch_loss=True)


def transformers(setting):
    """transformers' model of the same sizes with SDPA and fused AdamW.

    With `compile` its layers are compiled, one graph for each kind, as ours are.
    """
    import transformers as hf

    ours = setting.build_sizes()
    width = ours.cls_token.shape[-1]
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": len(ours.blocks),
        "num_attention_heads": ours.blocks[0].attn.num_heads,
        "intermediate_size": 4 * width,
        "image_size": setting.input_size,
        "patch_size": ours.patch_embed.patch_size[0],
        "attn_implementation": "sdpa",
    }
    if setting.task == "finetune":
        model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, num_labels=CLASSES))
    else:
        width = ours.mask_token.shape[-1]
        sizes |= {
            "decoder_hidden_size": width,
            "decoder_num_hidden_layers": len(ours.decoder_blocks),
            "decoder_num_attention_heads": ours.decoder_blocks[0].attn.num_heads,
            "decoder_intermediate_size": 4 * width,
        }
        config = hf.ViTMAEConfig(**sizes, mask_ratio=MASK_RATIO, norm_pix_loss=True)
        model = hf.ViTMAEForPreTraining(config)
    model.to(setting.device).train()
    if setting.compile:
        for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
            for layer in layers:
                layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def loss_of(images, labels):
        targets = {} if setting.task == "pretrain" else {"labels": labels}
        return model(pixel_values=images, **targets).loss

    return tutorial_loop(setting, loss_of, optimizer)


def lightly(setting):
    """lightly's masked autoencoder (from 1.6 on), in its documentation's parts; only pre-trains."""
    if setting.task != "pretrain":
        raise UserError("lightly's masked autoencoder only pre-trains")
    from lightly.models import utils
    from lightly.models.modules import (
        MaskedVisionTransformerDecoderTIMM,
        MaskedVisionTransformerTIMM,
    )

    ours = setting.build_sizes()
    vit = models_vit.build_model(
        setting.model.removeprefix("mae_"), img_size=setting.input_size, num_classes=0
    )
    patch, tokens = vit.patch_embed.patch_size[0], 1 + vit.patch_embed.num_patches
    width = ours.mask_token.shape[-1]
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    embed, predict = nn.Linear(vit.embed_dim, width), nn.Linear(width, 3 * patch**2)
    decoder = MaskedVisionTransformerDecoderTIMM(
        num_patches=tokens - 1,
        embed_dim=width,
        depth=len(ours.decoder_blocks),
        num_heads=ours.decoder_blocks[0].attn.num_heads,
    )
    model = nn.ModuleList([backbone, embed, decoder, predict]).to(setting.device)
    speed.prepare(model, setting.device, setting.dtype, compile=setting.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def loss_of(images, _labels):
        size = (len(images), tokens)
        kept, removed = utils.random_token_mask(size, MASK_RATIO, device=images.device)
        encoded = embed(backbone.encode(images=images, idx_keep=kept))
        masked = utils.repeat_token(decoder.mask_token, size)
        masked = utils.set_at_index(masked, kept, encoded.type_as(masked))
        decoded = utils.get_at_index(decoder.decode(decoder.add_pos_embed(masked)), removed)
        patches = utils.get_at_index(utils.patchify(images, patch), removed - 1)
        target = utils.normalize_mean_var(patches)
        return nn.functional.mse_loss(predict(decoded), target)

    return tutorial_loop(setting, loss_of, optimizer)


def tutorial_loop(setting, loss_of, optimizer, fetch_loss=False):
    """The steps of a tutorial: float images to the device, loss, backward, update."""
    images, labels = setting.images()
    images = normalize(images)
    scaler = grad_scaler(setting.device, setting.dtype)

    def train(steps):
        for _ in range(steps):
            with autocast(setting.device, setting.dtype):
                loss = loss_of(images.to(setting.device), labels.to(setting.device))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()  # here, so that no side holds gradients after its turn
            if fetch_loss:
                loss.item()

    return train


SIDES = {side.__name__: side for side in (ours, plain, transformers, lightly)}
