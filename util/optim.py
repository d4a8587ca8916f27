"""Parameter groups and the AdamW optimizer of the recipes (paper, tables 8 and 9)."""

from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from util.errors import UserError


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: 1-D tensors and biases without weight decay."""
    return param_groups_weight_decay(model, weight_decay)


def layer_decay_groups(
    model: nn.Module, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters whose learning rate falls from the head to the patches.

    Head and final norm have an `lr_scale` of 1, each block `layer_decay` times that of the block
    above it, as in BEiT (arXiv 2106.08254). timm's function would count the final norm as part of
    the last block. 1-D tensors, biases, class token and positions have no weight decay.
    """
    last = len(model.blocks) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = last
        if name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        elif name.startswith(("cls_token", "pos_embed", "patch_embed.")):
            layer = 0
        decays = parameter.ndim > 1 and name not in model.no_weight_decay()
        group = {
            "params": [],
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": layer_decay ** (last - layer),
        }
        groups.setdefault((layer, decays), group)["params"].append(parameter)
    return list(groups.values())


def adamw(groups: Any, *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over groups of parameters, fused into one kernel, on the CPU too.

    The learning rate starts at 0: the training loop sets it before every step.
    """
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The model's names of the optimizer's parameters, as its `state_dict` numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def load_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    state: dict[str, Any],
    saved_names: list[str] | None,
) -> None:
    """Load what an optimizer has gathered for each parameter, such as AdamW's moments.

    The groups and their settings, such as weight decay and `lr_scale`, stay the optimizer's own:
    those in `state` are of the time when it was saved. timm groups parameters otherwise without
    weight decay, so that their numbers are not the same.

    Args:
        optimizer: over the model's parameters.
        model: what is trained.
        state: the saved optimizer's `state_dict`.
        saved_names: its `parameter_names`; None if they are unknown and its groups the same.

    Raises:
        UserError: the saved one had other parameters.
    """
    names = parameter_names(optimizer, model)
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    saved = dict(zip(saved_names or names, numbers, strict=False))
    fits = len(numbers) == len(names) and saved.keys() == set(names)
    if saved_names is None:
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        fits &= sizes == [len(group["params"]) for group in state["param_groups"]]
    gathered = {}
    for number, name in enumerate(names if fits else []):
        values = state["state"].get(saved[name])
        if values is not None:
            gathered[number] = values
            shapes = {value.shape for value in values.values() if value.ndim}  # a counter has none
            fits &= shapes <= {model.get_parameter(name).shape}
    if not fits:
        raise UserError(
            "the checkpoint's optimizer has different parameters or groups of them than this "
            "model's, and can't be resumed: start anew in another --output_dir"
        )
    optimizer.load_state_dict(optimizer.state_dict() | {"state": gathered})


def clip_and_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip_grad: float | None,
    measure: bool = False,
) -> Tensor | None:
    """One update: unscale the gradients, clip them to the norm `clip_grad` if given, step.

    Returns:
        the gradients' norm before they are clipped, a scalar on their device, if it is computed:
        to clip, or as `measure` asks. Not finite where fp16 overflowed, and the step is skipped.
    """
    norm = None
    if clip_grad is not None or measure:
        scaler.unscale_(optimizer)
        if clip_grad is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        else:
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in model.parameters() if p.grad is not None]
            )
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm
