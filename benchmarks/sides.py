"""The training steps that benchmarks/train_step.py compares: this project's and its peers'.

A side is a function of a `Setting` that builds a model and its optimizer and returns a function of
a number of steps that trains for so many. All sides of a setting are given the same sizes, float32
weights and synthetic images, which start on the host as a data loader leaves them.
"""

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
from util.precision import autocast, grad_scaler, resolve_amp

MASK_RATIO = 0.75
CLASSES = 1000
SCHEDULE = {"lr": 1e-4, "min_lr": 0.0, "warmup_epochs": 0, "epochs": 1}


@dataclass(frozen=True)
class Setting:
    """What a side trains: task, named model, pixels, batch and how it is computed."""

    task: str
    model: str
    input_size: int
    batch_size: int
    device: torch.device
    amp: str
    compile: bool

    @property
    def dtype(self):
        return resolve_amp(self.amp, self.device)

    def build_model(self):
        if self.task == "pretrain":
            return models_mae.build_model(self.model, img_size=self.input_size, norm_pix_loss=True)
        return models_vit.build_model(
            self.model, img_size=self.input_size, num_classes=CLASSES, drop_path_rate=0.1
        )

    def images(self):
        """uint8 images [N, 3, H, W] and their labels on the host, page-locked for a GPU."""
        shape = (self.batch_size, 3, self.input_size, self.input_size)
        images = torch.randint(256, shape, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (self.batch_size,))
        return (images.pin_memory(), labels.pin_memory()) if self.on_gpu else (images, labels)

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    def batch_augmentation(self):
        """Random erasing and mixup as the ImageNet recipe of fine-tuning has them."""
        mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES)
        return {
            "random_erasing": RandomErasing(0.25, mode="pixel", device=self.device),
            "mixup": mixup,
        }


class SyntheticRun:
    """In place of a `Run` and its epoch's log: one batch again and again, nothing is shown."""

    def __init__(self, setting):
        self.process = Process(0, 1, setting.device)
        self.images, self.labels = setting.images()

    def epoch_log(self, loader, _epoch):
        self._steps = loader
        return self

    def steps(self):
        device = self.process.device
        for step in self._steps:
            images = normalize(self.images.to(device, non_blocking=True))
            yield step, images, self.labels.to(device, non_blocking=True)

    def add(self, step, loss, lr):
        pass

    def save_if_due(self, log, next_step):
        pass

    def summary(self):
        return {}


def ours(setting):
    """The engines of this project, as main_pretrain.py and main_finetune.py set them up."""
    model = setting.build_model().to(setting.device)
    speed.prepare(model, setting.device, setting.dtype, compile=setting.compile)
    scaler = grad_scaler(setting.device, setting.dtype)
    run = SyntheticRun(setting)
    common = {
        "run": run,
        "epoch": 0,
        "schedule": SCHEDULE,
        "accum_iter": 1,
        "clip_grad": None,
        "amp_dtype": setting.dtype,
        "seed": 0,
    }
    if setting.task == "pretrain":
        optimizer = optim.adamw(optim.weight_decay_groups(model, 0.05), betas=(0.9, 0.95))
        return lambda steps: engine_pretrain.train_one_epoch(
            model, range(steps), optimizer, scaler, mask_ratio=MASK_RATIO, **common
        )
    optimizer = optim.adamw(optim.layer_decay_groups(model, 0.05, 0.75), betas=(0.9, 0.999))
    common |= setting.batch_augmentation()
    criterion = nn.CrossEntropyLoss()
    return lambda steps: engine_finetune.train_one_epoch(
        model, criterion, range(steps), optimizer, scaler, **common
    )


def plain(setting):
    """This project's model in a loop written without a thought of speed.

    Attention by a softmax, AdamW parameter by parameter where torch does so by default, images
    that travel as floats, and the loss's value fetched at every step; eager.
    """
    model = setting.build_model().to(setting.device)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    scaler = grad_scaler(setting.device, setting.dtype)
    if setting.task == "pretrain":

        def loss_of(images, _labels):
            return model(images, MASK_RATIO)[0]
    else:
        augmentation = setting.batch_augmentation()

        def loss_of(images, labels):
            images, labels = augmentation["mixup"](augmentation["random_erasing"](images), labels)
            return nn.functional.cross_entropy(model(images), labels)

    return plain_loop(setting, loss_of, optimizer, scaler)


def transformers(setting):
    """transformers' model of the same sizes with SDPA, and the AdamW that its Trainer takes."""
    from transformers import (
        ViTConfig,
        ViTForImageClassification,
        ViTMAEConfig,
        ViTMAEForPreTraining,
    )

    ours = setting.build_model()
    sizes = {
        "hidden_size": ours.cls_token.shape[-1],
        "num_hidden_layers": len(ours.blocks),
        "num_attention_heads": ours.blocks[0].attn.num_heads,
        "intermediate_size": 4 * ours.cls_token.shape[-1],
        "image_size": setting.input_size,
        "patch_size": ours.patch_embed.patch_size[0],
        "attn_implementation": "sdpa",
    }
    if setting.task == "pretrain":
        width = ours.mask_token.shape[-1]
        config = ViTMAEConfig(
            **sizes,
            decoder_hidden_size=width,
            decoder_num_hidden_layers=len(ours.decoder_blocks),
            decoder_num_attention_heads=ours.decoder_blocks[0].attn.num_heads,
            decoder_intermediate_size=4 * width,
            mask_ratio=MASK_RATIO,
            norm_pix_loss=True,
        )
        model = ViTMAEForPreTraining(config)
    else:
        model = ViTForImageClassification(ViTConfig(**sizes, num_labels=CLASSES))
    model.to(setting.device).train()
    if setting.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    scaler = grad_scaler(setting.device, setting.dtype)

    def loss_of(images, labels):
        targets = {} if setting.task == "pretrain" else {"labels": labels}
        return model(pixel_values=images, **targets).loss

    return plain_loop(setting, loss_of, optimizer, scaler, fetch_loss=False)


def lightly(setting):
    """lightly's masked autoencoder as its documentation puts it together, pre-training only."""
    if setting.task != "pretrain":
        raise UserError("lightly's masked autoencoder is for pre-training only")
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    ours = setting.build_model()
    vit = models_vit.build_model(
        setting.model.removeprefix("mae_"), img_size=setting.input_size, num_classes=0
    )
    patch = vit.patch_embed.patch_size[0]
    tokens = 1 + vit.patch_embed.num_patches
    model = nn.ModuleDict(
        {
            "backbone": MaskedVisionTransformerTIMM(vit=vit),
            "decoder": MAEDecoderTIMM(
                num_patches=tokens - 1,
                patch_size=patch,
                embed_dim=vit.embed_dim,
                decoder_embed_dim=ours.mask_token.shape[-1],
                decoder_depth=len(ours.decoder_blocks),
                decoder_num_heads=ours.decoder_blocks[0].attn.num_heads,
            ),
        }
    ).to(setting.device)
    if setting.compile:
        for part in model.values():
            part.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    scaler = grad_scaler(setting.device, setting.dtype)

    def loss_of(images, _labels):
        size = (len(images), tokens)
        kept, removed = utils.random_token_mask(size, MASK_RATIO, device=images.device)
        encoded = model["decoder"].embed(model["backbone"].encode(images=images, idx_keep=kept))
        masked = utils.repeat_token(model["decoder"].mask_token, size)
        masked = utils.set_at_index(masked, kept, encoded.type_as(masked))
        decoded = utils.get_at_index(model["decoder"].decode(masked), removed)
        patches = utils.get_at_index(utils.patchify(images, patch), removed - 1)
        target = utils.normalize_mean_var(patches)
        return nn.functional.mse_loss(model["decoder"].predict(decoded), target)

    return plain_loop(setting, loss_of, optimizer, scaler, fetch_loss=False)


def plain_loop(setting, loss_of, optimizer, scaler, fetch_loss=True):
    """Steps as tutorials have them: float images to the device, loss, backward, update."""
    images, labels = setting.images()
    images = normalize(images)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            with autocast(setting.device, setting.dtype):
                loss = loss_of(images.to(setting.device), labels.to(setting.device))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if fetch_loss:
                loss.item()

    return train


def matmul(setting):
    """The device's measured peak: products of square matrices, computed as our linear layers."""
    size, dtype = matmul_size(setting.device), setting.dtype or torch.float32
    layer = nn.Linear(size, size, bias=False, device=setting.device, dtype=dtype)
    layer.requires_grad_(False)
    speed.prepare(layer, setting.device, setting.dtype)
    matrix = torch.randn(size, size, device=setting.device, dtype=dtype)

    def multiply(steps):
        for _ in range(steps):
            layer(matrix)

    return multiply


def matmul_size(device):
    return 8192 if device.type == "cuda" else 2048


SIDES = {side.__name__: side for side in (ours, plain, transformers, lightly, matmul)}
