"""The training steps that benchmarks/train_step.py compares: this project's and its peers'.

A side is a function that builds the model and the optimizer of a `Setting` and returns a function
that trains for a number of steps. All sides of a setting have the same sizes, float32 weights and
synthetic images, which start on the host, where a data loader leaves them.
"""

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
    """What a side trains, and how: task, model's name, image size, batch, device and precision."""

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


class SyntheticLoader:
    """In place of an `ImageLoader`: one batch again and again."""

    def __init__(self, setting, steps):
        self.device = setting.device
        self.steps = steps
        self.images_per_step = setting.batch_size
        self.images, self.labels = setting.images()

    def __len__(self):
        return self.steps

    def train_batches(self, _epoch, _first_step):
        for step in range(self.steps):
            imgs = normalize(self.images.to(self.device, non_blocking=True))
            yield Batch(step, imgs, self.labels.to(self.device, non_blocking=True), unreadable=0)


def ours(setting):
    """The engines of this project, as main_pretrain.py and main_finetune.py set them up."""
    if not setting.on_gpu:
        speed.keep_freed_memory()
    model = setting.build_model().to(setting.device)
    speed.prepare(model, setting.device, setting.dtype, compile=setting.compile)
    if setting.task == "pretrain":
        groups, betas = optim.weight_decay_groups(model, 0.05), (0.9, 0.95)
        engine, task = engine_pretrain, {"mask_ratio": MASK_RATIO}
    else:
        groups, betas = optim.layer_decay_groups(model, 0.05, 0.75), (0.9, 0.999)
        engine, task = (
            engine_finetune,
            {
                "criterion": nn.CrossEntropyLoss(),
                "random_erasing": RandomErasing(0.25, mode="pixel", device=setting.device),
                "mixup": Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES),
            },
        )
    optimizer = optim.adamw(groups, betas=betas)
    scaler = grad_scaler(setting.device, setting.dtype)
    checkpoints = Checkpoints(  # which never saves
        ".",
        Process(0, 1, setting.device),
        signals=StopSignals(),
        settings={},
        contents={},
        epochs=1,
        save_every=1,
        save_minutes=math.inf,
    )

    def train(steps):
        state = TrainingState(model, optimizer, scaler)
        loader = SyntheticLoader(setting, steps)
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


def transformers(setting):
    """transformers' model of the same sizes with SDPA and fused AdamW, in a tutorial's loop."""
    import transformers as hf

    ours = setting.build_model()
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
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    images, labels = setting.images()
    images = normalize(images)
    scaler = grad_scaler(setting.device, setting.dtype)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            targets = {} if setting.task == "pretrain" else {"labels": labels.to(setting.device)}
            with autocast(setting.device, setting.dtype):
                loss = model(pixel_values=images.to(setting.device), **targets).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return train


SIDES = {"ours": ours, "transformers": transformers}
