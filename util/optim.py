"""Parameter groups and the AdamW optimizer of the recipes (paper, tables 8 and 9)."""

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay


def weight_decay_groups(model, weight_decay):
    """Two optimizer groups of the trainable parameters: 1-D tensors and biases are not decayed."""
    return param_groups_weight_decay(model, weight_decay)


def layer_decay_groups(model, weight_decay, layer_decay):
    """Optimizer groups of a classifier whose learning rate falls from the head to the patches.

    The head's `lr_scale` is 1 and every block's is `layer_decay` times the next one's, as in BEiT
    (arXiv 2106.08254). 1-D tensors, biases, class token and positions have no weight decay.
    """
    return param_groups_layer_decay(
        model, weight_decay, model.no_weight_decay(), layer_decay=layer_decay
    )


def adamw(groups, *, betas):
    """AdamW over `groups`, fused into one kernel, on the CPU too.

    The learning rate starts at 0: the training loop sets it before every step.
    """
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def clip_and_step(model, optimizer, scaler, clip_grad):
    """One update from the gradients, scaled back and clipped to the norm `clip_grad` if given."""
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
