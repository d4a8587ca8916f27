"""Parameter groups and the AdamW optimizer of the recipes (paper, tables 8 and 9)."""

import torch
from timm.optim import param_groups_weight_decay


def weight_decay_groups(model, weight_decay):
    """Two optimizer groups of the trainable parameters: 1-D tensors and biases are not decayed."""
    return param_groups_weight_decay(model, weight_decay)


def adamw(groups, *, betas):
    """AdamW over `groups`, fused into one kernel, on the CPU too.

    The learning rate starts at 0: the training loop sets it before every step.
    """
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
